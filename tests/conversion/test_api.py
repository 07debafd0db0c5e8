import copy
import pickle

import pytest
import torch
from torch import nn

from torchdsc import DSC, BasisBank, Residual, convert, regularization
from torchdsc.nn import RoutedLayer

OPTIONS = {"num_atoms": 20, "top_k": 3}
ENCODER_TARGET = r"\.(intermediate|output)$"


class Block(nn.Module):
    def __init__(self, width=16, hidden=24):
        super().__init__()
        self.mixer = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        x = x + self.mixer(x)
        return x + self.ffn(x)


class Plain(nn.Module):
    """A plain PyTorch model that takes a mask, by name or by place, and needs none."""

    def __init__(self, depth=2, **sizes):
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.blocks = nn.ModuleList(Block(**sizes) for _ in range(depth))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=61, **sizes))


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, bos_token_id=0, eos_token_id=0, **sizes, **dropout)
    )


def neox():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(vocab_size=61, **sizes))


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertModel(transformers.BertConfig(vocab_size=61, **sizes, **dropout))


# A model, arguments of convert, and the (in, out) features of the layers it makes.
CASES = {
    "plain": (Plain, {}, [(16, 16)] * 2),
    "llama": (llama, {}, [(16, 16)] * 2),
    "gpt2": (gpt2, {}, [(16, 16)] * 2),
    "gpt2-conv1d": (gpt2, {"target": r"mlp\.c_fc$"}, [(16, 64)] * 2),
    "bert": (bert, {"target": r"layer\.\d+\.(intermediate|output)$"}, [(16, 24), (24, 16)] * 2),
}


@pytest.fixture(params=CASES)
def case(request):
    make, arguments, sizes = CASES[request.param]
    return make(), {**OPTIONS, **arguments}, sizes


@pytest.fixture
def input_ids():
    return torch.randint(1, 61, (3, 9))


def first(output):
    """Output of a model, plain or Hugging Face."""
    return output if isinstance(output, torch.Tensor) else output[0]


def routed(model):
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


class TestWrap:
    def test_at_gamma_zero_changes_nothing(self, case, input_ids):
        model, arguments, sizes = case
        expected = first(model.eval()(input_ids))
        names = convert(model, gamma_init=0.0, **arguments)
        assert len(names) == len(sizes)
        assert [(layer.in_features, layer.out_features) for layer in routed(model)] == sizes
        assert torch.equal(first(model(input_ids)), expected)

    def test_adds_the_update_and_trains(self, case, input_ids):
        model, arguments, _ = case
        expected = first(model.eval()(input_ids))
        convert(model, **arguments)
        assert not any(layer.training for layer in routed(model))
        assert not torch.allclose(first(model(input_ids)), expected, atol=1e-6)
        model.train()
        (first(model(input_ids)).square().mean() + regularization(model).total).backward()
        assert all(p.grad is not None and p.grad.any() for layer in routed(model) for p in layer.parameters())

    def test_state_dict_round_trip(self, case, input_ids):
        model, arguments, _ = case
        other = copy.deepcopy(model)
        for each in (model, other):
            convert(each.eval(), **arguments)
        other.load_state_dict(model.state_dict())
        assert torch.equal(first(other(input_ids)), first(model(input_ids)))

    def test_takes_over_dtype_and_mode(self):
        model = Plain().bfloat16().eval()
        convert(model, **OPTIONS)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert not any(module.training for module in model.modules())

    def test_a_predicate_as_target(self):
        model = Plain()
        names = convert(model, target=lambda name, module: isinstance(module, Block) and name.endswith("1"), **OPTIONS)
        assert names == ["blocks.1"]

    def test_what_is_inside_a_target_or_converted_already_is_left_alone(self):
        model = Plain()
        assert convert(model, target=r"ffn", **OPTIONS) == ["blocks.0.ffn", "blocks.1.ffn"]
        with pytest.raises(ValueError, match="matches none"):
            convert(model, **OPTIONS)
        assert convert(model, target="mixer", **OPTIONS) == ["blocks.0.mixer", "blocks.1.mixer"]

    @pytest.mark.parametrize("target", ["linear1$", "linear2$"])
    def test_torchs_encoder_has_no_way_past_the_update(self, target):
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        convert(model, target=target, **OPTIONS)
        x, padding = torch.randn(3, 9, 16), torch.arange(9) >= torch.tensor([[9], [5], [7]])
        expected = model(x, src_key_padding_mask=padding)
        with torch.no_grad():
            actual = model.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding])

    @pytest.mark.parametrize(
        "duplicate",
        [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],  # noqa: S301
    )
    def test_copies_work_on_their_own(self, duplicate, input_ids):
        model = Plain()
        convert(model, share_bank=True, **OPTIONS)
        twin = duplicate(model)
        assert torch.equal(twin(input_ids), model(input_ids))
        assert len({id(layer.bank) for layer in routed(twin)}) == 1
        twin(input_ids, attention_mask=torch.ones_like(input_ids))
        assert twin.blocks[0].ffn.token_mask is not None
        assert model.blocks[0].ffn.token_mask is None


