"""What each command does."""

import json
import re
import sys

import pytest
import yaml

from torchdsc.cli.options import experiment_parser, parse_experiment
from torchdsc.cli.parsing import underscored
from torchdsc.lab.adapt.config import AdaptConfig
from torchdsc.lab.config import ExperimentConfig, load_preset, preset_names
from torchdsc.lab.presets import preset_names as preset_names_of
from torchdsc.lab.presets import read_preset
from torchdsc.lab.study.config import StudyConfig

BUDGET = ("budget", "--total", "35e6", "--active", "28e6", "--d_model", 384, "--n_layer", 6)


class TestOptions:
    """A preset, then a file, then flags, each over the one before."""

    @pytest.fixture
    def parse(self):
        def run(*arguments):
            parser = experiment_parser("compare", "", "quick")
            return parse_experiment(parser, [str(argument) for argument in arguments])[1]

        return run

    @pytest.fixture
    def settings(self, tmp_path):
        def write(**values):
            (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
            return tmp_path / "s.yaml"

        return write

    def test_preset(self, parse):
        assert parse() == ExperimentConfig(**load_preset("quick"))
        # Nothing of the default preset is left in another one.
        for preset in ("small", "paper"):
            assert parse("--preset", preset) == parse(f"--preset={preset}") == ExperimentConfig(**load_preset(preset))

    def test_flags_override_the_preset(self, parse):
        config = parse("--steps", 7, "--preset", "small", "--overrides.dsc.learning_rate", "0.01")
        assert config.steps == 7
        assert config.of_method("dsc", "learning_rate") == 0.01
        assert config.of_method("moe", "router_lr_multiplier") == 1
        assert config.eval_every == load_preset("small")["eval_every"]

    def test_one_override_leaves_the_others(self, parse):
        config = parse("--overrides.moe.learning_rate", "2e-3", "--overrides.moe.feed_forward.jitter=0.01")
        kept = load_preset("quick")["overrides"]
        assert config.overrides == kept | {
            "moe": {**kept["moe"], "learning_rate": 0.002, "feed_forward": {"jitter": 0.01}}
        }
        config = parse("--overrides", "{moe: {learning_rate: 0.002}}")
        assert config.overrides == {"moe": {"learning_rate": 0.002}}
        config = parse("--overrides.moe.feed_forward", "{impl: eager}", "--overrides.moe.feed_forward.top_k", "3")
        assert config.of_method("moe", "feed_forward") == {"impl": "eager", "top_k": 3}
        for value in ("0", "high"):
            with pytest.raises(ValueError, match="learning_rate of moe in overrides must be > 0, got"):
                parse("--overrides.moe.learning_rate", value)
        with pytest.raises(ValueError, match=r"--overrides.moe.feed_forward must be YAML, got '\{a'"):
            parse("--overrides.moe.feed_forward", "{a")
        with pytest.raises(ValueError, match="must name a setting, got router_lr_multiplier = 1 above it"):
            parse("--overrides.moe.router_lr_multiplier.x", "1")

    def test_a_file_comes_between(self, parse, settings):
        file = settings(steps=7, batch_size=3)
        for arguments in (
            ("--config", file, "--steps", 9),
            ("--steps", 9, "--config", file),
            (f"--config={file}", "--steps=9"),
        ):
            config = parse(*arguments)
            assert (config.steps, config.batch_size, config.window) == (9, 3, load_preset("quick")["window"])

    def test_a_file_may_name_the_preset(self, parse, settings):
        assert parse("--config", settings(preset="small")) == parse("--preset", "small")
        assert parse("--config", settings(preset="small"), "--preset", "quick") == parse()

    def test_an_experiments_own_config_gives_it_again(self, parse, settings):
        config = parse("--preset", "small", "--seeds", 5, "--overrides.moe.feed_forward.jitter", 0.01)
        assert parse("--config", settings(**config.as_dict())) == config

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--seeds", "[1,2]", "--methods", "[dsc,moe]"],
            ["--seeds", "1", "2", "--methods", "dsc", "moe"],
            ["--seeds=1,2", "--methods=dsc,moe"],
            ["--seeds", "1,", "2", "--methods", "dsc,", "moe", "--steps", "3"],
        ],
    )
    def test_lists_may_be_written_in_any_way(self, parse, arguments):
        config = parse(*arguments)
        assert (config.seeds, config.methods) == ([1, 2], ["dsc", "moe"])

    def test_list_of_one(self, parse):
        assert parse("--seeds", "7").seeds == [7]

    def test_corpus_is_one_however_it_is_written(self, parse, tiny, workplace):
        text = tiny.parent / "text.txt"
        assert parse("--corpus", text).corpus == parse("--corpus", "../text.txt").corpus == str(text)
        assert parse("--corpus", "wikitext-2").corpus == "wikitext-2"


