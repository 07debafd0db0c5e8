"""Several adapters on a model: switching, mixed batches, deletion, unloading, and what is refused."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import GenerationConfig

TARGETS = {"llama": ["q_proj", "mlp"], "t5": ["q", "DenseReluDense"], "bert": ["query"], "mlp": ["first", "block"]}


@pytest.fixture
def two(adapt, make_config, moved):
    """A model with adapters "default" and "other", of different sizes and targets."""

    def make(kind, *, share_bank=False, **fields):
        model = adapt(kind, target_modules=TARGETS[kind], share_bank=share_bank, moved=True, **fields)
        other = make_config(num_atoms=5, top_k=3, target_modules=TARGETS[kind][:1], share_router=True, **fields)
        model.add_adapter("other", other)
        return moved(model, "other", seed=4)

    return make


@pytest.fixture
def alone(two, output):
    """Outputs of the base and of each adapter alone."""

    def make(model, batch):
        results = {}
        for name in model.peft_config:
            model.set_adapter(name)
            results[name] = output(model, batch)
        with model.disable_adapter():
            results["__base__"] = output(model, batch)
        model.set_adapter("default")
        return results

    return make


@pytest.mark.parametrize("kind", ["mlp", "llama", "t5"])
class TestSwitching:
    def test_each_adapter_has_its_own_output(self, kind, two, alone, make_base, make_batch, output):
        batch, base = make_batch(kind), make_base(kind)
        results = alone(two(kind), batch)
        assert torch.equal(results["__base__"], output(base, batch))
        assert not torch.equal(results["default"], results["other"])
        assert not torch.equal(results["other"], results["__base__"])

    def test_only_the_active_one_trains(self, kind, two):
        model = two(kind)
        for name in ("other", "default"):
            model.set_adapter(name)
            trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
            assert trainable == {key for key, _ in model.named_parameters() if f".dsc_layers.{name}." in key}

    def test_both_at_once_add_up(self, kind, two, alone, make_batch, output):
        model, batch = two(kind), make_batch(kind)
        model.base_model.set_adapter(["default", "other"])
        both = output(model, batch)
        assert all(not torch.equal(both, other) for other in alone(model, batch).values())

    def test_deleted_and_added_again(self, kind, two, alone, make_config, make_batch, output, moved):
        model, batch = two(kind, share_bank=True), make_batch(kind)
        results = alone(model, batch)
        with pytest.warns(UserWarning, match="active which is now deleted"):
            model.delete_adapter("default")
        assert not any("default" in key for key in model.state_dict())
        assert torch.equal(output(model, batch), results["other"])
        model.add_adapter("default", make_config(num_atoms=7, target_modules=TARGETS[kind], share_bank=True))
        model.set_adapter("default")
        assert torch.equal(output(model, batch), results["__base__"])
        banks = {id(layer.bank) for key, layer in model.named_modules() if key.endswith(".dsc_layers.default")}
        assert len(banks) == sum(1 for key, _ in model.named_parameters() if key.endswith("default.bank.u"))
        assert not torch.equal(output(moved(model), batch), results["__base__"])

    def test_unloaded(self, kind, two, make_base, make_batch, output):
        model, base = two(kind).unload(), make_base(kind)
        assert torch.equal(output(model, make_batch(kind)), output(base, make_batch(kind)))
        assert [*model.state_dict()] == [*base.state_dict()]
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert "accepts_loss_kwargs" not in vars(model)

    def test_copies(self, kind, two, alone, make_batch):
        model, batch = two(kind, share_bank=True), make_batch(kind)
        expected = alone(model, batch)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 (its own)
            assert all(torch.equal(value, expected[name]) for name, value in alone(copied, batch).items())
            for parameter in copied.parameters():
                parameter.data.zero_()
        assert all(torch.equal(value, expected[name]) for name, value in alone(model, batch).items())


class TestMixedBatch:
    NAMES = ("default", "__base__", "other", "other")

    @pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
    def test_each_sample_has_its_adapter(self, kind, two, alone, make_batch, output):
        model, batch = two(kind), make_batch(kind)
        results = alone(model, batch)
        mixed = output(model, batch, adapter_names=list(self.NAMES))
        for i, name in enumerate(self.NAMES):
            torch.testing.assert_close(mixed[i], results[name][i], rtol=1e-5, atol=1e-5)
        assert torch.equal(output(model, batch), results["default"])

    @pytest.mark.parametrize("kind", ["llama", "t5"])
    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": False},
            {"num_beams": 2},
            {"num_beams": 3, "num_return_sequences": 2},
            {"generation_config": GenerationConfig(num_beams=2, pad_token_id=0, eos_token_id=2)},
            {"positional": GenerationConfig(num_beams=2, pad_token_id=0, eos_token_id=2)},
        ],
        ids=["greedy", "beams", "several of the beams", "beams of a generation config", "of one given by position"],
    )
    def test_generates(self, kind, options, two, make_batch):
        model, batch = two(kind), make_batch(kind)
        batch.pop("labels")
        # All of a length: padding on the right is not what decoders are given.
        batch["attention_mask"][:] = 1
        options = {**options, "max_new_tokens": 4, "min_new_tokens": 4}
        positional = [options.pop("positional")] if "positional" in options else []
        for config in (*positional, *([options["generation_config"]] if "generation_config" in options else ())):
            config.decoder_start_token_id = 0 if kind == "t5" else None
        ids = batch.pop("input_ids")
        mixed = model.generate(ids, *positional, **batch, adapter_names=list(self.NAMES), **options)
        each = options.get("num_return_sequences", 1)
        for i, name in enumerate(self.NAMES):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            if name == "__base__":
                with model.disable_adapter():
                    expected = model.generate(ids[i : i + 1], *positional, **one, **options)
            else:
                model.set_adapter(name)
                expected = model.generate(ids[i : i + 1], *positional, **one, **options)
            assert torch.equal(mixed[i * each : (i + 1) * each], expected), name

    @pytest.mark.parametrize("kind", ["llama", "t5"])
    def test_samples_several_sequences(self, kind, two, make_batch):
        model, batch = two(kind), make_batch(kind)
        batch.pop("labels")
        batch["attention_mask"][:] = 1
        options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 4, "min_new_tokens": 4}
        mixed = model.generate(**batch, adapter_names=list(self.NAMES), **options)
        greedy = {"max_new_tokens": 4, "min_new_tokens": 4}
        expected = model.generate(**batch, adapter_names=list(self.NAMES), **greedy)
        assert torch.equal(mixed, expected.repeat_interleave(3, 0))

    def test_takes_the_heads_saved_with_each(self, adapt, make_config, make_batch, output, moved):
        fields = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
        model, batch = adapt("bert", **fields, moved=True), make_batch("bert")
        model.add_adapter("other", make_config(**fields))
        moved(model, "other", seed=4)
        for i, name in enumerate(("default", "other")):
            model.base_model.model.classifier.modules_to_save[name].bias.data.fill_(10.0 * i)
        names = ["default", "other", "__base__", "other"]
        mixed = output(model, batch, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = output(model, batch)
            else:
                model.set_adapter(name)
                expected = output(model, batch)
            torch.testing.assert_close(mixed[i], expected[i], rtol=1e-5, atol=1e-5)

    def test_refuses_unknown_names_other_counts_and_training(self, two, make_batch):
        model, batch = two("llama"), make_batch("llama")
        with pytest.raises(ValueError, match=r"adapter_names must name adapters of the model, got \['third'\]"):
            model(**batch, adapter_names=["default", "third", "other", "other"])
        for names in (["default"] * 3, ["default"] * 2, ["default"] * 8):
            with pytest.raises(ValueError, match=f"each of 4 samples, got {len(names)} names"):
                model(**batch, adapter_names=names)
        with pytest.raises(ValueError, match="adapter_names must be None in training"):
            model.train()(**batch, adapter_names=list(self.NAMES))

    def test_refuses_flattened_tokens(self, adapt, make_batch):
        model = adapt("qwen_moe", target_modules=["shared_expert"], moved=True)
        with pytest.raises(ValueError, match="each of 32 samples, got 4 names"):
            model(**make_batch("qwen_moe"), adapter_names=["default"] * 4)


class TestAdding:
    def test_all_linear_twice_adapts_the_same_modules(self, adapt, make_config, adapter_layers):
        model = adapt("llama", target_modules="all-linear")
        model.add_adapter("other", make_config(target_modules="all-linear"))
        layers = adapter_layers(model)
        assert len(layers) == 14
        assert all({*layer.adapters} == {"default", "other"} for layer in layers.values())

    @pytest.mark.parametrize(("kind", "pattern"), [("llama", "layers"), ("llama", None), ("gpt2", "h"), ("bert", None)])
    @pytest.mark.parametrize("layers", [1, [0], [0, 1], [5]])
    def test_all_linear_in_some_layers(self, layers, kind, pattern, adapt, adapter_layers):
        every = {*adapter_layers(adapt(kind, target_modules="all-linear", task_type="SEQ_CLS"))}
        chosen = [layers] if isinstance(layers, int) else layers
        expected = {name for name in every if any(f".{layer}." in name for layer in chosen)}
        fields = {"target_modules": "ALL-linear", "layers_to_transform": layers, "layers_pattern": pattern}
        if not expected:
            with pytest.raises(ValueError, match=r"layers_to_transform must be indices of layers.*got \[5\]"):
                adapt(kind, **fields)
            return
        assert {*adapter_layers(adapt(kind, **fields, task_type="SEQ_CLS"))} == expected

    @pytest.mark.parametrize("training", [False, True])
    def test_takes_the_mode_of_the_model(self, training, adapt, make_config, adapter_layers):
        model = adapt("llama", target_modules=["q_proj"]).train(training)
        model.add_adapter("other", make_config(target_modules=["q_proj", "v_proj"]))
        for layer in adapter_layers(model).values():
            assert all(module.training is training for module in layer.modules())

    def test_beside_lora(self, make_base, make_config, make_batch, output, moved):
        """Through transformers, which lets methods meet."""
        model, batch = make_base("llama"), make_batch("llama")
        base = output(model, batch)
        model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
        lora = output(model, batch)
        model.add_adapter(make_config(target_modules=["q_proj"]), "dsc")
        assert torch.equal(output(model, batch), base)
        moved(model, "dsc")
        dsc = output(model, batch)
        assert not torch.equal(dsc, base)
        model.set_adapter("lora")
        assert torch.equal(output(model, batch), lora)
        model.set_adapter("dsc")
        assert torch.equal(output(model, batch), dsc)

    def test_after_the_last_one_is_deleted(self, make_base, make_config, make_batch, output, moved):
        """Through transformers: a PEFT model without adapters does not run."""
        model, batch = make_base("llama"), make_batch("llama")
        base, config = output(model, batch), make_config(target_modules=["q_proj"], share_bank=True)
        for _ in range(2):
            model.add_adapter(config)
            assert torch.equal(output(model, batch), base)
            assert not torch.equal(output(moved(model), batch), base)
            model.delete_adapter("default")
            assert torch.equal(output(model, batch), base)

    @pytest.mark.parametrize("name", ["a.b", "", "keys", "training"])
    def test_refuses_names_that_no_module_has(self, name, make_base, make_config):
        from peft import get_peft_model

        base = make_base("llama")
        with pytest.raises(ValueError, match=f"must be a name that nn.ModuleDict takes, got {name!r}"):
            get_peft_model(base, make_config(target_modules=["q_proj"]), adapter_name=name)
        assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)

    @pytest.mark.parametrize("heads", [(["classifier"], None), (None, ["classifier"])])
    def test_refuses_names_of_modules_to_save(self, heads, adapt, make_config):
        """PEFT finds them by the ends of names, among the adapters too."""
        model = adapt("bert", target_modules=["query"], modules_to_save=heads[0])
        message = r"names of adapters must not be among modules_to_save, got \['classifier'\]"
        with pytest.raises(ValueError, match=message):
            model.add_adapter("classifier", make_config(target_modules=["query"], modules_to_save=["classifier"]))

    @pytest.mark.parametrize(
        ("targets", "error", "message"),
        [
            (r".*mlp.*", ValueError, r"must not match modules inside others.*mlp\.gate_proj.*mlp"),
            (["mlp", "up_proj"], ValueError, "must not match modules inside others"),
            (["embed_tokens", "q_proj"], TypeError, "'model.embed_tokens', a Embedding"),
            (["q_proj", "act_fn"], TypeError, "act_fn"),
            (["layers"], TypeError, "must match modules that map tokens.*'model.layers', a ModuleList"),
            (["model"], TypeError, "must match modules that map tokens.*'model', a LlamaModel"),
            (["nothing"], ValueError, "not found in the base model"),
        ],
    )
    def test_refuses_targets_and_leaves_the_model(self, targets, error, message, make_base, make_config):
        from peft import get_peft_model

        model = make_base("llama")
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(error, match=message):
            get_peft_model(model, make_config(target_modules=targets))
        assert [name for name, _ in model.named_modules()] == names

    @pytest.mark.parametrize("targets", [["gate_proj"], ["gate_proj", "q_proj"]], ids=["all", "some"])
    def test_refuses_modules_inside_adapted_ones(self, targets, adapt, make_config, make_batch, output):
        adapted, batch = adapt("llama", target_modules=["mlp"], moved=True), make_batch("llama")
        before = output(adapted, batch)
        with pytest.raises(ValueError, match=r"one that has an adapter, got 'gate_proj' inside '.*\.0\.mlp'"):
            adapted.add_adapter("second", make_config(target_modules=targets))
        assert list(adapted.peft_config) == ["default"]
        assert torch.equal(output(adapted, batch), before)

    def test_refuses_a_layer_of_several_experts(self, adapt):
        with pytest.raises(TypeError, match=r"'model.layers.0.mlp', a MixtralSparseMoeBlock"):
            adapt("mixtral", target_modules=["mlp"])

    def test_status_as_peft_reports_it(self, two):
        status = two("llama", share_bank=True).get_model_status()
        assert status.available_adapters == ["default", "other"]
        assert status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True, "other": False}


NAMES = ("0", "1", "layers", "q_proj", "self_attn", "model", "bank", "router", "gamma", "u", "dsc_layers", "lora_A")


@pytest.mark.parametrize("method", ["dsc", "molora"])
@pytest.mark.parametrize("name", NAMES)
class TestNamesWithinTheModel:
    """PEFT tells adapters apart in a state dict by their names in its keys."""

    def pair(self, name, method, adapt, make_config, moved):
        fields = {"target_modules": ["q_proj", "mlp"]}
        model = adapt("llama", method, moved=True, **fields)
        model.add_adapter(name, make_config(method, **fields))
        return moved(model, name, seed=4)

    def test_switched_mixed_and_deleted(self, name, method, adapt, make_config, make_batch, alone, output, moved):
        model, batch = self.pair(name, method, adapt, make_config, moved), make_batch("llama")
        results = alone(model, batch)
        assert not torch.equal(results["default"], results[name])
        mixed = output(model, batch, adapter_names=["default", name, "__base__", name])
        for i, key in enumerate(["default", name, "__base__", name]):
            torch.testing.assert_close(mixed[i], results[key][i], rtol=1e-5, atol=1e-5)
        model.set_adapter(name)
        trains = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trains == {key for key, _ in model.named_parameters() if f"_layers.{name}." in key}
        model.set_adapter("default")
        model.delete_adapter(name)
        assert torch.equal(output(model, batch), results["default"])

    @pytest.mark.parametrize("through", ["peft", "transformers"])
    def test_saved_and_loaded(
        self, through, name, method, adapt, make_base, make_config, make_batch, alone, output, moved, tmp_path
    ):
        model, batch = self.pair(name, method, adapt, make_config, moved), make_batch("llama")
        results = alone(model, batch)
        model.save_pretrained(tmp_path)
        for saved, folder in (("default", tmp_path), (name, tmp_path / name)):
            for given in (name, "third"):
                loaded = make_base("llama")
                if through == "peft":
                    loaded = PeftModel.from_pretrained(loaded, folder, adapter_name=given)
                else:
                    loaded.load_adapter(folder, given)
                assert torch.equal(output(loaded, batch), results[saved]), (saved, given)

    def test_added_leave_what_is_frozen(self, name, method, adapt, make_config):
        model = adapt("llama", method, target_modules=["q_proj"])
        model.requires_grad_(requires_grad=False)
        model.add_adapter(name, make_config(method, target_modules=["q_proj"]))
        assert not any(parameter.requires_grad for parameter in model.parameters())


class TestRefusals:
    def test_merging(self, two):
        model = two("llama")
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="composed token by token cannot be merged"):
                merge()
        for layer in model.modules():
            if hasattr(layer, "merge") and hasattr(layer, "adapters"):
                with pytest.raises(ValueError, match="cannot be merged"):
                    layer.merge()
        model.unmerge_adapter()

    def test_hot_swapping(self, two, make_base, tmp_path):
        from peft.utils.hotswap import hotswap_adapter

        two("llama").save_pretrained(tmp_path, selected_adapters=["default"])
        model = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        with pytest.raises(ValueError, match="Hotswapping only supports LORA but DSC was passed"):
            hotswap_adapter(model, tmp_path, adapter_name="default")
        model = make_base("llama")
        model.load_adapter(tmp_path)
        with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
            model.load_adapter(tmp_path, adapter_name="default", hotswap=True)

    def test_another_method_in_one_peft_model(self, two, make_config):
        with pytest.raises(ValueError, match="peft types"):
            two("llama").add_adapter("third", make_config("molora", target_modules=["q_proj"]))


def test_torchs_fused_encoder_is_left(make_config):
    """In evaluation it reads the weights of its linear layers past their modules."""
    from peft import get_peft_model

    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = get_peft_model(nn.TransformerEncoder(layer, 2), make_config(target_modules=["linear1"], gamma_init=0.5))
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
    expected = model.train()(x, src_key_padding_mask=padding)
    with torch.no_grad():
        actual = model.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual[~padding], expected[~padding])