class TestReplace:
    def test_leaves_only_the_update(self, input_ids):
        model = Plain()
        convert(model, mode="replace", **OPTIONS)
        assert not any("ffn" in name and "0.weight" in name for name, _ in model.named_parameters())
        assert [type(block.ffn.module) for block in model.blocks] == [DSC, DSC]
        x = torch.randn(4, 16)
        torch.testing.assert_close(model.blocks[0].ffn(x), model.blocks[0].ffn.module(x))

    def test_a_language_model_still_generates(self, input_ids):
        model = llama().eval()
        convert(model, mode="replace", **OPTIONS)
        generated = model.generate(input_ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert generated.shape == (3, 12)


class TestSharedBank:
    def test_is_one_bank_with_the_gradients_of_all(self, input_ids):
        model = Plain(3)
        convert(model, share_bank=True, **OPTIONS)
        assert sum(isinstance(module, BasisBank) for module in model.modules()) == 1
        assert len({id(layer.router) for layer in routed(model)}) == 3
        model.eval()(input_ids).square().mean().backward()
        assert routed(model)[0].bank.u.grad.any()

    def test_saves_and_loads_as_a_hugging_face_model(self, input_ids, tmp_path):
        from safetensors.torch import load_file

        model, other = llama().eval(), llama().eval()
        for each in (model, other):
            convert(each, share_bank=True, **OPTIONS)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert sum(name.endswith("bank.u") for name in saved) == 1
        other.load_state_dict(saved, strict=False)
        assert torch.equal(other(input_ids).logits, model(input_ids).logits)


class TestMask:
    """Padding behind the tokens of a causal model changes nothing of them, and must not count."""

    @pytest.fixture(params=["plain", "llama", "gpt2"])
    def padded(self, request, input_ids):
        model = CASES[request.param][0]().train()
        convert(model, **OPTIONS)
        mask = (torch.arange(9) < torch.tensor([[9], [4], [6]])).long()
        _outputs = model(input_ids[:1]), model(input_ids[1:2, :4]), model(input_ids[2:, :6])
        return model, mask, regularization(model, num_tokens=19)

    @staticmethod
    def z(collected):
        return collected.z.item()

    def test_padding_does_not_count(self, padded, input_ids):
        model, mask, expected = padded
        _output = model(input_ids=input_ids, attention_mask=mask)
        assert self.z(regularization(model)) == pytest.approx(self.z(expected), rel=1e-4)

    @pytest.mark.parametrize("make", [Plain, llama])
    def test_by_place(self, make, input_ids):
        model, mask = make().train(), torch.ones_like(input_ids)
        mask[:, 6:] = 0
        convert(model, **OPTIONS)
        _output = model(input_ids, attention_mask=mask)
        expected = self.z(regularization(model))
        _output = model(input_ids, mask)
        assert self.z(regularization(model)) == pytest.approx(expected, rel=1e-6)

    def test_a_mask_does_not_outlive_its_call(self, padded, input_ids):
        model, mask, _ = padded
        _output = model(input_ids)
        expected = self.z(regularization(model))
        _output = model(input_ids, attention_mask=mask)
        masked = self.z(regularization(model))
        _output = model(input_ids)
        assert self.z(regularization(model)) == pytest.approx(expected, rel=1e-6)
        assert masked != pytest.approx(expected, rel=1e-4)

    def test_a_mask_of_another_shape_is_no_token_mask(self, input_ids):
        model = Plain()
        convert(model, **OPTIONS)
        _output = model(input_ids, attention_mask=torch.ones(3, 1, 9, 9))
        assert regularization(model).z > 0


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_gradient_checkpointing_without_reentry_is_exact(make, input_ids):
    model = make().train()
    convert(model, frame_weight=0.1, z_weight=0.1, **OPTIONS)
    mask = torch.ones_like(input_ids)
    mask[:, 7:] = 0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids, attention_mask=mask, labels=input_ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert not any(len(layer.statistics_log) for layer in routed(model))


@pytest.mark.slow
def test_compiles_to_one_graph(input_ids):
    model, mask = Plain(), torch.ones_like(input_ids)
    mask[:, 7:] = 0
    convert(model, **OPTIONS)
    expected, total = model(input_ids, mask), regularization(model).total
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, mask), expected)
    torch.testing.assert_close(regularization(model).total, total)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mode": "add"}, r"mode must be one of \('wrap', 'replace'\), got 'add'"),
        ({"target": "attention"}, "target must match a module of model, got 'attention', which matches none"),
        ({"target": r"ffn\.1$"}, r"in_features and out_features must be given for 'blocks.0.ffn.1'"),
        ({"top_k": 21}, "top_k must be at most num_atoms = 20, got 21"),
        ({"share_bank": True, "target": "mixer|ffn.0$"}, "bank must have .* = .20, 16, 24., got .20, 16, 16."),
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(changes, match):
    model = Plain()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=match):
        convert(model, **{**OPTIONS, **changes})
    assert list(model.named_modules()) == before
    assert not model._forward_pre_hooks


