"""What a figure depends on beside its config: versions, hardware, commit, and the memory that a run took."""

import gc
import platform
import resource
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

__all__ = ["command_line", "commit", "hardware", "peak_memory_bytes", "reset_peak_memory", "versions"]

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "triton")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those it computes with."""
    found = {"python": platform.python_version()}
    for name in ("torchdsc", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int]:
    """Processor, its cores in use, and the accelerator if there is one."""
    described: dict[str, str | int] = {"cpu": _cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str:
    """Commit of the source this package runs from, with "-dirty" where files differ; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        state = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if state.stdout.strip() else "")


def command_line() -> str:
    """The command that is running, with the path of its program left out."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def reset_peak_memory() -> None:
    """Start a new peak for :func:`peak_memory_bytes`."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        # Linux: 5 sets the resident set's high-water mark back to its present size.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """Peak since the last reset: allocated on the GPU, or resident on the CPU (of the whole process elsewhere)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
