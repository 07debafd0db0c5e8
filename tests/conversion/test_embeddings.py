"""Converted causal language models whose layers see tokens or their embeddings, against the same tokens in one pass."""

import copy
import json
import subprocess
import sys

import pytest
import torch

import torchdsc
from torchdsc.nn import DSC, ContextOptions, GatedFFN
from torchdsc.nn.broadcast import broadcast_tokens
from torchdsc.ops import ngram_codes

transformers = pytest.importorskip("transformers")

VOCABULARY = 97
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, **HEADS, "intermediate_size": 88}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**SIZES, **HEADS, "intermediate_size": 88}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SIZES, **HEADS, "intermediate_size": 88, "head_dim": 8}),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**SIZES, **HEADS, "intermediate_size": 88, "sliding_window": 6},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "eos_token_id": 0}),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, "intermediate_size": 128, "max_position_embeddings": 64}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**SIZES, **HEADS, "intermediate_size": 16, "num_local_experts": 4},
    ),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**SIZES, **HEADS, **MOE, "intermediate_size": 48}),
}
NGRAMS = {
    "llama, n-grams": {"router": "ngram", "static": "gated"},
    "gpt2, n-grams": {"router": "ngram", "static": "gated", "ngram_orders": (1, 5)},
    "llama, n-grams alone": {"router": "ngram", "input_context": 1, "static": "dense"},
}
BESIDE_EXPERTS = ("mixtral", "qwen3_moe")


def make_plain(kind, **changes):
    model_class, config_class, sizes = MODELS[kind.partition(",")[0]]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**sizes, **changes})
    return getattr(transformers, model_class)(config)


def convert(model, kind, **changes):
    options = {**torchdsc.recommended(top_k=4), **NGRAMS.get(kind, {}), **changes}
    if kind in BESIDE_EXPERTS:
        return torchdsc.convert(model, **{"num_atoms": 40, **options})
    return torchdsc.convert(model, **{"mode": "replace", "match": "parameters", **options})


def make(kind, **changes):
    """A converted model in evaluation mode whose DSC layers and contexts matter to the output."""
    model = make_plain(kind)
    convert(model, kind, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("gamma", "_context", "bank")):
                parameter.normal_()
    model.generation_config.pad_token_id = 0
    # Experts have no kernel in double precision.
    return (model if kind in BESIDE_EXPERTS else model.double()).eval()


def ngram_dscgpt(options):
    from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

    sizes = {**SIZES, "max_position_embeddings": 64, "intermediate_size": 24, "dropout": 0.0, "initializer_range": 0.3}
    return DSCGPTForCausalLM(DSCGPTConfig(**sizes, feed_forward_options=options))


