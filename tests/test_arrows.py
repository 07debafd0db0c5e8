"""What may import what, and what ``import torchdsc`` needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchdsc

PACKAGE = Path(torchdsc.__file__).parent
# Every part, and the parts of the package that it may import: ops <- nn, losses <- {...} <- lab <- cli.
CORE = {"arguments", "kinds", "ops", "nn", "losses"}
ALLOWED = {
    "arguments": set(),
    "kinds": set(),
    "ops": set(),
    "nn": {"arguments", "kinds", "ops"},
    "losses": {"arguments", "ops", "nn"},
    "baselines": CORE,
    "bounds": CORE,
    "conversion": CORE,
    "optim": CORE,
    "diagnostics": CORE | {"bounds"},
    "models": CORE | {"baselines"},
    "adapters": CORE | {"baselines"},
    "lab": CORE | {"baselines", "bounds", "conversion", "diagnostics", "models", "adapters", "optim", "torchdsc"},
    "cli": CORE
    | {"baselines", "bounds", "conversion", "diagnostics", "models", "adapters", "lab", "optim", "torchdsc"},
    "torchdsc": CORE | {"bounds", "conversion", "optim"},
    "__main__": {"cli"},
}
# The core may import torch and the standard library; the parts for an extra import the extra's packages at their top.
TORCH_ONLY = (
    "arguments",
    "kinds",
    "ops",
    "nn",
    "losses",
    "bounds",
    "conversion",
    "optim",
    "baselines",
    "diagnostics",
    "torchdsc",
)
OPTIONAL = {"accelerate", "datasets", "filelock", "jinja2", "matplotlib", "numpy", "peft", "psutil", "pydantic"}
OPTIONAL |= {"rich", "safetensors", "scipy", "tokenizers", "tqdm", "transformers", "yaml"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module):
    """The part of the package that a module belongs to: the folder or file below the top."""
    return module.split(".")[1] if "." in module else module


def imports_of(path, *, lazy=True):
    """Modules that a file imports, by full name; without ``lazy`` only those at its top."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(tree) if lazy else top_level(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            found.add(source)
            # A name may be a module: ``from . import gather``.
            found.update(f"{source}.{alias.name}" for alias in node.names if is_module(f"{source}.{alias.name}"))
    return found


def top_level(tree):
    """Statements that run on import, those inside ``try`` and ``if`` included."""
    pending = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            pending.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def is_module(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def test_every_part_has_its_arrows():
    assert {part_of(name_of(path)) for path in MODULES} <= set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_nothing_to_its_right(path):
    own = part_of(name_of(path))
    inside = {name for name in imports_of(path) if name.split(".")[0] == "torchdsc"}
    # The top module is its names' parts: ``from torchdsc import ops`` counts as ops.
    parts = {part_of(name) for name in inside} - {own}
    assert parts <= ALLOWED[own]


# Imported when it is first asked for.
WITH_TRANSFORMERS = {"torchdsc.diagnostics.callback"}
CORE_MODULES = [p for p in MODULES if part_of(name_of(p)) in TORCH_ONLY and name_of(p) not in WITH_TRANSFORMERS]


@pytest.mark.parametrize("path", CORE_MODULES, ids=name_of)
def test_core_needs_torch_alone(path):
    outside = {name.split(".")[0] for name in imports_of(path, lazy=False)} - {"torchdsc", "torch", "triton"}
    assert outside <= sys.stdlib_module_names


def test_nothing_leans_on_the_reference_and_it_on_nothing():
    reference = PACKAGE / "ops" / "compose" / "reference.py"
    assert not {name for name in imports_of(reference) if name.startswith("torchdsc")}
    users = {path for path in MODULES if "torchdsc.ops.compose.reference" in imports_of(path)}
    # The table of implementations.
    assert users == {reference.with_name("contract.py")}


# Packages that are installed, made to look as if they were not.
BLOCKED = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {OPTIONAL!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_blocked(code):
    done = subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_works_with_torch_alone():
    out = run_blocked("""
import torch, torchdsc, torchdsc.baselines, torchdsc.diagnostics
layer = torchdsc.Residual(torch.nn.Linear(8, 8), torchdsc.DSC(8, num_atoms=12, top_k=3))
(layer(torch.randn(5, 8)).sum() + torchdsc.regularization(layer).total).backward()
torchdsc.baselines.StandardMoE(8, 6, 4)(torch.randn(5, 8))
for name in ("models", "lab.experiment", "cli.main"):
    try:
        __import__(f"torchdsc.{name}")
    except ImportError as error:
        print(name, "|", error)
try:
    torchdsc.diagnostics.DiagnosticsCallback
except ImportError as error:
    print("callback |", error)
import contextlib
from torchdsc.cli.main import main
with contextlib.redirect_stderr(sys.stdout):
    assert main(["run"]) == 2
""")
    lab = "accelerate, filelock, jinja2, matplotlib, numpy, peft, psutil, pydantic, rich, scipy, tokenizers, "
    lab = f"torchdsc.lab needs {lab}transformers, yaml: pip install 'torchdsc[lab]'"
    assert f"lab.experiment | {lab}\n" in out
    assert f"torchdsc run: {lab}\n" in out
    assert "models | torchdsc.models needs transformers >= 5.17: pip install 'torchdsc[models]'" in out
    assert "callback | torchdsc.diagnostics.DiagnosticsCallback needs transformers: pip install" in out
    assert "cli.main" not in out
