"""The checkpoints of a run: which one to go on from."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["checkpoint_step", "last_checkpoint", "remove_checkpoints"]

_PREFIX = "checkpoint-"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint: Trainer writes its state last, so one without it was cut off."""
    return max(filter(_is_complete, _checkpoints(folder)), key=_step, default=None)


def checkpoint_step(folder: Path) -> int:
    """The step that a run in ``folder`` would go on from; 0 where it would begin."""
    checkpoint = last_checkpoint(folder)
    return 0 if checkpoint is None else _step(checkpoint)


def remove_checkpoints(folder: Path) -> None:
    """Remove all, complete or not; another process may be at it too."""
    for checkpoint in _checkpoints(folder):
        with suppress(FileNotFoundError):
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
