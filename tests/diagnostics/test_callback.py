import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import torchdsc
from torchdsc.adapters import DSCAdapterConfig
from torchdsc.diagnostics import DiagnosticsCallback, DiagnosticsWarning
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}


def dscgpt():
    options = {"num_atoms": 40, "top_k": 4}
    return DSCGPTForCausalLM(
        DSCGPTConfig(**SIZES, intermediate_size=16, feed_forward="dsc", feed_forward_options=options)
    )


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))


def converted():
    model = llama()
    torchdsc.convert(model, num_atoms=40, top_k=4)
    return model


def adapted():
    return get_peft_model(llama(), DSCAdapterConfig(target_modules=["q_proj", "v_proj"], num_atoms=24, top_k=2))


class Reporter(TrainerCallback):
    """What a reporter, TensorBoard's for example, gets."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))

    @property
    def steps(self):
        return [step for step, logs in self.logs if any(key.startswith("dsc/") for key in logs)]


def trainer_of(model, folder, *, steps=5, **arguments):
    torch.manual_seed(0)
    examples = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(64, (64, 12))]
    options = {"max_steps": steps, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "seed": 0}
    options |= {
        "output_dir": str(folder),
        "save_strategy": "no",
        "logging_steps": 2,
        "learning_rate": 1e-3,
        **arguments,
    }
    reporter = Reporter()
    return Trainer(model, TrainingArguments(**options), train_dataset=examples, callbacks=[reporter]), reporter


@pytest.mark.parametrize("build", [dscgpt, converted, adapted], ids=lambda build: build.__name__)
def test_every_kind_of_model_is_measured(build, tmp_path):
    trainer, reporter = trainer_of(build(), tmp_path)
    callback = DiagnosticsCallback(trainer, every=2)
    trainer.add_callback(callback)
    trainer.train()
    assert reporter.steps == [1, 3, 5]
    logs = {key: value for _, entry in reporter.logs for key, value in entry.items() if key.startswith("dsc/")}
    expected = {"utilization", "gate", "clamped", "agreement", "effective_rank_u", "turn", "certified_norm"}
    expected |= {"measured_norm", "gradient_norm_atoms", "gradient_norm_router", "gradient_norm_gamma"}
    assert {f"dsc/{name}" for name in expected} <= set(logs)
    assert logs["dsc/turn"] > 0
    assert logs["dsc/gradient_norm_atoms"] > 0
    assert any("dsc/gate" in entry for entry in trainer.state.log_history)
    assert callback.latest is not None
    assert len(callback.latest.layers) == (6 if build is adapted else 3)


def test_each_layer_within_the_cap(tmp_path):
    trainer, reporter = trainer_of(dscgpt(), tmp_path, steps=1)
    trainer.add_callback(DiagnosticsCallback(trainer, per_layer=True, max_keys=60))
    trainer.train()
    keys = [key for _, entry in reporter.logs for key in entry if key.startswith("dsc/")]
    assert 40 < len(keys) <= 60
    assert "dsc/model.blocks.0.feed_forward.dsc/gate" in keys


@pytest.mark.parametrize(
    "arguments",
    [{"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_training_is_the_same_with_and_without(arguments, tmp_path):
    losses = []
    for measures in (False, True):
        torch.manual_seed(0)
        trainer, _ = trainer_of(dscgpt(), tmp_path, steps=4, **arguments)
        if measures:
            trainer.add_callback(DiagnosticsCallback(trainer, every=2))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_sign_of_failure_warns_once(tmp_path):
    model = dscgpt()
    for block in model.model.blocks:
        torch.nn.init.normal_(block.feed_forward.dsc.router.weight, std=60.0)
    trainer, _ = trainer_of(model, tmp_path)
    callback = DiagnosticsCallback(trainer, every=1)
    trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    texts = [str(each.message) for each in caught if issubclass(each.category, DiagnosticsWarning)]
    assert sum(text.startswith("logits-clamped in model.blocks.0.feed_forward.dsc") for text in texts) == 1
    assert "logits-clamped" in callback.found


def test_explosion_is_seen_though_gradients_are_clipped(tmp_path):
    model = dscgpt()
    trainer, _ = trainer_of(model, tmp_path, steps=8, logging_steps=1, max_grad_norm=1.0)
    callback = DiagnosticsCallback(trainer, every=100)
    trainer.add_callback(callback)
    whole = trainer.compute_loss

    def exploding(*args, **kwargs):
        return whole(*args, **kwargs) * (1e5 if trainer.state.global_step >= 5 else 1.0)

    trainer.compute_loss = exploding
    with pytest.warns(DiagnosticsWarning, match="exploding-gradients: the gradient's norm is .* before clipping"):
        trainer.train()


def test_loss_that_is_no_number_warns_and_does_not_raise(tmp_path):
    trainer, _ = trainer_of(dscgpt(), tmp_path, logging_nan_inf_filter=False)
    trainer.add_callback(DiagnosticsCallback(trainer, every=1))
    whole = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: whole(*args, **kwargs) * torch.nan
    with pytest.warns(DiagnosticsWarning, match="exploding-gradients"):
        trainer.train()


def test_the_loss_is_logged_at_measured_steps_too(tmp_path):
    trainer, reporter = trainer_of(dscgpt(), tmp_path, logging_steps=1)
    trainer.add_callback(DiagnosticsCallback(trainer, every=1))
    trainer.train()
    assert reporter.steps == [1, 2, 3, 4, 5]
    assert [step for step, logs in reporter.logs if "loss" in logs] == [1, 2, 3, 4, 5]


def test_overflow_of_float16_is_no_explosion(tmp_path, monkeypatch):
    trainer, _ = trainer_of(dscgpt(), tmp_path, logging_nan_inf_filter=False, max_steps=1, logging_steps=1)
    callback = DiagnosticsCallback(trainer, every=1)
    trainer.add_callback(callback)
    whole = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: whole(*args, **kwargs) * torch.inf
    # As a scaler says that has found the overflow.
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    trainer.train()
    assert "exploding-gradients" not in callback.found
    assert callback.latest.gradient_norms == {}


def test_an_error_within_a_step_leaves_no_hooks(tmp_path):
    model = dscgpt()
    trainer, _ = trainer_of(model, tmp_path)
    callback = DiagnosticsCallback(trainer, every=1)
    trainer.add_callback(callback)
    callback.on_step_begin(trainer.args, trainer.state, trainer.control)
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.blocks.modules())


def test_bad_arguments(tmp_path):
    trainer, _ = trainer_of(dscgpt(), tmp_path)
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        DiagnosticsCallback(trainer, every=0)
    dense, _ = trainer_of(llama(), tmp_path)
    with pytest.raises(ValueError, match="model must contain a routed layer, got LlamaForCausalLM"):
        DiagnosticsCallback(dense)