def test_sizes_can_be_given_where_no_linear_layer_tells_them():
    model = Plain()
    convert(model, target=r"ffn\.1$", in_features=24, out_features=24, **OPTIONS)
    assert isinstance(model.blocks[0].ffn[1].module, Residual)
    assert model(torch.ones(2, 3, dtype=torch.long)).shape == (2, 3, 16)


@pytest.mark.parametrize("kind", ["dsc", "moe", "dense"])
def test_a_dscgpt_keeps_what_its_routers_see(kind, input_ids):
    from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

    options = {
        "dsc": {"num_atoms": 20, "top_k": 3, "router_input": "embeddings", "router_context": 3, "input_context": 2},
        "moe": {"num_experts": 4, "top_k": 2, "router_input": "embeddings"},
        "dense": {"input_context": 2},
    }
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DSCGPTConfig(
        feed_forward=kind, feed_forward_options=options[kind], intermediate_size=8, dropout=0.0, **sizes
    )
    model = DSCGPTForCausalLM(config).eval()
    expected = model(input_ids).logits
    terms = model.train()(input_ids, labels=input_ids)
    own = 0.0 if kind == "dense" else terms.loss - terms.task_loss
    convert(model.eval(), gamma_init=0.0, in_features=16, out_features=16, num_atoms=20, top_k=3)
    assert torch.equal(model(input_ids).logits, expected)
    converted = model.train()(input_ids, labels=input_ids)
    # The regularisers of an added layer have no weight until its gamma has moved; those of the base stay.
    torch.testing.assert_close(converted.loss - converted.task_loss, own + torch.zeros(()), atol=1e-5, rtol=1e-4)
    converted.loss.backward()


class TestAttention:
    """Modules that get their input by keyword and return a tuple."""

    @pytest.mark.parametrize("options", [{}, {"router_input": "embeddings", "router_context": 3}], ids=["x", "seen"])
    def test_wrapped(self, options):
        model, ids = llama().eval(), torch.randint(61, (2, 9))
        before = model(ids, output_attentions=False).logits
        names = convert(model, target=r"self_attn$", gamma_init=0.0, **OPTIONS, **options)
        assert len(names) == 2
        assert torch.equal(model(ids).logits, before)
        for layer in (module for module in model.modules() if isinstance(module, DSC)):
            nn.init.constant_(layer.gamma, 0.5)
        assert not torch.equal(model(ids).logits, before)
        cached = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "dsc" in name)

    def test_input_by_keyword(self):
        class Mixer(nn.Module):
            def forward(self, x, mask):
                return x * mask, mask

        model = nn.ModuleDict({"attn": Mixer()})
        convert(model, target="attn", in_features=8, out_features=8, **OPTIONS)
        x, seen = torch.randn(2, 3, 8), []
        model["attn"].dsc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model["attn"](mask=torch.ones(2, 3, 8), x=x)
        assert torch.equal(seen[0], x)

    @pytest.mark.parametrize("make", [llama, gpt2, neox])
    def test_is_not_replaced(self, make):
        model = make()
        before = [name for name, _ in model.named_modules()]
        message = r"target must match modules that return one tensor for mode = 'replace', got '.*', a \w+Attention"
        with pytest.raises(ValueError, match=message):
            convert(model, target=r"(self_attn|attn|attention)$", mode="replace", **OPTIONS)
        assert [name for name, _ in model.named_modules()] == before
