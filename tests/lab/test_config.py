"""The configuration of an experiment: presets, overrides, and every value that it refuses."""

import math
from pathlib import Path

import pytest
import yaml

from torchdsc.lab import presets
from torchdsc.lab.config import ExperimentConfig, load_preset, preset_names
from torchdsc.lab.training import make_plans


class TestPresets:
    def test_names(self):
        assert {"paper", "quick", "small"} <= set(preset_names())

    @pytest.mark.parametrize("name", preset_names())
    def test_are_valid_experiments(self, name):
        config = ExperimentConfig(**load_preset(name))
        vocab_size = 50304 if config.tokenizer == "gpt2" else config.vocab_size
        assert config.doubts() == []
        plans = make_plans(config, vocab_size)
        assert list(plans) == config.methods
        for plan in plans.values():
            assert abs(plan.miss_total) < 0.05

    def test_paper_is_the_papers_table(self):
        config = ExperimentConfig(**load_preset("paper"))
        plans = make_plans(config, 50304)
        assert [plan.description for plan in plans.values()] == [
            "width 2611",
            "5 experts of 545, top-2",
            "M 1523, K 4, static width 327",
        ]
        assert (config.learning_rate, config.learning_rate * config.min_lr_ratio) == (6e-4, pytest.approx(6e-5))
        assert config.batch_size // config.accumulation == 16

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"preset must be one of \[.*'paper'.*\], got 'tiny'"):
            load_preset("tiny")

    def test_unknown_field(self, tmp_path, monkeypatch):
        (tmp_path / "odd.yaml").write_text("stepps: 3\n")
        monkeypatch.setattr(presets, "_place", lambda *parts: Path(tmp_path, *parts))
        with pytest.raises(ValueError, match=r"preset 'odd' must set fields of ExperimentConfig, got \['stepps'\]"):
            load_preset("odd")


class TestExperimentConfig:
    def test_defaults_are_valid(self):
        assert ExperimentConfig().methods == ["dense", "moe", "mixture_of_loras", "dsc"]

    def test_as_dict_survives_yaml(self):
        config = ExperimentConfig(learning_rate=1e-5, overrides={"moe": {"feed_forward": {"jitter": 0.01}}})
        assert ExperimentConfig(**yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config

    def test_overrides(self):
        config = ExperimentConfig(
            learning_rate=1e-3, overrides={"moe": {"learning_rate": 2e-3, "feed_forward": {"jitter": 0.01}}}
        )
        assert config.of_method("moe", "learning_rate") == 2e-3
        assert config.of_method("dsc", "learning_rate") == 1e-3
        assert config.of_method("moe", "weight_decay") == config.weight_decay
        assert config.of_method("moe", "feed_forward") == {"jitter": 0.01}
        assert config.of_method("dsc", "feed_forward") == {}

    def test_overrides_of_the_layer_reach_the_plan(self):
        config = ExperimentConfig(overrides={"dsc": {"feed_forward": {"router_bias": True}}})
        assert make_plans(config, 4096)["dsc"].options["router_bias"] is True
        config = ExperimentConfig(overrides={"dsc": {"feed_forward": {"num_atoms": 7}}})
        with pytest.raises(ValueError, match="options of dsc must leave num_atoms, top_k to the solver"):
            make_plans(config, 4096)

    def test_top_k_may_differ(self):
        config = ExperimentConfig(top_k=4, overrides={"dsc": {"top_k": 16}})
        plans = make_plans(config, 4096)
        assert {method: plans[method].options["top_k"] for method in ("dsc", "mixture_of_loras", "moe")} == {
            "dsc": 16, "mixture_of_loras": 4, "moe": 2
        }  # fmt: skip

    def test_budget(self):
        budget = ExperimentConfig(total=3e6, active=2e6, window=64).budget(1024)
        assert (budget.total, budget.active, budget.vocab_size, budget.n_positions) == (3e6, 2e6, 1024, 64)

    @pytest.mark.parametrize("match", [None, "moe", "dsc"])
    def test_match(self, match):
        plans = make_plans(ExperimentConfig(methods=["dense", "moe", "dsc"], match=match), 4096)
        totals = {method: plan.params_total for method, plan in plans.items()}
        spread = max(totals.values()) - min(totals.values())
        # MoE's steps are large: matched to it the others follow, otherwise it is the one apart.
        assert (spread < 3_000) == (match == "moe")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"methods": []}, r"methods must be one or more different names, got \[\]"),
            ({"methods": ["dsc", "dsc"]}, "methods must be one or more different names"),
            ({"methods": ["dsc", "lora"]}, "methods must be among dense, moe, mixture_of_loras, peer, dsc, got lora"),
            ({"match": "lora"}, "match must be among .*, got lora"),
            ({"seeds": []}, "seeds must be one or more different integers"),
            ({"seeds": [1, 1]}, "seeds must be one or more different integers"),
            ({"seeds": [-1]}, r"seeds must be in 0 .. 2\^32 - 1, got -1"),
            ({"seeds": [2**32]}, "seeds must be in"),
            *(
                ({name: 0}, f"{name} must be >= 1, got 0")
                for name in (
                    *("d_model", "n_layer", "n_head", "window", "top_k", "rank", "experts_per_token", "steps"),
                    *("batch_size", "accumulation", "eval_every", "eval_windows", "test_windows", "eval_batch_size"),
                )
            ),
            *(
                ({name: value}, f"{name} must be > 0, got {value}")
                for name in ("total", "active", "learning_rate", "router_lr_multiplier", "max_grad_norm")
                for value in (0, math.nan)
            ),
            ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
            ({"vocab_size": 10**9}, r"vocab_size must be at most 2\^24 = 16,777,216, got 1000000000"),
            ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
            ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
            ({"beta1": 1.0}, r"beta1 must be in \[0, 1\)"),
            ({"beta2": -0.1}, r"beta2 must be in \[0, 1\)"),
            ({"min_lr_ratio": 1.1}, r"min_lr_ratio must be in \[0, 1\], got 1.1"),
            ({"latency_rounds": 1}, "latency_rounds must be >= 2, got 1"),
            ({"max_bytes": 0}, "max_bytes must be None or >= 1, got 0"),
            ({"precision": "fp8"}, r"precision must be one of \('fp32', 'bf16', 'fp16'\), got 'fp8'"),
            ({"preparation": "odd"}, "preparation must be one of .*, got 'odd'"),
            ({"residual_init": "odd"}, "residual_init must be one of .*, got 'odd'"),
            ({"batch_size": 8, "accumulation": 3}, "accumulation must divide batch_size = 8, got 3"),
            ({"d_model": 32, "n_head": 3}, "n_head must divide d_model = 32, got 3"),
            ({"overrides": {"lora": {}}}, "overrides must be among .*, got lora"),
            ({"overrides": {"moe": {"steps": 3}}}, r"overrides of moe must be among \('learning_rate', .*'steps'"),
            ({"overrides": {"moe": 3}}, "overrides of moe must be among .*, got 3"),
            ({"overrides": {"moe": {"feed_forward": 3}}}, "overrides of moe: feed_forward must be options, got 3"),
            ({"overrides": {"moe": {"learning_rate": 0}}}, "learning_rate of moe in overrides must be > 0, got 0"),
            ({"overrides": {"dsc": {"top_k": 2.5}}}, "top_k of dsc in overrides must be an int >= 1, got 2.5"),
            ({"overrides": {"moe": {"weight_decay": "4e-3"}}}, "weight_decay of moe in overrides must be >= 0, got '4"),
        ],
    )
    def test_refuses(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ExperimentConfig(**fields)
