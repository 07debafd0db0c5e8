"""Fixtures and the time budget of slow tests."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each of the processes that share the tests has a core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides on its first import whether its kernels are compiled or interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

# Seconds that the tests marked slow (compile, several processes, properties) may take together, summed over workers.
SLOW_BUDGET = 600.0
_slow_seconds = 0.0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def run_processes() -> Callable[..., None]:
    """Runs a test file as a script in some processes, each with the arguments and its rank; one that fails raises."""

    def run(count: int, file: str, *arguments: Any) -> None:
        # Fresh interpreters: autograd's threads do not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, file, *map(str, arguments)]
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(count)]
        try:
            assert [process.wait(timeout=200) for process in processes] == [0] * count
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real files to test on: TORCHDSC_DATA, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("TORCHDSC_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real files at {folder}: set TORCHDSC_DATA")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an accelerator where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Add up the time of slow tests."""
    start = time.perf_counter()
    yield
    if item.get_closest_marker("slow"):
        global _slow_seconds
        _slow_seconds += time.perf_counter() - start


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what the tests of another process took."""
    global _slow_seconds
    _slow_seconds += getattr(node, "workeroutput", {}).get("slow_seconds", 0.0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run when slow tests outgrow their budget, rather than let it creep."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow_seconds"] = _slow_seconds
    elif _slow_seconds > SLOW_BUDGET:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"slow tests took {_slow_seconds:.0f} s, over their budget of {SLOW_BUDGET:.0f} s")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
