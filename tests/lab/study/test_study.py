import copy
import json
import shutil
from dataclasses import asdict
from statistics import fmean

import pytest
import yaml

from torchdsc.lab import training
from torchdsc.lab.study.config import StudyConfig
from torchdsc.lab.study.study import _best, run_study
from torchdsc.lab.study.summary import summarize, to_markdown
from torchdsc.lab.tables import MINUS


@pytest.fixture(scope="module")
def study(tiny):
    """Values of a study of seconds; keywords replace some."""
    varied = ("methods", "seeds", "overrides", "match", "learning_rate")
    settings = {name: value for name, value in asdict(tiny).items() if name not in varied}

    def make(**changes):
        values = {
            "settings": settings,
            "trial_settings": {"steps": 4},
            "variants": [
                {"name": "Dense", "method": "dense", "trials": [{"learning_rate": 1e-9}, {"learning_rate": 1e-2}]},
                {"name": "DSC K 2", "method": "dsc", "settings": {"top_k": 2, "feed_forward": {"gate": "mean"}}}
                | {"trials": [{"feed_forward": {"gamma_init": 0.2}}, {"feed_forward": {"gamma_init": 0.4}}]},
                {"name": "DSC", "method": "dsc", "against": ["DSC K 2", "Dense"]},
            ],
            "seeds": [1, 2],
        }
        return StudyConfig.from_dict(values | changes)

    return make


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory, module_cache):
    folder = tmp_path_factory.mktemp("study") / "out"
    return study(), folder, run_study(study(), folder)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_trials_choose_and_runs_follow(finished):
    config, folder, results = finished
    assert [(t["variant"], t["trial"], t["seed"], t["steps"]) for t in results["trials"]] == [
        ("Dense", 0, 1000, 4), ("Dense", 1, 1000, 4), ("DSC K 2", 0, 1000, 4), ("DSC K 2", 1, 1000, 4)
    ]  # fmt: skip
    # Nothing is learned at 1e-9.
    assert results["chosen"]["Dense"] == {"learning_rate": 1e-2}
    assert results["chosen"]["DSC"] == {}
    assert [(run["variant"], run["seed"]) for run in results["runs"]] == [
        (name, seed) for seed in (1, 2) for name in ("Dense", "DSC K 2", "DSC")
    ]
    assert {run["steps"] for run in results["runs"]} == {6}
    for run in results["runs"]:
        options = run["config"]["plan"]["options"]
        if run["variant"] == "DSC K 2":
            chosen = results["chosen"]["DSC K 2"]["feed_forward"]["gamma_init"]
            assert (options["top_k"], options["gate"], options["gamma_init"]) == (2, "mean", chosen)
        if run["variant"] == "DSC":
            assert (options["top_k"], options.get("gate")) == (config.settings["top_k"], None)
    assert json.loads((folder / "results.json").read_text())["runs"] == results["runs"]


def test_variants_that_diverge(study, tmp_path, module_cache):
    variants = [
        {"name": "Dense", "method": "dense"},
        {"name": "wild", "method": "dense", "trials": [{"learning_rate": 1e30}]},
    ]
    results = run_study(study(variants=variants), tmp_path / "out")
    assert [run["diverged_at_step"] for run in results["runs"]] == [None, 3, None, 3]
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.splitlines()[3].count("| NaN |") == 2
    assert (tmp_path / "out" / "report.html").is_file()


def test_trials_leave_the_test_part_alone(finished):
    _, folder, results = finished
    assert {trial["test_loss"] for trial in results["trials"]} == {None}
    assert all(run["test_loss"] > 0 for run in results["runs"])
    assert not list(folder.glob("trial-*/model"))


def test_a_study_to_choose_by_leaves_the_test_part_alone(study, tmp_path, module_cache):
    results = run_study(study(variants=[{"name": "DSC", "method": "dsc"}], seeds=[1], test=False), tmp_path / "out")
    assert [run["test_loss"] for run in results["runs"]] == [None]
    assert summarize(results)[0].test == []
    assert not list((tmp_path / "out").glob("run-*/model"))


def test_trials_alone(finished, study, tmp_path):
    _, original, results = finished
    config = study(seeds=[])
    folder = shutil.copytree(original, tmp_path / "copy", ignore=shutil.ignore_patterns("config.yaml", "run-*"))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    alone = run_study(config, folder)
    assert (alone["runs"], alone["trials"], alone["chosen"]) == ([], results["trials"], results["chosen"])
    table = (folder / "table.md").read_text()
    assert table.count("\n") == 6
    assert f"| Dense | learning_rate 0.01 | {results['trials'][1]['val_loss_final']:.3f} |" in table
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "in a trial" in page


