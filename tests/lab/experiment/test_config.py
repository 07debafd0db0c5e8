"""Configurations of experiments: what they make of settings, what they refuse, presets, and how they may grow."""

from pathlib import Path

import pytest
import yaml

from torchdsc import recommended
from torchdsc.lab.experiment.config import Experiment, Job
from torchdsc.lab.experiment.presets import preset_names
from torchdsc.lab.experiment.values import merge, read_experiment
from torchdsc.lab.schema import SettingsError, build
from torchdsc.lab.tasks.forecasting.run import make_plan as make_forecasting_plan
from torchdsc.lab.tasks.language_modelling.run import make_plan

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
DSC = {"name": "a"}


class TestPresets:
    @pytest.mark.parametrize("name", preset_names())
    def test_are_valid_and_say_what_they_are_for(self, name):
        values = read_experiment(name)
        if name == "adapt":
            values["settings"] = {"base": "some/model", "train": "a.csv"}
        experiment = build(Experiment, values)
        assert len(experiment.title) > 20
        for job in experiment.possible_jobs() if experiment.task == "language_modelling" else ():
            settings = experiment.settings_of(job)
            assert settings.doubts() == []
            plan = make_plan(settings, settings.vocab_size if settings.tokenizer == "bpe" else 50304)
            assert abs(plan.miss_total) < 0.05

    def test_forecasting_is_at_equal_budgets(self):
        experiment = build(Experiment, read_experiment("forecasting"))
        plans = {}
        for job in experiment.possible_jobs():
            plans[job.variant] = make_forecasting_plan(experiment.settings_of(job))
        totals = {plan.params_total for plan in plans.values()}
        assert max(totals) / min(totals) < 1.005
        routed = [plan.params_active for plan in plans.values() if plan.miss_active is not None]
        assert max(routed) / min(routed) < 1.005
        assert all(len(variant.trials) == 4 for variant in experiment.variants)

    @pytest.mark.parametrize("name", [path.parent.name for path in EXPERIMENTS.glob("*/config.yaml")])
    def test_what_is_committed_is_the_presets(self, name):
        kept = build(Experiment, yaml.safe_load((EXPERIMENTS / name / "config.yaml").read_text()))
        values = read_experiment(name)
        if values["settings"].get("corpus") == "wikitext-2":
            values["settings"]["corpus"] = "${TORCHDSC_DATA}/wikitext-2"
        assert kept.extended_by(build(Experiment, values)) == kept

    def test_paper_is_the_papers_table(self):
        experiment = build(Experiment, read_experiment("paper"))
        settings = [
            experiment.settings_of(job) for job in experiment.run_jobs({v.name: {} for v in experiment.variants})
        ]
        assert [make_plan(item, 50304).description for item in settings[:3]] == [
            "width 2611",
            "5 experts of 545, top-2",
            "M 1523, K 4, static width 327",
        ]
        assert (settings[0].learning_rate, settings[0].min_lr_ratio) == (6e-4, 0.1)
        assert settings[0].batch_size // settings[0].accumulation == 16

    @pytest.mark.parametrize("name", ["quick", "best"])
    def test_recommended_is_what_the_library_recommends(self, name):
        settings = build(Experiment, read_experiment(name)).variant("DSC as recommended").settings
        assert {"top_k": settings["top_k"], **settings["feed_forward"]} == recommended()

    @pytest.mark.parametrize("name", ["sparse", "sparse-small", "paper-enwiki"])
    def test_recommended_by_ngrams_is_what_was_measured(self, name):
        settings = build(Experiment, read_experiment(name)).variant("DSC by n-grams").settings
        options = {"top_k": settings["top_k"], **settings["feed_forward"]}
        assert options | {"ngram_orders": tuple(options["ngram_orders"])} == recommended("ngrams")


