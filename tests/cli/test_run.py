"""``torchdsc run`` and what follows it: flags, files, going on, ``report`` and ``generate``."""

import json
import re
import sys

import pytest
import yaml

from torchdsc.cli.parsing import underscored
from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.experiment.presets import preset_names
from torchdsc.lab.experiment.results import Results
from torchdsc.lab.experiment.values import read_experiment
from torchdsc.lab.schema import build


@pytest.fixture
def shown(torchdsc):
    """The experiment that a command line comes to."""

    def show(*arguments):
        status, out, err = torchdsc("run", *arguments, "--print-config")
        assert (status, err) == (0, "")
        return build(Experiment, yaml.safe_load(out))

    return show


@pytest.mark.usefixtures("workplace")
class TestFlags:
    @pytest.mark.parametrize("name", [name for name in preset_names() if name != "adapt"])
    def test_what_is_printed_gives_the_experiment_again(self, torchdsc, shown, tmp_path, name):
        out = torchdsc("run", name, "--seeds", 5, 6, "--print_config").out
        assert shown(name) == build(Experiment, read_experiment(name))
        (tmp_path / "s.yaml").write_text(out)
        assert torchdsc("run", tmp_path / "s.yaml", "--print_config").out == out
        assert yaml.safe_load(out)["seeds"] == [5, 6]

    def test_win_over_all_that_the_experiment_sets(self, shown):
        experiment = shown("best", "--learning-rate", "2e-3", "--feed_forward.aux_weight=0.5", "--corpus", "0012")
        for variant in experiment.variants:
            settings = experiment.settings_of(next(j for j in experiment.possible_jobs() if j.variant == variant.name))
            assert (settings.learning_rate, settings.corpus) == (2e-3, "0012")
            assert settings.feed_forward["aux_weight"] == 0.5
        # What is beside it in a mapping stays.
        assert experiment.variant("DSC as recommended").settings["feed_forward"]["router_context"] == 3

    def test_part_of_an_experiment(self, shown):
        experiment = shown("glue", "--variants", "DSC 8", "LoRA 8", "--cases", "RTE", "--seeds", 3)
        assert [v.name for v in experiment.variants] == ["LoRA 8", "DSC 8"]
        assert (list(experiment.cases), experiment.seeds) == (["RTE"], [3])
        assert {job.seed for job in experiment.possible_jobs() if not job.is_trial} == {3}

    def test_flags_need_not_suit_what_is_left_out(self, shown, torchdsc):
        given = ("adapt", "--base", "b", "--train", "a.csv", "--also_scaled", "0.5", "--variants", "DSC", "LoRA")
        assert [variant.name for variant in shown(*given).variants] == ["LoRA", "DSC"]
        status, _, err = torchdsc("run", *given[:-2], "Mixture-of-LoRAs")
        assert status == 2
        assert "settings of variant 'Mixture-of-LoRAs': also_scaled must be left out" in err

    def test_lists(self, shown):
        base = ("adapt", "--base", "b", "--train", "007.csv")
        for text in (["title", "body"], ["[title, body]"]):
            experiment = shown(*base, "--text", *text)
            assert (experiment.settings["text"], experiment.settings["train"]) == (["title", "body"], "007.csv")

    def test_hyphens_are_underscores_in_flags_alone(self):
        given = ["--learning-rate", "-1e-3", "--batch-size=3", "--feed-forward.aux-weight", "--prompt=--a-b", "--a-b c"]
        assert underscored(given) == [
            "--learning_rate", "-1e-3", "--batch_size=3", "--feed_forward.aux_weight", "--prompt=--a-b", "--a-b c"
        ]  # fmt: skip

    @pytest.mark.parametrize(("name", "steps"), [("quick", 120), ("small", 1200), ("glue", 150)])
    def test_help_shows_the_experiments_values(self, torchdsc, name, steps):
        out = " ".join(torchdsc("run", name, "--help").out.split())
        assert re.search(rf" --steps VALUE Optimizer steps\. \(default: {steps}\)", out)
        assert "default: None" not in out.partition("settings of all runs")[0]


class TestRun:
    def test_writes_the_folder_and_goes_on_there(self, torchdsc, tiny, workplace):
        status, out, _ = torchdsc("run", tiny)
        assert status == 0
        assert [run["variant"] for run in Results.read(workplace / "runs" / "tiny").runs] == ["Dense", "MoE"]
        assert "report: runs/tiny/report.html" in out
        assert "1 of 2: run-Dense-seed3" in out
        assert " of 2: " not in torchdsc("run", tiny).out
        status, _, err = torchdsc("run", tiny, "--steps", 3)
        assert (status, err) == (
            2,
            "torchdsc run: output runs/tiny holds an experiment with steps 2 instead of 3: choose another folder, or "
            "delete this one\n",
        )

    def test_a_mistake_does_not_take_the_folder(self, torchdsc, tiny, workplace):
        assert torchdsc("run", tiny, "--total", 900).status == 2
        assert torchdsc("run", tiny, "--variants", "Dense").status == 0

    def test_dry_run_writes_nothing(self, torchdsc, tiny, workplace):
        status, out, err = torchdsc("run", tiny, "--dry-run")
        assert (status, err, list(workplace.iterdir())) == (0, "", [])
        assert "MoE: 4 experts of 84, top-2; 0.037 M stored, 0.026 M active; total = 34,000 is missed: " in out
        assert re.search(r"^Dense: 1 run: about \d+ s\nMoE: 1 run: about \d+ s\nin all about \d+ s", out, re.M)

    def test_a_failed_run_is_told_by_the_status(self, torchdsc, tiny, monkeypatch, caplog):
        monkeypatch.setattr("torchdsc.lab.tasks.language_modelling.run._train", lambda *args, **kwargs: 1 / 0)
        status, out, _ = torchdsc("run", tiny)
        assert status == 1
        assert "run-MoE-seed3 failed: ZeroDivisionError" in caplog.text
        assert "failed: Dense (seed 3), MoE (seed 3); the same command tries them again" in out
        assert "report: runs/tiny/report.html" in out

    def test_bars_are_for_terminals(self, torchdsc, tiny, monkeypatch):
        assert torchdsc("run", tiny, "--output", "one").err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert "run-Dense-seed3: " in torchdsc("run", tiny, "--output", "two").err


def test_report_and_generate(torchdsc, fails, tiny, workplace):
    torchdsc("run", tiny)
    folder = workplace / "runs" / "tiny"
    page = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    status, out, _ = torchdsc("report", folder)
    assert (status, (folder / "report.html").read_text()) == (0, page)
    assert "report: " in out
    # From the records alone.
    (workplace / "copy").mkdir()
    (folder / "results.json").rename(workplace / "copy" / "results.json")
    assert torchdsc("report", "copy").status == 0
    assert (workplace / "copy" / "report.html").read_text() == page

    run = folder / "run-MoE-seed3"
    assert json.loads((run / "record.json").read_text())["method"] == "moe"
    texts = [torchdsc("generate", m, "--prompt", "sent", "--max_new_tokens", 8) for m in (run, run / "model")]
    assert texts[0] == texts[1]
    assert texts[0].out.startswith("sent")
    assert fails("generate", run, "--prompt", "sentence", "--max_new_tokens", 9) == (
        "torchdsc generate: prompt and max_new_tokens must fit the model's 16 positions, got 8 tokens and 9"
    )
