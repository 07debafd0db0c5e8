"""The checkpoints of a run: which one to go on from."""

import json
import logging
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["checkpoint_step", "last_checkpoint", "remove_checkpoints"]

_PREFIX, _STATE = "checkpoint-", "trainer_state.json"
# What Trainer goes on from, its state apart.
_PARTS = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")

_logger = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are whole; a warning names the damaged file of each newer one.

    Trainer writes its state last: a checkpoint without it was cut off, and is passed over without a word.

    Raises:
        ValueError: If there are checkpoints, and in each a file is damaged or missing; it names the newest's.
    """
    damages: list[str] = []
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        of_state = _state_damage(checkpoint)
        damage = of_state or _damage(checkpoint)
        if damage is None:
            for newer in damages:
                _logger.warning("%s: going on from %s", newer, checkpoint.name)
            return checkpoint
        if of_state is None:
            damages.append(damage)
        elif (checkpoint / _STATE).exists():
            _logger.warning("%s: passing %s over", of_state, checkpoint.name)
    if damages:
        raise ValueError(f"{damages[0]}, and no checkpoint before it is whole: delete {folder} to begin anew")
    return None


def checkpoint_step(folder: Path) -> int:
    """The step that a run in ``folder`` would go on from; 0 where it would begin."""
    return max((_step(c) for c in _checkpoints(folder) if not (_state_damage(c) or _damage(c))), default=0)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, complete or not, even if another process does so at the same time."""
    for checkpoint in _checkpoints(folder):
        with suppress(FileNotFoundError):
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _state_damage(checkpoint: Path) -> str | None:
    """What is wrong with the state, which tells whether the checkpoint was written to its end; None for nothing."""
    file = checkpoint / _STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{file} is damaged ({error})"
    if not isinstance(state, dict) or state.get("global_step") != _step(checkpoint):
        return f"{file} is damaged (it must be the state at step {_step(checkpoint)})"
    return None


def _damage(checkpoint: Path) -> str | None:
    """The first part that is missing, cut off or otherwise damaged, in words; None for none."""
    for part in _PARTS:
        files = sorted(checkpoint.glob(part))
        if not files:
            return f"{checkpoint} lacks {part}"
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    # Opening compares the lengths in the header with the file's.
                    with safe_open(file, framework="pt"):
                        continue
                with zipfile.ZipFile(file) as archive:
                    broken = archive.testzip()
            except (OSError, SafetensorError, zipfile.BadZipFile) as error:
                return f"{file} is damaged ({error})"
            if broken is not None:
                return f"{file} is damaged (wrong checksum of {broken})"
    return None
