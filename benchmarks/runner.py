"""Measures the cases of a benchmark: times in turn, memory, ratios and floors, as rows of JSON."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import median, quantiles
from typing import Any

from torchdsc.lab.training.environment import hardware, versions
from torchdsc.lab.training.latency import Timing, measure_in_turn

from . import child
from .case import Benchmark, Case, MemoryCase, Row, Settings, ordered
from .ceilings import Ceilings, measure_ceilings
from .peak import extra_bytes

SCHEMA = 1
# Without a given number of rounds a point gets as many as fit these seconds, within limits.
_SECONDS, _LEAST, _MOST = 8.0, 7, 200
_QUICK_ROUNDS = 3
# Fresh processes a step whose memory is measured: libraries' buffers differ by tens of megabytes from one to the next.
_PROCESSES = 3

Progress = Callable[[str], None]


def run(
    benchmark: Benchmark, settings: Settings, *, rounds: int | None, command: str, progress: Progress
) -> dict[str, Any]:
    """Measure every case of a benchmark.

    Args:
        benchmark: Which.
        settings: How.
        rounds: Counted rounds a point, >= 2; by default as many as fit a few seconds.
        command: What remakes the result.
        progress: Told what is being measured.

    Returns:
        The result, ready for JSON.
    """
    progress("copy rate and matrix-product rate")
    ceilings = measure_ceilings(settings.device)
    rows: list[Row] = []
    summary = None
    cases = benchmark.cases(settings)
    try:
        case = next(cases)
        while True:
            progress(f"point {len(rows) + 1}: {describe(case.point)}")
            rows.append(measure(case, settings, rounds, ceilings))
            case = cases.send(rows[-1])
    except StopIteration as stop:
        summary = stop.value
    return {
        "schema": SCHEMA,
        "benchmark": benchmark.name,
        "description": benchmark.description,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": child.source_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "device": settings.device,
        "quick": settings.quick,
        "rounds": rounds,
        "ceilings": shortened(ceilings.as_dict()),
        "rows": rows,
        **(summary or {}),
    }


def measure(case: Case | MemoryCase, settings: Settings, rounds: int | None, ceilings: Ceilings) -> Row:
    """One row: the calls of a case, in the order of tables."""
    if isinstance(case, MemoryCase):
        return _weigh(case, 1 if settings.quick else min(rounds or _PROCESSES, _PROCESSES))
    return _time(case, settings, rounds, ceilings)


def _time(case: Case, settings: Settings, rounds: int | None, ceilings: Ceilings) -> Row:
    calls = {name: case.calls[name] for name in ordered(case.calls)}
    timings = time_calls(calls, rounds, quick=settings.quick)
    own = timings[case.subject]
    rows = {
        name: {
            "ms": _spread([sample / case.per for sample in timing.samples]),
            "subject_over_it": ratio(own.samples, timing.samples),
            "extra_bytes": extra_bytes(calls[name]),
        }
        for name, timing in timings.items()
    }
    row: Row = {
        "point": case.point,
        "unit": case.unit,
        "subject": case.subject,
        "rounds": len(own.samples),
        "calls": rows,
        "left_out": dict(case.left_out),
    }
    if case.floor is not None:
        row["floor"] = {**ceilings.floor(case.floor, own.median), "per": case.per}
    short: Row = shortened(row)
    return short


def _weigh(case: MemoryCase, processes: int) -> Row:
    names = ordered(case.steps)
    runs = [{name: int(child.call(case.steps[name], case.point)) for name in names} for _ in range(processes)]
    measured = {name: round(median(run[name] for run in runs)) for name in names}
    own = measured[case.subject]
    computed = {name: dict(terms) for name, terms in case.computed.items()}
    return {
        "point": case.point,
        "unit": "bytes",
        "subject": case.subject,
        "calls": {
            name: {
                "bytes": value,
                "runs": [run[name] for run in runs],
                "subject_over_it": float(f"{own / value:.4g}"),
            }
            for name, value in measured.items()
        },
        "computed": {name: {"bytes": sum(terms.values()), "terms": terms} for name, terms in computed.items()},
        "left_out": dict(case.left_out),
    }


def time_calls(
    calls: Mapping[str, Callable[[], object]], rounds: int | None, *, quick: bool = False
) -> dict[str, Timing]:
    """Time calls in turn; the first round, which nothing counts, says how many rounds there is time for."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    seconds = time.perf_counter() - start
    if rounds is None:
        rounds = _QUICK_ROUNDS if quick else min(_MOST, max(_LEAST, int(_SECONDS / max(seconds, 1e-9))))
    return measure_in_turn(calls, rounds=rounds, warmup=2 if seconds < 1 else 1)


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Quartiles over rounds of one call's time over another's; what a round slowed for both cancels out."""
    return _spread([a / b for a, b in zip(own, other, strict=True)])


def describe(point: Mapping[str, int | str]) -> str:
    """A point in words."""
    return ", ".join(f"{name} {value}" for name, value in point.items())


def _spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = quantiles(values, n=4, method="inclusive")
    return {"q1": q1, "median": median, "q3": q3}


def shortened(value: Any) -> Any:
    """Floats at four digits, wherever they are: more would be noise in a committed file."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: shortened(item) for key, item in value.items()}
    return value