@pytest.mark.usefixtures("workplace")
class TestPresets:
    """What is shown is the preset's, and what is printed and read back is the same experiment."""

    @pytest.mark.parametrize("command", ["compare", "train"])
    @pytest.mark.parametrize("name", preset_names())
    def test_printed_settings_give_the_experiment_again(self, torchdsc, tmp_path, command, name):
        shown = torchdsc(command, "--preset", name, "--steps", 7, "--print-config")
        assert (shown.status, shown.err) == (0, "")
        values = yaml.safe_load(shown.out)
        wanted = ExperimentConfig(**load_preset(name)).as_dict() | {"preset": name, "steps": 7}
        if command == "train":
            wanted = {key: wanted[key] for key in wanted if key not in ("methods", "seeds")}
            wanted |= {"method": "dsc", "seed": 42}
        assert values == wanted
        (tmp_path / "s.yaml").write_text(shown.out)
        again = torchdsc(command, "--config", tmp_path / "s.yaml", "--print_config").out
        assert yaml.safe_load(again) == values

    def test_what_differs_from_the_preset_keeps_its_name(self, torchdsc):
        out = torchdsc("compare", "--preset", "best", "--steps", 7, "--print_config=skip_default").out
        assert yaml.safe_load(out) == {"preset": "best", "steps": 7}

    @pytest.mark.parametrize("command", ["adapt", "study"])
    def test_printed_studies_too(self, torchdsc, tmp_path, command):
        for name in preset_names_of(command):
            shown = torchdsc(command, "--preset", name, "--seeds", 5, 6, "--print-config")
            assert (shown.status, shown.err) == (0, "")
            values = yaml.safe_load(shown.out)
            assert values.pop("output") == f"runs/{command}-{name}"
            kind = {"adapt": AdaptConfig, "study": StudyConfig}[command]
            assert kind.from_dict(values) == kind.from_dict(read_preset(name, command) | {"seeds": [5, 6]})
            (tmp_path / "s.yaml").write_text(shown.out)
            assert torchdsc(command, "--config", tmp_path / "s.yaml", "--print_config").out == shown.out

    @pytest.mark.parametrize("command", ["compare", "train"])
    @pytest.mark.parametrize("name", preset_names())
    def test_help_shows_the_presets_defaults(self, torchdsc, command, name):
        out = " ".join(torchdsc(command, "--preset", name, "--help").out.split())
        preset = load_preset(name)
        for setting in ("learning_rate", "steps", "corpus"):
            described = out[out.index(f" --{setting} ") :]
            assert described.partition("default: ")[2].startswith(f"{preset[setting]})")

    def test_help_of_adapt_too(self, torchdsc):
        bare, glue = (" ".join(torchdsc("adapt", *flags, "--help").out.split()) for flags in ((), ("--preset", "glue")))

        def default(out, flag):
            described = out[out.index(f" --{flag} ") :].partition(" --")[2].partition(" --")[0]
            return described.partition("(default: ")[2].partition(")")[0]

        assert [default(out, "max_length") for out in (bare, glue)] == ["128", "64"]
        assert [default(out, "seeds") for out in (bare, glue)] == ["[0]", "[0, 1, 2]"]
        assert [default(out, "kind") for out in (bare, glue)] == ["classification"] * 2
        assert "null" not in bare + glue


def test_hyphens_are_underscores_in_flags_alone():
    given = ["--learning-rate", "-1e-3", "--batch-size=3", "--overrides.moe.learning-rate", "--prompt=--a-b", "--a-b c"]
    assert underscored(given) == [
        "--learning_rate", "-1e-3", "--batch_size=3", "--overrides.moe.learning_rate", "--prompt=--a-b", "--a-b c"
    ]  # fmt: skip


class TestBudget:
    def test_table(self, torchdsc):
        status, out, err = torchdsc(*BUDGET)
        assert (status, err) == (0, "")
        for words in (r"dense .*width 2611", r"moe .*5 experts of 545", r"dsc .*M 1523", r"\+4\.42%"):
            assert re.search(words, out)

    def test_json(self, torchdsc):
        status, out, _ = torchdsc(*BUDGET, "--json", "--rank", 4)
        assert status == 0
        dense, moe, loras, dsc = json.loads(out)
        assert dense["intermediate_size"] == 2611
        assert dense["miss_active"] is None
        assert moe["options"] == {"num_experts": 5, "top_k": 2}
        assert loras["options"]["rank"] == 4
        assert (dsc["method"], dsc["options"]["num_atoms"], dsc["params_total"]) == ("dsc", 1523, 35_000_064)

    def test_router(self, torchdsc):
        status, out, _ = torchdsc(*BUDGET, "--json", "--router", "product_key", "--router_rank", 64)
        dsc = json.loads(out)[-1]
        assert status == 0
        assert dsc["options"] == {"router": "product_key", "router_rank": 64, "num_atoms": 1521, "top_k": 4}
        assert dsc["description"].endswith(", product_key router")

    @pytest.mark.parametrize(
        ("flags", "error"),
        [
            (("--router_rank", 8), "router_rank must be None for router = 'linear', got 8"),
            (("--router_heads", 2), "router_heads must be 1 for router = 'linear', got 2"),
            (
                ("--router", "product_key", "--router_rank", 3),
                "router_rank must be even and >= 2 for product keys, got 3",
            ),
        ],
    )
    def test_router_options_that_do_not_fit(self, fails, flags, error):
        assert fails(*BUDGET, *flags) == f"torchdsc budget: {error}"

    def test_infeasible(self, fails):
        line = fails("budget", "--total", "1e6", "--active", "1e5", "--d_model", 100, "--n_layer", 2)
        assert line == "torchdsc budget: total must be at least 5,137,400 for width 1, got 1,000,000"


