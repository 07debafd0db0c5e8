"""The health of the routing at the end of training: what is used, and what is wrong with it, in words."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from torchdsc.baselines.methods import METHODS
from torchdsc.lab.tasks.task import Record

from .intervals import DASH
from .tables import Table
from .words import join_words

__all__ = ["layer_table", "use_table", "warnings"]

Figure = Callable[[Mapping[str, Any]], float]
"""Of a layer; NaN where it has none."""

# A warning names as many variants: the table has all.
_NAMED = 6


def _recorded(key: str) -> Figure:
    return lambda layer: math.nan if layer.get(key) is None else layer[key]


_used, _effective, _strength, _gate = map(_recorded, ("utilization", "effective_atoms", "strength", "gate"))


def _effective_share(layer: Mapping[str, Any]) -> float:
    return _effective(layer) / float(layer["num_atoms"])


# A figure, whether a value of it is a fault, and what that means.
_FAULTS: tuple[tuple[Figure, Callable[[float], bool], str], ...] = (
    (_used, lambda value: value < 0.5, "Less than 50 % of the atoms or experts are in use"),
    (_effective_share, lambda value: value < 0.1, "The equivalent of less than 10 % of the atoms or experts is in use"),
    (_gate, lambda value: value < 0.05, "The gate has collapsed: it adds next to nothing"),
    (_gate, lambda value: value > 0.999, "The gate is saturated: it is constant, and the strength idle"),
)


def warnings(runs: Mapping[str, Sequence[Record]]) -> list[str]:
    """A sentence for each fault, with the variants that have it; by the records of each variant."""
    found = []
    for figure, is_fault, words in _FAULTS:
        parts = []
        for name, records in runs.items():
            values = _values(records, figure)
            count = sum(map(is_fault, values))
            of = f" (over {len(records)} runs)" if len(records) > 1 else ""
            parts += [f"{name} in {count} of {len(values)} layers{of}"] if count else []
        more = [f"{len(parts) - _NAMED} variants more"] if parts[_NAMED:] else []
        found += [f"{words}: {'; '.join([*parts[:_NAMED], *more])}."] if parts else []
    for code in sorted({code for records in runs.values() for run in records for code in _signs(run)}):
        names = [name for name, records in runs.items() if any(code in _signs(run) for run in records)]
        found.append(f"A sign of failure was seen in training, {code}: {join_words(names)}.")
    unknown = [name for name, records in runs.items() if not _values(records, _used)]
    return found + ([f"How much is in use was not recorded: {join_words(unknown)}."] if unknown else [])


def _signs(run: Record) -> set[str]:
    """Codes of findings, see :mod:`torchdsc.diagnostics.findings`, that two evaluations in a row have, or the last."""
    found = [set(point.get("findings", [])) for point in run["routing"]["history"]]
    return set().union(*found[-1:], *(one & other for one, other in pairwise(found)))


def use_table(runs: Mapping[str, Sequence[Record]]) -> Table | None:
    """A row a variant: means over the layers of all its runs."""
    head = ["Variant", "selects from", "in use", "least in a layer", "effective", "strength S", "gate tanh S"]
    rows = []
    for name, records in runs.items():
        method = records[0].get("method")
        counts = sorted({layer["num_atoms"] for run in records for layer in run["routing"]["layers"]})
        units = METHODS[method].units if method in METHODS else ""
        used = _values(records, _used)
        row = [
            name,
            f"{' or '.join(map(str, counts))} {units}".strip(),
            _mean(used, ".0%"),
            _mean(sorted(used)[:1], ".0%"),
        ]
        figures = ((_effective_share, ".0%"), (_strength, ".2f"), (_gate, ".2f"))
        rows.append(row + [_mean(_values(records, figure), form) for figure, form in figures])
    return Table.of("Means over layers and runs", head, rows)


def layer_table(runs: Mapping[str, Sequence[Record]]) -> Table | None:
    """A row for each layer of each run."""
    head = ["Variant", "case", "seed", "layer", "number", "in use", "effective", "strength S", "gate tanh S"]
    figures = ((_used, ".1%"), (_effective, ",.1f"), (_strength, ".3f"), (_gate, ".3f"))
    rows = [
        [
            *(name, run["case"] or DASH, str(run["seed"]), str(index), f"{layer['num_atoms']:,}"),
            *(_mean([figure(layer)], form) for figure, form in figures),
        ]
        for name, records in runs.items()
        for run in records
        for index, layer in enumerate(run["routing"]["layers"], 1)
    ]
    return Table.of("At the end of training", head, rows, "wide")


def _values(records: Sequence[Record], figure: Figure) -> list[float]:
    found = [figure(layer) for run in records for layer in run["routing"]["layers"]]
    return [value for value in found if math.isfinite(value)]


def _mean(values: Iterable[float], form: str) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{fmean(finite):{form}}" if finite else DASH
