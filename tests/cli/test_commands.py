"""What each command does."""

import json
import re

import pytest
import yaml

from torchdsc.cli.options import experiment_parser, parse_experiment
from torchdsc.lab.config import ExperimentConfig, load_preset

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


class TestTrainAndGenerate:
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
