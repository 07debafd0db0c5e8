"""Adapters beside whole layers of many architectures: hidden states, and what a model reads of its layers."""

import copy
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model

from torchdsc.adapters import AdapterLayer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**SMALL, "intermediate_size": 48}
DECODER = {**WIDE, "num_key_value_heads": 1}
DISTILLED = {"vocab_size": 64, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 3, "num_heads": 2, "dropout_rate": 0.0}
VIT = {**WIDE, "image_size": 8, "patch_size": 4}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 2}
# Model, its sizes, and its layers.
ARCHITECTURES = {
    "Bert": ("BertModel", WIDE, r"encoder\.layer\.\d+"),
    "Roberta": ("RobertaModel", WIDE, r"encoder\.layer\.\d+"),
    "ModernBert": ("ModernBertModel", {**WIDE, "pad_token_id": 0}, r"layers\.\d+"),
    "DistilBert": ("DistilBertModel", DISTILLED, r"transformer\.layer\.\d+"),
    "Llama": ("LlamaForCausalLM", DECODER, r"model\.layers\.\d+"),
    "Qwen2": ("Qwen2ForCausalLM", DECODER, r"model\.layers\.\d+"),
    "Mistral": ("MistralForCausalLM", DECODER, r"model\.layers\.\d+"),
    "Gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 16}, r"model\.layers\.\d+"),
    "GPT2": ("GPT2LMHeadModel", GPT, r"transformer\.h\.\d+"),
    "T5": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}, r".*\.block\.\d+"),
    "ViT": ("ViTModel", VIT, r"(encoder\.)?layers?\.\d+"),
    "GPTJ": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}, r"transformer\.h\.\d+"),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 3, "n_head": 2}, r".*\.h\.\d+"),
    "Falcon": ("FalconForCausalLM", SMALL, r"transformer\.h\.\d+"),
    "DebertaV2": ("DebertaV2Model", WIDE, r"encoder\.layer\.\d+"),
}
SILENT = {"dsc": {"gamma_init": 1.0, "budget_weight": 0.0, "frame_weight": 0.0}, "molora": {}}


@pytest.fixture
def build(make_config):
    """A model with adapters beside all its layers that are felt, and how to call it."""

    def make(name, method="dsc", *, recorded=False):
        cls, sizes, layers = ARCHITECTURES[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            base = getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**sizes)).eval()
            generator = torch.Generator().manual_seed(2)
            tokens = torch.randint(3, 64, (2, 6), generator=generator)
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if name == "ViT":
                batch = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
            elif name == "T5":
                batch["labels"] = tokens
            if recorded:
                base(**batch, output_hidden_states=True)
            weights = {"aux_weight": 0.0, "z_weight": 0.0, **SILENT[method]}
            model = get_peft_model(base, make_config(method, target_modules=layers, **weights)).eval()
            for key, parameter in model.named_parameters():
                if key.endswith(".up"):
                    parameter.data.normal_()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model, batch

    return make


def states_and_inputs(model, call):
    """Hidden states that a call returns, and what the layers that come after each received."""
    received = []

    def receive(_, args, kwargs):
        received.append((args[0] if args else kwargs["hidden_states"]).detach())

    layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    handles = [layer.register_forward_pre_hook(receive, with_kwargs=True) for layer in layers]
    output = call()
    for handle in handles:
        handle.remove()
    keys = [key for key in ("encoder_hidden_states", "hidden_states", "decoder_hidden_states") if key in output]
    # The last state of each stack has gone through its last norm.
    return [state for key in keys for state in output[key][:-1]], received


def assert_same(states, received):
    assert states
    assert len(states) == len(received)
    assert all(torch.equal(state, other) for state, other in zip(states, received, strict=True))


