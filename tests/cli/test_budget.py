"""``torchdsc budget``."""

import json
import re

import pytest

BUDGET = ("budget", "--total", "35e6", "--active", "28e6", "--d_model", 384, "--n_layer", 6)


def test_table(torchdsc):
    status, out, err = torchdsc(*BUDGET)
    assert (status, err) == (0, "")
    for words in (r"dense .*width 2611", r"moe .*5 experts of 545", r"dsc .*M 1523", r"\+4\.42%"):
        assert re.search(words, out)


def test_json(torchdsc):
    status, out, _ = torchdsc(*BUDGET, "--json", "--rank", 4)
    assert status == 0
    dense, moe, loras, dsc = json.loads(out)
    assert dense["intermediate_size"] == 2611
    assert dense["miss_active"] is None
    assert moe["options"] == {"num_experts": 5, "top_k": 2}
    assert loras["options"]["rank"] == 4
    assert (dsc["method"], dsc["options"]["num_atoms"], dsc["params_total"]) == ("dsc", 1523, 35_000_064)


def test_router(torchdsc):
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
def test_router_options_that_do_not_fit(fails, flags, error):
    assert fails(*BUDGET, *flags) == f"torchdsc budget: {error}"


@pytest.mark.parametrize(("by", "top_k", "words"), [("embeddings", 32, "linear"), ("ngrams", 18, "ngram")])
def test_dsc_as_recommended(torchdsc, by, top_k, words):
    status, out, _ = torchdsc(*BUDGET, "--json", "--recommended", by)
    dsc = json.loads(out)[-1]
    assert status == 0
    assert dsc["options"]["top_k"] == top_k
    assert (dsc["options"].get("router", "linear"), dsc["options"]["router_input"]) == (words, "embeddings")
    assert abs(dsc["miss_total"]) < 0.001
    mixture = json.loads(out)[-2]
    assert mixture["options"]["top_k"] == 4


def test_what_is_recommended_is_not_to_be_changed(fails):
    for flags in (("--top_k", 4), ("--router", "linear")):
        line = fails(*BUDGET, "--recommended", "ngrams", *flags)
        assert "--recommended must be given without --top_k and options of the router" in line


def test_methods_that_cannot_meet_it_are_told(torchdsc):
    sparse = ("budget", "--total", "35e6", "--active", "10e6", "--d_model", 384, "--n_layer", 6, "--vocab_size", 4096)
    status, out, err = torchdsc(*sparse, "--recommended", "ngrams")
    assert status == 0
    assert re.search(r"dsc .*K 18", out)
    assert "mixture_of_loras" not in out
    assert "torchdsc budget: no mixture_of_loras: active must be at least 15,165,163" in err


def test_infeasible(fails):
    line = fails("budget", "--total", "1e6", "--active", "1e5", "--d_model", 100, "--n_layer", 2)
    assert line == "torchdsc budget: total must be at least 5,137,400 for width 1, got 1,000,000"
