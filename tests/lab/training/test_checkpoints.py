"""Which checkpoint a run goes on from, whatever became of the files of newer ones."""

import json

import pytest
import torch
from safetensors.torch import save_file

from torchdsc.lab.training import checkpoints
from torchdsc.lab.training.checkpoints import checkpoint_step, last_checkpoint, remove_checkpoints

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def folder(tmp_path):
    """A run's folder with checkpoints at steps 2 and 10."""
    for step in (2, 10):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        save_file({"weight": torch.ones(100)}, place / FILES[0])
        for name in FILES[1:]:
            torch.save({"state": torch.ones(100)}, place / name)
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    return tmp_path


def check_goes_on_from(folder, step):
    assert last_checkpoint(folder) == folder / f"checkpoint-{step}"
    assert checkpoint_step(folder) == step


def test_the_newest(folder, caplog):
    check_goes_on_from(folder, 10)
    assert caplog.text == ""


@pytest.mark.parametrize(("state", "is_said"), [(None, False), ("{", True), ('{"global_step": 9}', True), ("[]", True)])
def test_one_that_was_cut_off_is_passed_over(folder, caplog, state, is_said):
    for step, kept in ((10, 2), (2, None)):
        file = folder / f"checkpoint-{step}" / "trainer_state.json"
        file.unlink() if state is None else file.write_text(state)
        if kept:
            check_goes_on_from(folder, kept)
    assert (last_checkpoint(folder), checkpoint_step(folder)) == (None, 0)
    assert ("trainer_state.json is damaged" in caplog.text) == is_said


# safetensors has no checksums.
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (FILES[0], "missing"),
        (FILES[0], "cut off"),
        *((n, d) for n in FILES[1:] for d in ("missing", "cut off", "bits")),
    ],
)
def test_a_damaged_one_is_named(folder, caplog, name, damage):
    for step in (10, 2):
        file = folder / f"checkpoint-{step}" / name
        data = file.read_bytes()
        middle = len(data) // 2
        changed = {"cut off": data[:-1], "bits": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]}
        file.unlink() if damage == "missing" else file.write_bytes(changed[damage])
        if step == 10:
            check_goes_on_from(folder, 2)
            assert f"checkpoint-{step}" in caplog.text
            assert "going on from checkpoint-2" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-10.* and no checkpoint before it is whole: delete .* to begin"):
        last_checkpoint(folder)


def test_removal(folder, monkeypatch):
    remove_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-best"]
    # Another process may have been there before.
    monkeypatch.setattr(checkpoints, "_checkpoints", lambda folder: [folder / "checkpoint-1"])
    remove_checkpoints(folder)
