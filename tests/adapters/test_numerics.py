"""Half precision, quantised bases, gradient checkpointing and compilation."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from torchdsc import regularization

LOW = [torch.bfloat16, torch.float16]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", LOW)
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    @pytest.mark.parametrize(
        "fields", [{}, {"share_bank": True}, {"method": "molora"}], ids=["dsc", "shared", "molora"]
    )
    def test_of_the_base(
        self, dtype, autocast_adapter_dtype, fields, adapt, make_base, make_batch, output, moved, tmp_path
    ):
        # A whole MLP has no weight of its own to tell its dtype.
        peft = {"autocast_adapter_dtype": autocast_adapter_dtype}
        model = adapt("llama", target_modules=["q_proj", "mlp"], dtype=dtype, peft=peft, **fields)
        batch = make_batch("llama")
        expected = torch.float32 if autocast_adapter_dtype else dtype
        assert {p.dtype for name, p in model.named_parameters() if "_layers." in name and "default" in name} == {
            expected
        }
        assert torch.equal(output(model, batch), output(make_base("llama", dtype), batch))
        assert output(moved(model), batch).dtype == dtype
        loss = model.train()(**batch).loss
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
        model.eval().save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_base("llama", dtype), tmp_path, **peft)
        assert torch.equal(output(loaded, batch), output(model, batch))

    def test_is_near_full_precision(self, adapt, make_batch, output):
        fields = {"target_modules": ["q_proj", "mlp"]}
        model, batch = adapt("llama", **fields, moved=True), make_batch("llama")
        half = copy.deepcopy(model).bfloat16()
        torch.testing.assert_close(output(half, batch).float(), output(model, batch), rtol=0.1, atol=0.3)

    def test_under_autocast(self, adapt, make_batch, output):
        model, batch = adapt("llama", target_modules=["q_proj", "mlp"], moved=True), make_batch("llama")
        expected = output(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(output(model, batch).float(), expected, rtol=0.1, atol=0.3)
            loss = model.train()(**batch).loss
        loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())


class Quantized(nn.Module):
    """What libraries' quantised layers look like: integers, no ``weight`` to multiply by, sizes as attributes."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight * self.scale).t().to(x.dtype)


class TestQuantized:
    @pytest.fixture
    def check(self, make_config, make_batch, moved, output, tmp_path):
        """A fresh adapter is the identity, trains and loads back."""

        def run(make, targets=("q_proj", "mlp"), dtype=torch.float32, **fields):
            batch = make_batch("llama")
            model = get_peft_model(make(), make_config(target_modules=list(targets), **fields)).eval()
            assert torch.equal(output(model, batch), output(make(), batch))
            parameters = [p for p in model.parameters() if p.requires_grad]
            assert {p.dtype for p in parameters} == {dtype}
            optimizer = torch.optim.AdamW(parameters, lr=1e-2)
            losses = []
            model.train()
            for _ in range(6):
                losses.append(model(**batch).loss)
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
            assert losses[-1] < losses[0]
            model.eval().save_pretrained(tmp_path)
            loaded = PeftModel.from_pretrained(make(), tmp_path)
            torch.testing.assert_close(output(loaded, batch), output(model, batch))
            with pytest.raises(ValueError, match="cannot be merged"):
                model.merge_and_unload()
            assert torch.equal(output(model.unload(), batch), output(make(), batch))

        return run

    @pytest.mark.parametrize("share_bank", [False, True])
    def test_layers_of_no_known_library(self, share_bank, make_base, check):
        def make():
            model = make_base("llama")
            for name, module in [*model.named_modules()]:
                if isinstance(module, nn.Linear) and "lm_head" not in name:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, Quantized(module))
            return model

        check(make, share_bank=share_bank)

    def test_torchao(self, make_base, check):
        quantization = pytest.importorskip("torchao.quantization")

        def make():
            model = make_base("llama")
            quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
            return model

        check(make)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bitsandbytes(self, bits, check, tmp_path):
        pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path / "base")
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

        def make():
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path / "base", quantization_config=config, device_map="cpu"
            )
            return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

        check(make)


class TestCheckpointing:
    @pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
    def test_not_reentrant_changes_no_gradient(self, kind, adapt, make_batch):
        targets = {
            "gpt2": ["c_attn", "mlp"],
            "bert": ["query"],
            "t5": ["v", "DenseReluDense"],
            "llama": ["q_proj", "mlp"],
        }
        weights = {"aux_weight": 0.5, "z_weight": 0.1, "budget_weight": 0.5, "budget": 50.0}
        model = adapt(kind, target_modules=targets[kind], dtype=torch.float64, moved=True, **weights).train()
        batch = make_batch(kind)
        loss = model(**batch).loss
        loss.backward()
        expected = gradients(model)
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        again = model(**batch).loss
        again.backward()
        assert torch.equal(again, loss)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-14)

    def test_reentrant_raises_where_regularisers_would_vanish(self, adapt, make_batch):
        model = adapt("llama", target_modules=["q_proj", "mlp"], moved=True).train()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        with pytest.raises(RuntimeError, match="reentrant checkpointing"):
            model(**make_batch("llama"))

    def test_reentrant_is_fine_without_regularisers(self, adapt, make_batch):
        none = dict.fromkeys(("aux_weight", "budget_weight", "frame_weight", "z_weight"), 0.0)
        model = adapt("llama", target_modules=["q_proj", "mlp"], moved=True, **none).train()
        model(**make_batch("llama")).loss.backward()
        expected = gradients(model)
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        model(**make_batch("llama")).loss.backward()
        torch.testing.assert_close(gradients(model), expected)


@pytest.mark.slow
class TestCompiling:
    @pytest.mark.parametrize("fields", [{}, {"share_bank": True, "share_router": True}], ids=["private", "shared"])
    def test_training(self, fields, adapt, make_batch):
        model = adapt("llama", target_modules=["q_proj", "mlp"], moved=True, **fields).train()
        batch = make_batch("llama")
        loss = model(**batch).loss
        loss.backward()
        expected = gradients(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            again = compiled(**batch).loss
            torch.testing.assert_close(again, loss)
        again.backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)
        assert not any(len(module.statistics_log) for module in model.modules() if hasattr(module, "statistics_log"))

    def test_inference_in_one_graph(self, adapt, make_batch, output):
        model, batch = adapt("llama", target_modules=["q_proj", "mlp"], moved=True), make_batch("llama")
        expected = output(model, batch)
        torch._dynamo.reset()
        compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(output(compiled, batch), expected)


def test_regularisers_of_a_plain_model(adapt, make_batch):
    """Whose loss is computed outside."""
    model = adapt("mlp", target_modules=["first", "block"], moved=True).train()
    with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
        model(**make_batch("mlp")).square().mean().backward()
    model.zero_grad()
    task = model(**make_batch("mlp")).square().mean()
    total = regularization(model).total
    assert total > 0
    (task + total).backward()
    assert all(gradient.any() for gradient in gradients(model).values())
