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
