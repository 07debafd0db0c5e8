"""Settings of a language model's run, and the widths that its budget comes to."""

import pytest

from torchdsc.lab.schema import SettingsError, build
from torchdsc.lab.tasks.language_modelling.run import make_plan
from torchdsc.lab.tasks.language_modelling.settings import Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "^steps must be greater than or equal to 1, got 0$"),
        ({"steps": 2.5}, "^steps must be an integer, got 2.5$"),
        ({"learning_rate": float("nan")}, "^learning_rate must be .*, got nan$"),
        ({"warmup_steps": -1}, "^warmup_steps must be greater than or equal to 0, got -1$"),
        ({"vocab_size": 10**9}, "^vocab_size must be less than or equal to 16777216, got 1000000000$"),
        ({"dropout": 1.0}, "^dropout must be less than 1, got 1.0$"),
        ({"min_lr_ratio": 1.1}, "^min_lr_ratio must be less than or equal to 1, got 1.1$"),
        ({"max_grad_norm": 0.0}, "^max_grad_norm must be greater than 0"),
        ({"max_bytes": 0}, "^max_bytes must be greater than or equal to 1, got 0$"),
        ({"precision": "fp8"}, "^precision must be 'fp32', 'bf16' or 'fp16', got 'fp8'$"),
        ({"match": "lora"}, "^match must be 'dense', .*, got 'lora'$"),
        ({"batch_size": 8, "accumulation": 3}, "^accumulation must divide batch_size = 8, got 3$"),
        ({"d_model": 32, "n_head": 3}, "^n_head must divide d_model = 32, got 3$"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(SettingsError, match=message):
        build(Settings, fields)


def test_budget():
    budget = Settings(total=3e6, active=2e6, window=64).budget(1024)
    assert (budget.total, budget.active, budget.vocab_size, budget.n_positions) == (3e6, 2e6, 1024, 64)


@pytest.mark.parametrize("match", [None, "moe", "dsc"])
def test_match(match):
    plans = [make_plan(Settings(method=method, match=match), 4096) for method in ("dense", "moe", "dsc")]
    totals = [plan.params_total for plan in plans]
    # MoE's steps are large: matched to it the others follow, otherwise it is the one apart.
    assert (max(totals) - min(totals) < 3_000) == (match == "moe")


def test_widths_of_each_method():
    plans = {m: make_plan(Settings(method=m, top_k=16), 4096) for m in ("dsc", "mixture_of_loras", "moe")}
    assert {m: plan.options["top_k"] for m, plan in plans.items()} == {"dsc": 16, "mixture_of_loras": 16, "moe": 2}
    assert make_plan(Settings(feed_forward={"router_bias": True}), 4096).options["router_bias"] is True
