"""docs/claims.md is what the committed records say."""

import importlib.util
import re
from pathlib import Path

import pytest

from torchdsc.lab.experiment.intervals import Interval

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("claims", ROOT / "experiments" / "claims.py")
claims = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(claims)


def test_page_is_that_of_the_records():
    assert (ROOT / "docs" / "claims.md").read_text(encoding="utf-8") == claims.render()


def test_figures_are_those_of_the_records():
    for file, svg in claims.draw().items():
        assert (ROOT / "docs" / "figures" / file).read_text(encoding="utf-8") == svg


def test_every_claim_has_a_verdict_and_a_command():
    page = claims.render().partition("## ")[0]
    rows = re.findall(r"^\| (.*) \|$", page, re.MULTILINE)[1:]
    assert len(rows) == len(claims.CLAIMS) >= 15
    for row in rows:
        text, source, figure, verdict, command = re.split(r" \| ", row)
        assert text
        assert source.split(",")[0] in ("paper", "this project")
        assert re.search(r"\d", figure)
        assert verdict.strip("*") in ("supported", "not supported", "not decided", "supported in part")
        assert command.startswith("`")


def test_both_kinds_of_verdict_occur():
    verdicts = {claim.found()[1] for claim in claims.CLAIMS}
    assert {"supported", "not supported", "not decided"} <= verdicts


@pytest.mark.parametrize(
    ("found", "margin", "verdict"),
    [
        (Interval(-0.2, -0.3, -0.1), 0.0, "supported"),
        (Interval(-0.2, -0.3, -0.1), 0.2, "not decided"),
        (Interval(-0.05, -0.07, -0.03), 0.1, "not supported"),
        (Interval(0.2, 0.1, 0.3), 0.0, "not supported"),
        (Interval(-0.1, -0.3, 0.1), 0.0, "not decided"),
        (Interval(-0.5), 0.0, "not decided"),
    ],
)
def test_the_rule(found, margin, verdict):
    assert claims.judge(found, margin) == verdict


def test_figures_are_the_experiments_own():
    found = claims.values("small", "DSC")
    runs = claims.results("small").runs_of("DSC")
    assert found == {runs[0]["case"]: {run["seed"]: run["val_loss_final"] for run in runs}}


class Made:
    """Records made by hand."""

    def __init__(self, *norms, diverged=None):
        curve = [{"step": step, "grad_norm": norm} for step, norm in enumerate(norms, 1)]
        curve += [] if diverged is None else [{"step": diverged, "loss": float("nan")}]
        run = {"method": "dsc", "train_curve": curve, "config": {"warmup_steps": 1}, "diverged_at_step": diverged}
        self.runs = [run | {"routing": None, "case": "", "seed": 0}]

    def runs_of(self, variant):
        return self.runs


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (Made(90.0, 1.0, 2.0, 3.0), "supported"),
        (Made(1.0, 1.0, 1.0, 1.0, 30.0), "not supported"),
        (Made(1.0, 1.0, 1.0, diverged=4), "not supported"),
    ],
)
def test_gradients_are_judged_after_warm_up(made, verdict, monkeypatch):
    monkeypatch.setattr(claims, "results", lambda name: made)
    assert claims.steady("made", "dsc", 5)[1] == verdict


def test_what_records_do_not_have_is_named():
    with pytest.raises(ValueError, match="records of 'Dense' in small must have kept, and have none"):
        claims.at_most("small", "Dense", "kept", 1.0)
    with pytest.raises(ValueError, match="records of small must have norms of gradients"):
        claims.steady("small", "dsc", 5)


@pytest.mark.parametrize(("limit", "verdict"), [(5.0, "supported"), (4.4, "not supported"), (4.43, "not decided")])
def test_limits(limit, verdict):
    assert claims.at_most("small", "DSC", "val_loss_final", limit)[1] == verdict
