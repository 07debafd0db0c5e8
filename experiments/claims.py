"""Writes docs/claims.md: what the paper and this project claim, beside what the committed records say of it.

    python experiments/claims.py          # or: make claims

What is claimed stands in ``claims.yaml``. Every figure is computed from ``experiments/*/results.json`` and
``benchmarks/results/*.json``. A claim about a loss is decided by the one rule of experiments: a difference paired by
seed whose 95 % interval leaves zero out.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from textwrap import wrap
from typing import Any

import yaml

from torchdsc.lab.experiment.intervals import DASH, MINUS, Interval, format_interval, format_mean, mean_difference
from torchdsc.lab.experiment.report import Page
from torchdsc.lab.experiment.results import Results
from torchdsc.lab.figures.looks import Group
from torchdsc.lab.figures.style import to_svg

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "claims.md"
PAPER_METHODS = ("Dense", "Standard MoE", "DSC")
# Of the page.
_WIDTH = 120
BAR = r"\|"
YES, NO, OPEN = "supported", "not supported", "not decided"
Found = tuple[str, str]
"""Figure in words, and verdict."""


@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        text: The claim.
        source: Who makes it, and where.
        found: Computes figure and verdict.
        command: What remakes the records.
    """

    text: str
    source: str
    found: Callable[[], Found]
    command: str


@cache
def results(name: str) -> Results:
    """The records of a committed experiment."""
    return Results.read(ROOT / "experiments" / name)


def values(name: str, variant: str, key: str | None = None) -> dict[str, dict[int, float]]:
    """A figure by case and seed: the experiment's measure by default, or what the last measurement of routing has."""
    found: dict[str, dict[int, float]] = {}
    own = results(name)
    for run in own.runs_of(variant):
        known = run if key is None or key in run else (run["routing"] or {"history": [{}]})["history"][-1]
        if key is not None and key not in known:
            raise ValueError(f"records of {variant!r} in {name} must have {key}, and have none")
        found.setdefault(run["case"], {})[run["seed"]] = known[key or own.measure.key]
    return found


def below(experiment: str, variants: list[str], by: float = 0.0, key: str | None = None, decimals: int = 3) -> Found:
    """Whether the first variant's figure is lower than the second's, by a margin."""
    own, others = (values(experiment, variant, key) for variant in variants)
    difference = mean_difference(own, others)
    return _in_words(difference, _paired(own, others), decimals), judge(difference, by)


def above(experiment: str, variants: list[str], key: str | None = None, decimals: int = 2) -> Found:
    """Whether it is higher: told as it is, judged the other way round."""
    own, others = (values(experiment, variant, key) for variant in variants)
    words = _in_words(mean_difference(own, others), _paired(own, others), decimals)
    return words, judge(mean_difference(others, own))


def judge(found: Interval, margin: float = 0.0) -> str:
    """Whether a difference lies below minus a margin: by its interval, without which nothing is decided."""
    if found.low is None or found.high is None:
        return OPEN
    return YES if found.high < -margin else NO if found.low > -margin else OPEN


