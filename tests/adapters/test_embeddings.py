"""DSC adapters that see the tokens or their embeddings, against updates computed by hand."""

import copy
import json
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, StaticCache

import torchdsc
from torchdsc import optim
from torchdsc.adapters import AdapterLayer, DSCAdapterConfig
from torchdsc.nn.broadcast import Broadcast
from torchdsc.ops import ngram_codes, ngram_rows

KINDS = ("llama", "gpt2")
TARGETS = {"llama": ["q_proj", "mlp"], "gpt2": ["c_attn", "mlp"]}
SIZES = {"num_atoms": 9, "top_k": 2, "gamma_init": 0.0}
SEEN = torchdsc.recommended(**SIZES)
CONTEXTS = {
    "recommended": SEEN,
    "router alone": {**SIZES, "router_input": "embeddings"},
    "router and the past": {**SIZES, "router_input": "embeddings", "router_context": 3},
    "layer alone": {**SIZES, "input_context": 2},
    "n-grams": {**SEEN, "router": "ngram", "ngram_orders": (1, 4)},
    "n-grams alone": {
        **SIZES,
        "router": "ngram",
        "router_input": "hidden",
        "router_context": 1,
        "input_context": 1,
    },
}
SEEING = ("recommended", "n-grams")
DOUBLE = {"dtype": torch.float64, "peft": {"autocast_adapter_dtype": False}, "moved": True}
UNWEIGHTED = dict.fromkeys(("aux_weight", "budget_weight", "frame_weight", "z_weight"), 0.0)


@pytest.fixture
def make(adapt):
    """A model in float64 with an adapter that is felt, its convolutions included."""

    def build(kind, **fields):
        return stir(adapt(kind, **DOUBLE, **{"target_modules": TARGETS[kind], **SEEN, **fields}))

    return build


@torch.no_grad()
def stir(model):
    """Give the short convolutions weights of their own, and the updates more."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "_context." in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5)
        elif name.endswith(".gamma"):
            parameter.mul_(4.0)
    return model


def by_hand(layer, x, embeddings, ids=None):
    """The update of one sequence, token by token: x of shape (T, d_in), embeddings (T, d_in) as they are looked up."""
    weights, options = dict(layer.named_parameters()), layer.options
    e = functional.layer_norm(embeddings, embeddings.shape[-1:])
    rows = []
    for t in range(x.shape[0]):
        z, routed = x[t], e[t]
        if "input_context.weight" in weights:
            z = z + sum(a * e[t - i] for i, a in enumerate(weights["input_context.weight"]) if i <= t)
        if "router_context.weight" in weights:
            routed = sum(a * e[t - i] for i, a in enumerate(weights["router_context.weight"]) if i <= t)
        elif layer.context.router_input == "hidden":
            routed = z
        if options.router == "ngram":
            codes = ngram_codes(ids, layer.context.ngram_orders)[t]
            # One atom of each order, in its own part of the bank.
            starts = [order * options.num_atoms // len(codes) for order in range(len(codes) + 1)]
            sizes = [end - start for start, end in pairwise(starts)]
            chosen = ngram_rows(codes, 1, sizes, salt=layer.router.salt) + torch.tensor(starts[:-1])
            top = torch.zeros(options.top_k, dtype=x.dtype)
        else:
            logits = weights["router.weight"] @ functional.layer_norm(routed, routed.shape)
            top, chosen = logits.topk(options.top_k)
        scores = (1 + top.exp()).log()
        scores = scores * scores.sum().tanh() / (scores.sum() + options.eps)
        u, v = (functional.normalize(weights[f"bank.{side}"][chosen], dim=-1) for side in "uv")
        rows.append(options.scale * weights["gamma"] * ((scores * (u @ z)) @ v))
    return torch.stack(rows)


@pytest.fixture
def reference(make_base):
    """Logits (T, V) of one sequence by the base with the updates of a model's adapter, computed by hand."""

    def call(kind, model, ids, name="default"):
        base = make_base(kind, torch.float64)
        embeddings = base.get_input_embeddings()(ids)
        for target, layer in model.base_model.model.named_modules():
            if isinstance(layer, AdapterLayer) and name in layer.adapters:

                def add(_, args, kwargs, y, layer=layer.adapters[name]):
                    x = args[0] if args else kwargs["hidden_states"]
                    return y + by_hand(layer, x[0], embeddings, ids).unsqueeze(0)

                base.get_submodule(target).register_forward_hook(add, with_kwargs=True)
        return base(ids.unsqueeze(0)).logits[0]

    return call


