"""Every argument of every public class: wrong types and values that are not finite are errors that name them."""

import copy
import inspect
import math
import re
import types
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

from torchdsc import DSC, BasisBank, DSCOptions, ShortConvolution, convert, regularization
from torchdsc.arguments import check_at_least, check_types, named_arguments, own_copies
from torchdsc.baselines import PEER, DenseFFN, MixtureOfLoRAs, SoftmaxRouter, StandardMoE
from torchdsc.nn import LinearRouter, LowRankRouter, ProductKeyRouter, RegularizerWeights
from torchdsc.nn.routers import Router

LAYER = {"in_features": 8, "num_atoms": 16}
# What is made, with arguments that are right.
OWNERS = {
    DSCOptions: {"num_atoms": 16, "top_k": 4},
    RegularizerWeights: {},
    DSC: {"in_features": 8, "num_atoms": 16, "top_k": 4},
    BasisBank: LAYER,
    Router: LAYER,
    LinearRouter: LAYER,
    LowRankRouter: {**LAYER, "rank": 2},
    ProductKeyRouter: {**LAYER, "rank": 2},
    ShortConvolution: {"features": 8, "num_tokens": 2},
    DenseFFN: {"in_features": 8, "hidden_features": 4},
    StandardMoE: {"in_features": 8, "hidden_features": 4, "num_experts": 4},
    MixtureOfLoRAs: {"in_features": 8, "num_experts": 4, "rank": 2},
    PEER: {"in_features": 8, "num_experts": 16},
    SoftmaxRouter: {"in_features": 8, "num_experts": 4, "top_k": 2},
}