def measured(benchmark: str) -> dict[str, Any]:
    """A committed result of a benchmark."""
    text = (ROOT / "benchmarks" / "results" / f"{benchmark}.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result


def faster(benchmark: str, others: str, tokens: int = 1) -> Found:
    """Whether the subject takes less time than every call whose name begins like this, at points of so many tokens."""
    ratios = {}
    for row in measured(benchmark)["rows"]:
        point = row["point"]
        if point["tokens"] >= tokens:
            found = [
                each["subject_over_it"]["median"] for call, each in row["calls"].items() if call.startswith(others)
            ]
            ratios[f"{point['tokens']} tokens, {point['kind']}"] = max(found)
    text = "; ".join(f"{ratio:.2f} ({where})" for where, ratio in ratios.items())
    verdict = YES if max(ratios.values()) < 1 else NO if min(ratios.values()) >= 1 else "supported in part"
    return f"{text} of its time", verdict


def at_most(experiment: str, variant: str, key: str, limit: float, decimals: int = 2) -> Found:
    """Whether a figure lies below a limit with every seed."""
    found = [value for by_seed in values(experiment, variant, key).values() for value in by_seed.values()]
    verdict = YES if max(found) <= limit else NO if min(found) > limit else OPEN
    return f"{format_mean(found, decimals)} ({len(found)} seeds), limit {limit:g}", verdict


def steady(experiment: str, method: str, times: float) -> Found:
    """Whether the logged norms of gradients, before clipping, stay within so many times the median after warm-up.

    Of all runs of a method; one that diverged is not steady.
    """
    peaks = []
    for run in results(experiment).runs:
        if run["method"] == method:
            after = [point for point in run["train_curve"] if point["step"] > run["config"]["warmup_steps"]]
            found = [point["grad_norm"] for point in after if "grad_norm" in point]
            if not found:
                raise ValueError(f"records of {experiment} must have norms of gradients, and have none")
            diverged = run["diverged_at_step"] is not None
            peaks.append(math.inf if diverged else max(found) / median(found))
    text = f"largest over median: {fmean(peaks):.1f} in the mean, {max(peaks):.1f} at most, {len(peaks)} runs"
    return text, YES if max(peaks) <= times else NO


def norms(experiment: str, key: str = "measured_norm") -> Found:
    """Whether measured norms stay below the bound of |dW|, at every measurement of every run."""
    points = [point for run in results(experiment).runs for point in (run["routing"] or {"history": []})["history"]]
    ratios = [point[key] / point["certified_norm"] for point in points if key in point]
    words = {"measured_norm": "|dW|", "local_lipschitz": "local Lipschitz constant"}[key]
    text = f"{words} over the bound of |dW|: {fmean(ratios):.2f} in the mean, {max(ratios):.2f} at most"
    return f"{text}, {len(ratios)} means over layers of the largest of 64 tokens", YES if max(ratios) <= 1 else NO


def traffic(router: str) -> Found:
    """Whether the bytes that one token's layer reads grow no faster than d, with M in proportion to d at fixed K."""
    points = [point for point in measured("traffic")["counted"] if (point["router"], point["tokens"]) == (router, 1)]
    first, *_, last = sorted(points, key=lambda point: point["d"])
    shares = [point["router_bytes"] / (point["router_bytes"] + point["atom_bytes"]) for point in (first, last)]
    growth = (last["router_bytes"] + last["atom_bytes"]) / (first["router_bytes"] + first["atom_bytes"])
    wider = last["d"] / first["d"]
    text = f"from d {first['d']} to {last['d']} ({wider:g} times) bytes grow {growth:.1f} times; the router's share is "
    return f"{text}{shares[0]:.1%} and {shares[1]:.1%}", YES if growth <= wider else NO


def forgets(experiment: str, variant: str, others: list[str], share: float = 1.0, scale: float = 1.0) -> Found:
    """Whether a variant, with all or part of its update, forgets less than a share of what others forget at its loss.

    By seed. What they forget there lies on the straight lines between what no other of them beats in both: they as they
    are, and where they were measured with parts of their update too.
    """
    losses: dict[str, dict[int, float]] = {}
    own: dict[str, dict[int, float]] = {}
    for run in results(experiment).runs_of(variant):
        point = run if scale == 1 else next(at for at in run["scaled"] if at["scale"] == scale)
        losses.setdefault(run["case"], {})[run["seed"]] = point["loss"]
        own.setdefault(run["case"], {})[run["seed"]] = point["forgotten"]
    there: dict[str, dict[int, float]] = {
        case: {seed: _forgotten_at(loss, experiment, others, case, seed) for seed, loss in by_seed.items()}
        for case, by_seed in losses.items()
    }
    shares = {case: {seed: share * value for seed, value in by_seed.items()} for case, by_seed in there.items()}
    means = [fmean(value for by_seed in each.values() for value in by_seed.values()) for each in (losses, own, there)]
    text = f"at its loss of {means[0]:.3f} it forgets {means[1]:.3f}, they {means[2]:.3f}".replace("-", MINUS)
    text += f": {means[1] / means[2]:.2f} of it" if means[1] > 0 else ""
    seeds = max(map(len, own.values()))
    return f"{text} ({seeds} seed{'s' if seeds > 1 else ''})", judge(mean_difference(own, shares))


def _forgotten_at(loss: float, experiment: str, others: list[str], case: str, seed: int) -> float:
    runs = [run for name in others for run in results(experiment).runs_of(name)]
    found = [run for run in runs if (run["case"], run["seed"]) == (case, seed)]
    every = [(at["loss"], at["forgotten"]) for run in found for at in (run, *run.get("scaled", ()))]
    points = sorted(one for one in every if not any(a < one[0] and b < one[1] for a, b in every))
    for (low, more), (high, less) in pairwise(points):
        if low <= loss <= high:
            return more + (less - more) * (loss - low) / (high - low)
    raise ValueError(f"the loss {loss:.3f} must be within those of {others} in {experiment}, got {points}")


def _paired(own: dict[str, dict[int, float]], others: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """What has a counterpart of the same case and seed."""
    found = {}
    for case, by_seed in own.items():
        found[case] = {seed: value for seed, value in by_seed.items() if seed in others.get(case, {})}
    return found


def _in_words(difference: Interval, own: dict[str, dict[int, float]], decimals: int) -> str:
    seeds = max(map(len, own.values()))
    return f"{format_interval(difference, decimals)} ({seeds} seed{'s' if seeds > 1 else ''})"


JUDGES: dict[str, Callable[..., Found]] = {
    judged.__name__: judged for judged in (below, above, at_most, steady, faster, norms, traffic, forgets)
}


STATED = yaml.safe_load((ROOT / "experiments" / "claims.yaml").read_text(encoding="utf-8"))


def read_claims() -> list[Claim]:
    """The claims of ``claims.yaml``, in its order."""
    found = []
    for row in STATED["claims"]:
        ((kind, arguments),) = ((name, row[name]) for name in JUDGES if name in row)
        found.append(Claim(row["claim"], row["source"], partial(JUDGES[kind], **arguments), row["command"]))
    return found


CLAIMS = read_claims()


def render() -> str:
    """The page."""
    page = [
        "# Claims, and what the records say",
        "",
        *wrap(
            "Written by `experiments/claims.py` (`make claims`) from the committed records; a test compares the two. "
            "Losses are in nats per token (forecasts: squared errors of standardised values), differences the first "
            "variant less the second, ± half of the 95 % interval paired by seed. A difference is decided where its "
            "interval leaves zero (or the margin) out; one seed decides nothing. Times are medians of ratios, to the "
            "fastest of the others, on the machines that [benchmarks](benchmarks.md) name.",
            _WIDTH,
        ),
        "",
        "| claim | who says so | found | verdict | made again by |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        figure, verdict = claim.found()
        cells = [claim.text, claim.source, figure, f"**{verdict}**", f"`{claim.command}`"]
        page.append(f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |")
    return "\n".join([*page, "", *table_1(), "", *training_figures()]) + "\n"


def table_1() -> list[str]:
    """The paper's Table 1 beside ours."""
    lines = [
        "## The paper's Table 1 beside ours",
        "",
        *wrap(
            "The paper: WikiText-103, 35.0 M stored, 65 M tokens in 2,000 steps, two seeds. Ours at that size: enwiki, "
            "3.9 M tokens in 120 steps at the paper's rates, one seed (`torchdsc run paper-enwiki`; `--steps 2000 "
            "--warmup_steps 150` is the whole). And at 1.73 M stored: WikiText-2, 1.84 M tokens, two seeds (`torchdsc "
            "run small`). Losses compare within a column alone.",
            _WIDTH,
        ),
        "",
        "| method | paper, validation loss | paper's size, 120 steps | small |",
        "|---|---|---|---|",
    ]
    paper = dict(zip(PAPER_METHODS, ("5.171 ± 0.004", "5.125 ± 0.009", "5.126 ± 0.006"), strict=True))
    for method in (*PAPER_METHODS, "Mixture-of-LoRAs", "Gated dense", "DSC by n-grams"):
        own = [_mean("paper-enwiki", method), _mean("small", method)]
        lines.append(f"| {method} | {paper.get(method, DASH)} | {' | '.join(own)} |")
    return lines


def training_figures() -> list[str]:
    """What is drawn over training, with its text."""
    lines = ["## Over training"]
    for row in STATED["figures"]:
        lines += ["", *wrap(row["text"], _WIDTH), "", f"![{_described(row)}](figures/{row['file']})"]
    return lines


def _described(row: dict[str, Any]) -> str:
    return f"{row['name']} over the steps of {row['experiment']}: {', '.join(row['variants'])}"


def draw() -> dict[str, str]:
    """The figures as SVG, by file."""
    drawn = {}
    for row in STATED["figures"]:
        page = Page(results(row["experiment"]))
        figure = page.draw_curves(Group("", row["variants"]), row["curve"], row["key"], row["name"])
        assert figure is not None
        svg = to_svg(figure, row["file"].removesuffix(".svg"), _described(row))
        drawn[row["file"]] = svg.replace("<svg ", '<svg style="background: white; font-family: sans-serif" ', 1)
    return drawn


def _mean(name: str, variant: str) -> str:
    if variant not in {each.name for each in results(name).experiment.variants}:
        return DASH
    return format_mean([value for by_seed in values(name, variant).values() for value in by_seed.values()], 3)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    for file, svg in draw().items():
        (PAGE.parent / "figures" / file).write_text(svg, encoding="utf-8")
    print(f"written: {PAGE}")
