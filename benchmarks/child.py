"""A function of this checkout's benchmarks called in a fresh process, if need be against another torchdsc."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Measuring is the same on both sides of a comparison, whatever the other commit's own clock was like.
_INSTRUMENTS = ("torchdsc.lab.training", "torchdsc.lab.training.environment", "torchdsc.lab.training.latency")


class ChildError(RuntimeError):
    """A fresh process ended without an answer."""


def call(function: str, arguments: Mapping[str, Any], *, source: Path | None = None) -> Any:
    """Call a function in a fresh process.

    Args:
        function: "module:name"; module of this checkout.
        arguments: Its keyword arguments, as JSON allows.
        source: Folder that holds the torchdsc to import; the one imported here by default.

    Returns:
        What it returns, as JSON allows.

    Raises:
        ChildError: If the process fails, or is killed, as for want of memory.
    """
    source = imported_source() if source is None else source
    paths = [str(source), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = json.dumps({"function": function, "arguments": dict(arguments), "source": str(source)})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", request, str(answer)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode or not answer.is_file():
            raise ChildError(f"{function} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def imported_source() -> Path:
    """Folder that holds the torchdsc imported in this process."""
    import torchdsc

    return Path(str(torchdsc.__file__)).resolve().parents[1]


def source_commit() -> str:
    """Commit of the library imported here, with "-dirty" where it or this checkout's benchmarks differ from it."""
    from torchdsc.lab.training.environment import commit

    found = commit()
    # Results are what a run changes itself.
    command = ["git", "status", "--porcelain", "--", "benchmarks", ":!benchmarks/results"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return f"{found}-dirty" if done.stdout and found != "unknown" and not found.endswith("-dirty") else found


def main(request: str, answer: str) -> None:
    """Answer a request in this process."""
    asked = json.loads(request)
    for name in _INSTRUMENTS:
        _load_instrument(name)
    if imported_source() != Path(asked["source"]).resolve():
        raise ImportError(f"torchdsc must come from {asked['source']}, got {imported_source()}")
    module, _, name = asked["function"].partition(":")
    result = getattr(importlib.import_module(module), name)(**asked["arguments"])
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def _load_instrument(name: str) -> None:
    path = (ROOT / "src").joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Entered first: a dataclass looks its module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main(*sys.argv[1:])
