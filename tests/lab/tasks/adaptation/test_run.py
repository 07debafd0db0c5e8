import json
import math
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import torchdsc.adapters
from torchdsc.lab.schema import SettingsError
from torchdsc.lab.tasks.adaptation import run as run_module
from torchdsc.lab.tasks.adaptation import task as task_module
from torchdsc.lab.tasks.adaptation.methods import head_parameters
from torchdsc.lab.tasks.adaptation.task import Task

DSC = {"method": "dsc", "budget": 512, "options": {"target_modules": ["query", "value"]}}
FULL = {"method": "full", "options": {}}
# What two equal runs need not share.
VARYING = {"train_seconds", "peak_memory_bytes", "commit"}


def run(settings, folder, *, is_trial=False):
    return Task().run(settings, 0, folder, label="a run", is_trial=is_trial)


@contextmanager
def stopped_at(step):
    """A run inside is stopped after a step, as by a callback."""
    made = run_module.build_trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == step

    def stopping(*arguments):
        trainer = made(*arguments)
        trainer.add_callback(Stop())
        return trainer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run_module, "build_trainer", stopping)
        with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of 6"):
            yield


def same(first, second):
    return all(first[key] == second[key] for key in first.keys() | second.keys() if key not in VARYING)


def weights(folder):
    return [file.read_bytes() for file in sorted((folder / "adapter").glob("*.safetensors"))]


@pytest.fixture(scope="module")
def finished(settings, reviews, tmp_path_factory):
    """Settings of a run with DSC, its folder and its record."""
    chosen = settings(**DSC, evaluation=str(reviews / "dev.tsv"), eval_every=2)
    folder = tmp_path_factory.mktemp("run") / "out"
    return chosen, folder, run(chosen, folder)


def test_record(finished):
    chosen, folder, record = finished
    assert json.loads((folder / "record.json").read_text()) == record
    assert record["description"] == "dsc: num_atoms 1, top_k 1"
    assert record["options"] == {"target_modules": ["query", "value"], "num_atoms": 1, "top_k": 1}
    assert record["config"] == chosen.model_dump()
    assert list(record["data"]) == [chosen.train, chosen.evaluation]
    assert record["params_adapter"] <= 512
    assert record["adapter_bytes"] == (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record["regularization"]["total"] > 0
    [layer, *others] = record["routing"]["layers"]
    # Query and value of two layers; the only atom is always taken.
    assert (layer["num_atoms"], layer["utilization"], layer["load"], len(others)) == (1, 1.0, [1.0], 3)
    assert [point["step"] for point in record["routing"]["history"]] == [2, 4]
    assert record["routing"]["history"][-1]["gate"] == pytest.approx(fmean(other["gate"] for other in (layer, *others)))
    assert [point["step"] for point in record["curve"]] == [2, 4]
    assert all(math.isfinite(point[key]) for point in record["curve"] for key in ("score", "validation_loss"))
    assert [point["step"] for point in record["train_curve"]] == [1, 2, 3, 4]
    assert all(point["grad_norm"] > 0 for point in record["train_curve"])
    assert not list(folder.glob("checkpoint-*"))


def test_saved_adapter_scores_what_was_recorded(finished, encoder):
    _, folder, record = finished
    base = AutoModelForSequenceClassification.from_pretrained(encoder)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert isinstance(model.base_model, torchdsc.adapters.DSCAdapterModel)
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    texts, labels = ["bad film", "good it was very", "bad"], [0, 1, 0]
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    assert record["score"] == pytest.approx(100 * right / 3)


def test_trials_are_scored_on_the_validation_part_and_keep_no_weights(finished, tmp_path):
    chosen, _, _ = finished
    record = run(chosen, tmp_path / "out", is_trial=True)
    assert record["score"] == max(point["score"] for point in record["curve"])
    assert "adapter_bytes" not in record
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["record.json"]
    assert run(chosen, tmp_path / "out", is_trial=True) == record


def test_a_run_that_diverges_stops(settings, tmp_path, caplog):
    record = run(settings(**FULL, learning_rate=1e30, eval_every=1), tmp_path / "out")
    step = record["diverged_at_step"]
    assert step in (2, 3, 4)
    assert math.isnan(record["score"])
    # As long as those of other runs.
    assert [point["step"] for point in record["curve"]] == [1, 2, 3, 4]
    assert math.isfinite(record["curve"][0]["score"])
    assert math.isnan(record["curve"][-1]["score"])
    assert record["train_curve"][-1]["step"] == step
    assert "a run diverged: the loss was nan at step" in caplog.text
    assert repr(run(settings(**FULL), tmp_path / "out")) == repr(record)


def test_weights_that_cannot_be_written(settings, tmp_path, monkeypatch):
    written = PeftModel.save_pretrained

    def save(self, folder, **options):
        if "adapter" in str(folder):
            raise OSError(28, "No space left on device")
        written(self, folder, **options)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    with pytest.raises(OSError, match=r"out/adapter could not be written: No space left on device"):
        run(settings(), tmp_path / "out")


def test_interrupted_run_goes_on_exactly(settings, tmp_path):
    chosen = settings(**DSC, steps=6, eval_every=2)
    whole = run(chosen, tmp_path / "whole")
    with stopped_at(3):
        run(chosen, tmp_path / "cut")
    assert same(run(chosen, tmp_path / "cut"), whole)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{}, {**DSC, "eval_every": 2}, {**FULL, "eval_every": 2}])
