"""``python -m benchmarks NAME``: run a benchmark and write its JSON."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchdsc.lab.environment import commit, hardware, versions

from . import crossover, layer

RESULTS = Path(__file__).parent / "results"
# What auto takes follows from the measurement: not a condition for making it.
CHOICE = "tests/ops/compose/test_crossover.py"
# Benchmark, and the tests without which its figures mean nothing.
BENCHMARKS = {
    "crossover": (crossover.measure, "tests/ops/compose"),
    "layer": (layer.measure, "tests/ops tests/nn tests/baselines"),
}


def main() -> int:
    """Run the named benchmarks, after the tests of what they time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), choices=[[], *BENCHMARKS], help="default: all")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each measurement (default: its own)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    options = parser.parse_args()
    for name in options.names:
        measure, tests = BENCHMARKS[name]
        selection = ["-m", "not slow", "--deselect", CHOICE]
        if subprocess.run([sys.executable, "-m", "pytest", *tests.split(), *selection], check=False).returncode:
            print(f"benchmarks: {name} is not timed: its tests fail", file=sys.stderr)
            return 1
        result: dict[str, Any] = {
            "benchmark": name,
            "command": f"python -m benchmarks {name}",
            "commit": commit(),
            "versions": versions(),
            "hardware": hardware(),
            **measure(options.rounds),
        }
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / f"{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