@pytest.fixture
def ids():
    return torch.randint(3, 64, (3, 8), generator=torch.Generator().manual_seed(4))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
class TestNumbers:
    @pytest.mark.parametrize("fields", CONTEXTS.values(), ids=CONTEXTS)
    def test_are_those_by_hand(self, kind, fields, adapt, reference, ids):
        model = stir(adapt(kind, **DOUBLE, target_modules=TARGETS[kind], **fields))
        close(model(ids).logits, torch.stack([reference(kind, model, row) for row in ids]))

    @pytest.mark.parametrize("fields", CONTEXTS.values(), ids=CONTEXTS)
    def test_a_fresh_adapter_is_the_identity(self, kind, fields, adapt, make_base, make_batch, output):
        model, batch = adapt(kind, target_modules=TARGETS[kind], **fields), make_batch(kind)
        expected = output(make_base(kind), batch)
        assert torch.equal(output(model, batch), expected)
        assert torch.equal(output(model.train(), batch), expected)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("context", SEEING)
    def test_padding(self, kind, context, side, make, reference, ids):
        model, mask = make(kind, **CONTEXTS[context]), torch.ones_like(ids)
        lengths = [8, 5, 2]
        for row, length in zip(mask, lengths, strict=True):
            row[: 8 - length] = 0
        mask = mask if side == "left" else mask.flip(1)
        places = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=places).logits
        for row, own, found in zip(ids, mask.bool(), logits, strict=True):
            close(found[own], reference(kind, model, row[own]))

    @pytest.mark.parametrize("context", SEEING)
    def test_packed_sequences(self, kind, context, make, reference, ids):
        model, row = make(kind, **CONTEXTS[context]), ids[0]
        places = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
        found = model(row.unsqueeze(0), position_ids=places, use_cache=False).logits[0]
        for part, logits in zip(row.split([3, 2, 3]), found.split([3, 2, 3]), strict=True):
            close(logits, reference(kind, model, part))

    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_half_precision_is_near(self, kind, autocast_adapter_dtype, adapt, make_batch, output):
        fields, batch = {"target_modules": TARGETS[kind], **SEEN, "top_k": 9}, make_batch(kind)
        expected = output(stir(adapt(kind, **fields, moved=True)), batch)
        peft = {"autocast_adapter_dtype": autocast_adapter_dtype}
        model = stir(adapt(kind, **fields, peft=peft, moved=True)).bfloat16()
        if autocast_adapter_dtype:
            for layer in model.modules():
                if isinstance(layer, AdapterLayer):
                    layer.adapters.float()
        found = output(model, batch)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            found = output(stir(adapt(kind, **fields, moved=True)), batch)
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)

    def test_embeddings_in_place_of_tokens(self, kind, make, ids):
        model = make(kind)
        close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
        model = make(kind, router="ngram")
        embeddings = model.get_input_embeddings()(ids)
        with pytest.raises(ValueError, match=r"input_ids must be given .* routed by n-grams, got inputs_embeds alone"):
            model(inputs_embeds=embeddings)
        with model.disable_adapter():
            close(model(inputs_embeds=embeddings).logits, model(ids).logits)

    def test_salts_are_indices_of_layers(self, kind, make, ids):
        model, found = make(kind, **CONTEXTS["n-grams alone"]), []
        for name, layer in model.named_modules():
            if isinstance(layer, AdapterLayer):
                router = layer.adapters["default"].router
                assert router.salt == int(next(part for part in name.split(".") if part.isdigit()))
                router.register_forward_hook(lambda _, args, y: found.append(y.indices))
        model(ids)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[-1])

    def test_a_shared_router_has_one_salt(self, kind, make):
        model = make(kind, **CONTEXTS["n-grams alone"], share_router=True)
        layers = [layer.adapters["default"] for layer in model.modules() if isinstance(layer, AdapterLayer)]
        assert {layer.router.salt for layer in layers if layer.out_features == 32} == {0}


