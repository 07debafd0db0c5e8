"""The two transformers of examples/: both train and write, and their difference is the one that README shows."""

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchdsc

FOLDER = Path(__file__).parents[1] / "examples"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
NAMES = ("transformer", "transformer_dsc")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_writes(name, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times.\n" * 60)
    load(name).main([str(text), "--steps", "20", "--batch", "4", "--length", "40", "--seed", "3"])
    losses = re.findall(r"step (\d+): validation loss (\d+\.\d+) nats per byte", capfd.readouterr().out)
    assert [int(step) for step, _ in losses] == [20]
    # Uniform over the text's bytes would be 2.9, over all 256 of them 5.5.
    assert 0 < float(losses[0][1]) < 2.9


def test_dsc_stores_no_more():
    for sizes in ({}, {"features": 64, "layers": 2}):
        dense, dsc = (load(name).Transformer(**sizes) for name in NAMES)
        parts = [[sum(p.numel() for p in part.parameters()) for part in (m, m.blocks[0].mlp)] for m in (dense, dsc)]
        assert all(0.98 * before < after <= before for before, after in zip(*parts, strict=True))


def test_dsc_has_the_recommended_settings():
    layer = load("transformer_dsc").Transformer().blocks[0].mlp
    options = torchdsc.recommended()
    known = {**vars(layer.dsc.options), **vars(layer.context)}
    assert {name: known[name] for name in options} == options


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_logits_are_those_of_one_pass(name):
    torch.manual_seed(0)
    model = load(name).Transformer(features=64, layers=2).double().eval()
    tokens = torch.randint(256, (3, 20))
    whole, _ = model(tokens)
    logits, caches = model(tokens[:, :7])
    parts = [logits]
    for token in tokens[:, 7:].split(1, 1):
        logits, caches = model(token, caches)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_validation_looks_at_every_window(name):
    module = load(name)
    data = torch.randint(256, (4 * 10 + 5,))
    model = module.Transformer(features=64, layers=1, length=10).eval()
    windows = torch.stack([data[start : start + 11] for start in range(0, 40, 10)])
    assert module.evaluate(model, data, 10) == pytest.approx(module.loss_of(model, windows).item(), rel=1e-5)


def test_readme_shows_the_difference():
    command = ["diff", "-u", *(part for name in NAMES for part in ("--label", f"{name}.py", f"{name}.py"))]
    # 1 says that they differ.
    made = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    assert made.returncode == 1, made.stderr
    assert re.findall(r"```diff\n(.*?)```", README, re.DOTALL) == [made.stdout]


def test_readme_shows_the_results():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    for name in NAMES:
        stored = sum(p.numel() for p in load(name).Transformer().parameters())
        assert results["parameters"][f"{name}.py"] == stored
        assert f"{stored:,}" in README
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for step, cells in rows:
        losses = [
            [run["validation_loss"][step.replace(",", "")] for run in results["runs"] if run["program"] == f"{name}.py"]
            for name in NAMES
        ]
        differences = [after - before for before, after in zip(*losses, strict=True)]
        shown = [", ".join(f"{value:.3f}" for value in values) for values in (*losses, differences)]
        expected = f"{shown[0]} | {shown[1]} | {statistics.median(differences):.3f} ({shown[2]})"
        assert cells == expected.replace("-", "\N{MINUS SIGN}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_bank_on_disk_is_measured(tmp_path, monkeypatch):
    example = load("bank_on_disk")
    monkeypatch.setattr(example, "ATOMS", {**example.ATOMS, "num_atoms": 500})
    monkeypatch.setattr(example, "ROUNDS", 1)
    monkeypatch.setattr(example, "memory_limit", lambda: None)
    example.main(str(tmp_path), str(tmp_path / "results.json"))
    (record,) = json.loads((tmp_path / "results.json").read_text())["measurements"]
    assert record["bank_bytes"] == 4 * 2 * 500 * 64 * 4
    assert set(record["runs"]) == {example.MAPPED, example.ROWS, example.AHEAD, example.MEMORY}
    for way, ratios in record["over_asked_for_ahead"].items():
        (run,) = record["runs"][way]
        assert all(ratios[name] == run[name] / record["runs"][example.AHEAD][0][name] for name in ("prompt", "token"))
