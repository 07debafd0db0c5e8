"""What is built of a checkout: a wheel with the compiled part, one without, and a source distribution."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import torchdsc
from torchdsc.lab.experiment.presets import preset_names
from torchdsc.ops import build_name

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
CODE = ("src", "docs", "tests", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "mkdocs.yml")


@pytest.fixture
def checkout(tmp_path):
    """A copy without what was built in the original."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "build")
    for name in CODE:
        source = ROOT / name
        shutil.copytree(source, copy / name, ignore=ignore) if source.is_dir() else shutil.copy(source, copy)
    return copy


def build(checkout, call, **environment):
    """Call setuptools' backend for a result, whose path is returned."""
    out = checkout.parent / "out"
    script = f"from setuptools import build_meta; print('made:', build_meta.{call}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / re.findall(r"made: (.*)", done.stdout)[-1]


def test_wheel_without_the_compiled_part_is_for_any_machine(checkout):
    wheel = build(checkout, "build_wheel", TORCHDSC_COMPILED="0")
    assert wheel.name == f"torchdsc-{torchdsc.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".pyd"))]
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert {f"torchdsc/configs/{name}.yaml" for name in preset_names()} < set(names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of Linux")
def test_wheel_with_it_is_for_later_pythons_and_other_machines(checkout):
    wheel = build(checkout, "build_wheel", TORCHDSC_COMPILED="1")
    assert re.fullmatch(rf"torchdsc-{torchdsc.__version__}-cp311-abi3-linux_\w+\.whl", wheel.name)
    archive = zipfile.ZipFile(wheel)
    modules = [name for name in archive.namelist() if name.endswith(".abi3.so")]
    assert f"torchdsc/ops/{build_name()}.abi3.so" in modules
    for name in modules:
        code = archive.read(name)
        assert b"libm.so" in code
        # No path of the machine that built it.
        assert str(checkout).encode() not in code
        assert sys.base_prefix == "/usr" or sys.base_prefix.encode() not in code


def test_a_compiler_that_fails_gives_the_wheel_for_any_machine_or_an_error(checkout):
    for source in (checkout / "src/torchdsc/ops/csrc").glob("*.c"):
        source.write_text("no C\n", encoding="utf-8")
    assert build(checkout, "build_wheel").name.endswith("-py3-none-any.whl")
    with pytest.raises(AssertionError, match="error"):
        build(checkout, "build_wheel", TORCHDSC_COMPILED="1")


def test_source_distribution_has_the_tests_and_the_c_code(checkout):
    folder = checkout / "experiments" / "glue"
    (folder / "run-x").mkdir(parents=True)
    for file in ("results.json", "report.html", "run-x/model.safetensors"):
        (folder / file).touch()
    with tarfile.open(build(checkout, "build_sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    own = {path.relative_to(checkout).as_posix() for path in (checkout / "tests").rglob("*.py")}
    assert own <= names
    # Not what an experiment leaves beside its records.
    assert {name for name in names if "/glue/" in name} == {"experiments/glue/results.json"}
    assert {
        "setup.py",
        "mkdocs.yml",
        "docs/claims.md",
        "src/torchdsc/ops/csrc/native.h",
        "src/torchdsc/py.typed",
    } <= names
