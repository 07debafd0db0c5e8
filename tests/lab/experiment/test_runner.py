"""Running an experiment: its queue, folder and files, going on, growing, sharing, failures, and what it refuses."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file

from torchdsc.lab.experiment import queue, runner
from torchdsc.lab.experiment.results import Results, choose
from torchdsc.lab.experiment.runner import dry_run, run
from torchdsc.lab.experiment.words import duration
from torchdsc.lab.schema import SettingsError
from torchdsc.lab.tasks.language_modelling import run as training
from torchdsc.lab.tasks.language_modelling.task import Task


def say(function, experiment, folder):
    """What a call returns, and the lines it prints."""
    console = Console(file=io.StringIO(), width=200)
    returned = function(experiment, folder, console=console)
    return returned, console.file.getvalue().splitlines()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory):
    """A finished experiment: folder, results, output. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, *say(run, make_experiment(), folder)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training, "_train", lambda *args, **kwargs: pytest.fail("trained"))


@pytest.fixture
def one(make_experiment):
    """One variant and one seed."""
    return make_experiment(variants=[{"name": "DSC"}], seeds=[1])


class TestEndToEnd:
    def test_trials_choose_and_runs_follow(self, finished):
        _, results, _ = finished
        assert [(t["variant"], t["seed"], t["steps"], t["test_loss"]) for t in results.trials] == [
            ("Dense", 1000, 4, None), ("Dense", 1000, 4, None), ("DSC K 2", 1000, 4, None), ("DSC K 2", 1000, 4, None)
        ]  # fmt: skip
        # Nothing is learned at 1e-9.
        assert (results.chosen["Dense"], results.chosen["DSC"]) == ({"learning_rate": 1e-2}, {})
        assert {(r["variant"], r["seed"], r["steps"]) for r in results.runs} == {
            (name, seed, 6) for name in ("Dense", "DSC K 2", "DSC") for seed in (1, 2)
        }
        for record in results.runs:
            assert record["test_loss"] > 0
            if record["variant"] == "DSC K 2":
                chosen = results.chosen["DSC K 2"]["feed_forward"]["gamma_init"]
                options = record["plan"]["options"]
                assert (options["top_k"], options["gate"], options["gamma_init"]) == (2, "mean", chosen)

    def test_files_are_the_results(self, finished, make_experiment):
        folder, results, _ = finished
        assert Results.read(folder) == results
        assert yaml.safe_load((folder / "config.yaml").read_text()) == make_experiment().model_dump()
        assert not list(folder.glob("trial-*/model"))
        page = (folder / "report.html").read_text()
        for record in results.runs:
            assert record["description"] in page
        assert (folder / "table.md").read_text().count("\n") == 5

    def test_variants_are_timed_in_turn(self, finished):
        _, results, _ = finished
        assert list(results.timing) == ["Dense", "DSC K 2", "DSC"]
        for timing in results.timing.values():
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]
            assert (timing["batch"], len(timing["samples"])) == ([4, 16], 6)
            assert timing["peak_memory_bytes"] > 0

    def test_output_tells_how_far_it_is(self, finished):
        _, _, lines = finished
        runs = [line for line in lines if re.match(r"\d of \d: ", line)]
        assert runs[0] == "1 of 4: trial-Dense-learning_rate_1e-09-seed1000"
        assert re.fullmatch(r"6 of 6: run-DSC-seed2; about \d+ s left", runs[-1])
        assert len(runs) == 10
        assert lines[1].startswith("Dense: width ")
        assert lines[-1].endswith("report.html")

    @pytest.mark.usefixtures("no_training")
    def test_again_trains_nothing(self, copied, finished, make_experiment):
        before = snapshot(copied)
        again, lines = say(run, make_experiment(), copied)
        assert again == finished[1]
        assert not [line for line in lines if " of " in line and "seed" in line]
        assert snapshot(copied) == before

    @pytest.mark.usefixtures("no_training")
    def test_results_alone_are_enough(self, finished, make_experiment, tmp_path):
        """As in a checkout, which has no folders of runs."""
        for name in ("config.yaml", "results.json"):
            (tmp_path / "out").mkdir(exist_ok=True)
            shutil.copy(finished[0] / name, tmp_path / "out")
        assert run(make_experiment(), tmp_path / "out") == finished[1]

    @pytest.mark.usefixtures("no_training")
    def test_records_from_before_there_was_a_setting(self, copied, finished, make_experiment):
        """They are of runs as its default makes them, and of no others."""
        for file in copied.glob("*/record.json"):
            record = json.loads(file.read_text())
            assert record["config"].pop("initializer_range") == 0.02
            file.write_text(json.dumps(record))
        key = "val_loss_final"
        found = run(make_experiment(), copied)
        assert [each[key] for each in found.trials] == [each[key] for each in finished[1].trials]
        values = {
            **make_experiment().model_dump(),
            "settings": {**make_experiment().settings, "initializer_range": 0.1},
        }
        (copied / "config.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(ValueError, match=r"must be of this experiment, got .* with initializer_range 0\.02"):
            run(make_experiment(settings=values["settings"]), copied)

    def test_one_to_choose_by_leaves_the_test_part_alone(self, make_experiment, tmp_path):
        results = run(make_experiment(variants=[{"name": "DSC"}], seeds=[1], test=False), tmp_path / "out")
        assert [record["test_loss"] for record in results.runs] == [None]
        assert not list((tmp_path / "out").glob("run-*/model"))

    def test_trials_alone(self, copied, finished, make_experiment):
        shutil.rmtree(copied / "run-DSC-seed1")
        for name in ("results.json", "config.yaml"):
            (copied / name).unlink()
        for path in copied.glob("run-*"):
            shutil.rmtree(path)
        (copied / "config.yaml").write_text(yaml.safe_dump(make_experiment(seeds=[]).model_dump()))
        alone = run(make_experiment(seeds=[]), copied)
        assert (alone.runs, alone.trials, alone.timing) == ([], finished[1].trials, {})
        assert (copied / "table.md").read_text().count("\n") == 6


class TestGoingOn:
    def test_from_the_checkpoint(self, finished, make_experiment, tmp_path, monkeypatch):
        part = make_experiment(variants=[{"name": "DSC"}], seeds=[1])
        with monkeypatch.context() as patch:
            save = training.LabTrainer._save_checkpoint

            def interrupt(self, *args):
                save(self, *args)
                raise KeyboardInterrupt

            patch.setattr(training.LabTrainer, "_save_checkpoint", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(part, tmp_path / "out")
        assert not (tmp_path / "out" / "results.json").exists()
        results, lines = say(run, part, tmp_path / "out")
        assert "1 of 1: run-DSC-seed1 (going on from step 2)" in lines
        whole = next(r for r in finished[1].runs if (r["variant"], r["seed"]) == ("DSC", 1))
        assert [(r["curve"], r["test_loss"]) for r in results.runs] == [(whole["curve"], whole["test_loss"])]

    @pytest.mark.parametrize("moment", ["measure_in_turn", "write_table", "write_report"])
    def test_killed_while_results_are_written(self, copied, make_experiment, finished, monkeypatch, moment):
        for name in ("results.json", "table.md", "report.html"):
            (copied / name).unlink()

        def kill(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(runner, moment, kill)
            with pytest.raises(KeyboardInterrupt):
                run(make_experiment(), copied)
        monkeypatch.setattr(training, "_train", lambda *args, **kwargs: pytest.fail("trained"))
        assert run(make_experiment(), copied).runs == finished[1].runs
        assert (copied / "report.html").is_file()

    def test_seeds_and_trials_may_be_added(self, copied, finished, make_experiment):
        more = run(make_experiment(variants=[{"name": "DSC"}], seeds=[3]), copied)
        assert [r for r in more.runs if r["seed"] < 3] == finished[1].runs
        assert [(r["variant"], r["seed"]) for r in more.runs if r["seed"] == 3] == [("DSC", 3)]
        variant = make_experiment().variants[0].model_dump() | {"trials": [{"learning_rate": 2e-2}]}
        tried = run(make_experiment(variants=[variant], seeds=[1]), copied)
        assert len(tried.trials) == 5
        assert {r["variant"] for r in tried.runs} == {"Dense", "DSC K 2", "DSC"}

    def test_dry_run(self, copied, make_experiment, tmp_path):
        """It counts what is left to do, times it, and leaves the folder as it is."""
        shutil.rmtree(next(copied.glob("run-DSC_K_2-*seed2")))
        shutil.rmtree(copied / "run-DSC-seed1")
        (copied / "results.json").unlink()
        before = snapshot(copied)
        _, (*_, dense, two, four, last) = say(dry_run, make_experiment(), copied)
        assert dense == "Dense: 4 runs, 4 of them done before"
        assert re.fullmatch(r"DSC K 2: 4 runs, 3 of them done before: about \d+ s", two)
        assert re.fullmatch(r"DSC: 2 runs, 1 of them done before: about \d+ s", four)
        assert re.fullmatch(rf"in all about \d+ s .*; a dry run: {copied} is left as it is", last)
        assert snapshot(copied) == before
        assert re.fullmatch(r"Dense: 4 runs: about \d+ s", say(dry_run, make_experiment(), tmp_path / "new")[1][-4])
        assert not (tmp_path / "new").exists()


class TestFailures:
    def test_one_is_recorded_and_the_rest_goes_on(self, make_experiment, tmp_path, monkeypatch, caplog):
        variants = [{"name": "bad", "settings": {"top_k": 3}}, {"name": "good"}]
        experiment = make_experiment(variants=variants, seeds=[1])
        train = training._train

        def fail(settings, *args, **kwargs):
            if settings.top_k == 3:
                raise RuntimeError("out of luck")
            return train(settings, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(training, "_train", fail)
            results = run(experiment, tmp_path / "out")
        assert [record["variant"] for record in results.runs] == ["good"]
        assert [(f["variant"], f["seed"], f["error"]) for f in results.failed] == [
            ("bad", 1, "RuntimeError: out of luck")
        ]
        assert "in fail" in results.failed[0]["traceback"]
        assert "run-bad-seed1 failed: RuntimeError: out of luck" in caplog.text
        assert "out of luck" in (tmp_path / "out" / "report.html").read_text()
        # A later call tries it again.
        again = run(experiment, tmp_path / "out")
        assert ([record["variant"] for record in again.runs], again.failed) == (["bad", "good"], [])

    def test_a_diverged_run_is_no_failure(self, make_experiment, tmp_path):
        variants = [{"name": "tame"}, {"name": "wild", "settings": {"learning_rate": 1e30}}]
        results = run(make_experiment(variants=variants, seeds=[1]), tmp_path / "out")
        assert [record["diverged_at_step"] for record in results.runs] == [None, 3]
        assert (results.failed, list(results.timing)) == ([], ["tame"])
        assert "diverged" in (tmp_path / "out" / "table.md").read_text()

    def test_trials_that_failed_or_diverged_come_last(self, make_experiment):
        experiment = make_experiment(variants=[{"name": "a", "trials": [{"top_k": k} for k in (1, 2, 3)]}])
        measure = Task.measure
        trials = [
            {"variant": "a", "trial": {"top_k": k}, "case": "", "val_loss_final": loss}
            for k, loss in ((1, math.nan), (3, 9.0))
        ]
        assert choose(experiment, trials, measure) == {"a": {"top_k": 3}}


class TestSharing:
    def test_two_processes(self, make_experiment, tmp_path, finished):
        """Each run is done by one of them, and both end with all."""
        file = tmp_path / "e.yaml"
        file.write_text(yaml.safe_dump(make_experiment().model_dump()))
        command = [sys.executable, "-m", "torchdsc", "run", str(file), "--output", str(tmp_path / "out")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
            for _ in range(2)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        done = [name for output in outputs for name in re.findall(r"\d+ of \d+: (\S+)", output)]
        assert len(done) == 10
        assert len({name.rstrip(";") for name in done}) == 10
        mine = [(r["variant"], r["seed"], r["val_loss_final"]) for r in Results.read(tmp_path / "out").runs]
        assert mine == [(r["variant"], r["seed"], r["val_loss_final"]) for r in finished[1].runs]

    def test_a_run_that_another_process_is_at_is_waited_for(self, one, tmp_path, monkeypatch):
        folder = tmp_path / "out"
        run(one, folder)
        record = (folder / "run-DSC-seed1" / "record.json").read_bytes()
        (folder / "run-DSC-seed1" / "record.json").unlink()
        (folder / "results.json").unlink()
        monkeypatch.setattr(training, "_train", lambda *args, **kwargs: pytest.fail("trained"))
        monkeypatch.setattr(queue, "_POLL_SECONDS", 0.05)
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            (folder / "run-DSC-seed1" / "record.json").write_bytes(record)

        script = (
            "import sys, time; from pathlib import Path; from torchdsc.lab.files import locked\n"
            f"with locked(Path({str(folder / 'run-DSC-seed1' / '.lock')!r}), wait=True):\n"
            "    print('held', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout.readline() == "held\n"
            monkeypatch.setattr(queue.time, "sleep", sleep)
            assert len(run(one, folder).runs) == 1
            other.kill()
        assert slept == [0.05]

    def test_a_launch_of_several_is_refused(self, one, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="takes processes that are started one by one, got a launch of 2"):
            run(one, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_training")
class TestRefusals:
    def refuse(self, experiment, folder, message, kind=ValueError):
        before = snapshot(folder)
        with pytest.raises(kind, match=message):
            run(experiment, folder)
        assert snapshot(folder) == before

    def test_another_experiment(self, copied, make_experiment):
        settings = make_experiment().settings | {"batch_size": 8}
        message = r"^output .*/copy holds an experiment with batch_size 4 instead of 8: choose another folder"
        self.refuse(make_experiment(settings=settings), copied, message, SettingsError)

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

    @pytest.mark.parametrize("text", ["", "- a list", "steps: [1", "steps: 3"])
    def test_damaged_config(self, one, tmp_path, text):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.yaml").write_text(text)
        self.refuse(one, tmp_path / "out", r"config\.yaml")

    @pytest.mark.parametrize("content", ["{}", "null", '{"task": '])
    def test_damaged_record(self, copied, make_experiment, content):
        (copied / "run-DSC-seed1" / "record.json").write_text(content)
        self.refuse(make_experiment(), copied, r"run-DSC-seed1/record\.json is damaged: .* put it back")

    @pytest.mark.parametrize("part", ["config", "data"])
    def test_record_of_another_run(self, copied, make_experiment, part):
        file = copied / "run-DSC-seed1" / "record.json"
        record = json.loads(file.read_text())
        record[part] = {**record[part], "batch_size": 99}
        file.write_text(json.dumps(record))
        what = "batch_size 99" if part == "config" else "other data"
        self.refuse(make_experiment(), copied, rf"record\.json must be of this experiment, got .* with {what}")

    def test_results_of_another_format(self, copied, make_experiment):
        values = json.loads((copied / "results.json").read_text())
        (copied / "results.json").write_text(json.dumps({**values, "format": 1}))
        self.refuse(make_experiment(), copied, r"results\.json must have format 2, got 1")

    def test_changed_corpus(self, make_experiment, tiny, tmp_path, monkeypatch):
        """Also if no run has been finished."""
        text = tmp_path / "text.txt"
        text.write_text(Path(tiny.corpus).read_text())
        experiment = make_experiment(settings=make_experiment().settings | {"corpus": str(text)})

        def kill(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(training, "_train", kill)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "out")
        text.write_text(text.read_text()[::-1])
        self.refuse(experiment, tmp_path / "out", "text.txt must hold what it held when the experiment in .* began")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"total": 1000, "active": 900}, r"^settings of variant 'a': total and active must be"),
            ({"feed_forward": {"num_atoms": 7}}, "variant 'a': options of dsc must leave num_atoms, .* to the solver"),
            ({"feed_forward": {"router_context": "x"}}, "variant 'a': router_context must be"),
            ({"tokenizer": "bpe", "vocab_size": 100}, "vocab_size must be at least 257 for 'bpe'"),
            ({"window": 4000}, r"corpus 'sentences.txt' is too short in its valid split: .*window of length 4000"),
        ],
    )
    def test_what_cannot_be_trained_leaves_no_folder(self, make_experiment, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            run(make_experiment(variants=[{"name": "a", "settings": settings}]), tmp_path / "some" / "out")
        assert list(tmp_path.iterdir()) == []

    def test_missing_corpus(self, make_experiment, tmp_path):
        settings = make_experiment().settings | {"corpus": str(tmp_path / "nowhere.txt")}
        with pytest.raises(OSError, match=r"corpus must be one of .* a path that is not there: .*/nowhere.txt"):
            run(make_experiment(settings=settings), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_doubtful_settings_are_told(one, make_experiment, tmp_path, caplog):
    settings = {"warmup_steps": 50, "tokenizer": "bpe", "vocab_size": 10_000_000, "learning_rate": 0.5, "steps": 2}
    run(make_experiment(variants=[{"name": "DSC", "settings": settings}], seeds=[1]), tmp_path / "odd")
    assert "warmup_steps = 50 of 2 steps: no step has the full rate" in caplog.text
    assert "learning_rate = 0.5: weights begin at about 0.02" in caplog.text
    assert re.search(r"vocab_size = 10,000,000: the corpus gives a vocabulary of \d,?\d{2,}", caplog.text)
    caplog.clear()
    run(one, tmp_path / "usual")
    assert caplog.text == ""


def test_missed_budget_is_told(make_experiment, tmp_path):
    variants = [{"name": "DSC", "settings": {"match": "moe", "steps": 1, "eval_every": 1, "warmup_steps": 0}}]
    _, lines = say(run, make_experiment(variants=variants, seeds=[1]), tmp_path / "out")
    assert "total = 34,000 is missed: 36,640 (+7.8%); match = 'moe' gives the numbers" in lines[1]


def test_model_that_lacks_weights_is_not_timed_in_silence(one, tmp_path):
    run(one, tmp_path / "out")
    (tmp_path / "out" / "results.json").unlink()
    file = tmp_path / "out" / "run-DSC-seed1" / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[:4]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in .*/run-DSC-seed1/model must be those .*: they lack "):
        run(one, tmp_path / "out")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (89, "89 s"),
        (100, "2 min"),
        (7200, "2 h 0 min"),
        (12600, "3 h 30 min"),
        (math.nan, "an unknown time"),
    ],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
