"""The comparison end to end: its files, going on after an interruption, and folders that it leaves alone."""

import dataclasses
import io
import json
import math
import re

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from torchdsc.lab import compare as lab_compare
from torchdsc.lab import experiment, training
from torchdsc.lab.compare import compare
from torchdsc.lab.summaries import REQUIRED_KEYS, summarize
from torchdsc.lab.tables import to_markdown

COMPARED = ("dense", "moe", "mixture_of_loras", "dsc")


def run(config, folder):
    """The records, and what was printed."""
    console = Console(file=io.StringIO(), width=200)
    return compare(config, folder, console=console), console.file.getvalue()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def experiment_of_all(tiny):
    return dataclasses.replace(tiny, seeds=[1, 2], steps=4)


@pytest.fixture(scope="module")
def finished(experiment_of_all, tmp_path_factory):
    """A finished comparison of all methods: folder, records, output. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return folder, *run(experiment_of_all, folder)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training, "_train", lambda *args: pytest.fail("trained"))


@pytest.fixture
def one(tiny):
    return dataclasses.replace(tiny, methods=["dense"], steps=2)


class TestEndToEnd:
    def test_results_are_the_records(self, finished):
        folder, runs, _ = finished
        assert json.loads((folder / "results.json").read_text()) == {"format": 1, "runs": runs}
        assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for s in (1, 2) for m in COMPARED]
        for record in runs:
            assert set(REQUIRED_KEYS) <= set(record)
            kept = json.loads((folder / f"{record['method']}-seed{record['seed']}" / "record.json").read_text())
            assert kept == {key: value for key, value in record.items() if key != "latency_ms"}
            assert math.isfinite(record["test_loss"])

    def test_files_agree(self, finished, experiment_of_all):
        folder, runs, _ = finished
        assert (folder / "table.md").read_text() == to_markdown(summarize(runs))
        report = (folder / "report.html").read_text()
        for record in runs:
            assert record["description"] in report
            assert f"{record['test_loss']:.4f}" in report
        assert yaml.safe_load((folder / "config.yaml").read_text()) == experiment_of_all.as_dict()
        assert json.loads((folder / "corpus.json").read_text()) == runs[0]["corpus"]
        assert (folder / "tokenizer" / "tokenizer.json").is_file()

    def test_latency_is_measured_together(self, finished, experiment_of_all):
        folder, runs, _ = finished
        measured = json.loads((folder / "latency.json").read_text())
        for record in runs:
            latency = record["latency_ms"]
            assert latency == measured[record["method"]]
            assert 0 < latency["q1"] <= latency["median"] <= latency["q3"]
            assert latency["batch"] == [4, 16]
            assert len(latency["samples"]) == experiment_of_all.latency_rounds
            assert latency["hardware"]["threads"] >= 1

    def test_output_tells_how_far_it_is(self, finished):
        _, _, output = finished
        lines = re.findall(r"run (\d) of 8: (\w+), seed (\d) \(training\)(.*)", output)
        assert [line[:3] for line in lines] == [
            (str(i + 1), method, str(seed)) for i, (seed, method) in enumerate((s, m) for s in (1, 2) for m in COMPARED)
        ]
        assert lines[0][3] == ""
        assert all(re.fullmatch(r"; about \d+ s left for all runs", line[3]) for line in lines[1:])
        assert re.search(r"tokens: [\d,]+ train, [\d,]+ valid, [\d,]+ test; 257 different", output)
        assert output.rstrip().endswith("report.html")

    @pytest.mark.usefixtures("no_training", "cache")
    def test_again_trains_nothing(self, finished, experiment_of_all):
        folder, runs, _ = finished
        before = {path: data for path, data in snapshot(folder).items() if path.suffix in (".json", ".md", ".yaml")}
        again, output = run(experiment_of_all, folder)
        assert again == runs
        assert output.count("(done before)") == 8
        assert "left for all" not in output
        assert {path: path.read_bytes() for path in before} == before

    @pytest.mark.usefixtures("cache")
    def test_match(self, tiny, tmp_path):
        config = dataclasses.replace(tiny, methods=["dsc", "dense"], match="moe", steps=1)
        runs, _ = run(config, tmp_path)
        totals = {record["method"]: record["params_total"] for record in runs}
        # MoE's realised number: 4 experts of 84.
        realised = config.budget(320).fixed + 4 * (2 * 84 + 1) * 32
        assert all(abs(total - realised) <= 3 * 32 for total in totals.values())


@pytest.mark.usefixtures("cache")
class TestDiverged:
    def test_the_others_go_on(self, tiny, tmp_path):
        overrides = {"moe": {"learning_rate": 1e30}}
        config = dataclasses.replace(tiny, methods=["dense", "moe"], seeds=[1, 2], overrides=overrides, steps=4)
        runs, output = run(config, tmp_path)
        assert [record["diverged_at_step"] for record in runs] == [None, 3, None, 3]
        assert all(math.isfinite(record["test_loss"]) for record in runs if record["method"] == "dense")
        names = ", ".join(f"Standard MoE seed {seed} (at step 3)" for seed in (1, 2))
        note = f"Diverged, so that the loss is not finite: {names}."
        assert note in output
        assert note in (tmp_path / "table.md").read_text()
        report = (tmp_path / "report.html").read_text()
        assert "Training diverged: Standard MoE seed 1 and Standard MoE seed 2 ended with" in report
        assert math.isnan(json.loads((tmp_path / "latency.json").read_text())["moe"]["median"])
        assert json.dumps(run(config, tmp_path)[0]) == json.dumps(runs)

    def test_latency_is_that_of_a_seed_that_did_not(self, one, tmp_path, monkeypatch):
        trained = lab_compare.train_run

        def train(config, plan, seed, data, place):
            rate = 1e30 if seed == 1 else 1e-3
            return trained(dataclasses.replace(config, learning_rate=rate), plan, seed, data, place)

        monkeypatch.setattr(lab_compare, "train_run", train)
        runs, _ = run(dataclasses.replace(one, seeds=[1, 2]), tmp_path)
        assert [record["diverged_at_step"] for record in runs] == [2, None]
        assert runs[0]["latency_ms"]["median"] > 0

    def test_settings_that_can_hardly_be_meant(self, one, tmp_path, caplog):
        config = dataclasses.replace(
            one, warmup_steps=50, tokenizer="bpe", vocab_size=10_000_000, overrides={"dense": {"learning_rate": 0.5}}
        )
        run(config, tmp_path)
        assert "warmup_steps = 50 of 2 steps: no step has the full rate" in caplog.text
        assert "learning_rate = 0.5 of dense: weights begin at about 0.02" in caplog.text
        assert re.search(r"vocab_size = 10,000,000: the corpus gives a vocabulary of \d,?\d{2,}", caplog.text)

    def test_usual_settings_are_not_doubted(self, one, tmp_path, caplog):
        run(dataclasses.replace(one, warmup_steps=1), tmp_path)
        assert caplog.text == ""


class TestInterrupted:
    @pytest.mark.usefixtures("cache")
    def test_in_the_second_run(self, finished, experiment_of_all, tmp_path, monkeypatch):
        config = dataclasses.replace(experiment_of_all, methods=["dense", "dsc"], seeds=[1])
        with monkeypatch.context() as patch:
            train = lab_compare.train_run

            def stop(config, plan, seed, data, place):
                if plan.method == "dsc":
                    patch.setattr(training.LabTrainer, "_save_checkpoint", _saved_and_interrupted)
                return train(config, plan, seed, data, place)

            patch.setattr(lab_compare, "train_run", stop)
            with pytest.raises(KeyboardInterrupt):
                run(config, tmp_path)
        assert not (tmp_path / "results.json").exists()
        runs, output = run(config, tmp_path)
        assert "run 1 of 2: dense, seed 1 (done before)" in output
        assert "run 2 of 2: dsc, seed 1 (going on from step 2)" in output
        whole = {record["method"]: record for record in finished[1] if record["seed"] == 1}
        for record in runs:
            assert record["curve"] == whole[record["method"]]["curve"]
            assert record["test_loss"] == whole[record["method"]]["test_loss"]

    @pytest.mark.parametrize("file", ["results.json", "table.md", "report.html", "latency.json"])
    @pytest.mark.usefixtures("cache")
    def test_while_results_are_written(self, one, tmp_path, monkeypatch, file):
        def kill(*args, **kwargs):
            raise KeyboardInterrupt

        names = {"results.json": "write_results", "latency.json": "measure_in_turn"}
        names |= {"table.md": "to_markdown", "report.html": "write_report"}
        with monkeypatch.context() as patch:
            patch.setattr(lab_compare, names[file], kill)
            with pytest.raises(KeyboardInterrupt):
                run(one, tmp_path)
        assert not (tmp_path / file).exists()
        with monkeypatch.context() as patch:
            patch.setattr(training, "_train", lambda *args: pytest.fail("trained"))
            run(one, tmp_path)
        assert (tmp_path / file).is_file()
        assert not [path for path in snapshot(tmp_path) if path.name.startswith(".")]


SAVE = training.LabTrainer._save_checkpoint


def _saved_and_interrupted(self, *args):
    SAVE(self, *args)
    raise KeyboardInterrupt


@pytest.mark.usefixtures("no_training", "cache")
class TestRefusedFolders:
    def refuse(self, config, folder, message, kind=ValueError):
        before = snapshot(folder)
        with pytest.raises(kind, match=message):
            run(config, folder)
        assert snapshot(folder) == before

    def test_another_experiment(self, finished, experiment_of_all):
        folder = finished[0]
        other = dataclasses.replace(experiment_of_all, steps=5)
        self.refuse(
            other, folder, r"output .*/out holds an experiment with steps 4 instead of 5: choose another folder"
        )
        other = dataclasses.replace(other, d_model=64)
        self.refuse(other, folder, "holds an experiment with d_model 32 instead of 64, and other steps: choose")

    def test_foreign_files(self, one, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        self.refuse(
            one, tmp_path / "out", "output must be a new or empty folder, or an experiment's, got .* with other"
        )
        self.refuse(one, tmp_path / "out" / "thesis.txt", "output must be a new or empty folder")

    def test_path_under_a_file(self, one, tmp_path):
        (tmp_path / "file").write_text("")
        self.refuse(one, tmp_path / "file" / "out", "Not a directory", OSError)

    @pytest.mark.parametrize("text", ["", "- a list", "steps: [1"])
    def test_damaged_config(self, one, tmp_path, text):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.yaml").write_text(text)
        self.refuse(one, tmp_path / "out", "config.yaml must (hold an experiment's settings|be the YAML)")

    def test_changed_corpus(self, finished, experiment_of_all, text_file, monkeypatch):
        text = text_file.read_text()
        monkeypatch.setattr(
            experiment, "load_corpus", lambda *a, **k: dataclasses.replace(LOAD(*a, **k), sha256="0" * 64, train=text)
        )
        self.refuse(experiment_of_all, finished[0], "corpus 'sentences.txt' must be the text that the runs in .* are")


LOAD = experiment.load_corpus


@pytest.mark.usefixtures("no_training", "cache")
class TestUnusableExperiments:
    """They leave the folder free for the experiment put right."""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                b"too short for a window, but text\n" * 4,
                "corpus 'c.txt' is too short in its valid split: .*window of len",
            ),
            (b"", "got an empty train split"),
            (b"\x00\xff\xfe\x01" * 100, "UTF-8"),
        ],
        ids=["short", "empty", "binary"],
    )
    def test_corpus(self, one, tmp_path, content, message):
        (tmp_path / "c.txt").write_bytes(content)
        config = dataclasses.replace(one, corpus=str(tmp_path / "c.txt"), window=64)
        with pytest.raises(ValueError, match=message):
            run(config, tmp_path / "out")
        assert snapshot(tmp_path / "out") == {}

    def test_missing_corpus(self, one, tmp_path):
        with pytest.raises(OSError, match=r"corpus must be one of .* a path that is not there: .*/nowhere.txt"):
            run(dataclasses.replace(one, corpus=str(tmp_path / "nowhere.txt")), tmp_path / "out")
        assert snapshot(tmp_path / "out") == {}

    def test_tokenizer(self, one, tmp_path):
        with pytest.raises(ValueError, match="vocab_size must be at least 257 for 'bpe'"):
            run(dataclasses.replace(one, tokenizer="bpe", vocab_size=100), tmp_path / "out")
        assert snapshot(tmp_path / "out") == {}

    def test_budget(self, one, tmp_path):
        with pytest.raises(ValueError, match="total must be at least 15,104 for width 1, got 900"):
            run(dataclasses.replace(one, total=900), tmp_path / "out")
        assert snapshot(tmp_path / "out") == {}


@pytest.mark.usefixtures("cache")
def test_draft_of_a_killed_start_is_no_foreign_file(one, tmp_path):
    (tmp_path / ".config.yaml.x1").write_text("meth")
    run(dataclasses.replace(one, steps=1), tmp_path)


@pytest.mark.usefixtures("cache")
def test_latency_of_a_model_that_lacks_weights(one, tmp_path):
    run(one, tmp_path)
    (tmp_path / "latency.json").unlink()
    file = tmp_path / "dense-seed42" / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[:4]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in .*/dense-seed42/model must be those .*: they lack "):
        run(one, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "latency.json is damaged: it lacks dense; delete it to make it anew"),
        ('{"dense": {"median": 1}}', "latency.json is damaged: it lacks quartiles of dense; delete it"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_damaged_latency(one, tmp_path, content, message):
    run(one, tmp_path)
    (tmp_path / "latency.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run(one, tmp_path)


class TestPace:
    @pytest.mark.parametrize(
        ("runs", "todo", "expected"),
        [
            ([], [("dsc", 10)], ""),
            ([("dsc", 5.0, 0)], [("dsc", 10)], ""),
            ([("dsc", 5.0, 10)], [("dsc", 0)], ""),
            ([("dsc", 5.0, 10)], [("dsc", 10), ("dsc", 20)], "; about 15 s left for all runs"),
            # Two seconds a step for DSC, half a second for Dense; MoE is taken for their mean.
            ([("dsc", 20.0, 10), ("dense", 5.0, 10)], [("moe", 100), ("dense", 10)], "; about 2 min left for all runs"),
            ([("dsc", 3600.0, 10)], [("dsc", 20)], "; about 2 h 0 min left for all runs"),
            ([("dsc", 3600.0, 10)], [("dsc", 35)], "; about 3 h 30 min left for all runs"),
        ],
    )
    def test_left(self, runs, todo, expected):
        pace = lab_compare._Pace()
        for finished_run in runs:
            pace.add(*finished_run)
        assert pace.left(todo) == expected