def test_killed_after_the_last_checkpoint(settings, tmp_path, monkeypatch, changes):
    # Six steps are no whole number of epochs, after which Trainer would stop by itself.
    chosen = settings(**changes, steps=6, learning_rate=1e-2)
    whole = run(chosen, tmp_path / "whole")

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "summary", killed)
        with pytest.raises(KeyboardInterrupt):
            run(chosen, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint-6").is_dir()
    with monkeypatch.context() as patched:
        patched.setattr(run_module.AdaptationTrainer, "training_step", None)
        resumed = run(chosen, tmp_path / "cut")
    assert same(resumed, whole)
    assert resumed["train_seconds"] > 0
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "least", "most"), [("lora", 1000, 10**5), ("full", 10**5, 10**7), ("head", 264, 999)]
)
def test_head_has_a_rate_of_its_own(settings, tmp_path, monkeypatch, method, least, most):
    rates = {True: set(), False: set()}

    class Trainer(run_module.AdaptationTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            head = {id(p) for p in head_parameters(self.model)}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates[id(parameter) in head].add(group["lr"])
            trained = {id(p) for p in self.model.parameters() if p.requires_grad}
            assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
            return optimizer

    monkeypatch.setattr(run_module, "AdaptationTrainer", Trainer)
    changes = {} if method == "lora" else {"options": {}}
    record = run(
        settings(method=method, **changes, learning_rate=1e-2, head_learning_rate=3e-4, weight_decay=0.1),
        tmp_path / "out",
    )
    assert record["routing"] is None
    assert rates == {True: {3e-4}, False: set() if method == "head" else {1e-2}}
    # A head has 2 x 32 and 2 numbers.
    assert least <= record["adapter_bytes"] <= most


@pytest.mark.parametrize("is_pair", [True, False])
def test_embeddings_learn(settings, pairs, tmp_path, is_pair):
    changes = pairs if is_pair else {}
    record = run(settings(**changes, **DSC, head="embedding", steps=30, learning_rate=3e-2), tmp_path / "out")
    assert [point["step"] for point in record["routing"]["history"]] == [30], "the final score alone"
    # The first word tells score and label.
    assert record["score"] > 90
    assert record["params_trainable"] - record["params_adapter"] == (4 * 32 + 1 if is_pair else 2 * 32 + 2)


def test_causal_lm_and_forgetting(settings, prose, reviews, tmp_path):
    changes = {**prose, **DSC, "budget": 900, "options": {"target_modules": ["q_proj", "mlp"]}}
    chosen = settings(**changes, retain=str(reviews / "old.txt"), learning_rate=1e-2, steps=8, eval_every=4)
    record = run(chosen, tmp_path / "out")
    assert record["score"] == -record["loss"]
    assert record["retain_loss_before"] > 0
    assert record["retain_loss_after"] != record["retain_loss_before"]
    # Without the evaluations of other parts.
    assert [point["step"] for point in record["curve"]] == [4, 8]
    assert all(point["score"] == -point["validation_loss"] for point in record["curve"])
    assert "retain_loss_before" not in run(chosen, tmp_path / "trial", is_trial=True)


@pytest.mark.parametrize("changes", [DSC, FULL, {"method": "lora", "options": {"r": 2}}], ids=["dsc", "full", "lora"])
def test_old_domains_in_a_record(settings, prose, reviews, tmp_path, changes):
    sources = [str(reviews / name) for name in ("old.txt", "prose.txt")]
    changes = {**prose, **changes, "options": {**changes["options"]}}
    if changes["options"]:
        changes["options"]["target_modules"] = ["q_proj", "v_proj"]
    changes |= {"retain": sources, "max_length": 32, "max_evaluation": 6, "choices": 5}
    task = Task()
    chosen = settings(**changes, learning_rate=3e-2, steps=8, eval_every=4)
    record = task.run(chosen, 0, tmp_path / "out", label="a run", is_trial=False)
    assert list(record["retained"]) == sources
    for old in record["retained"].values():
        assert old["loss_before"] != old["loss_after"]
        assert 0 <= old["choice_before"] <= 100
    for key in ("loss_before", "loss_after"):
        assert record[f"retain_{key}"] == pytest.approx(fmean(old[key] for old in record["retained"].values()))
    assert record["forgotten"] == record["retain_loss_after"] - record["retain_loss_before"]
    # What the base model knows does not depend on the method, or on what was trained before.
    other = task.run(
        settings(**changes, learning_rate=3e-2, steps=4), 1, tmp_path / "other", label="a run", is_trial=False
    )
    assert other["retain_loss_before"] == record["retain_loss_before"]
    fresh = run(settings(**{**changes, **DSC, "options": {"target_modules": ["mlp"]}}, steps=1), tmp_path / "fresh")
    assert fresh["retain_loss_before"] == pytest.approx(record["retain_loss_before"], abs=1e-6)


def test_a_record_does_not_depend_on_other_runs(settings, prose, reviews, tmp_path):
    """What the base model knows is measured once, without the adapter's changes to it, and draws no random number."""
    changes = {**prose, "method": "lora", "retain": str(reviews / "old.txt"), "steps": 3}
    lora = {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.3}
    task, alone = Task(), {}
    for name, options in (("pissa", {"init_lora_weights": "pissa"}), ("plain", {})):
        chosen = settings(**{**changes, "options": {**lora, **options}})
        alone[name] = run(chosen, tmp_path / f"alone-{name}")
        after = task.run(chosen, 0, tmp_path / f"after-{name}", label="a run", is_trial=False)
        assert same({**alone[name], "train_curve": 0, "routing": 0}, {**after, "train_curve": 0, "routing": 0}), name
    assert alone["pissa"]["retain_loss_before"] == alone["plain"]["retain_loss_before"]


BOUND = {**DSC, "options": {**DSC["options"], "max_update_norm": 0.1}}


@pytest.mark.parametrize(
    "changes", [DSC, BOUND, FULL, {"method": "lora", "options": {"r": 2}}], ids=["dsc", "bound", "full", "lora"]
)
def test_scaled_update(settings, prose, reviews, tmp_path, changes):
    """The saved weights are those on the way back to the base model, at whose end nothing is forgotten."""
    changes = {**prose, **changes, "options": {**changes["options"]}}
    if changes["options"]:
        changes["options"]["target_modules"] = ["q_proj", "v_proj"]
    changes |= {"retain": str(reviews / "old.txt"), "max_length": 32, "learning_rate": 3e-2, "steps": 12}
    found, saved = {}, {}
    for scale in (1.0, 0.25, 1e-6):
        found[scale] = run(settings(**changes, update_scale=scale), tmp_path / f"{scale}")
        [file] = (tmp_path / f"{scale}" / "adapter").glob("*.safetensors")
        saved[scale] = load_file(file)
    assert found[1e-6]["forgotten"] == pytest.approx(0.0, abs=1e-4)
    assert abs(found[0.25]["forgotten"]) > 1e-4
    base = load_file(Path(prose["base"]) / "model.safetensors")
    scaled = 0
    for name, weight in saved[1.0].items():
        is_full = changes["method"] == "full"
        zero = base[name] if is_full else torch.zeros_like(weight)
        if name.endswith("gamma") and "max_update_norm" in changes["options"]:
            outputs = [32 * each[name] / (1 + (32 * each[name]).abs() / 0.1) for each in (saved[1.0], saved[0.25])]
            torch.testing.assert_close(outputs[1], 0.25 * outputs[0])
            scaled += 1
        elif is_full or name.endswith(("gamma", "lora_B.weight")):
            torch.testing.assert_close(saved[0.25][name] - zero, 0.25 * (weight - zero), atol=1e-6, rtol=1e-4)
            scaled += 1
        else:
            assert torch.equal(saved[0.25][name], weight)
    assert scaled > 2


def test_also_scaled(settings, prose, reviews, tmp_path):
    """Points on the way back are those of runs with that scale, and the saved weights are of the whole update."""
    changes = {**prose, "retain": str(reviews / "old.txt"), "choices": 2, "max_length": 32}
    changes |= {
        "method": "dsc",
        "options": {"target_modules": ["q_proj", "mlp"], "num_atoms": 6},
        "learning_rate": 3e-2,
    }
    curve = run(settings(**changes, also_scaled=[0.25, 0.5]), tmp_path / "curve")
    plain = run(settings(**changes), tmp_path / "plain")
    assert weights(tmp_path / "curve") == weights(tmp_path / "plain")
    assert plain["scaled"] == []
    assert {key: value for key, value in curve.items() if key in ("score", "loss", "retained")} == {
        key: plain[key] for key in ("score", "loss", "retained")
    }
    assert [point["scale"] for point in curve["scaled"]] == [0.5, 0.25]
    for point in curve["scaled"]:
        alone = run(settings(**changes, update_scale=point["scale"]), tmp_path / f"{point['scale']}")
        for key in ("score", "loss", "forgotten", "retain_loss_before"):
            assert point[key] == pytest.approx(alone[key], abs=1e-5)
        assert point["loss"] != pytest.approx(plain["loss"], abs=1e-5)
        # Questions are asked at the end alone.
        assert "choice_after" not in point
        assert "choice_after" in alone


@pytest.fixture
def prompted(prose, reviews):
    """Settings that differ for a classification in words."""
    words = {"prompt": "the film was {sentence} very", "answers": {"0": "bad", "1": "good"}, "max_train": 32}
    columns = {"train": str(reviews / "train.tsv"), "text": ["sentence"], "validation_examples": 8, "max_length": 8}
    return {**prose, "kind": "prompted", **words, **columns}


def test_prompted(settings, prompted, reviews, tmp_path):
    """A causal LM learns to answer, and its score is of its answers."""
    changes = {**prompted, "retain": str(reviews / "old.txt"), "max_retained": 4, "choices": 2, "max_length": 16}
    changes |= {"options": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 3e-2, "steps": 60}
    record = run(settings(**changes, replay=0.2), tmp_path / "learnt")
    assert record["metric"] == "accuracy"
    assert record["score"] == 100
    assert {"forgotten", "choice_after"} <= record.keys()
    untrained = run(settings(**(changes | {"learning_rate": 1e-9, "steps": 1})), tmp_path / "untrained")
    assert untrained["score"] < 75
    # By hand, on the examples of the score.
    data, _ = Task()._data(settings(**changes))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(prompted["base"]), tmp_path / "untrained/adapter"
    )
    right, losses = [], []
    for example in data.evaluation:
        *ids, answer = example["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        right.append(logits[answer] == logits[list(data.answers.tokens)].max())
        losses.append(-logits.log_softmax(-1)[answer])
    assert untrained["score"] == pytest.approx(100 * float(torch.stack(right).float().mean()))
    assert untrained["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_quiet_on_old_text(settings, prose, reviews, tmp_path):
    """The gate closes on the old text's blocks that are trained on, and hardly on others."""
    options = {"target_modules": ["q_proj", "mlp"], "router_input": "embeddings", "router_context": 2, "num_atoms": 6}
    changes = {**prose, "method": "dsc", "options": options, "learning_rate": 3e-2, "steps": 40, "max_evaluation": 4}
    changes |= {"retain": str(reviews / "old.txt")}
    task, forgotten = Task(), {}
    for quiet in (0.0, 1.0):
        chosen = settings(**changes, quiet=quiet)
        record = task.run(chosen, 0, tmp_path / f"{quiet}", label="a run", is_trial=False)
        forgotten[quiet] = record["forgotten"]
    assert forgotten[1.0] < forgotten[0.0]
    base = AutoModelForCausalLM.from_pretrained(prose["base"])
    model = PeftModel.from_pretrained(base, tmp_path / "1.0" / "adapter")
    data, _ = task._data(chosen)
    [old] = data.retain.blocks.values()
    strengths = [
        float(torchdsc.adapters.signal_strength(model, torch.stack([block["input_ids"] for block in blocks])))
        for blocks in (old, data.evaluation)
    ]
    assert strengths[0] < 0.2 * strengths[1]


def test_choices_are_told(settings, prose, reviews, tmp_path):
    """A model that has learnt a text by heart knows how it goes on; a text of other words it knows no better."""
    changes = {**prose, **FULL, "max_length": 32, "retain": prose["train"], "max_evaluation": 16, "choices": 16}
    record = run(settings(**changes, learning_rate=1e-2, steps=150), tmp_path / "out")
    assert record["choice_after"] > record["choice_before"] + 20


def test_task_loads_and_solves_once(settings, tmp_path, monkeypatch):
    calls = []
    for name in ("load_data", "solve_options"):
        made = getattr(task_module, name)
        monkeypatch.setattr(task_module, name, lambda *a, made=made, name=name: calls.append(name) or made(*a))
    task, chosen = Task(), settings(**DSC)
    assert task.describe(chosen) == "dsc: num_atoms 1, top_k 1"
    task.data(chosen)
    other = settings(**DSC, learning_rate=1.0, steps=7)
    assert task.timed(other, tmp_path).batch == (4, 6)
    assert 0 < task.seconds(other, is_trial=True) < 60
    assert sorted(calls) == ["load_data", "solve_options"]
    task.data(settings(max_train=20))
    assert task.describe(settings(**FULL)) == "full"
    assert sorted(calls) == ["load_data", "load_data", "solve_options", "solve_options"]
    task.timed(other, tmp_path).call()


def test_a_missing_base_is_named(settings, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"^base '.*/nosuch': ") as absolute:
        Task().data(settings(base=str(tmp_path / "nosuch")))
    assert "there is no folder" not in str(absolute.value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        SettingsError, match=rf"(?s)^base 'models/nosuch': .* no folder models/nosuch in {tmp_path}, so"
    ):
        Task().data(settings(base="models/nosuch"))