def wrong_values(kind):
    """Values that an argument of this type must refuse."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    wrong = [object()] if Any not in parts else []
    if not {bool, int} & set(parts) or float in parts:
        wrong.append(True)
    if str not in parts:
        wrong.append("nosuch")
    if float in parts:
        wrong += [math.nan, math.inf, -math.inf]
    if int in parts and float not in parts:
        wrong += [1.5, True]
    if bool in parts:
        wrong += [1, "no"]
    return wrong


def cases_of(owner, arguments, of=None):
    parameters = inspect.signature(owner).parameters
    hints = get_type_hints(of or (owner.__init__ if inspect.isclass(owner) else owner))
    for name, parameter in parameters.items():
        if name not in ("device", "dtype") and parameter.kind is not parameter.VAR_KEYWORD:
            for value in wrong_values(hints[name]):
                yield owner, {**arguments, name: value}, name


CASES = [case for owner, arguments in OWNERS.items() for case in cases_of(owner, arguments)]
CASES += [
    (DSC, {"in_features": 8, **arguments}, name) for _, arguments, name in cases_of(DSCOptions, OWNERS[DSCOptions])
]


def refuses(owner, arguments, name):
    with pytest.raises((TypeError, ValueError), match=rf"{name}\w* must be .*got {re.escape(repr(arguments[name]))}"):
        owner(**arguments)


@pytest.mark.parametrize(("owner", "arguments", "name"), CASES)
def test_wrong_arguments_are_named(owner, arguments, name):
    refuses(owner, arguments, name)


@pytest.mark.parametrize("owner", OWNERS, ids=lambda owner: owner.__name__)
def test_right_arguments_are_taken(owner):
    owner(**OWNERS[owner])


@pytest.mark.parametrize("function", [convert, regularization])
def test_wrong_arguments_of_functions_are_named(function):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    right = {"num_atoms": 16, "top_k": 4, "target": "0"} if function is convert else {}
    for _, arguments, name in cases_of(function, {"model": model, **right}):
        # A callable may be any.
        if not (name == "target" and arguments[name] == "nosuch"):
            refuses(function, arguments, name)


def test_wrong_values_of_a_models_configuration_are_named():
    pytest.importorskip("transformers")
    from torchdsc.models import DSCGPTConfig

    for case in cases_of(DSCGPTConfig, {"hidden_size": 12}):
        refuses(*case)
    for options in (dict.fromkeys(("eps", "share_bank", "router_context"), "x"), {"gamma_init": math.nan}):
        for name, value in options.items():
            with pytest.raises(ValueError, match=rf"{name} must be .*got {value!r}"):
                DSCGPTConfig(feed_forward_options={"num_atoms": 16, "top_k": 4, name: value})


@pytest.mark.parametrize("name", ["DSCAdapterConfig", "MixtureOfLoRAsConfig"])
def test_wrong_fields_of_an_adapters_configuration_are_named(name):
    peft = pytest.importorskip("peft")
    import torchdsc.adapters

    owner = getattr(torchdsc.adapters, name)
    theirs = {f.name for f in fields(peft.PeftConfig)}
    cases = [case for case in cases_of(owner, {}, of=owner) if case[2] not in theirs]
    assert {case[2] for case in cases} == {f.name for f in fields(owner)} - theirs
    for case in cases:
        # Names of modules are any text.
        refuses(*case)


def mutable_configurations():
    """Configurations that take lists, dictionaries or sets, with arguments of such values."""
    from torchdsc.adapters import DSCAdapterConfig, MixtureOfLoRAsConfig
    from torchdsc.lab.budget import Plan
    from torchdsc.models import DSCGPTConfig

    where = {"target_modules": ["q"], "exclude_modules": {"k"}, "layers_to_transform": [1], "modules_to_save": ["head"]}
    where["layers_pattern"] = ["layers"]
    plan = dict.fromkeys(("params_total", "params_active", "miss_total", "miss_active"), 0)
    return [
        (DSCGPTConfig, {"feed_forward_options": {"num_atoms": 16, "top_k": 4}}),
        (DSCAdapterConfig, where),
        (MixtureOfLoRAsConfig, copy.deepcopy(where)),
        (Plan, {"method": "dsc", "intermediate_size": 4, "options": {"num_atoms": 16}, **plan}),
    ]


def change(value):
    """Change a value and all that it holds, in place."""
    if isinstance(value, dict):
        for inner in value.values():
            change(inner)
        value["changed"] = 1
    elif isinstance(value, list):
        for inner in value:
            change(inner)
        value.append("changed")
    elif isinstance(value, set):
        value.add("changed")
    elif is_dataclass(value):
        for f in fields(value):
            change(getattr(value, f.name))


def test_configurations_own_what_they_are_given():
    pytest.importorskip("peft")
    for owner, arguments in mutable_configurations():
        config = owner(**arguments)
        before = copy.deepcopy(vars(config))
        for value in arguments.values():
            change(value)
        assert vars(config) == before, owner.__name__


def test_copies_own_their_values():
    @dataclass(frozen=True)
    class Held:
        values: list[int] = field(default_factory=list)

        def __post_init__(self):
            own_copies(self)

    given = [1]
    held = Held(given)
    given.append(2)
    assert held.values == [1]


def test_types_that_fit():
    def function(a: int | None, b: list[str], c: dict[str, float], d: Literal["x"] | None, e: set[int], f: Any): ...

    check_types(function, {"a": None, "b": ("x",), "c": {"x": 1}, "d": "x", "e": {1}, "f": object(), "unknown": 0})
    for name, value, expected in (
        ("b", [1], "a list of str"),
        ("c", {"x": "y"}, "a dict"),
        ("e", {1.5}, "a set of int"),
        ("a", 1.0, "an int or None"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"{name} must be {expected}, got {value!r}")):
            check_types(function, {name: value})
    with pytest.raises(ValueError, match=r"d must be one of \('x',\) or None, got 'y'"):
        check_types(function, {"d": "y"})
    with pytest.raises(ValueError, match="rank must be >= 2, got 1"):
        check_at_least(2, rank=1, other=None)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(300, 8), r"a Tensor of shape \(300, 8\)$"),
        ("x" * 1000, r"'x{199}\.\.\.$"),
        (1.5, "1.5$"),
    ],
)
def test_what_was_received_is_told_in_brief(value, words):
    with pytest.raises(TypeError, match=f"^num_atoms must be an int, got {words}"):
        DSCOptions(num_atoms=value, top_k=2)
    with pytest.raises(ValueError, match=f"^router must be one of .*, got {words}"):
        DSCOptions(num_atoms=4, top_k=2, router=value)


def test_named_arguments():
    assert named_arguments(("a", "b", "c"), (1,), {"c": 3}) == {"a": 1, "c": 3}
    # A model that takes any number of them.
    assert named_arguments(("a",), (1, 2), {}) == {"a": 1}