def close(kind):
    return {"rtol": 1e-4, "atol": 1e-5} if kind in BESIDE_EXPERTS else {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(params=[*MODELS, *NGRAMS])
def kind(request):
    return request.param


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(1, VOCABULARY, (3, 11))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class TestOnePass:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        # Not a decorator of the class, which would make a function of it that is not collected.
        with torch.no_grad():
            yield

    def test_layers_are_those_of_a_model_wired_by_hand(self, ids):
        model = make("llama")
        x, normed = model.model.embed_tokens(ids), []
        seen = torch.nn.functional.layer_norm(x, (32,))
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: normed.append((module, args[0], output)))
        model(ids)
        for converted, z, y in normed:
            routed = converted.router_context(seen)
            z = converted.input_context(seen, onto=z)
            update = converted.module.dsc(z, router_input=routed)
            torch.testing.assert_close(y, converted.module.base(z) + update, **close("llama"))

    @pytest.mark.parametrize("static", ["dense", "gated"])
    def test_ngrams_are_those_of_a_model_wired_by_hand(self, static, ids):
        model, caught = make("llama", router="ngram", static=static, ngram_orders=[3, 1]), []
        seen = torch.nn.functional.layer_norm(model.model.embed_tokens(ids), (32,))
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: caught.append((module, args[0], output)))
        model(ids)
        for salt, (converted, z, y) in enumerate(caught):
            z = converted.input_context(seen, onto=z)
            base, dsc = converted.module.base, converted.module.dsc
            assert dsc.router.salt == salt
            assert isinstance(base, GatedFFN) == (static == "gated") == (converted.router_context is not None)
            static_y = base(z, router_input=converted.router_context(seen)) if static == "gated" else base(z)
            update = dsc(z, router_input=ngram_codes(ids, (3, 1)))
            torch.testing.assert_close(y, static_y + update, **close("llama"))

    def test_layers_with_ngrams_of_other_orders(self, ids):
        model, found = make_plain("llama").double().eval(), []
        for index, orders in enumerate([(2, 3), (5, 2)]):
            options = {"num_atoms": 40, "top_k": 4, "router": "ngram", "ngram_orders": orders}
            torchdsc.convert(model, target=rf"layers\.{index}\.mlp$", **options)
            router = model.model.layers[index].mlp.dsc.router
            router.register_forward_hook(lambda module, args, output: found.append(args[0]))
        model(ids)
        for codes, orders in zip(found, [(2, 3), (5, 2)], strict=True):
            assert torch.equal(codes, ngram_codes(ids, orders).flatten(0, 1))

    def test_ngrams_do_not_ask_for_a_size(self, ids):
        model = make_plain("llama").eval()
        plain = model(ids).logits
        torchdsc.convert(model, target="down_proj", num_atoms=40, top_k=4, router="ngram", gamma_init=5.0)
        assert model.model.layers[1].mlp.down_proj.dsc.in_features == 88
        assert not torch.allclose(model(ids).logits, plain)

    @pytest.mark.parametrize("options", [{}, {"router": "ngram"}], ids=str)
    def test_dscgpt(self, options, ids):
        """Its blocks hand routed layers a router's input, which the converted layer's own comes before."""
        from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

        torch.manual_seed(0)
        sizes = {**SIZES, "max_position_embeddings": 64, "intermediate_size": 48, "feed_forward": "dense"}
        model = DSCGPTForCausalLM(DSCGPTConfig(**sizes)).double().eval()
        torchdsc.convert(model, mode="replace", num_atoms=40, **torchdsc.recommended(top_k=4, **options))
        found = []
        for block in model.model.blocks:
            block.feed_forward.dsc.router.register_forward_hook(lambda _, args, output: found.append(args[0]))
        full = model(ids).logits
        if options:
            expected = [ngram_codes(ids, (2, 3))] * 2
        else:
            seen = torch.nn.functional.layer_norm(model.model.embed_tokens(ids), (32,))
            expected = [block.feed_forward.router_context(seen) for block in model.model.blocks]
        torch.testing.assert_close(found, [each.flatten(0, 1) for each in expected])
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, **close("llama"))

    def test_kept_modules_see_what_they_did(self, ids):
        """Beside a module that stays, the embeddings are mixed into what DSC sees alone."""
        plain, model = make_plain("llama").eval(), make_plain("llama").eval()
        torchdsc.convert(model, num_atoms=20, **torchdsc.recommended(top_k=4, gamma_init=0.0))
        assert torch.equal(model(ids).logits, plain(ids).logits)

    def test_beside_a_kept_module(self, ids):
        model = make_plain("gpt2").double().eval()
        plain = model(ids).logits
        torchdsc.convert(model, num_atoms=20, **torchdsc.recommended(top_k=4, router="ngram"))
        assert model.transformer.h[1].mlp.router_context is None
        full, cache = model(ids).logits, transformers.DynamicCache(config=model.config)
        assert not torch.allclose(full, plain)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, **close("gpt2"))

    def test_cached_token_by_token(self, kind, ids):
        model = make(kind)
        output = model(ids[:, :4], use_cache=True)
        logits, cache = [output.logits], output.past_key_values
        for start, end in ((4, 5), (5, 8), (8, 9), (9, 11)):
            logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits, **close(kind))

    def test_padding(self, kind, ids):
        model, rubbish = make(kind), torch.randint(1, VOCABULARY, (3, 3))
        expected = model(ids).logits
        mask = torch.cat((torch.zeros(3, 3), torch.ones(3, 11)), 1).long()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        left = model(torch.cat((rubbish, ids), 1), attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(left[:, 3:], expected, **close(kind))
        right = model(torch.cat((ids, rubbish), 1), attention_mask=mask.flip(1)).logits
        torch.testing.assert_close(right[:, :11], expected, **close(kind))

    def test_packed(self, kind, ids):
        model = make(kind)
        positions = torch.arange(11).repeat(3).unsqueeze(0)
        packed = model(ids.reshape(1, -1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed.view(3, 11, -1), model(ids).logits, **close(kind))

    def test_packed_from_any_position_on(self, kind, ids):
        model = make(kind)
        positions = torch.cat((torch.arange(5), torch.arange(3, 9))).expand(3, -1)
        packed = model(ids, position_ids=positions, use_cache=False).logits
        for piece in (slice(0, 5), slice(5, 11)):
            alone = model(ids[:, piece], position_ids=positions[:, piece], use_cache=False).logits
            torch.testing.assert_close(packed[:, piece], alone, **close(kind))

    def test_embeddings_in_place_of_tokens(self, ids):
        model = make("llama")
        embeddings = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
        model = make("llama, n-grams")
        with pytest.raises(ValueError, match=r"input_ids must be given .* routed by n-grams, got inputs_embeds alone"):
            model(inputs_embeds=embeddings)

    def test_the_part_without_a_head(self, ids):
        model = make("llama")
        model(ids[:, :5])
        states = model.model(ids).last_hidden_state
        torch.testing.assert_close(model.lm_head(states), model(ids).logits)

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}], ids=str)
    def test_generates_the_same_tokens_with_a_cache(self, kind, options, ids):
        model = make(kind)
        mask = torch.ones(2, 8, dtype=torch.long)
        mask[0, :2] = 0
        common = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        common["num_beams"] = options.get("num_beams", 1)
        expected = model.generate(ids[:2, :8], use_cache=False, **common)
        assert torch.equal(model.generate(ids[:2, :8], **{**common, **options}), expected)

    def test_a_resized_vocabulary(self, ids):
        model = make("llama")
        expected = model(ids).logits
        model.resize_token_embeddings(VOCABULARY + 3)
        torch.testing.assert_close(model(ids).logits[..., :VOCABULARY], expected)

    def test_copies(self, kind, ids):
        model = make(kind)
        expected = model(ids).logits
        copied = copy.deepcopy(model)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(-1)
        assert torch.equal(copied(ids).logits, expected)

    def test_saved_and_loaded(self, kind, ids, tmp_path):
        model = make(kind)
        model.save_pretrained(tmp_path)
        loaded = torchdsc.load_converted(tmp_path, dtype=model.dtype)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, **close(kind))


