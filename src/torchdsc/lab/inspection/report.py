"""An inspection as lines for a terminal, and as a page that stands by itself."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from torchdsc.diagnostics import LayerHealth
from torchdsc.lab.figures.layers import draw_layers
from torchdsc.lab.figures.style import PALETTE, to_svg
from torchdsc.lab.files import write_text

from .state import Inspection, LayerState

_DASH = "\N{EN DASH}"
_HEAD = (
    *("layer", "M", "K", "rank of U", "rank of V", "coherence of U", "bound of |dW|", "|dW|"),
    *("gate", "clamped", "in use", "effective"),
)


_SENSITIVE = (
    *("layer", "|dW|", "local Lipschitz constant", "selections that a 1 % step changes", "jump there"),
    *("gate, text", "gate, noise", "|dW| of noise over text"),
)


def sensitivity_table(layers: Sequence[LayerState]) -> list[list[str]]:
    """A row for each layer whose router sees the layer's own input."""
    found = [(state.health.name, state.sensitivity) for state in layers if state.sensitivity is not None]
    return [
        [
            *(name, f"{s.fixed_norm:.3g}", f"{s.local_lipschitz:.3g}", f"{s.changed:.0%}", f"{s.jump:.2%}"),
            *(_number(s.gate), _number(s.noise_gate), _number(s.noise_norm)),
        ]
        for name, s in found
    ]


def table(layers: Sequence[LayerState]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and a row for each layer; columns that no layer has are left out."""
    rows = [_row(state.health) for state in layers]
    kept = [place for place in range(len(_HEAD)) if any(row[place] != _DASH for row in rows)]
    return tuple(_HEAD[place] for place in kept), [[row[place] for place in kept] for row in rows]


def lines(inspection: Inspection) -> list[str]:
    """The inspection for a terminal."""
    head, rows = table(inspection.layers)
    text = [inspection.title, *(f"{name}: {value}" for name, value in inspection.facts.items())]
    if not inspection.num_tokens:
        text.append("No text was routed (--text FILE): nothing is known of gates, use and |dW|")
    text += ["", *_aligned(head, rows), ""]
    sensitive = sensitivity_table(inspection.layers)
    text += [*_aligned(_SENSITIVE, sensitive), ""] if sensitive else []
    return text + ([f"! {finding}" for finding in inspection.findings] or ["No sign of failure"])


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *others = (cell for cell in row)
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def write_inspection(inspection: Inspection, file: Path) -> None:
    """Write the page, whole or not at all."""
    write_text(file, render_inspection(inspection))


def render_inspection(inspection: Inspection) -> str:
    """The page, which loads nothing. All that comes from files is escaped."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "experiment"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("inspection.html.j2").render(
        inspection=inspection,
        tables=[table_words for table_words in _tables(inspection.layers) if table_words[2]],
        pictures=list(_pictures(inspection.layers)),
        palette=PALETTE,
    )
    return text.strip() + "\n"


def _tables(layers: Sequence[LayerState]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Caption, head and rows."""
    ranks = "Effective ranks: exp of the entropy of the squared singular values of unit atoms, at most min(M, d)"
    moves = (
        "How the update moves with x, its routing included, at 64 tokens; a jump is the change of the output where the "
        "selection changes, over its size; noise has the tokens' mean and deviation in each feature"
    )
    return [(ranks, *table(layers)), (moves, _SENSITIVE, sensitivity_table(layers))]


def _number(value: float | None, form: str = ".3g") -> str:
    return _DASH if value is None else f"{value:{form}}"


def _row(health: LayerHealth) -> list[str]:
    def rank(value: float | None, most: int | None) -> str:
        return _DASH if value is None else f"{value:.1f} of {most}"

    return [
        *(health.name, f"{health.num_atoms:,}", str(health.top_k)),
        rank(health.effective_rank_u, health.most_rank_u),
        rank(health.effective_rank_v, health.most_rank_v),
        _number(health.coherence_u),
        *(_number(health.certified_norm), _number(health.measured_norm)),
        *(_number(health.gate, ".2f"), _number(health.clamped, ".0%"), _number(health.utilization, ".0%")),
        _number(health.effective_atoms, ",.1f"),
    ]


def _pictures(layers: Sequence[LayerState]) -> list[tuple[str, str, Markup, float]]:
    """Title, caption, SVG and width of each figure that has something to show."""

    def of(values: str, side: str | None = None) -> dict[str, list[float]]:
        found = {state.health.name: getattr(state, values) for state in layers}
        return {name: value if side is None else value.get(side, []) for name, value in found.items()}

    drawn: list[tuple[str, str, Figure | None]] = [
        (
            "Spectrum of U.",
            "Squared singular values of the unit atoms; level is a tight frame, steep is collapse.",
            draw_layers(of("spectra", "u"), "directions", "times the mean", even=1.0),
        ),
        (
            "Spectrum of V.",
            "The same of the atoms v.",
            draw_layers(of("spectra", "v"), "directions", "times the mean", even=1.0),
        ),
        (
            "Norms of the raw rows of U.",
            "Only a scale: the larger, the less a step turns an atom.",
            draw_layers(of("norms", "u"), "atoms", "norm"),
        ),
        ("Norms of the raw rows of V.", "The same of V.", draw_layers(of("norms", "v"), "atoms", "norm")),
        (
            "Output scale.",
            "|scale gamma| of each channel; the largest bounds |dW|.",
            draw_layers(of("scale"), "channels", "|scale gamma|", is_log=False),
        ),
        (
            "Load.",
            "How often an atom or expert is selected, in multiples of its even share.",
            draw_layers(of("load"), "most to least selected", "times the even share", even=1.0),
        ),
    ]
    return [
        (title, caption, Markup(to_svg(figure, f"figure-{place}", f"{title} {caption}")), figure.bbox.width)
        for place, (title, caption, figure) in enumerate(drawn, 1)
        if figure is not None
    ]
