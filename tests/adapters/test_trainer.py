"""Adapters under transformers' Trainer: exact accumulation, resuming, loading the best."""

import copy

import pytest
import torch
from torch.nn import functional

pytest.importorskip("accelerate")

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from torchdsc import regularization
from torchdsc.adapters import RegularizedLoss

# Linear in tokens, or independent of them: exact however a step is cut up.
LINEAR = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.1, "frame_weight": 0.05}
NONE = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.0, "frame_weight": 0.0}


def precise_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
    """transformers' loss is float32 whatever the model is."""
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.fixture
def make_trainer(tmp_path):
    def make(model, batch, accumulation=1, callbacks=(), cls=Trainer, **options):
        settings = {
            "output_dir": str(tmp_path / "trainer"),
            "per_device_train_batch_size": 4 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
        }
        arguments = TrainingArguments(**{**settings, **options})
        examples = [{name: value[i] for name, value in batch.items()} for i in range(4)]
        return cls(model, arguments, train_dataset=examples, eval_dataset=examples, callbacks=list(callbacks))

    return make


@pytest.fixture
def training(adapt):
    targets = {
        "llama": ["q_proj", "mlp"],
        "gpt2": ["c_attn"],
        "bert": ["query", "intermediate"],
        "dscgpt": ["qkv_proj"],
    }

    def make(kind, **fields):
        options = {"target_modules": targets[kind], "dtype": torch.float64, "moved": True, **LINEAR, **fields}
        model = adapt(kind, **options)
        if kind != "bert":
            model.base_model.model.loss_function = precise_loss
        return model

    return make


def trained(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def steps(make_model, make_trainer, batch):
    """Weights after one step, for each accumulation."""
    results = []
    for accumulation in (1, 2, 4):
        model = make_model()
        start = trained(model)
        make_trainer(model, batch, accumulation).train()
        results.append(trained(model))
        assert not any(torch.equal(value, start[name]) for name, value in results[-1].items())
    return results


@pytest.mark.parametrize("through", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_accumulation_takes_the_same_step(kind, through, training, make_trainer, make_batch):
    make_model = (lambda: training(kind)) if through == "get_peft_model" else (lambda: training(kind).base_model.model)
    first, *others = steps(make_model, make_trainer, make_batch(kind))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-13)


class OutsideTrainer(Trainer):
    """Computes its loss from logits, as TRL's do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        loss = precise_loss(model(**inputs).logits, labels, num_items_in_batch=num_items_in_batch)
        return (loss, None) if return_outputs else loss


class RegularizedOutsideTrainer(RegularizedLoss, OutsideTrainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_loss_outside_the_model_takes_the_same_step(accumulation, training, make_trainer, make_batch):
    inside, beside = training("llama"), training("llama")
    make_trainer(inside, make_batch("llama")).train()
    make_trainer(beside, make_batch("llama"), accumulation, cls=RegularizedOutsideTrainer).train()
    torch.testing.assert_close(trained(beside), trained(inside), rtol=1e-10, atol=1e-13)


class RegularizedTrainer(RegularizedLoss, Trainer):
    pass


def test_a_loss_inside_the_model_is_left_as_it_is(training, make_trainer, make_batch):
    plain, mixed = training("llama"), training("llama")
    make_trainer(plain, make_batch("llama")).train()
    make_trainer(mixed, make_batch("llama"), cls=RegularizedTrainer).train()
    torch.testing.assert_close(trained(mixed), trained(plain), rtol=0, atol=0)


def test_nothing_is_added_without_weights(training, make_trainer, make_batch):
    plain, beside = training("llama", **NONE), training("llama", **NONE)
    make_trainer(plain, make_batch("llama"), cls=OutsideTrainer).train()
    make_trainer(beside, make_batch("llama"), cls=RegularizedOutsideTrainer).train()
    torch.testing.assert_close(trained(beside), trained(plain), rtol=0, atol=0)


def test_a_model_that_averages_has_the_mean_over_micro_batches(training, make_trainer, make_batch):
    batch, size = make_batch("bert"), 0.1
    for accumulation in (1, 2, 4):
        model, expected = training("bert"), training("bert").train()
        make_trainer(model, batch, accumulation).train()
        for piece in range(accumulation):
            part = {name: value.chunk(accumulation)[piece] for name, value in batch.items()}
            task = functional.cross_entropy(expected(**{**part, "labels": None}).logits, part["labels"])
            ((task + regularization(expected).total) / accumulation).backward()
        for actual, parameter in zip(model.parameters(), expected.parameters(), strict=True):
            if parameter.requires_grad:
                torch.testing.assert_close(actual, parameter - size * parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_options_that_take_the_labels_out_raise(kind, option, training, make_trainer, make_batch):
    trainer = make_trainer(training(kind), make_batch(kind), **({option: 0.1} if "smoothing" in option else {}))
    if option == "compute_loss_func":
        trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
    with pytest.raises(RuntimeError, match=r"put torchdsc.RegularizedLoss before the class of a trainer"):
        trainer.train()


def smoothed(logits, labels, num_items_in_batch=None, **_):
    """The loss of Trainer's label smoothing, 0.1, in the dtype of the model."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_with_regularized_loss_they_take_the_step_of_a_loss_inside(
    option, accumulation, training, make_trainer, make_batch
):
    inside, beside = training("llama"), training("llama")
    inside.base_model.model.loss_function = smoothed
    make_trainer(inside, make_batch("llama")).train()
    options = {option: 0.1} if "smoothing" in option else {}
    trainer = make_trainer(beside, make_batch("llama"), accumulation, cls=RegularizedTrainer, **options)
    if not options:
        trainer.compute_loss_func = lambda outputs, labels, **keywords: smoothed(outputs.logits, labels, **keywords)
    trainer.train()
    torch.testing.assert_close(trained(beside), trained(inside), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("option", [{}, {"label_smoothing_factor": 0.1}])
def test_regularized_loss_passes_through_a_model_without_regularisers(option, make_base, make_trainer, make_batch):
    plain, beside = make_base("llama"), make_base("llama")
    make_trainer(plain, make_batch("llama"), **option).train()
    make_trainer(beside, make_batch("llama"), cls=RegularizedTrainer, **option).train()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), beside.parameters(), strict=True))