@pytest.mark.parametrize("method", ["dsc", "molora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
class TestHiddenStates:
    @pytest.mark.parametrize("recorded", [False, True], ids=["asked for later", "asked for before"])
    def test_are_what_the_next_layer_reads(self, name, method, recorded, build):
        model, batch = build(name, method, recorded=recorded)
        states, received = states_and_inputs(model, lambda: model(**batch, output_hidden_states=True))
        assert_same(states, received)
        with model.disable_adapter():
            without, received = states_and_inputs(model, lambda: model(**batch, output_hidden_states=True))
        assert_same(without, received)
        assert torch.equal(without[0], states[0])
        assert not torch.equal(without[1], states[1])

    def test_by_the_config(self, name, method, build):
        model, batch = build(name, method)
        expected, _ = states_and_inputs(model, lambda: model(**batch, output_hidden_states=True))
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel):
                module.config.output_hidden_states = True
        assert_same(*states_and_inputs(model, lambda: model(**batch)))
        assert_same(states_and_inputs(model, lambda: model(**batch))[0], expected)

    def test_under_checkpointing(self, name, method, build):
        model, batch = build(name, method)
        model.double().train()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        options = {"output_hidden_states": True, **({} if name == "ViT" else {"use_cache": False})}
        expected, gradients = [], []
        for checkpoints in (False, True):
            if checkpoints:
                model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            states, received = states_and_inputs(model, lambda: model(**batch, **options))
            assert_same(states, received)
            expected.append([state.detach() for state in states])
            sum(state.square().mean() for state in states).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
        torch.testing.assert_close(*expected)
        assert len(gradients[0]) == len(gradients[1])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_hidden_states_of_a_compiled_model(build):
    model, batch = build("Llama")
    expected, received = states_and_inputs(model, lambda: model(**batch, output_hidden_states=True))
    assert_same(expected, received)
    compiled = torch.compile(model, backend="eager")
    assert_same(compiled(**batch, output_hidden_states=True).hidden_states[:-1], expected)


def test_hidden_states_of_both_methods_on_a_layer(build, make_config, moved):
    """Through transformers, which lets methods meet."""
    model, batch = build("Llama")
    model = model.unload()
    for method in ("dsc", "molora"):
        model.add_adapter(make_config(method, target_modules=r"model\.layers\.\d+"), method)
        moved(model, method)
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        layer.set_adapter(["dsc", "molora"])
    received = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    states = model(**batch, output_hidden_states=True).hidden_states
    assert_same([states[1]], received)


def test_copies_and_unloaded_models_have_hidden_states_of_their_own(build):
    model, batch = build("Llama")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # noqa: S301 (its own)

    def call(model):
        return model(**batch, output_hidden_states=True).hidden_states

    expected = call(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    # The last copy is made after transformers has put its hooks in.
    for copied in (*copies, copy.deepcopy(copies[0])):
        assert_same(call(copied), expected)
    copied = copies[0]
    with copied.disable_adapter():
        expected = call(copied)
    base = copied.unload()
    assert_same(call(base), expected)
    assert all(len(layer._forward_hooks) == 1 for layer in base.model.layers), "transformers' own is left"


class TestAttributes:
    @pytest.mark.parametrize("method", ["dsc", "molora"])
    def test_a_model_reads_those_of_its_layers(self, method, build):
        model, batch = build("ModernBert", method)
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        assert [layer.attention_type for layer in layers] == [layer.base_layer.attention_type for layer in layers]
        assert model(**batch).last_hidden_state.isfinite().all()

    def test_of_a_whole_attention_block(self, make_base, make_config, make_batch):
        model = get_peft_model(make_base("bert"), make_config(target_modules=["attention"]))
        blocks = [layer.attention for layer in model.base_model.model.bert.encoder.layer]
        assert all(block.self is block.base_layer.self and block.output is block.base_layer.output for block in blocks)
        assert model(**make_batch("bert")).logits.isfinite().all()

    def test_methods_too_and_of_nested_layers(self, build, make_config):
        model = build("Llama")[0].unload()
        base = model.model.layers[0]
        base.note, base._private = {"a": 1}, 2
        type(base)._prepare = lambda self: self.note
        try:
            for method in ("dsc", "molora"):
                model.add_adapter(make_config(method, target_modules=r"model\.layers\.\d+"), method)
            layer = model.model.layers[0]
            assert layer.base_layer is not base
            assert layer.note is base.note
            assert layer._prepare() is base.note
        finally:
            del type(base)._prepare
        assert layer.mlp is base.mlp
        assert not hasattr(layer, "_private"), "what others keep about a module"
        with pytest.raises(AttributeError, match="absent"):
            _ = layer.absent

    def test_hooks_of_accelerate_stay_with_their_module(self, build):
        """It takes a module that has its attributes for one that it has hooked."""
        from accelerate.hooks import ModelHook, add_hook_to_module

        model, batch = build("Llama")
        layer = model.base_model.model.model.layers[0]
        expected = model(**batch).logits
        add_hook_to_module(layer.base_layer, ModelHook())
        add_hook_to_module(layer, ModelHook())
        assert torch.equal(model(**batch).logits, expected)
        assert layer._old_forward.__func__ is not layer.base_layer._old_forward.__func__