class TestReading:
    def test_extends(self, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("extends: quick\nsettings: {steps: 7}\nvariants: [{name: DSC}]\n")
        values, base = read_experiment(str(file)), read_experiment("quick")
        assert values["settings"] == {**base["settings"], "steps": 7}
        assert (values["variants"], values["seeds"]) == ([{"name": "DSC"}], base["seeds"])
        circle = tmp_path / "circle.yaml"
        circle.write_text("extends: circle.yaml")
        with pytest.raises(SettingsError, match=r"extends must not lead back .*circle.yaml -> .*circle.yaml"):
            read_experiment(str(circle))
        (tmp_path / "more.yaml").write_text("extends: mine.yaml\nseeds: [1]\n")
        assert read_experiment(str(tmp_path / "more.yaml")) == {**values, "seeds": [1]}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "extends: quik",
                r"experiment must be a YAML file or one of ablations, .*, got 'quik' \(did you mean quick\?\)",
            ),
            ("variants: [A]", r"variants.0 must be a mapping, got 'A'"),
            ("variants: [null]", "variants.0 must be a mapping, got nothing"),
            ("variants: {A: {}}", r"variants must be a list, got \{'A': \{\}\}"),
            ("variants: [{name: A, trials: {learning_rate: 0.1}}]", "variants.0.trials must be a list, got"),
            ("variants: [{name: A, trials: [0.1]}]", "variants.0.trials.0 must be a mapping, got 0.1"),
            ("variants: [{name: A, settings: moe}]", "variants.0.settings must be a mapping, got 'moe'"),
            ("settings: foo", "settings must be a mapping, got 'foo'"),
            ("trial_settings: [1]", "trial_settings must be a mapping"),
            ("cases: [a, b]", "cases must be a mapping"),
            ("cases: {a: 3}", "cases.a must be a mapping, got 3"),
            ("task: 3", "task must be a name, got 3"),
            ("extends: 5", "extends must be a preset or a YAML file, got 5"),
            ("- a", "must hold settings by name"),
        ],
    )
    def test_errors_name_the_file(self, tmp_path, text, message):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SettingsError, match=rf"a\.yaml.*{message}"):
            read_experiment(str(tmp_path / "a.yaml"))

    def test_merge(self):
        assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": 5}) == {
            "a": {"b": 1, "c": 4},
            "d": 3,
            "e": 5,
        }


class TestSettings:
    def test_of_a_run(self, make_experiment):
        experiment = make_experiment(cases={"short": {"steps": 3}, "long": {"batch_size": 2}})
        trial = {"feed_forward": {"gamma_init": 0.2}}
        run = experiment.settings_of(Job("DSC K 2", trial, "short", 1, is_trial=False))
        assert (run.steps, run.batch_size, run.top_k) == (3, 4, 2)
        # Mappings are merged by their keys.
        assert run.feed_forward == {"gate": "mean", "gamma_init": 0.2}
        assert experiment.settings_of(Job("DSC K 2", trial, "long", 1, is_trial=True)).steps == 4

    def test_jobs(self, make_experiment):
        variants = [{"name": "a", "trials": [{}, {"top_k": 2}]}, {"name": "b", "seeds": [1, 5]}]
        cases = {"x": {}, "y": {}}
        experiment = make_experiment(variants=variants, seeds=[1], cases=cases, tuning_cases=["y"])
        assert [(j.variant, j.trial, j.case, j.seed) for j in experiment.trial_jobs()] == [
            ("a", {}, "y", 1000), ("a", {"top_k": 2}, "y", 1000)
        ]  # fmt: skip
        chosen = {"a": {"top_k": 2}, "b": {}}
        assert [(j.variant, j.case, j.seed) for j in experiment.run_jobs(chosen)] == [
            ("a", "x", 1), ("a", "y", 1), ("b", "x", 1), ("b", "y", 1), ("b", "x", 5), ("b", "y", 5)
        ]  # fmt: skip
        assert next(experiment.run_jobs(chosen)).name == "run-x-a-top_k_2-seed1"

    def test_task_of_ones_own(self, make_experiment):
        experiment = make_experiment(task="torchdsc.lab.tasks.language_modelling.task:Task")
        assert experiment.settings_of(next(experiment.trial_jobs())).method == "dense"


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"variants": []}, "^variants must have at least 1 item"),
            ({"variants": [["a"]]}, r"^variants\[0\] must be a mapping, got \['a'\]$"),
            ({"variants": [DSC, DSC]}, "^variants must have different names"),
            ({"variants": [{**DSC, "trial": []}]}, r"^variants\['a'\]: trial must be one of the .*did you mean trials"),
            ({"variants": [{**DSC, "trials": []}]}, r"^variants\['a'\].trials must have at least 1 item"),
            (
                {"variants": [{**DSC, "trials": [{}, {}]}]},
                r"^variants\['a'\] must have different trials, got {} twice$",
            ),
            ({"variants": [{**DSC, "against": ["b"]}]}, "^against of variant 'a' must be names of other"),
            ({"variants": [{**DSC, "settings": {"rate": 1}}]}, "^settings of variant 'a': rate must be one of the"),
            ({"variants": [{**DSC, "settings": {"steps": 2.5}}]}, "variant 'a': steps must be an integer, got 2.5$"),
            ({"variants": [{**DSC, "trials": [{"compile": "no"}]}]}, "'a': compile must be true or false, got 'no'$"),
            ({"variants": [{**DSC, "settings": {"method": "lora"}}]}, "'a': method must be 'dense', .*, got 'lora'$"),
            ({"settings": {"corpus": 5}}, "corpus must be text, got 5$"),
            ({"settings": {"learning_rate": -1.0}}, "learning_rate must be greater than 0, got -1.0$"),
            ({"trial_settings": {"feed_forward": 3}}, "feed_forward must be a mapping, got 3$"),
            ({"reference": "b"}, "^reference must be the name of a variant"),
            ({"cases": {}}, "^cases must have at least 1 item"),
            ({"tuning_cases": ["b"]}, "^tuning_cases must be among the cases"),
            ({"seeds": [1, 1]}, r"^seeds must be different values, got \[1, 1\]$"),
            ({"seeds": [1.5]}, r"^seeds\[0\] must be an integer, got 1.5$"),
            ({"seeds": [2**32]}, r"^seeds\[0\] must be less than 4294967296"),
            ({"seeds": [], "variants": [DSC]}, "^seeds must be one or more where no variant"),
            ({"test": "no"}, "^test must be true or false, got 'no'$"),
            ({"timing_rounds": 1}, "^timing_rounds must be greater than or equal to 2, got 1"),
            ({"task": "chess"}, "^task must be one of language_modelling, .*forecasting, or module:Class, got 'chess'"),
            ({"task": "json:JSONDecoder"}, "^task must be a subclass of .*Task, got 'json:JSONDecoder'"),
            ({"task": "nowhere:Task"}, "^task must be module:Class that can be imported, got 'nowhere:Task'"),
            (
                {"variants": [{"name": "a b"}, {"name": "a_b"}]},
                "^runs must differ in the names of their folders, got 'run-a_b-seed1' twice",
            ),
        ],
    )
    def test_are_a_line(self, make_experiment, changes, message):
        with pytest.raises(SettingsError, match=message) as raised:
            make_experiment(**changes)
        assert "\n" not in str(raised.value)


