"""docs/benchmarks.md and its figures, generated from the committed results: ``python -m benchmarks page``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.case import Row
from benchmarks.runner import SCHEMA
from benchmarks.suite import NAMES
from torchdsc.lab.files import write_text

from .canvas import own_font
from .markdown import described_hardware
from .sections import INTRODUCTION, SECTIONS

__all__ = ["render", "write"]

_DEVICES = ("cpu", "cuda")
FIGURES = "figures"


def write(results: Path, docs: Path) -> None:
    """Write ``benchmarks.md`` and the figures that it shows into a folder.

    Args:
        results: Folder of the benchmarks' JSON.
        docs: Folder of the page; its figures go into ``figures`` there.
    """
    text, figures = render(results)
    (docs / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        write_text(docs / FIGURES / name, svg)
    for path in (docs / FIGURES).glob("bench-*.svg"):
        if path.name not in figures:
            path.unlink()
    write_text(docs / "benchmarks.md", text)
    print(f"written: {docs / 'benchmarks.md'}")


def render(results: Path) -> tuple[str, dict[str, str]]:
    """The page, and its figures as SVG by file name; the same bytes for the same results.

    Args:
        results: Folder of the benchmarks' JSON. What is not there, or of an older form, is "not measured".
    """
    parts, figures = [INTRODUCTION], {}
    for name, section in SECTIONS.items():
        parts.append(f"## {section.title}\n\n{section.paragraph}")
        measured = [(device, read(results, name, device)) for device in _DEVICES]
        found = [(device, result) for device, result in measured if result is not None]
        if not found:
            parts.append(f"Not measured yet: `torchdsc bench {name}`.")
        for device, result in found:
            parts.append(described_hardware(result))
            parts.extend(section.tables(result))
            with own_font():
                drawn = section.figures(result)
            for figure_name, (svg, description) in drawn.items():
                file = f"bench-{figure_name}{'' if device == 'cpu' else '-' + device}.svg"
                figures[file] = svg
                parts.append(f"![{description}]({FIGURES}/{file})")
    return "\n\n".join(parts) + "\n", figures


def read(results: Path, name: str, device: str) -> Row | None:
    """A committed result, or None where there is none of the present form."""
    assert name in NAMES
    path = results / (f"{name}.json" if device == "cpu" else f"{name}-{device}.json")
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result.get("schema") == SCHEMA else None
