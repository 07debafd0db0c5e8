import io
import json
import math
import re
import shutil
import subprocess
import sys
from statistics import median

import pytest
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

import torchdsc.adapters
from torchdsc.lab.adapt import run as run_module
from torchdsc.lab.adapt.methods import head_parameters
from torchdsc.lab.adapt.report import render_report
from torchdsc.lab.adapt.study import _best_rate, adapt, dry_run
from torchdsc.lab.adapt.summary import difference, summarize, to_markdown
from torchdsc.lab.schema import SettingsError


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """A finished study with tuning and two seeds, and its folder."""
    config = study(seeds=[0, 1], learning_rates=[1e-3, 1e-2])
    folder = tmp_path_factory.mktemp("study") / "out"
    return config, folder, adapt(config, folder)


def test_results(finished):
    _, folder, results = finished
    assert [(run["method"], run["seed"]) for run in results["runs"]] == [
        ("LoRA", 0), ("DSC", 0), ("LoRA", 1), ("DSC", 1)
    ]  # fmt: skip
    assert json.loads((folder / "results.json").read_text())["runs"] == results["runs"]
    for name in ("LoRA", "DSC"):
        trials = {t["learning_rate"]: t["score"] for t in results["trials"] if t["method"] == name}
        assert len(trials) == 2
        assert trials[results["rates"][name]] == max(trials.values())
    for run in results["runs"]:
        assert run["learning_rate"] == results["rates"][run["method"]]
        assert run["params_adapter"] <= 512
        weights = folder / f"run-reviews-{run['method']}-lr{run['learning_rate']:g}-seed{run['seed']}" / "adapter"
        assert run["adapter_bytes"] == (weights / "adapter_model.safetensors").stat().st_size
    assert {run["method"]: bool(run["regularization"]) for run in results["runs"]} == {"LoRA": False, "DSC": True}


