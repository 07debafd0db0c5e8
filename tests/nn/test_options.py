"""Options in parts, their keywords for editors, and the settings that are recommended."""

import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_type_hints

import pytest
import torch

from torchdsc import DSCFeedForward, DSCOptions, recommended
from torchdsc.nn.context_options import ContextOptions, FeedForwardArguments, split_context
from torchdsc.nn.options import DSCArguments

# As docs/recommended.md has them.
RECOMMENDED = {
    "top_k": 32,
    "gamma_init": 1.0,
    "frame_weight": 0.0,
    "router_input": "embeddings",
    "router_context": 3,
    "input_context": 4,
}
BY_NGRAMS = RECOMMENDED | {
    "router": "ngram",
    "ngram_orders": (1, 2, 3),
    "top_k": 18,
    "gamma_init": 4.0,
    "static": "gated",
}


def test_recommended_settings():
    assert recommended() == RECOMMENDED
    changed = {"num_atoms": 90, "top_k": 8, "input_context": 1}
    assert recommended(**changed) == RECOMMENDED | changed
    assert recommended() == RECOMMENDED
    with pytest.raises(TypeError, match=r"got \['num_atom', 'topk'\]"):
        recommended(topk=8, num_atom=90, top_k=4)


def test_recommended_by_ngrams():
    assert recommended("ngrams") == BY_NGRAMS
    assert recommended("ngrams", top_k=6) == BY_NGRAMS | {"top_k": 6}
    layer = DSCFeedForward(8, 16, **recommended("ngrams", num_atoms=90))
    x = torch.randn(2, 5, 8)
    assert layer(x, torch.randn(2, 5, 8), tokens=torch.randint(9, (2, 5))).shape == x.shape
    with pytest.raises(ValueError, match="by must be 'embeddings' or 'ngrams', got 'ngram'"):
        recommended("ngram")


def test_a_base_without_a_gate_is_refused():
    with pytest.raises(ValueError, match="base must be a GatedFFN for static = 'gated', got a Linear"):
        DSCFeedForward(8, base=torch.nn.Linear(8, 8), **recommended("ngrams", num_atoms=90))


def test_the_layer_has_them_by_default():
    layer = DSCFeedForward(8, num_atoms=90)
    context, own = split_context(RECOMMENDED)
    assert layer.context == context
    assert layer.dsc.options == DSCOptions(num_atoms=90, **own)
    assert layer.dsc.options != DSCOptions(num_atoms=90, top_k=32)


@pytest.mark.parametrize(
    ("arguments", "classes"),
    [(DSCArguments, [DSCOptions]), (FeedForwardArguments, [DSCOptions, ContextOptions])],
)
def test_keywords_are_the_fields(arguments, classes):
    hints = {}
    for options in classes:
        types = get_type_hints(options)
        hints |= {field.name: types[field.name] for field in fields(options)}
    hints.pop("routes_by_ngrams", None)
    assert get_type_hints(arguments) == hints
    assert not arguments.__required_keys__


def test_options_are_assigned_once():
    options = DSCOptions(num_atoms=9, top_k=3)
    for made, name in ((options, "top_k"), (ContextOptions(), "router_context")):
        with pytest.raises(FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(made, name, 2)
    assert replace(options, top_k=2) == DSCOptions(num_atoms=9, top_k=2)
    assert hash(replace(options, top_k=3)) == hash(options)
    with pytest.raises(ValueError, match="top_k must be at most num_atoms = 9, got 10"):
        replace(options, top_k=10)


@pytest.mark.parametrize(
    ("options", "seen", "past", "rows"),
    [
        ({}, False, 0, 0),
        ({"router_input": "embeddings"}, True, 0, 0),
        ({"router_context": 3}, False, 2, 3),
        ({"input_context": 2}, True, 1, 2),
        ({"router_input": "embeddings", "router_context": 3, "input_context": 4}, True, 3, 7),
        ({"ngram_orders": [2, 6]}, False, 0, 0),
        ({"ngram_orders": [2, 6], "routes_by_ngrams": True}, False, 5, 0),
        ({"input_context": 4, "routes_by_ngrams": True}, True, 3, 4),
    ],
    ids=str,
)
def test_what_a_context_needs(options, seen, past, rows):
    context = ContextOptions(**options)
    assert (context.embeddings_are_seen, context.past_tokens, context.context_rows) == (seen, past, rows)
    assert context.tokens_are_seen == (seen or "routes_by_ngrams" in options)
    assert hash(context) == hash(ContextOptions(**options))


def test_an_ngram_router_leaves_its_input_to_a_gate():
    context, own = split_context(recommended(router="ngram", static="gated", ngram_orders=(1, 4)))
    assert own == {"top_k": 32, "gamma_init": 1.0, "frame_weight": 0.0, "router": "ngram"}
    assert context.routes_by_ngrams
    assert context.beside(gate=True) == context
    alone = context.beside(gate=False)
    assert alone == replace(context, router_input="hidden", router_context=1)
    assert (alone.past_tokens, alone.context_rows) == (3, 4)
    other, _ = split_context(recommended())
    assert other.beside(gate=False) == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ngram_orders": ()}, r"ngram_orders must be numbers of tokens, each 1 or more, got \(\)"),
        ({"ngram_orders": (2, 0)}, r"ngram_orders must be numbers of tokens, each 1 or more, got \(2, 0\)"),
        ({"static": "thin"}, r"static must be one of \('dense', 'gated'\), got 'thin'"),
        ({"router": "ngram", "top_k": 3}, "top_k must be a multiple of the 2 orders of n-grams, got 3"),
        ({"router": "ngram", "router_context": 2}, "router_input must be 'embeddings' for a router_context beside"),
    ],
)
def test_what_a_context_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        split_context(options)


@pytest.mark.parametrize("orders", [2, "23", (2, 2.5), [True], None], ids=repr)
def test_orders_of_another_type(orders):
    with pytest.raises(TypeError, match=f"ngram_orders must be a list of int, got {re.escape(repr(orders))}"):
        ContextOptions(ngram_orders=orders)