def test_evaluates_the_task_loss(training, make_trainer, make_batch):
    batch = make_batch("llama")
    model = training("llama")
    trainer = make_trainer(model, batch)
    trainer.train()
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("share_bank", [False, True])
def test_an_interrupted_run_resumes_exactly(share_bank, adapt, make_trainer, make_batch, tmp_path):
    fields = {"target_modules": ["q_proj", "mlp"], "share_bank": share_bank, "modules_to_save": ["lm_head"]}
    options = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole, batch = adapt("llama", **fields), make_batch("llama")
    make_trainer(whole, batch, **options).train()
    part = adapt("llama", **fields)
    make_trainer(part, batch, callbacks=[StopAt(2)], **options).train()
    again = adapt("llama", **fields)
    assert not torch.equal(trained(again)[next(iter(trained(again)))], trained(part)[next(iter(trained(part)))])
    make_trainer(again, batch, **options).train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert all(torch.equal(value, trained(whole)[name]) for name, value in trained(again).items())


def test_the_best_checkpoint_is_loaded(adapt, make_base, make_trainer, make_batch, output, tmp_path):
    """By a loss taken for a score, so that it is not the last."""
    model, batch = adapt("llama", target_modules=["q_proj"], moved=True), make_batch("llama")
    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 3}
    trainer = make_trainer(
        model,
        batch,
        learning_rate=1.0,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **options,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-3")
    loaded = PeftModel.from_pretrained(make_base("llama"), best)
    assert torch.equal(output(model.eval(), batch), output(loaded, batch))


def test_a_copy_trains_alone(training, make_batch):
    """The hook of the loss belongs to the copy."""
    model, batch = training("llama").train(), make_batch("llama")
    model(**batch)
    copied = copy.deepcopy(model)
    expected = model(**batch).loss
    assert torch.equal(copied(**batch).loss, expected)
    assert not any(len(m.statistics_log) for m in model.modules() if hasattr(m, "statistics_log"))
