"""``torchdsc inspect``."""

from pathlib import Path

from .parsing import ArgumentParser, existing


def run(arguments: list[str]) -> int:
    """Say what state a saved model or adapter is in, and write a page with pictures."""
    parser = ArgumentParser(
        "inspect",
        "Say what state the routed layers of a saved model or adapter are in, and write a page with pictures.",
    )
    parser.add_argument("folder", type=existing, help="folder of a model, an adapter, a checkpoint or a run")
    parser.add_argument(
        "--text", type=existing, help="file of text to route; without it only atoms and bounds are looked at"
    )
    parser.add_base()
    parser.add_argument("--output", type=Path, help="page to write (default: inspection.html in the folder)")
    options = parser.parse_args(arguments)
    from torchdsc.lab.inspection import inspect, load_saved, write_inspection
    from torchdsc.lab.inspection.report import lines

    text = None if options.text is None else options.text.read_text(encoding="utf-8")
    saved = load_saved(options.folder, base=options.base)
    inspection = inspect(saved, text=text)
    print("\n".join(lines(inspection)))
    file = options.output or saved.folder / "inspection.html"
    write_inspection(inspection, file)
    print(f"page: {file}")
    return 0
