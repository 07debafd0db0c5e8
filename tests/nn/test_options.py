"""Options in parts, their keywords for editors, and the settings that are recommended."""

from dataclasses import FrozenInstanceError, fields, replace
from typing import get_type_hints

import pytest

from torchdsc import DSCFeedForward, DSCOptions, recommended
from torchdsc.nn.options import ContextOptions, DSCArguments, FeedForwardArguments, split_context

# As docs/recommended.md has them.
RECOMMENDED = {
    "top_k": 32,
    "gamma_init": 1.0,
    "frame_weight": 0.0,
    "router_input": "embeddings",
    "router_context": 3,
    "input_context": 4,
}


def test_recommended_settings():
    assert recommended() == RECOMMENDED
    changed = {"num_atoms": 90, "top_k": 8, "input_context": 1}
    assert recommended(**changed) == RECOMMENDED | changed
    assert recommended() == RECOMMENDED
    with pytest.raises(TypeError, match=r"got \['num_atom', 'topk'\]"):
        recommended(topk=8, num_atom=90, top_k=4)


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
    ],
    ids=str,
)
def test_what_a_context_needs(options, seen, past, rows):
    context = ContextOptions(**options)
    assert (context.embeddings_are_seen, context.past_tokens, context.context_rows) == (seen, past, rows)
