import pytest
import torch

from torchdsc import DSC, Residual
from torchdsc.baselines import DenseFFN, GatedFFN, MixtureOfLoRAs, StandardMoE
from torchdsc.models import feed_forward
from torchdsc.models.feed_forward import build_attention_update, build_feed_forward, check_feed_forward


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("dense", {}, DenseFFN),
        ("gated", {}, GatedFFN),
        ("moe", {"num_experts": 4, "top_k": 1, "jitter": 0.01}, StandardMoE),
        ("mixture_of_loras", {"num_experts": 4, "rank": 2, "scale": 2.0}, MixtureOfLoRAs),
        ("dsc", {"num_atoms": 12, "top_k": 3, "router_bias": True}, DSC),
    ],
)
def test_builds_each_kind_with_its_options(kind, options, expected):
    layer = build_feed_forward(kind, 8, 6, options)
    if isinstance(layer, Residual):
        assert isinstance(layer.base, DenseFFN)
        layer = layer.dsc
    assert type(layer) is expected
    described = vars(layer) | vars(getattr(layer, "options", layer)) | vars(getattr(layer, "router", layer))
    assert {name: described.get(name, value) for name, value in options.items()} == options


def test_without_a_static_layer_only_the_update_is_left():
    layer = build_feed_forward("dsc", 8, 0, {"num_atoms": 12, "top_k": 3})
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), layer.dsc(x))


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("none", {}, r"feed_forward must be one of \('dense', .*, got 'none'"),
        ("dense", {"num_atoms": 3}, "feed_forward_options do not fit feed_forward='dense': .*num_atoms"),
        ("gated", {"gate_norm": "batch"}, "gate_norm must be one of .*, got 'batch'"),
        ("moe", {}, "feed_forward_options do not fit feed_forward='moe': .*num_experts"),
        ("mixture_of_loras", {"num_experts": 4}, "feed_forward='mixture_of_loras': .*rank"),
        ("dsc", {"num_atoms": 12}, "feed_forward_options do not fit feed_forward='dsc': .*top_k"),
        ("dsc", {"num_atoms": 12, "top_k": 3, "atoms": 1}, "feed_forward='dsc': .*atoms"),
        ("dsc", {"num_atoms": 12, "top_k": 3, "share_bank": 2}, "share_bank must be a bool, got 2"),
        ("dsc", {"num_atoms": 12, "top_k": 3, "attention_rank": -1}, "attention_rank must be >= 0, got -1"),
        ("moe", {"num_experts": 4, "attention_rank": 2}, "feed_forward='moe': .*attention_rank"),
        ("dsc", {"num_atoms": 12, "top_k": 3, "router_context": 0}, "router_context must be >= 1, got 0"),
        ("moe", {"num_experts": 4, "router_context": 2.0}, "router_context must be an int, got 2.0"),
        ("dense", {"input_context": True}, "input_context must be an int, got True"),
        ("dense", {"router_context": 2}, "feed_forward='dense': .*router_context"),
        ("moe", {"num_experts": 4, "router_input": "tokens"}, r"router_input must be one of .*, got 'tokens'"),
        (
            "moe",
            {"num_experts": 4, "router_context": 2, "input_context": 2},
            "router_input must be 'embeddings' for contexts of layer and router, got 'hidden'",
        ),
        (
            "dsc",
            {"num_atoms": 12, "top_k": 3, "router": "ngram"},
            "top_k must be a multiple of the 2 orders of n-grams, got 3",
        ),
        (
            "dsc",
            {"num_atoms": 2, "top_k": 3, "router": "ngram", "ngram_orders": (1, 2, 3)},
            "num_atoms must be at least 3, one for each order of n-grams, got 2",
        ),
        ("dense", {"ngram_heads": 0}, "ngram_heads must be >= 1, got 0"),
        ("peer", {"num_experts": 16, "share_bank": True}, "feed_forward='peer': .*share_bank"),
        ("dsc", {"num_atoms": 12, "top_k": 13}, "top_k must be at most num_atoms = 12, got 13"),
        ("dsc", {"num_atoms": 12.0, "top_k": 3}, "num_atoms must be an int, got 12.0"),
        ("moe", {"num_experts": 4, "impl": "loop"}, "impl must be one of"),
    ],
)
def test_errors_are_those_of_the_check_too(kind, options, match):
    for function in (build_feed_forward, check_feed_forward):
        with pytest.raises(ValueError, match=match):
            function(kind, 8, 6, options)


def test_the_check_builds_the_update_of_attention_too(monkeypatch):
    built = []

    def build(*arguments):
        built.append(build_attention_update(*arguments))

    monkeypatch.setattr(feed_forward, "build_attention_update", build)
    options = {"num_atoms": 12, "top_k": 3, "attention_rank": 2, "atom_features": 4, "offset": True}
    check_feed_forward("dsc", 8, 6, options)
    assert built[0].in_features == 8
    assert built[0].bank.in_features == 5


def test_checking_costs_nothing():
    check_feed_forward("dsc", 100_000, 100_000, {"num_atoms": 10_000_000, "top_k": 4})
