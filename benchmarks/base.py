"""``--base``: the same benchmark against another commit's library and this one's, in turn, each in fresh processes."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from torchdsc.lab.training.environment import hardware, versions

from . import child, runner
from .case import Benchmark, Case, MemoryCase, Row, Settings, ordered

TURNS = 5
# Rounds of a point in each process: the turns repeat them.
_ROUNDS = 7

# The rows of one process, and why they end before the benchmark does, if so.
Side = dict[str, Any]


def compare(
    benchmark: str, ref: str, settings: Settings, *, rounds: int | None, command: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run this checkout's benchmark against the library of another commit and against the one imported here.

    Both run in processes of their own, by turns, and which goes first alternates: a machine that slows down or
    speeds up hits both alike. A ratio is taken of the medians of one turn.

    Args:
        benchmark: Name of the benchmark.
        ref: The other commit, as git names it.
        settings: How to run.
        rounds: Rounds of each point in one turn.
        command: What remakes the result.
        progress: Told what is being measured.

    Returns:
        The result, ready for JSON: a row a point, with the ratio current / base of each call, and the calls that the
        base does not know.

    Raises:
        ValueError: If ``ref`` names no commit with this library.
    """
    request = {"benchmark": benchmark, "device": settings.device, "quick": settings.quick, "rounds": rounds or _ROUNDS}
    turns: list[dict[str, Side]] = []
    with worktree(child.ROOT, ref) as (folder, base_commit):
        sources = {"base": folder / "src", "current": child.imported_source()}
        native = _same_native(sources["current"], sources["base"])
        for turn in range(TURNS):
            order = ("base", "current") if turn % 2 == 0 else ("current", "base")
            sides = {}
            for side in order:
                progress(f"{benchmark}, turn {turn + 1} of {TURNS}: {side}")
                asked = {**request, "tolerant": side == "base"}
                sides[side] = child.call("benchmarks.base:values", asked, source=sources[side])
            turns.append(sides)
    return {
        "schema": runner.SCHEMA,
        "benchmark": benchmark,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": {"ref": ref, "commit": base_commit},
        "commit": child.source_commit(),
        "versions": versions(),
        "hardware": hardware(),
        "device": settings.device,
        "quick": settings.quick,
        "turns": TURNS,
        "rounds": request["rounds"],
        "compiled_functions": native,
        "rows": merge(turns),
    }


def merge(turns: list[dict[str, Side]]) -> list[Row]:
    """Rows of both sides over all turns: ratios of calls that both have, and what the base lacks.

    Args:
        turns: For each turn and side, "base" and "current", what :func:`values` returned.
    """
    merged = []
    for row in turns[0]["current"]["rows"]:
        calls, missing = {}, {}
        for name in ordered(row["values"]):
            # A benchmark that goes by what it measures may end elsewhere in another turn.
            pairs = [
                [_at(turn[side], row["point"])["values"].get(name) for side in ("current", "base")] for turn in turns
            ]
            both = [pair for pair in pairs if None not in pair]
            if len(both) < 2:
                missing[name] = _why_missing(turns[0]["base"], row["point"], name)
                continue
            own, other = [pair[0] for pair in both], [pair[1] for pair in both]
            calls[name] = {"current": median(own), "base": median(other), "current_over_base": runner.ratio(own, other)}
        found = {"point": row["point"], "unit": row["unit"], "calls": runner.shortened(calls), "missing": missing}
        merged.append(found)
    return merged


def _why_missing(base: Side, point: dict[str, Any], name: str) -> str:
    reason: str = _at(base, point)["missing"].get(name) or base["ended"] or "not measured there"
    return reason


def _at(side: Side, point: dict[str, Any]) -> Row:
    nothing: Row = {"values": {}, "missing": {}}
    return next((row for row in side["rows"] if row["point"] == point), nothing)


def values(*, benchmark: str, device: str, quick: bool, rounds: int, tolerant: bool) -> Side:
    """Median milliseconds, or bytes, of every call against the library imported here; runs in a process of its own.

    Args:
        benchmark: Name of the benchmark.
        device: See :class:`Settings`.
        quick: See :class:`Settings`.
        rounds: Rounds of each point.
        tolerant: Whether a call that raises is one the library does not know, rather than a failure.
    """
    rows: list[Row] = []
    try:
        cases = _registered(benchmark).cases(Settings(device, quick))
        case = next(cases)
        while True:
            measured = _weighed(case) if isinstance(case, MemoryCase) else _timed(case, rounds, tolerant)
            rows.append(measured)
            case = cases.send(measured)
    except StopIteration:
        return {"rows": rows, "ended": None}
    except Exception as error:
        # Points from here on need what this library does not have.
        if not tolerant:
            raise
        return {"rows": rows, "ended": _reason(error)}


def _registered(name: str) -> Benchmark:
    # Imported late: an older library may lack what some benchmark imports, which concerns that benchmark alone.
    from .suite import load

    return load(name)


def _timed(case: Case, rounds: int, tolerant: bool) -> Row:
    calls, missing = {}, {}
    for name, call in case.calls.items():
        try:
            call()
        except Exception as error:
            if not tolerant:
                raise
            missing[name] = _reason(error)
        else:
            calls[name] = call
    timings = runner.time_calls(calls, rounds) if calls else {}
    row: Row = {
        "point": case.point,
        "unit": case.unit,
        "values": {name: timing.median / case.per for name, timing in timings.items()},
        "missing": missing,
    }
    if case.subject in timings:
        # What a benchmark may ask of the row that is sent back to it.
        own = timings[case.subject].samples
        row["calls"] = {name: {"subject_over_it": runner.ratio(own, t.samples)} for name, t in timings.items()}
    return row


def _weighed(case: MemoryCase) -> Row:
    measured, missing = {}, {}
    for name, step in case.steps.items():
        try:
            measured[name] = child.call(step, case.point)
        except child.ChildError as error:
            missing[name] = str(error).strip().splitlines()[-1]
    return {"point": case.point, "unit": "bytes", "values": measured, "missing": missing}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def worktree(root: Path, ref: str) -> Iterator[tuple[Path, str]]:
    """A commit checked out beside the checkout, for as long as the block runs, and its hash.

    Raises:
        ValueError: If ``ref`` names no commit, or one without src/torchdsc.
    """
    try:
        head = _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        _git(root, "cat-file", "-e", f"{head}:src/torchdsc/__init__.py")
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"base must be a commit of {root} that holds src/torchdsc, got {ref!r}") from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        try:
            _git(root, "worktree", "add", "--detach", "--force", str(folder), head)
            yield folder, head
        finally:
            with suppress(OSError, subprocess.CalledProcessError):
                _git(root, "worktree", "remove", "--force", "--force", str(folder))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _same_native(current: Path, base: Path) -> dict[str, bool]:
    """Build the base's compiled functions where this side has them, and say which side has."""
    built = _has_native(current)
    if built and (base.parent / "setup.py").is_file():
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=base.parent, capture_output=True, check=False)
    return {"current": built, "base": _has_native(base)}


def _has_native(source: Path) -> bool:
    return any((source / "torchdsc" / "ops").glob("_native*.so"))