def test_dry_run(finished, study, tmp_path):
    """Counts what is left to do, times it, and leaves the folder as it is."""
    config, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    shutil.rmtree(folder / f"run-reviews-DSC-lr{results['rates']['DSC']:g}-seed1")
    before = sorted(folder.rglob("*"))

    def lines(config, place):
        console = Console(file=io.StringIO(), width=200)
        dry_run(config, place, console=console)
        return console.file.getvalue().splitlines()

    data, *_, sizes, lora, dsc, last = lines(config, folder)
    assert data == "reviews: 56 train, 8 validation, 3 evaluation"
    assert re.fullmatch(r"DSC: dsc \{.*'num_atoms': .*\}; \d+ parameters of the adapter", sizes)
    assert lora == "LoRA: 4 runs, 4 of them done before"
    assert re.fullmatch(r"DSC: 4 runs, 3 of them done before: about \d+ s", dsc)
    assert re.fullmatch(rf"in all about \d+ s .*; a dry run: {folder} is left as it is", last)
    assert before == sorted(folder.rglob("*"))
    lines(study(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_base_is_named(study, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match=r"^base 'nosuch': "):
        adapt(study(base="nosuch"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_report_stands_by_itself(finished):
    _, folder, _ = finished
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert "DSC" in page
    assert (folder / "table.md").read_text().count("\n") == 4


def test_report_says_how_many_seeds_and_steps_there_are(finished):
    _, _, results = finished
    methods = [results["config"]["methods"][0] | {"seeds": [0, 1, 2]}, *results["config"]["methods"][1:]]
    runs = [run | {"steps": 1000 * (1 + run["seed"])} for run in results["runs"]]
    page = render_report(results | {"config": results["config"] | {"methods": methods}, "runs": runs})
    facts = re.sub(r"<[^>]+>", " ", page[page.index("Seeds of a method") :])
    assert re.match(
        r"Seeds of a method\s+2 to 3\s+Training\s+1,000 to 2,000 steps of \d+\s+Learning.*tried\s+2\s", facts
    )


def test_finished_runs_are_kept(finished, monkeypatch):
    config, folder, results = finished
    monkeypatch.setattr(run_module, "build_model", None)
    again = adapt(config, folder)
    assert again["runs"] == results["runs"]


def test_times_are_kept_for_the_same_methods_alone(finished, tmp_path):
    config, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    assert adapt(config, folder)["timing"] == results["timing"]
    of_another = json.loads((folder / "timing.json").read_text())
    of_another["DSC"]["options"]["top_k"] += 1
    (folder / "timing.json").write_text(json.dumps(of_another))
    anew = adapt(config, folder)["timing"]
    assert anew["DSC"]["options"] == results["timing"]["DSC"]["options"]
    # All are measured in the same rounds.
    assert all(anew[name]["samples"] != results["timing"][name]["samples"] for name in anew)


@pytest.mark.parametrize("damaged", ["all", "a number", "no samples"])
def test_damaged_times_are_measured_anew(finished, tmp_path, damaged):
    config, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    dsc = {name: results["timing"]["DSC"][name] for name in ("kind", "options")}
    content = {"all": {}, "a number": results["timing"] | {"DSC": 5}, "no samples": results["timing"] | {"DSC": dsc}}
    (folder / "timing.json").write_text(json.dumps(content[damaged]))
    anew = adapt(config, folder)["timing"]
    assert anew["DSC"]["options"] == results["timing"]["DSC"]["options"]


def test_saved_adapter_scores_what_was_recorded(finished, encoder):
    _, folder, results = finished
    run = results["runs"][1]
    place = folder / f"run-reviews-DSC-lr{run['learning_rate']:g}-seed0" / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(encoder)
    model = PeftModel.from_pretrained(base, place).eval()
    assert isinstance(model.base_model, torchdsc.adapters.DSCAdapterModel)
    tokenizer = AutoTokenizer.from_pretrained(place)
    texts, labels = ["bad film", "good it was very", "bad"], [0, 1, 0]
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    right = sum(int(row.argmax()) == label for row, label in zip(logits, labels, strict=True))
    assert run["score"] == pytest.approx(100 * right / 3)


def test_more_seeds_may_be_added(finished, study, tmp_path):
    _, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    more = adapt(study(seeds=[0, 1, 2], learning_rates=[1e-3, 1e-2]), folder)
    assert more["runs"][:4] == results["runs"]
    assert len(more["runs"]) == 6


def test_a_rate_that_diverged_is_not_chosen(study):
    config = study(learning_rates=[1e-3, 1e-2, 1e-1])
    scores = {1e-3: 50.0, 1e-2: 60.0, 1e-1: float("nan")}
    trials = [{"method": "DSC", "learning_rate": rate, "score": score} for rate, score in scores.items()]
    assert _best_rate(config, config.methods[1], trials) == 1e-2


def test_a_run_that_diverges_stops_and_is_told_apart(study, tmp_path, caplog):
    """The other trial and method go on; the rate that can be trained is chosen."""
    methods = [
        {"name": "full", "kind": "full", "learning_rates": [1e30]},
        {"name": "LoRA", "kind": "lora", "options": {"r": 2, "target_modules": ["query", "value"]}},
    ]
    config = study(methods=methods, learning_rates=[1e-3], seeds=[0])
    results = adapt(config, tmp_path / "out")
    runs = {run["method"]: run for run in results["runs"]}
    assert runs["full"]["diverged_at_step"] in (2, 3, 4)
    assert math.isnan(runs["full"]["score"])
    assert runs["LoRA"]["diverged_at_step"] is None
    assert math.isfinite(runs["LoRA"]["score"])
    assert "diverged: the loss was nan at step" in caplog.text
    assert "| full |" in (table := to_markdown(results))
    assert "NaN" in table
    # Again from its records.
    assert repr(adapt(config, tmp_path / "out")["runs"]) == repr(results["runs"])


class TestErrors:
    def test_record_of_another_run(self, study, tmp_path):
        config = study(methods=[{"name": "m", "kind": "lora", "options": {"r": 2, "target_modules": ["query"]}}])
        adapt(config, tmp_path / "out")
        (record,) = (tmp_path / "out").glob("run-*/record.json")
        changed = json.loads(record.read_text())
        changed["config"]["method"]["options"]["r"] = 4
        record.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"must be a record of this study, got one of options .*'r': 4"):
            adapt(config, tmp_path / "out")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{}", "is damaged: it must have task, got none; delete its folder"),
            ("[]", "is damaged: it holds a list"),
            ('{"task": ', "is damaged: "),
            ("", "is damaged: "),
        ],
    )
    def test_damaged_record(self, finished, tmp_path, content, message):
        config, original, _ = finished
        folder = shutil.copytree(original, tmp_path / "copy")
        file = next(folder.glob("run-*/record.json"))
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} {message}"):
            adapt(config, folder)

    def test_record_that_lacks_a_part(self, finished, tmp_path):
        config, original, _ = finished
        folder = shutil.copytree(original, tmp_path / "copy")
        file = next(folder.glob("run-*/record.json"))
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"score": "high"}))
        with pytest.raises(ValueError, match=r"record\.json is damaged: it must have score, got 'high'"):
            adapt(config, folder)
        file.write_text(json.dumps(record | {"config": {}}))
        with pytest.raises(ValueError, match=r"record\.json must be a record of this study"):
            adapt(config, folder)

    @pytest.mark.parametrize("content", ["", "null", "- a", "a: [", "a: 1\na: 2"])
    def test_damaged_configuration(self, finished, tmp_path, content):
        config, original, _ = finished
        folder = shutil.copytree(original, tmp_path / "copy")
        (folder / "config.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"config\.yaml must (be YAML|hold settings by name), got"):
            adapt(config, folder)

    @pytest.mark.parametrize("part", ["train", "evaluation", "retain"])
    def test_changed_data(self, study, decoder, reviews, tmp_path, monkeypatch, part):
        task = {"name": "t", "kind": "causal_lm", "text": ["text"]}
        for name, file in (("train", "prose.txt"), ("evaluation", "old.txt"), ("retain", "old.txt")):
            task[name] = str(shutil.copy(reviews / file, tmp_path / f"{name}.txt"))
        methods = [{"name": "m", "kind": "lora", "options": {"r": 2, "target_modules": ["q_proj"]}}]
        config = study(base=decoder, tasks=[task], methods=methods, validation_examples=4)

        def killed(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(run_module, "build_model", killed)
            with pytest.raises(KeyboardInterrupt):
                adapt(config, tmp_path / "out")
        file = tmp_path / f"{part}.txt"
        content = file.read_text()
        file.write_text(content.replace("very", "not"))
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(file))} of task 't' must hold what it held when the stud"
        ):
            adapt(config, tmp_path / "out")
        file.write_text(content)
        assert len(adapt(config, tmp_path / "out")["runs"]) == 1

    @pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
    def test_launch_of_several_processes(self, study, tmp_path, monkeypatch, variable):
        monkeypatch.setenv(variable, "2")
        with pytest.raises(ValueError, match=r"takes processes that are started one by one, got a launch of 2: start"):
            adapt(study(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "changes",
        [
            {"methods": [("a b", [1e-3]), ("a_b", [1e-3])]},
            {"methods": [("m", [1e-3, 1.00000001e-3])]},
            {"tasks": ["a b", "a/b"]},
            {"tasks": ["a", "a-b"], "methods": [("b-m", [1e-3]), ("m", [1e-3])]},
        ],
    )
    def test_runs_that_would_share_a_folder(self, study, tmp_path, changes):
        values = study().as_dict()
        tasks = [values["tasks"][0] | {"name": name} for name in changes.get("tasks", ["t"])]
        method = values["methods"][0]
        methods = [
            method | {"name": name, "learning_rates": rates} for name, rates in changes.get("methods", [("m", [1e-3])])
        ]
        with pytest.raises(
            SettingsError, match=r"^\w+ of method .* and \w+ of method .* must differ in the names of their"
        ):
            adapt(study(tasks=tasks, methods=methods), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_folder_of_another_study(self, finished, study):
        _, folder, _ = finished
        with pytest.raises(ValueError, match=r"holds a study with steps 4 instead of 5"):
            adapt(study(seeds=[0, 1, 2], learning_rates=[1e-3, 1e-2], steps=5), folder)

    def test_folder_with_other_files(self, study, tmp_path):
        (tmp_path / "a").touch()
        with pytest.raises(ValueError, match="output must be a new or empty folder"):
            adapt(study(), tmp_path)


def test_interrupted_run_goes_on_exactly(study, tmp_path, monkeypatch):
    method = [{"name": "DSC", "kind": "dsc", "options": {"num_atoms": 8, "target_modules": ["query"]}}]
    config = study(methods=method, steps=6, eval_every=2)
    whole = adapt(config, tmp_path / "whole")["runs"][0]

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    made = run_module._trainer

    def stopping(*arguments, **named):
        trainer = made(*arguments, **named)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_trainer", stopping)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 6"):
            adapt(config, tmp_path / "cut")
    resumed = adapt(config, tmp_path / "cut")["runs"][0]
    for key in ("score", "loss", "curve"):
        assert resumed[key] == whole[key]
    name = f"run-reviews-DSC-lr{config.learning_rates[0]:g}-seed0/adapter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("kind", "eval_every"), [("lora", None), ("dsc", 2), ("full", 2)])
def test_killed_after_the_last_checkpoint(study, tmp_path, monkeypatch, kind, eval_every):
    options = {"lora": {"r": 2}, "dsc": {"num_atoms": 8}}.get(kind)
    method = {"name": "m", "kind": kind} | ({"options": {**options, "target_modules": ["query"]}} if options else {})
    # Six steps are no whole number of epochs, after which Trainer would stop by itself.
    config = study(methods=[method], steps=6, eval_every=eval_every, learning_rates=[1e-2])
    whole = adapt(config, tmp_path / "whole")["runs"][0]
    seconds = []

    def killed(trainer, *arguments):
        seconds.append(run_module.noted(trainer.state.log_history)["train_seconds"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            adapt(config, tmp_path / "cut")
    (checkpoint,) = (tmp_path / "cut").glob("run-*/checkpoint-6")
    with monkeypatch.context() as patched:
        patched.setattr(run_module.HeadTrainer, "training_step", None)
        resumed = adapt(config, tmp_path / "cut")["runs"][0]
    assert not checkpoint.exists()
    for key in ("steps", "score", "loss", "curve", "regularization"):
        assert resumed[key] == whole[key]
    # But for what came after the checkpoint.
    assert 0.5 * seconds[0] < resumed["train_seconds"] <= seconds[0]
    first, second = (sorted((tmp_path / name).glob("run-*/adapter/*.safetensors")) for name in ("whole", "cut"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_seconds_and_memory_of_all_calls(study, tmp_path, monkeypatch):
    method = [{"name": "m", "kind": "lora", "options": {"r": 2, "target_modules": ["query"]}}]
    config = study(methods=method, steps=6, eval_every=2)
    made = run_module._trainer

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    def stopping(*arguments, **named):
        trainer = made(*arguments, **named)
        trainer.add_callback(Stop())
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "_trainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            adapt(config, tmp_path)
    (file,) = tmp_path.glob("run-*/checkpoint-4/trainer_state.json")
    state = json.loads(file.read_text())
    for entry in state["log_history"]:
        entry |= {"train_seconds": 1000.0, "peak_memory_bytes": 2**50}
    file.write_text(json.dumps(state))
    (run,) = adapt(config, tmp_path)["runs"]
    assert 1000 < run["train_seconds"] < 1100
    assert run["peak_memory_bytes"] == 2**50


def test_seeds_of_a_method(study, tmp_path):
    first, second = study().as_dict()["methods"]
    results = adapt(study(methods=[{**first, "seeds": [3, 0, 1]}, second], seeds=[0]), tmp_path / "out")
    runs = [(run["method"], run["seed"]) for run in results["runs"]]
    assert runs == [("LoRA", 3), ("LoRA", 0), ("DSC", 0), ("LoRA", 1)]
    # What is compared are the seeds that both have.
    scores = {run["method"]: run["score"] for run in results["runs"] if run["seed"] == 0}
    assert difference(results["runs"], "DSC", "LoRA").mean == pytest.approx(scores["DSC"] - scores["LoRA"])


def test_head_has_a_rate_of_its_own(study, tmp_path, monkeypatch):
    seen = {}
    methods = [
        {"name": "LoRA", "kind": "lora", "options": {"r": 2, "target_modules": ["query"]}},
        {"name": "all", "kind": "full"},
        {"name": "head", "kind": "head"},
    ]

    class Trainer(run_module.HeadTrainer):
        def create_optimizer(self, *args):
            optimizer = super().create_optimizer(*args)
            head = {id(p) for p in head_parameters(self.model)}
            rates = {True: set(), False: set()}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    rates[id(parameter) in head].add(group["lr"])
            seen[len(seen)] = rates
            trained = {id(p) for p in self.model.parameters() if p.requires_grad}
            assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trained
            return optimizer

    monkeypatch.setattr(run_module, "HeadTrainer", Trainer)
    config = study(methods=methods, learning_rates=[1e-2], head_learning_rate=3e-4, weight_decay=0.1)
    results = adapt(config, tmp_path / "out")
    assert seen == {
        0: {True: {3e-4}, False: {1e-2}},
        1: {True: {3e-4}, False: {1e-2}},
        2: {True: {3e-4}, False: set()},
    }
    sizes = {run["method"]: run["adapter_bytes"] for run in results["runs"]}
    # A head of 2 x 32 and 2 numbers.
    assert 4 * 66 < sizes["head"] < 1000 < sizes["LoRA"] < sizes["all"]


def test_regression_and_full_fine_tuning(study, reviews, tmp_path):
    task = {"name": "pairs", "train": str(reviews / "scores.tsv"), "kind": "regression", "label": "score"}
    task["text"] = ["sentence1", "sentence2"]
    results = adapt(study(tasks=[task], methods=[{"name": "all", "kind": "full"}]), tmp_path / "out")
    (run,) = results["runs"]
    assert -100 <= run["score"] <= 100
    # But for the head, of 32 weights and a bias.
    assert run["params_adapter"] == run["params_trainable"] - 33


def test_causal_lm_and_forgetting(study, decoder, reviews, tmp_path):
    task = {"name": "prose", "train": str(reviews / "prose.txt"), "kind": "causal_lm", "text": ["text"]}
    task["retain"] = str(reviews / "old.txt")
    methods = [{"name": "DSC", "kind": "dsc", "budget": 900, "options": {"target_modules": ["q_proj", "mlp"]}}]
    config = study(base=decoder, tasks=[task], methods=methods, validation_examples=4, learning_rates=[1e-2], steps=8)
    (run,) = adapt(config, tmp_path / "out")["runs"]
    assert run["score"] == -run["loss"]
    assert run["retain_loss_before"] > 0
    assert run["retain_loss_after"] != run["retain_loss_before"]
    assert "old domain" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_share_the_work(study, tmp_path):
    config = study(seeds=[0, 1, 2])
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(config.as_dict()))
    command = [sys.executable, "-m", "torchdsc.cli", "adapt", "--config", str(file), "--output", str(tmp_path / "out")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=250)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["runs"]) == 6
    # Each run was done once, by one or the other.
    started = [line for text in printed for line in text.splitlines() if ": run-" in line]
    assert len(started) == len({line.split(": run-")[1] for line in started}) == 6


class TestSummary:
    def runs(self, scores):
        return [
            {"method": method, "task": task, "seed": seed, "score": value}
            for (method, task), values in scores.items()
            for seed, value in enumerate(values)
        ]

    def test_difference_is_paired_by_seed_and_averaged_over_tasks(self):
        scores = {("a", "x"): [1.0, 3.0], ("b", "x"): [0.0, 1.0], ("a", "y"): [5.0, 5.0], ("b", "y"): [4.0, 6.0]}
        found = difference(self.runs(scores), "a", "b")
        # x: differences 1 and 2; y: 1 and -1. Variances 0.5 and 2, each over two seeds.
        assert found.mean == pytest.approx((1.5 + 0.0) / 2)
        # Welch and Satterthwaite: (0.25 + 1)^2 / (0.25^2 + 1^2) = 1.47 degrees of freedom.
        assert found.half_width == pytest.approx(12.71 * (0.5 / 2 + 2 / 2) ** 0.5 / 2)

    def test_equal_variances_have_the_degrees_of_freedom_of_all_tasks(self):
        scores = {(method, task): [value, -value] for method, value in (("a", 1.0), ("b", 0.0)) for task in "vwxyz"}
        found = difference(self.runs(scores), "a", "b")
        assert (found.mean, found.half_width) == (0.0, pytest.approx(2.571 * (5 * 2 / 2) ** 0.5 / 5))

    def test_one_seed_has_no_interval(self):
        found = difference(self.runs({("a", "x"): [1.0], ("b", "x"): [2.0]}), "a", "b")
        assert (found.mean, found.half_width) == (-1.0, None)

    def test_rows_and_table(self, finished):
        _, _, results = finished
        lora, dsc = summarize(results)
        assert lora.against is None
        assert dsc.against is not None
        samples = [results["timing"][name]["samples"] for name in ("DSC", "LoRA")]
        assert dsc.step_ratio == median(own / other for own, other in zip(*samples, strict=True))
        assert to_markdown(results).splitlines()[3].startswith("| DSC |")