class TestGrowing:
    def test_seeds_variants_trials_and_cases(self, make_experiment):
        before = make_experiment(variants=[{"name": "a", "trials": [{}, {"top_k": 2}], "seeds": [7]}, {"name": "c"}])
        after = make_experiment(
            variants=[{"name": "b", "against": ["a"]}, {"name": "a", "trials": [{"top_k": 3}, {}]}],
            seeds=[2, 3],
            cases={"": {}, "more": {"steps": 3}},
        )
        grown = before.extended_by(after)
        assert [v.name for v in grown.variants] == ["a", "c", "b"]
        assert grown.variant("a").trials == [{}, {"top_k": 2}, {"top_k": 3}]
        assert (grown.variant("a").seeds, grown.seeds, list(grown.cases)) == ([7, 2, 3], [1, 2, 3], ["", "more"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"trial_settings": {"steps": 3}}, "an experiment with steps 4 instead of 3"),
            ({"tuning_seed": 3}, "an experiment with tuning_seed 1000 instead of 3"),
            (
                {"variants": [{"name": "DSC", "settings": {"top_k": 3}}]},
                "an experiment with top_k nothing instead of 3",
            ),
            ({"cases": {"": {"steps": 3}}}, "an experiment with steps nothing instead of 3"),
        ],
    )
    def test_what_is_there_stays(self, make_experiment, changes, message):
        with pytest.raises(SettingsError, match=message):
            make_experiment().extended_by(make_experiment(**changes))

    def test_a_default_may_be_told(self, make_experiment):
        settings = make_experiment().settings
        told = make_experiment(settings={**settings, "top_k": 4})
        assert make_experiment().extended_by(told).settings == {**settings, "top_k": 4}
        with pytest.raises(SettingsError, match="an experiment with top_k 4 instead of 3"):
            make_experiment().extended_by(make_experiment(settings={**settings, "top_k": 3}))

    def test_part(self, make_experiment):
        part = make_experiment(reference="Dense").part(["DSC", "DSC K 2"])
        assert ([v.name for v in part.variants], part.reference) == (["DSC K 2", "DSC"], None)
        assert part.variant("DSC").against == ["DSC K 2"]
        with pytest.raises(SettingsError, match=r"variants must be among those of the experiment, .*, got 'MoE'"):
            part.part(["MoE"])