def test_rows(finished):
    _, folder, results = finished
    dense, two, four = summarize(results)
    losses = {name: {r["seed"]: r["val_loss_final"] for r in results["runs"] if r["variant"] == name} for name in
              ("Dense", "DSC K 2", "DSC")}  # fmt: skip
    assert [[c.other for c in row.comparisons] for row in (dense, two, four)] == [[], ["Dense"], ["DSC K 2", "Dense"]]
    none = copy.deepcopy(results)
    none["config"]["variants"][1]["against"] = []
    assert summarize(none)[1].comparisons == []
    pairs = [losses["DSC"][seed] - losses["DSC K 2"][seed] for seed in (1, 2)]
    assert four.comparisons[0].difference.mean == pytest.approx(fmean(pairs))
    # Student's t for one degree of freedom, over the deviation of a mean of two.
    assert four.comparisons[0].difference.half_width == pytest.approx(12.71 * abs(pairs[0] - pairs[1]) / 2, rel=1e-3)
    assert (folder / "table.md").read_text().count("\n") == 5
    assert "vs Dense" in to_markdown(results)


def test_share_of_steps(finished):
    _, _, results = finished
    runs = [dict(run) for run in results["runs"]]
    for run in runs:
        run["curve"] = [{"step": step, "val_loss": 6.0 - step / 10} for step in (2, 4, 6)]
        run["val_loss_final"] = 5.4
        if run["variant"] == "Dense":
            run["val_loss_final"] = 5.6 if run["seed"] == 1 else 5.5
    rows = summarize({**results, "runs": runs})
    assert rows[0].comparisons == []
    # 5.55 is reached between step 4 and step 5 of 6.
    assert rows[1].comparisons[0].share_of_steps == pytest.approx(4.5 / 6)


def test_report_stands_by_itself(finished):
    _, folder, _ = finished
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert f"DSC {MINUS} DSC K 2" in page
    # A line for each variant that one is compared to.
    assert "(vs DSC K 2)<br>" in page
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert "DSC K 2" in page


def test_finished_runs_are_kept_and_seeds_may_be_added(finished, study, monkeypatch, tmp_path):
    _, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(training, "build_model", None)
        assert run_study(study(), folder)["runs"] == results["runs"]
    more = run_study(study(seeds=[1, 2, 3]), folder)
    assert more["runs"][:6] == results["runs"]
    assert len(more["runs"]) == 9


def test_trials_may_be_added(finished, study, tmp_path):
    config, original, results = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    variants = asdict(config)["variants"]
    variants[0]["trials"].insert(1, {"learning_rate": 2e-2})
    more = run_study(study(variants=variants), folder)
    assert [trial["trial"] for trial in more["trials"]] == [0, 1, 2, 0, 1]
    assert [more["trials"][0], *more["trials"][3:]] == [results["trials"][0], *results["trials"][2:]]
    variants[0]["trials"].pop()
    with pytest.raises(ValueError, match="holds a study with variants"):
        run_study(study(variants=variants), folder)


def test_a_trial_that_diverged_is_not_chosen(study):
    variant = study().variants[0]
    trials = [{"variant": "Dense", "trial": i, "val_loss_final": loss} for i, loss in enumerate((float("nan"), 9.0))]
    assert _best(variant, trials) == 1


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"variants": []}, "variants must be one or more of different names, got"),
            ({"variants": [{"name": "a", "method": "dense", "trial": []}]}, "variants must set fields of Variant"),
            ({"variants": [{"name": "a", "method": "sparse"}]}, "methods must be among"),
            (
                {"variants": [{"name": "a", "method": "dsc", "settings": {"rate": 1}}]},
                "settings of variant 'a' must be",
            ),
            ({"variants": [{"name": "a", "method": "dsc", "settings": {"corpus": "x"}}]}, "settings of variant 'a'"),
            ({"variants": [{"name": "a", "method": "dsc", "trials": []}]}, "trials of variant 'a' must be one or more"),
            ({"variants": [{"name": "a", "method": "dsc", "against": ["b"]}]}, "against of 'a' must be names of other"),
            ({"variants": [{"name": "a", "method": "dsc", "against": "a"}]}, "against of 'a' must be names of other"),
            ({"reference": "b"}, "reference must be the name of a variant"),
            ({"seeds": [1, 1]}, "seeds must be different integers"),
            ({"seeds": [], "variants": [{"name": "a", "method": "dsc"}]}, "seeds must be one or more where no variant"),
            ({"settings": {"learning_rate": -1.0}}, "learning_rate must be > 0, got -1.0"),
            ({"trial_settings": {"feed_forward": 3}}, "feed_forward in trial_settings must be options, got 3"),
        ],
    )
    def test_config(self, study, changes, message):
        with pytest.raises(ValueError, match=message):
            study(**changes)

    def test_folder_of_another_study(self, finished, study):
        _, folder, _ = finished
        with pytest.raises(ValueError, match="holds a study with trial_settings"):
            run_study(study(trial_settings={"steps": 3}), folder)

    def test_record_of_another_run(self, finished, study, tmp_path):
        folder = shutil.copytree(finished[1], tmp_path / "copy")
        file = folder / "run-DSC-seed1" / "record.json"
        record = json.loads(file.read_text())
        record["config"]["batch_size"] += 1
        file.write_text(json.dumps(record))
        with pytest.raises(ValueError, match="must be a record of this study, got one of batch_size"):
            run_study(study(), folder)