def test_loads_in_a_fresh_process(ids, tmp_path):
    model = make("llama").float()
    model.save_pretrained(tmp_path)
    code = (
        "import json, sys, torch, torchdsc; model = torchdsc.load_converted(sys.argv[1]); "
        "print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(ids.tolist())]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    torch.testing.assert_close(torch.tensor(json.loads(answer)), model(ids).logits)


class TestTraining:
    def model(self, kind):
        model = make(kind).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    def test_checkpointing_without_reentry_changes_no_gradient(self, kind, ids):
        model = self.model(kind)
        model(ids, labels=ids).loss.backward()
        expected = gradients(model)
        assert any("router_context" in name for name in expected) == ("alone" not in kind)
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(gradients(model), expected, **close(kind))

    def test_a_teacher_between_a_checkpoint_and_its_recomputation(self, ids):
        model = self.model("llama")
        model(ids, labels=ids).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids).loss
        with torch.no_grad():
            model(ids.flip(1))
        loss.backward()
        torch.testing.assert_close(gradients(model), expected)

    def test_two_calls_that_wait_cannot_be_told_apart(self, ids):
        model = self.model("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(ids, labels=ids).loss + model(ids.flip(1), labels=ids).loss
        with pytest.raises(RuntimeError, match="2 calls of LlamaModel wait"):
            loss.backward()

    def test_a_loss_that_is_kept_does_not_wait(self, ids):
        model, kept = self.model("llama"), []
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(3):
            kept.append(model(ids, labels=ids).loss)
            kept[-1].backward()

    def test_reentrant_checkpointing_raises(self, ids):
        model = self.model("llama")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(ids, labels=ids)

    @pytest.mark.parametrize("static", ["dense", "gated"])
    @pytest.mark.parametrize("changes", [{}, {"mode": "replace"}, {"mode": "replace", "router": "ngram"}], ids=str)
    def test_dscgpt_routed_by_ngrams(self, changes, static, ids):
        """What is put around its layer changes nothing while it adds nothing, and what replaces it is routed."""
        torch.manual_seed(0)
        options = torchdsc.recommended("ngrams", num_atoms=40, static=static)
        model = ngram_dscgpt(options)
        expected = model.eval()(ids).logits
        start = {} if changes else {"gamma_init": 0.0}
        torchdsc.convert(model, num_atoms=40, top_k=4, **start, **changes)
        assert torch.equal(model.eval()(ids).logits, expected) == (not changes)
        found = model.train()(ids, labels=ids)
        assert torch.equal(found.logits, expected) == (not changes)
        found.loss.backward()
        added = [parameter for name, parameter in model.named_parameters() if "dsc" in name]
        assert all(parameter.grad is not None for parameter in added)

    @pytest.mark.parametrize("static", ["dense", "gated"])
    @pytest.mark.parametrize("target", ["feed_forward", "dsc"])
    def test_dscgpt_routed_by_ngrams_with_adapters(self, target, static, ids):
        peft = pytest.importorskip("peft")
        from torchdsc.adapters import DSCAdapterConfig

        torch.manual_seed(0)
        model = ngram_dscgpt(torchdsc.recommended("ngrams", num_atoms=40, static=static)).eval()
        expected = model(ids).logits
        config = DSCAdapterConfig(num_atoms=20, top_k=2, gamma_init=0.0, target_modules=[target])
        adapted = peft.get_peft_model(model, config)
        assert torch.equal(adapted.eval()(ids).logits, expected)
        found = adapted.train()(ids, labels=ids)
        assert torch.equal(found.logits, expected)
        found.loss.backward()
        assert all(part.grad is not None for part in adapted.parameters() if part.requires_grad)

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "cache"), [("llama", False), ("llama, n-grams", False), ("llama", True)])
    def test_compiles_to_one_graph(self, kind, cache, ids):
        model = self.model(kind).float()
        loss = model(ids, labels=ids).loss
        loss.backward()
        expected = gradients(model)
        model.zero_grad()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(ids, labels=ids, use_cache=cache).loss
        found.backward()
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)

    def test_embeddings_learn_through_every_router(self, ids):
        model = self.model("llama")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed" in name)
        model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: (args[0].detach(),))
        model(ids, labels=ids).loss.backward()
        assert model.model.embed_tokens.weight.grad.any()