class TestCompare:
    def test_writes_the_folder_and_goes_on_there(self, torchdsc, tiny, workplace):
        command = ("compare", "--config", tiny, "--methods", "dense", "dsc", "--seeds", 1)
        status, out, _ = torchdsc(*command)
        assert status == 0
        folder = workplace / "runs" / "quick"
        runs = json.loads((folder / "results.json").read_text())["runs"]
        assert [run["method"] for run in runs] == ["dense", "dsc"]
        assert "report: runs/quick/report.html" in out
        assert "done before" not in out
        assert torchdsc(*command).out.count("done before") == 2
        status, _, err = torchdsc(*command, "--steps", 3)
        assert status == 2
        assert err == (
            "torchdsc compare: output runs/quick holds an experiment with steps 2 instead of 3: "
            "choose another folder, or delete this one\n"
        )

    def test_a_mistake_does_not_take_the_folder(self, torchdsc, fails, tiny, workplace):
        command = ("compare", "--config", tiny, "--methods", "dense", "--seeds", 1)
        status, _, err = torchdsc(*command, "--total", 900)
        assert status == 2
        assert "total must be at least" in err
        assert torchdsc(*command).status == 0

    def test_dry_run_says_what_would_be_done_and_writes_nothing(self, torchdsc, tiny, workplace):
        command = ("compare", "--config", tiny, "--methods", "dense", "moe", "--seeds", 1, 2)
        status, out, err = torchdsc(*command, "--dry-run")
        assert (status, err, list(workplace.iterdir())) == (0, "", [])
        assert "moe: 4 experts of 84, top-2; 0.037 M stored, 0.026 M active\n" in out
        assert re.search(r"^dense: 2 runs: about \d+ s\nmoe: 2 runs: about \d+ s\nin all about \d+ s", out, re.M)
        assert torchdsc(*command[:-1]).status == 0
        before = {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
        out = torchdsc(*command[:-1], "--dry-run").out
        assert "dense: 1 run, 1 of them done before\n" in out
        assert "nothing is left to train; a dry run: runs/quick is left as it is" in out
        assert before == {path: path.stat().st_mtime_ns for path in workplace.rglob("*")}
        # What the run itself would refuse.
        status, _, err = torchdsc(*command, "--dry-run", "--steps", 3)
        assert (status, "holds an experiment with" in err) == (2, True)

    def test_missed_targets_are_said(self, torchdsc, tiny):
        flags = ("--config", tiny, "--seeds", 1, "--methods", "dsc")
        line = "warning: total = 34,000 is missed by dsc 36,640 (+7.8%); match = 'moe' solves all methods"
        assert line in torchdsc("compare", *flags).out
        assert line in torchdsc("train", *flags[:2], "--method", "dsc").out
        assert "warning" not in torchdsc("compare", *flags, "--match", "null", "--output", "runs/other").out


class TestTrainAndGenerate:
    def test_bars_are_for_terminals(self, torchdsc, tiny, monkeypatch):
        assert torchdsc("train", "--config", tiny, "--output", "one").err == ""
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert "dsc seed 42: " in torchdsc("train", "--config", tiny, "--output", "two").err

    def test_a_run_that_diverges_has_no_model(self, torchdsc, tiny, workplace, caplog):
        command = ("train", "--config", tiny, "--method", "dense", "--learning_rate", "1e30")
        status, out, _ = torchdsc(*command)
        assert status == 0
        assert out.endswith("validation loss nan, test loss nan\nno model: see runs/quick-dense-seed42\n")
        assert "dense seed 42 diverged: the loss was nan at step 2 of 2, and it stopped there. Try" in caplog.text

    def test_train_then_generate(self, torchdsc, fails, tiny, workplace):
        status, out, _ = torchdsc("train", "--config", tiny, "--method", "moe", "--seed", 3)
        assert status == 0
        assert re.search(r"^moe: 4 experts of 84, top-2; validation loss \d\.\d{4}, test loss \d\.\d{4}$", out, re.M)
        folder = workplace / "runs" / "quick-moe-seed3"
        assert out.endswith("model: runs/quick-moe-seed3/model\n")
        record = json.loads((folder / "record.json").read_text())
        assert (record["method"], record["seed"], record["steps"]) == ("moe", 3, 2)
        texts = []
        for model in (folder, folder / "model"):
            status, out, err = torchdsc("generate", model, "--prompt", "sent", "--max_new_tokens", 8, "--seed", 1)
            assert (status, err) == (0, "")
            texts.append(out)
        assert texts[0] == texts[1]
        assert texts[0].startswith("sent")
        assert fails("generate", folder, "--prompt", "sentence", "--max_new_tokens", 9) == (
            "torchdsc generate: prompt and max_new_tokens must fit the model's 16 positions, got 8 tokens and 9"
        )
