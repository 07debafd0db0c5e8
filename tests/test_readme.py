"""The code of README and the documentation runs, README's commands parse, and the reference has every public name."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from torchdsc.cli.main import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BLOCKS = [
    pytest.param(block, id=f"{name}-{index}")
    for name, text in {"README.md": TEXT, **PAGES}.items()
    for index, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
COMMANDS = re.findall(r"^    (torchdsc .*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_code(block, tmp_path, monkeypatch):
    # Some of it saves files.
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_budget_command(capsys):
    command = next(c for c in COMMANDS if c.startswith("torchdsc budget"))
    assert main(shlex.split(command)[1:]) == 0
    assert "M 1551" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchdsc run")])
def test_experiment_commands_parse(command, capsys):
    assert main([*shlex.split(command)[1:], "--print_config"]) == 0
    assert "variants:" in capsys.readouterr().out


def test_experiment_of_the_adapters_page_parses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [(name, block)] = re.findall(r"```yaml\n# (\w+\.yaml)\n(.*?)```", PAGES["adapters.md"], re.DOTALL)
    Path(name).write_text(block)
    assert main(["run", name, "--print_config"]) == 0
    assert "variants:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", re.findall(r"^::: (torchdsc(?:\.\w+)*)\n    options", PAGES["reference.md"], re.MULTILINE)
)
def test_reference_has_functions_that_share_the_name_of_their_file(module):
    # Of a name that both have the site shows the file.
    public = import_module(module)
    for name in public.__all__:
        found = getattr(public, name)
        if hasattr(found, "__qualname__") and f"{module}.{name}" in sys.modules:
            assert f"::: {found.__module__}.{name}\n" in PAGES["reference.md"]