class TestMatch:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"router": "low_rank", "router_rank": 4},
            {"router": "product_key"},
            {"static": "gated"},
            {"router": "ngram"},
            {"router": "ngram", "static": "gated"},
        ],
        ids=str,
    )
    def test_stores_no_more_and_wastes_less_than_an_atom(self, kind, options):
        model = make_plain(kind)
        before = sum(parameter.numel() for parameter in model.parameters())
        names = convert(model, kind, **options)
        spare = before - sum(parameter.numel() for parameter in model.parameters())
        side = int(model.get_submodule(names[0]).dsc.options.num_atoms ** 0.5)
        most = 3 * 32 + 2 * 32 if options.get("router") != "product_key" else (2 * side + 1) * 64 + 2 * 32 + 64
        if options.get("router") == "ngram":
            # An atom has no row in the router.
            most = 2 * 32
        assert 0 <= spare < len(names) * most
        assert model.get_submodule(names[0]).module.base.up.out_features > 0

    def test_what_is_given_is_kept(self):
        model = make_plain("llama")
        convert(model, "llama", num_atoms=50, hidden_features=5)
        layer = model.model.layers[0].mlp
        assert (layer.dsc.options.num_atoms, layer.module.base.up.out_features) == (50, 5)

    def test_what_cannot_fit(self):
        with pytest.raises(ValueError, match="match must be None, or the module larger: its 8,448 parameters hold no"):
            convert(make_plain("llama"), "llama", num_atoms=500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "wrap", "num_atoms": 9}, "match must be None for mode = 'wrap'"),
        (
            {"mode": "wrap", "match": None, "num_atoms": 9, "static": "gated"},
            "static must be 'dense' for mode = 'wrap'",
        ),
        ({"router": "ngram", "top_k": 3}, "top_k must be a multiple of the 2 orders of n-grams, got 3"),
        ({"share_bank": True}, "match must be None for share_bank = True"),
        ({"router_input": "hidden", "input_context": 1}, "router_input must be 'embeddings' for router_context > 1"),
        ({"in_features": 16, "out_features": 16}, "must have in_features = 32, theirs, got 16"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(changes, message):
    model = make_plain("llama")
    before = [*model.state_dict()]
    with pytest.raises(ValueError, match=message):
        convert(model, "llama", **changes)
    assert [*model.state_dict()] == before


def test_models_without_embeddings_are_refused():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = torch.nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"no decoder with get_input_embeddings\(\), got Plain"):
        torchdsc.convert(Plain(), num_atoms=9, **torchdsc.recommended(top_k=4))
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="got T5ForConditionalGeneration"):
        broadcast_tokens(transformers.T5ForConditionalGeneration(config), 8, 2)
    with pytest.raises(ValueError, match=r"and router n-grams, for a model that is no decoder .* got Plain"):
        torchdsc.convert(Plain(), num_atoms=9, top_k=4, router="ngram")


def test_a_layer_called_alone(ids):
    model = make("gpt2")
    with pytest.raises(RuntimeError, match="must be called by GPT2Model"):
        model.transformer.h[0](torch.randn(1, 3, 32).double())


def test_a_cache_that_was_filled_before(ids):
    plain, model = make_plain("llama").double().eval(), make("llama")
    cache = plain(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds tokens whose embeddings are not in it"):
        model(ids, past_key_values=cache, use_cache=True)


def test_hidden_states_stay_the_default(ids):
    model = make_plain("llama")
    torchdsc.convert(model, num_atoms=9, top_k=2)
    converted = model.model.layers[0].mlp
    assert converted.context == ContextOptions()
    assert converted.broadcast is None
    assert isinstance(converted.dsc, DSC)