@pytest.mark.parametrize("kind", KINDS)
class TestGeneration:
    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("chunks", [[1] * 8, [3, 1, 4]], ids=["token by token", "in chunks"])
    @pytest.mark.parametrize("context", [*SEEING, "n-grams alone"])
    def test_a_cache_changes_nothing(self, kind, context, static, chunks, make, reference, ids):
        model = make(kind, **CONTEXTS[context])
        config = model.base_model.model.config
        cache = StaticCache(config, max_cache_len=8) if static else DynamicCache(config=config)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)]
        close(torch.cat(parts, 1), torch.stack([reference(kind, model, row) for row in ids]))

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
    @pytest.mark.parametrize("context", SEEING)
    def test_generates_what_it_does_without_a_cache(self, kind, context, options, make, ids):
        model, prompts, mask = make(kind, **CONTEXTS[context]), ids[:, :5], torch.ones(3, 5, dtype=torch.int64)
        mask[1, :3] = 0
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": mask, **options}
        beams = {key: value for key, value in options.items() if key != "cache_implementation"}
        expected = model.generate(prompts, use_cache=False, **beams)
        assert torch.equal(model.generate(prompts, **options), expected)
        with model.disable_adapter():
            assert not torch.equal(model.generate(prompts, **options), expected)

    def test_assisted_generation_is_refused(self, kind, make, ids):
        model = make(kind, **CONTEXTS[next(iter(SEEING))])
        with pytest.raises(NotImplementedError, match=r"assisted generation .* is not supported by adapters"):
            model.generate(ids[:1], prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("kind", KINDS)
class TestTraining:
    def gradients(self, model):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    def test_gradients_are_those_by_hand(self, kind, make, reference, ids):
        model = make(kind, **UNWEIGHTED).train()
        model(ids).logits.square().mean().backward()
        actual = self.gradients(model)
        torch.stack([reference(kind, model, row) for row in ids]).square().mean().backward()
        expected = self.gradients(model)
        assert any("router_context" in name for name in actual)
        assert any("input_context" in name for name in actual)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-12)

    @pytest.mark.parametrize("step", [1, 2])
    @pytest.mark.parametrize("context", SEEING)
    def test_checkpointing_changes_no_gradient(self, kind, context, step, make, make_batch):
        weights = {"z_weight": 0.1, "aux_weight": 0.5, "frame_weight": 0.1}
        model, batch = make(kind, **{**CONTEXTS[context], **weights}).train(), make_batch(kind)
        model(**batch).loss.backward()
        expected = self.gradients(model)
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(step):
            model.zero_grad()
            model(**batch).loss.backward()
        torch.testing.assert_close(self.gradients(model), expected, rtol=1e-11, atol=1e-14)

    def test_the_frame_loss_of_an_ngram_adapter(self, kind, make, make_batch):
        """Its router has nothing to train, but its bank has."""
        model, batch = make(kind, router="ngram", frame_weight=0.1).train(), make_batch(kind)
        loss = model(**batch).loss
        terms = torchdsc.adapters.last_regularization(model)
        assert terms["frame"] > 0
        assert terms["aux"] == terms["budget"] == terms["z"] == 0
        loss.backward()
        model.requires_grad_(requires_grad=False)
        assert loss > model(**batch).loss

    def test_several_calls_before_their_backward_pass(self, kind, make, make_batch):
        model, batch = make(kind).train(), make_batch(kind)
        other = {**batch, "input_ids": batch["input_ids"].flip(0)}
        for each in (batch, other):
            model(**each).loss.backward()
        expected = self.gradients(model)
        sum(model(**each).loss for each in (batch, other)).backward()
        torch.testing.assert_close(self.gradients(model), expected, rtol=1e-9, atol=1e-12)

    def test_under_trainer(self, kind, adapt, make_batch, tmp_path):
        from transformers import Trainer, TrainingArguments

        model, batch = adapt(kind, target_modules=TARGETS[kind], **SEEN), make_batch(kind)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        examples = [{name: value[i] for name, value in batch.items()} for i in range(4)]
        options = {"output_dir": str(tmp_path), "max_steps": 8, "learning_rate": 1e-2, "report_to": [], "use_cpu": True}
        options |= {"save_strategy": "no", "disable_tqdm": True, "gradient_accumulation_steps": 2, "logging_steps": 1}
        options |= {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
        trainer = Trainer(model, TrainingArguments(**options), train_dataset=examples)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        assert {name for name in start if "_context." in name} <= moved
        assert all(".dsc_layers." in name for name in moved)

    def test_convolutions_are_not_decayed(self, kind, make):
        names = optim.decay_parameter_names(make(kind))
        assert any("bank" in name for name in names)
        assert not any("_context" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
class TestCompiling:
    def test_training(self, kind, make, make_batch):
        model, batch = make(kind).train(), make_batch(kind)
        loss = model(**batch).loss
        loss.backward()
        expected = TestTraining().gradients(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        again = compiled(**batch).loss
        again.backward()
        torch.testing.assert_close(again, loss)
        torch.testing.assert_close(TestTraining().gradients(model), expected, rtol=1e-5, atol=1e-7)

    def test_inference_in_one_graph(self, kind, make, ids):
        model = make(kind)
        expected = model(ids).logits
        torch._dynamo.reset()
        compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            close(compiled(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
class TestSeveral:
    NAMES = ("default", "__base__", "other")

    @pytest.fixture(params=["router alone", "n-grams"])
    def two(self, request, make, make_config, moved):
        """Adapters that see different contexts, and one that sees none."""

        def build(kind):
            model = make(kind)
            fields = {**CONTEXTS[request.param], "target_modules": TARGETS[kind][:1]}
            model.add_adapter("other", make_config(**fields))
            model.add_adapter("blind", make_config(target_modules=TARGETS[kind]))
            for name in ("other", "blind"):
                moved(model, name, seed=len(name))
            return model.double()

        return build

    def alone(self, model, ids, call):
        results = {}
        for name in ("default", "other"):
            model.set_adapter(name)
            results[name] = call(model, ids)
        with model.disable_adapter():
            results["__base__"] = call(model, ids)
        model.set_adapter("default")
        return results

    def test_each_is_that_by_hand(self, kind, two, reference, ids):
        model = two(kind)
        results = self.alone(model, ids, lambda model, ids: model(ids).logits)
        for name in ("default", "other"):
            close(results[name], torch.stack([reference(kind, model, row, name) for row in ids]))

    def test_active_at_once(self, kind, two, ids):
        model = two(kind)
        model.base_model.set_adapter(["default", "other", "blind"])
        layers = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
        layer, calls = layers[0], {}
        handles = [
            adapter.register_forward_hook(lambda _, args, y, name=name: calls.__setitem__(name, y))
            for name, adapter in layer.adapters.items()
        ]
        base = []
        handles.append(layer.base_layer.register_forward_hook(lambda _, args, y: base.append(y.clone()), prepend=True))
        outputs = []
        handles.append(layer.base_layer.register_forward_hook(lambda _, args, y: outputs.append(y)))
        model(ids)
        for handle in handles:
            handle.remove()
        close(outputs[0], base[0] + sum(calls.values()))
        assert len(calls) == 3

    def test_mixed_batch(self, kind, two, ids):
        model = two(kind)
        results = self.alone(model, ids, lambda model, ids: model(ids).logits)
        mixed = model(ids, adapter_names=[*self.NAMES]).logits
        for i, name in enumerate(self.NAMES):
            close(mixed[i], results[name][i])

    def test_mixed_batch_of_packed_sequences(self, kind, two, ids):
        model, places = two(kind), torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
        for position_ids in (places, places.expand(3, -1)):
            call = lambda model, ids: model(ids, position_ids=position_ids.expand(3, -1), use_cache=False).logits  # noqa: B023, E731
            results = self.alone(model, ids, call)
            mixed = model(ids, position_ids=position_ids, use_cache=False, adapter_names=[*self.NAMES]).logits
            for i, name in enumerate(self.NAMES):
                close(mixed[i], results[name][i])

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
    def test_mixed_generation(self, kind, options, two, ids):
        model, mask = two(kind), torch.ones_like(ids[:, :5])
        mask[2, :2] = 0
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": mask, **options}
        results = self.alone(model, ids[:, :5], lambda model, ids: model.generate(ids, **options))
        mixed = model.generate(ids[:, :5], adapter_names=[*self.NAMES], **options)
        for i, name in enumerate(self.NAMES):
            assert torch.equal(mixed[i], results[name][i]), name

    def test_copies(self, kind, make, ids):
        model = make(kind)
        expected = model(ids).logits
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.get_input_embeddings().weight.zero_()
        assert not torch.equal(copied(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def hooks(model):
    """Hooks that hand embeddings on."""
    found = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    return [hook for part in model.modules() for hook in [*found, *part._forward_hooks.values()] if is_broadcast(hook)]


def is_broadcast(hook):
    return isinstance(getattr(hook, "__self__", None), Broadcast)


class TestLeaving:
    def test_unloaded(self, make, make_base, ids):
        model = make("llama")
        assert hooks(model)
        left = model.unload()
        assert not hooks(left)
        assert torch.equal(left(ids).logits, make_base("llama", torch.float64)(ids).logits)

    @pytest.mark.parametrize("by", ["peft", "transformers"])
    def test_the_last_that_sees_embeddings_is_deleted(self, by, make_base, make_config):
        model = make_base("llama")
        fields = {"target_modules": TARGETS["llama"]}
        configs = {"first": {**SEEN, **fields}, "second": {**CONTEXTS["router alone"], **fields}, "blind": fields}
        if by == "peft":
            model = get_peft_model(model, make_config(**configs["first"]), adapter_name="first")
            for name in ("second", "blind"):
                model.add_adapter(name, make_config(**configs[name]))
        else:
            for name, given in configs.items():
                model.add_adapter(make_config(**given), name)
        for name in ("first", "second"):
            assert hooks(model)
            model.delete_adapter(name)
        assert not hooks(model)
        again = make_config(**configs["first"])
        model.add_adapter(*(("first", again) if by == "peft" else (again, "first")))
        assert hooks(model)

    def test_a_converted_model_keeps_its_own(self, make_base, make_config, ids):
        model = make_base("llama", torch.float64)
        torchdsc.convert(model, target="mlp", **torchdsc.recommended(num_atoms=40))
        with torch.no_grad():
            expected = model(ids).logits
            adapted = get_peft_model(model, make_config(target_modules=["q_proj"], **SEEN))
            assert torch.equal(adapted.unload()(ids).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
class TestFiles:
    OPTIONS = (
        {},
        {"share_bank": True, "share_router": True},
        {"router": "low_rank", "router_rank": 4},
        {"router": "ngram"},
        {"router": "ngram", "share_bank": True, "share_router": True},
    )

    @pytest.mark.parametrize(
        "options", OPTIONS, ids=["private", "shared", "low rank", "n-grams", "n-grams, shared router"]
    )
    @pytest.mark.parametrize("through", ["peft", "transformers"])
    def test_saved_and_loaded(self, kind, options, through, adapt, make_base, make_batch, output, tmp_path):
        from safetensors.torch import load_file

        model = stir(adapt(kind, target_modules=TARGETS[kind], moved=True, **{**SEEN, **options}))
        model.save_pretrained(tmp_path)
        saved, batch = load_file(tmp_path / "adapter_model.safetensors"), make_batch(kind)
        contexts = [key for key in saved if key.endswith(("dsc_layers.router_context.weight", "input_context.weight"))]
        assert len(contexts) == 4 * (1 if "ngram" in options.values() else 2)
        loaded = make_base(kind)
        if through == "peft":
            loaded = PeftModel.from_pretrained(loaded, tmp_path, low_cpu_mem_usage=True)
        else:
            loaded.load_adapter(tmp_path)
        assert torch.equal(output(loaded, batch), output(model, batch))

    def test_by_a_fresh_process(self, kind, adapt, make_base, make_batch, output, tmp_path):
        model, batch = stir(adapt(kind, target_modules=TARGETS[kind], moved=True, **SEEN)), make_batch(kind)
        make_base(kind).save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "adapter")
        torch.save((batch, output(model, batch)), tmp_path / "expected.pt")
        code = """
import sys, torch, torchdsc.adapters
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapter")
batch, expected = torch.load(f"{folder}/expected.pt")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, expected)
"""
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=300)

    @pytest.mark.parametrize("through", ["peft", "transformers"])
    @pytest.mark.parametrize("changed", ["missing", "another size"])
    def test_weights_that_are_not_the_configs(self, kind, through, changed, adapt, make_base, tmp_path):
        from safetensors.torch import load_file, save_file

        adapt(kind, target_modules=TARGETS[kind], moved=True, **SEEN).save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        saved = load_file(file)
        key = next(key for key in saved if "router_context" in key)
        if changed == "missing":
            del saved[key]
        else:
            saved[key] = saved[key][:2].clone()
        save_file(saved, file, {"format": "pt"})
        base = make_base(kind)
        load = partial(PeftModel.from_pretrained, base) if through == "peft" else base.load_adapter
        # Transformers' own error leaves the name to its report.
        with pytest.raises((ValueError, RuntimeError), match=r"router_context|mismatched_sizes"):
            load(tmp_path)

    def test_an_old_config_has_the_defaults(self, kind, adapt, make_base, make_batch, output, tmp_path):
        model, batch = adapt(kind, target_modules=TARGETS[kind], moved=True), make_batch(kind)
        model.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
        config = json.loads(path.read_text())
        for name in ("router_input", "router_context", "input_context"):
            del config[name]
        path.write_text(json.dumps(config))
        assert torch.equal(output(PeftModel.from_pretrained(make_base(kind), tmp_path), batch), output(model, batch))


class TestBeside:
    def test_lora(self, make_base, make_config, moved, reference, ids):
        """Lora on the embedding moves what the layers see."""
        model = make_base("llama", torch.float64)
        model.add_adapter(LoraConfig(target_modules=["embed_tokens", "v_proj"], init_lora_weights=False), "lora")
        model = model.double()
        expected = model(ids).logits
        model.add_adapter(make_config(target_modules=TARGETS["llama"], **SEEN), "default")
        model.set_adapter(["lora", "default"])
        model = model.double()
        assert torch.equal(model(ids).logits, expected)
        stir(moved(model))
        with torch.no_grad():
            full = model(ids).logits
            cache = DynamicCache(config=model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(1, 1)]
        assert not torch.equal(full, expected)
        close(torch.cat(parts, 1), full)
        layer = model.model.layers[0].self_attn.q_proj
        caught = []
        layer.register_forward_hook(lambda _, args, y: caught.append((args[0], y)))
        model(ids)
        x, y = caught[0]
        seen = model.get_input_embeddings()(ids)
        assert not torch.equal(seen, make_base("llama", torch.float64).get_input_embeddings()(ids))
        for row, out, e in zip(x, y, seen, strict=True):
            close(out, row @ layer.base_layer.weight.T + by_hand(layer.adapters["default"], row, e))

    def test_a_converted_model(self, make_base, make_config, moved, ids):
        model = make_base("llama", torch.float64)
        options = torchdsc.recommended(num_atoms=40, router_context=2, input_context=1)
        torchdsc.convert(model, target="mlp", mode="replace", **options)
        expected = model(ids).logits
        model = get_peft_model(model, make_config(target_modules=["q_proj", "mlp"], **SEEN)).double().eval()
        assert torch.equal(model(ids).logits, expected)
        stir(moved(model))
        with torch.no_grad():
            full = model(ids).logits
            cache = DynamicCache(config=model.base_model.model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(1, 1)]
        assert not torch.equal(full, expected)
        close(torch.cat(parts, 1), full)

    def test_sizes_of_converted_modules_are_found_without_a_copy_of_the_embedding(
        self, make_base, make_config, monkeypatch
    ):
        model, copied = make_base("llama"), []
        torchdsc.convert(model, target="mlp", **torchdsc.recommended(num_atoms=40))
        monkeypatch.setattr(nn.Embedding, "__deepcopy__", lambda self, _: copied.append(self) or self, raising=False)
        get_peft_model(model, make_config(target_modules=["mlp"], **SEEN))
        assert not copied

    @pytest.mark.parametrize("kind", ["dscgpt", "qwen_moe"])
    def test_other_models(self, kind, adapt, ids):
        targets = {"dscgpt": ["qkv_proj"], "qwen_moe": ["q_proj", "shared_expert"]}[kind]
        model = stir(adapt(kind, **DOUBLE, target_modules=targets, **SEEN))
        with torch.no_grad():
            full = model(ids).logits
            cache = DynamicCache(config=model.base_model.model.config)
            parts = [model(part, past_key_values=cache).logits for part in ids.split(1, 1)]
        with model.disable_adapter():
            assert not torch.equal(model(ids).logits, full)
        close(torch.cat(parts, 1), full)

    def test_frozen_in_a_checkpoint_beside_what_trains(self, make, make_config, moved, make_batch):
        """Its layer is recomputed for what trains."""
        model, batch = (
            make("llama", **UNWEIGHTED, target_modules=["q_proj"], layers_to_transform=[0]),
            make_batch("llama"),
        )
        model.requires_grad_(requires_grad=False)
        lora = LoraConfig(target_modules=["v_proj"], init_lora_weights=False, layers_to_transform=[0])
        model = get_peft_model(model, lora, adapter_name="lora").double().train()

        def gradients():
            model(**batch).loss.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return found

        expected = gradients()
        assert expected
        model.base_model.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        for _ in range(2):
            torch.testing.assert_close(gradients(), expected)


class TestConfig:
    def test_recommended_settings(self):
        config = DSCAdapterConfig(target_modules=["q_proj"], **torchdsc.recommended(num_atoms=64, gamma_init=0.0))
        assert config.context() == torchdsc.nn.ContextOptions(
            router_input="embeddings", router_context=3, input_context=4
        )
        assert (config.options().top_k, config.options().scale) == (32, 32.0)

    @pytest.mark.parametrize(
        ("fields", "error", "message"),
        [
            ({"router_context": 3}, ValueError, "router_input must be 'embeddings' for router_context > 1"),
            ({"router_input": "tokens"}, ValueError, "router_input must be one of"),
            ({"router_context": 0}, ValueError, "router_context must be >= 1, got 0"),
            ({"router": "ngram", "top_k": 3}, ValueError, "top_k must be a multiple of the 2 orders of n-grams, got 3"),
            ({"ngram_orders": []}, ValueError, "ngram_orders must be numbers of tokens"),
            ({"input_context": 1.5}, TypeError, "input_context must be an int, got 1.5"),
        ],
    )
    def test_refuses(self, fields, error, message):
        with pytest.raises(error, match=message):
            DSCAdapterConfig(**fields)


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "targets", "message"),
        [
            ("t5", ["q"], "router_input and input_context .* got T5ForConditionalGeneration"),
            ("mlp", ["first"], "router_input and input_context .* got MLP"),
            ("llama", ["down_proj"], "target_modules must match modules of in_features = 32.*'.*down_proj' of 48"),
            ("llama", ["lm_head"], "target_modules must match modules inside LlamaModel.*got 'lm_head'"),
        ],
    )
    def test_what_cannot_see_them(self, kind, targets, message, make_base, make_config):
        base = make_base(kind)
        before = str(base)
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, make_config(target_modules=targets, **SEEN))
        assert str(base) == before
        assert not hooks(base)

    def test_tokens_that_are_not_all(self, make, ids):
        model = make("llama")
        layer = model.base_model.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda _, args: (args[0][:, 1:],))
        with pytest.raises(ValueError, match="must see every token once"):
            model(ids)

    def test_a_layer_called_alone(self, make):
        layer = make("llama").base_model.model.model.layers[0].mlp
        with pytest.raises(RuntimeError, match="must be called by LlamaModel"):
            layer(torch.randn(2, 3, 32, dtype=torch.float64))
