"""The registry: its entries fit each other and what is built, and one entry is all that a method needs."""

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from torch import nn

from torchdsc.baselines import MixtureOfLoRAs
from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind
from torchdsc.lab.budget import Budget, feed_forward_parameters, solve
from torchdsc.models.feed_forward import build_feed_forward
from torchdsc.models.options import ModelOptions, split_options

BUDGET = Budget(1_696_700, 1_178_900, 128, 4, vocab_size=4096, n_positions=128)


def test_every_kind_has_an_entry_and_no_look_twice():
    assert tuple(METHODS) == get_args(FeedForwardKind)
    for look in ("label", "color", "marker"):
        assert len({getattr(method, look) for method in METHODS.values()}) == len(METHODS)


@pytest.mark.parametrize("kind", METHODS)
def test_options_of_the_model_are_kept_from_the_layer(kind):
    values = {"router_input": "embeddings", "router_context": 2, "input_context": 3, "share_bank": True}
    values |= {"attention_rank": 4, "static": "gated", "ngram_rows": 40, "ngram_orders": (2, 4), "ngram_heads": 3}
    assert set(values) == {f.name for f in fields(ModelOptions)} - {"routes_by_ngrams"}
    names = METHODS[kind].model_options
    model, left = split_options(kind, {**values, "top_k": 3})
    assert {name: getattr(model, name) for name in names} == {name: values[name] for name in names}
    assert left == {"top_k": 3, **{name: value for name, value in values.items() if name not in names}}


@pytest.mark.parametrize(("form", "width"), [("dense", 5), ("experts", 5), ("update", 5), ("update", 0)])
def test_the_form_says_where_the_width_is(form, width):
    for kind in (kind for kind, method in METHODS.items() if method.form == form):
        values = dict(zip(METHODS[kind].widths, (4, 2, 3), strict=False))
        layer = build_feed_forward(kind, 8, width, values)
        routed = layer if form != "update" else layer.dsc
        assert type(routed) is METHODS[kind].layer
        wide = layer.experts if form == "experts" else layer if form == "dense" else layer.base
        assert {5} >= {size for p in wide.parameters() for size in p.shape if size not in (4, 8)}
        assert bool(list(wide.parameters())) == (width > 0)


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in METHODS), ("moe", {"gated": True})])
def test_idle_parameters_get_no_gradient_from_a_token(kind, options):
    """Counted where nothing is known of the layer: rows of experts or atoms that one token's loss does not touch."""
    values = dict(zip(METHODS[kind].widths, (9, 2, 3), strict=False))
    layer = build_feed_forward(kind, 8, 5, values | options).eval()
    routed = getattr(layer, "dsc", layer)
    for parameter in routed.parameters():
        nn.init.normal_(parameter)
    layer(torch.randn(1, 8)).sum().backward()
    rows = [
        p.grad[row]
        for name, p in routed.named_parameters()
        if not name.startswith("router") and p.dim() > 1 and p.shape[0] in (9, 27)
        for row in range(p.shape[0])
    ]
    assert METHODS[kind].idle(routed) == sum(row.numel() for row in rows if not row.any())


class Copy(MixtureOfLoRAs):
    """A baseline of somebody else."""


@pytest.mark.parametrize("options", [{}, {"router_input": "embeddings"}])
def test_one_entry_makes_a_method(monkeypatch, options):
    entry = replace(METHODS["mixture_of_loras"], layer=Copy, words="{num_experts} copies of rank {rank}")
    monkeypatch.setitem(METHODS, "copy", entry)
    plan, known = solve("copy", BUDGET, rank=2, options=options), solve("mixture_of_loras", BUDGET, rank=2)
    assert (plan.intermediate_size, plan.options) == (known.intermediate_size, {**options, **known.options})
    assert (plan.params_total, plan.params_active) == (known.params_total, known.params_active)
    said = f"{plan.options['num_experts']} copies of rank 2, static width {plan.intermediate_size}"
    assert plan.description == said + (", routed by embeddings" if options else "")
    layer = build_feed_forward("copy", 8, 4, {"num_experts": 6, "rank": 2})
    assert type(layer.dsc) is Copy
    stored, active = feed_forward_parameters("copy", 8, 4, {"num_experts": 6, "rank": 2})
    assert stored - active == 2 * 8 * 2 * (6 - 2)


def test_an_unknown_method_has_no_counts():
    with pytest.raises(ValueError, match=r"feed_forward must be one of \('dense', .*, got 'none'"):
        feed_forward_parameters("none", 8, 4, {})
