"""Settings of a forecaster's run, and what they refuse."""

import pytest

from torchdsc.lab.schema import SettingsError, build
from torchdsc.lab.tasks.forecasting.run import make_plan
from torchdsc.lab.tasks.forecasting.settings import Settings

ALONE = "^feed_forward must be options of a layer that sees its own input alone, .*, got "


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "^source must have at least 1 character"),
        ({"dropout": 1.0}, "^dropout must be less than 1, got 1.0$"),
        ({"attention": "none"}, "^attention must be 'full' or 'causal', got 'none'$"),
        ({"batch_size": 8, "accumulation": 3}, "^accumulation must divide batch_size = 8, got 3$"),
        ({"d_model": 32, "n_head": 3}, "^n_head must divide d_model = 32, got 3$"),
        ({"patch_length": 97}, "^patch_length must be at most look_back = 96, got 97$"),
        ({"stride": 9}, "^stride must divide look_back - patch_length = 80, got 9$"),
        ({"train_rows": 191}, r"^train_rows must be at least look_back \+ horizon = 192, got 191$"),
        ({"valid_rows": 95}, "^valid_rows must be at least horizon = 96, got 95$"),
        ({"test_rows": 95}, "^test_rows must be at least horizon = 96, got 95$"),
        ({"warmup_steps": 9, "steps": 8}, r"^warmup_steps must be in 0 .. steps = 8, got 9$"),
        ({"feed_forward": {"router": "ngram"}}, f"{ALONE}router = 'ngram'$"),
        ({"feed_forward": {"router_input": "embeddings"}}, f"{ALONE}router_input = 'embeddings'$"),
        ({"feed_forward": {"router_context": 3}}, f"{ALONE}router_context = 3$"),
        ({"feed_forward": {"input_context": 4}}, f"{ALONE}input_context = 4$"),
        ({"feed_forward": {"ngram_rows": 9}}, f"{ALONE}ngram_rows = 9$"),
        ({"feed_forward": {"share_bank": True}}, f"{ALONE}share_bank = True$"),
        ({"feed_forward": {"attention_rank": 2}}, f"{ALONE}attention_rank = 2$"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(SettingsError, match=message):
        build(Settings, {"source": "a.csv", **fields})


@pytest.mark.parametrize("options", [{"router": "low_rank"}, {"static": "gated"}, {"gamma_init": 0.5}])
def test_takes_options_of_the_layer(options):
    assert make_plan(Settings(source="a.csv", feed_forward=options)).options.items() >= options.items()


def test_budget():
    settings = Settings(source="a.csv", look_back=24, patch_length=8, stride=4, d_model=16, horizon=10, n_layer=2)
    assert settings.n_patches == 5
    # Patches 8 x 16, positions 5 x 16, head (5 x 16 + 1) x 10; in a layer attention 4 x 16^2 and norms 4 x 16.
    assert settings.budget.fixed == 128 + 80 + 810 + 2 * (1024 + 64) + 32


@pytest.mark.parametrize("match", [None, "moe"])
def test_match(tiny, match):
    totals = [
        make_plan(tiny.model_copy(update={"method": method, "match": match})).params_total
        for method in ("dense", "moe", "dsc", "mixture_of_loras")
    ]
    # MoE's steps are an expert; the others follow it within a step of the width.
    assert (max(totals) - min(totals) < 4 * 16) == (match == "moe")
