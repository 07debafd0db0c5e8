import copy
import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import pytest
import yaml
from rich.console import Console

from torchdsc.lab import training
from torchdsc.lab.schema import SettingsError
from torchdsc.lab.study.config import StudyConfig
from torchdsc.lab.study.study import _best, dry_run, run_study
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


def test_dry_run(finished, study, tmp_path):
    """Counts what is left to do, times it, and leaves the folder as it is."""
    _, original, _ = finished
    folder = shutil.copytree(original, tmp_path / "copy")
    shutil.rmtree(next(folder.glob("run-DSC_K_2-*seed2")))
    shutil.rmtree(folder / "run-DSC-seed1")
    before = sorted(folder.rglob("*"))

    def lines(config, place):
        console = Console(file=io.StringIO(), width=200)
        dry_run(config, place, console=console)
        return console.file.getvalue().splitlines()

    *_, dense, two, four, last = lines(study(), folder)
    assert dense == "Dense: 4 runs, 4 of them done before"
    assert re.fullmatch(r"DSC K 2: 4 runs, 3 of them done before: about \d+ s", two)
    assert re.fullmatch(r"DSC: 2 runs, 1 of them done before: about \d+ s", four)
    assert re.fullmatch(rf"in all about \d+ s .*; a dry run: {folder} is left as it is", last)
    assert before == sorted(folder.rglob("*"))
    *_, dense, _, _, _ = lines(study(), tmp_path / "new")
    assert re.fullmatch(r"Dense: 4 runs: about \d+ s", dense)
    assert not (tmp_path / "new").exists()


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


DSC = {"name": "a", "method": "dsc"}


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"variants": []}, "^variants must have at least 1 item"),
            ({"variants": 5}, "^variants must be a list, got 5$"),
            ({"variants": [["a"]]}, r"^variants\[0\] must be a mapping, got \['a'\]$"),
            ({"variants": [{"name": "a", "method": "dense"}] * 2}, "^variants must have different names"),
            (
                {"variants": [{"name": "a", "method": "dense", "trial": []}]},
                r"^variants\['a'\].trial must be one of the",
            ),
            ({"variants": [{"name": "a", "method": "sparse"}]}, r"^variants\['a'\]: method must be among .*'sparse'$"),
            ({"variants": [{"name": "a", "method": 5}]}, r"^variants\['a'\].method must be text, got 5$"),
            (
                {"variants": [{**DSC, "settings": {"rate": 1}}]},
                r"^variants\['a'\].settings must be among .*, got 'rate'$",
            ),
            ({"variants": [{**DSC, "settings": 5}]}, r"^variants\['a'\].settings must be a mapping, got 5$"),
            ({"variants": [{**DSC, "settings": {"corpus": "x"}}]}, r"settings must leave corpus, .*, got 'corpus'$"),
            (
                {"variants": [{**DSC, "settings": {"steps": 2.5}}]},
                r"\['a'\].settings: steps must be an integer, got 2.5$",
            ),
            (
                {"variants": [{**DSC, "trials": [{"compile": "no"}]}]},
                r"trials\[0\]: compile must be true or false, got 'no'",
            ),
            ({"variants": [{**DSC, "trials": []}]}, r"^variants\['a'\].trials must have at least 1 item"),
            ({"variants": [{**DSC, "trials": [{}, {}]}]}, r"^variants\['a'\]: trials must be different, got {} twice$"),
            ({"variants": [{**DSC, "against": ["b"]}]}, "^against of variant 'a' must be names of other"),
            ({"variants": [{**DSC, "against": "a"}]}, r"^variants\['a'\].against must be a list, got 'a'$"),
            ({"reference": "b"}, "^reference must be the name of a variant"),
            ({"reference": 5}, "^reference must be text, got 5$"),
            ({"test": "no"}, "^test must be true or false, got 'no'$"),
            ({"seeds": [1, 1]}, r"^seeds must be different values, got \[1, 1\]$"),
            ({"seeds": [1.5]}, r"^seeds\[0\] must be an integer, got 1.5$"),
            ({"seeds": [], "variants": [DSC]}, "^seeds must be one or more where no variant"),
            (
                {"settings": {"learning_rate": -1.0}},
                "^settings of variant 'DSC K 2': learning_rate must be > 0, got -1.0$",
            ),
            ({"settings": {"learning_rate": "fast"}}, "^settings: learning_rate must be a number, got 'fast'$"),
            ({"settings": {"precision": 16}}, "^settings: precision must be 'fp32', 'bf16' or 'fp16', got 16$"),
            ({"settings": []}, r"^settings must be a mapping, got \[\]$"),
            ({"trial_settings": {"feed_forward": 3}}, "^trial_settings: feed_forward must be a mapping, got 3$"),
            ({"stepz": 3}, "^stepz must be one of the fields variants, .*, got 'stepz'$"),
        ],
    )
    def test_config(self, study, changes, message):
        with pytest.raises(SettingsError, match=message):
            study(**changes)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{}", "is damaged: it must have description, got none; delete its folder"),
            ("null", "is damaged: it holds a NoneType"),
            ('{"task": ', "is damaged: "),
        ],
    )
    def test_damaged_record(self, finished, study, tmp_path, content, message):
        folder = shutil.copytree(finished[1], tmp_path / "copy")
        file = folder / "run-DSC-seed1" / "record.json"
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(file))} {message}"):
            run_study(study(), folder)

    def test_changed_corpus(self, study, tiny, tmp_path, module_cache, monkeypatch):
        text = tmp_path / "text.txt"
        text.write_text(Path(tiny.corpus).read_text())
        settings = study().settings | {"corpus": str(text)}
        config = study(settings=settings, variants=[{"name": "DSC", "method": "dsc"}])

        def killed(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(training, "build_model", killed)
            with pytest.raises(KeyboardInterrupt):
                run_study(config, tmp_path / "out")
        text.write_text(text.read_text()[::-1])
        with pytest.raises(
            ValueError, match=rf"^corpus {re.escape(str(text))} must hold what it held when the study in"
        ):
            run_study(config, tmp_path / "out")

    def test_launch_of_several_processes(self, study, tmp_path, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="takes processes that are started one by one, got a launch of 2"):
            run_study(study(), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "variants",
        [
            [{**DSC, "name": "a b"}, {**DSC, "name": "a_b"}],
            [{**DSC, "trials": [{"top_k": 2}, {"feed_forward": {"top_k": 2}}]}],
        ],
    )
    def test_runs_that_would_share_a_folder(self, study, tmp_path, variants):
        with pytest.raises(
            SettingsError, match=r"^\w+ of variant .* and \w+ of variant .* must differ in the names of"
        ):
            run_study(study(variants=variants), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_budget_out_of_reach_names_the_variant(self, study, tmp_path, module_cache):
        variants = [{**DSC, "settings": {"total": 1000, "active": 900}}]
        with pytest.raises(SettingsError, match=r"^settings of variant 'a': total and active must be"):
            run_study(study(variants=variants), tmp_path / "out")

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
