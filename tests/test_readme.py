"""The code of README and of two pages runs, and README's commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from torchdsc.cli.main import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [(ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("recommended", "diagnostics")]
BLOCKS = re.findall(r"```python\n(.*?)```", "".join([TEXT, *PAGES]), re.DOTALL)
COMMANDS = re.findall(r"^    (torchdsc .*)$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code(block, tmp_path, monkeypatch):
    # Some of it saves files.
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_budget_command(capsys):
    command = next(c for c in COMMANDS if c.startswith("torchdsc budget"))
    assert main(shlex.split(command)[1:]) == 0
    assert "M 1523" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchdsc run")])
def test_experiment_commands_parse(command, capsys):
    assert main([*shlex.split(command)[1:], "--print_config"]) == 0
    assert "variants:" in capsys.readouterr().out
