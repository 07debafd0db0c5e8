"""Pieces of HTML: everything that comes from a record is escaped here, once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from torchdsc.baselines.methods import METHODS
from torchdsc.lab.figures import to_svg

from .template import DETAILS, FIGURE, SECTION, TABLE

MARKS: dict[str, str] = {name: method.marker[1] for name, method in METHODS.items()}
"""The figures' markers as characters."""


class Html(str):
    """Text that is HTML already; any other string is escaped where it enters the page."""

    __slots__ = ()


def text(value: object) -> Html:
    """Returns a value as HTML, escaped unless it is `Html`."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def paragraph(value: object, kind: str = "") -> Html:
    """Returns a paragraph, of a class if one is given."""
    return Html(f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>")


def listing(values: Iterable[object], kind: str) -> Html:
    """Returns a list of a class, or nothing for no values."""
    items = "\n".join(f"<li>{text(value)}</li>" for value in values)
    return Html(f'<ul class="{kind}">\n{items}\n</ul>' if items else "")


def terms(entries: Mapping[str, object]) -> Html:
    """Returns a short list of terms and what they are."""
    items = (f"<div><dt>{text(term)}</dt><dd>{text(value)}</dd></div>" for term, value in entries.items())
    return Html('<dl class="facts">\n' + "\n".join(items) + "\n</dl>")


def method_name(method: str, label: str, description: str = "") -> Html:
    """Returns a method's name behind the marker it has in the figures, and its description below."""
    below = f"<small>{text(description)}</small>" if description else ""
    mark = f'<span class="mark" style="color:var(--{method})" aria-hidden="true">{MARKS[method]}</span>'
    return Html(f"{mark}{text(label)}{below}")


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "plain") -> Html:
    """Returns a table whose first row and first column are headers; wide ones scroll by themselves."""
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{text(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    columns = "".join(f'<th scope="col">{text(title)}</th>' for title in head)
    return Html(TABLE.substitute(kind=kind, caption=text(caption), head=columns, rows="\n".join(lines)))


def figure(name: str, drawing: Figure, title: str, caption: str, reading: str = "") -> Html:
    """Returns a drawing with its caption; that and what it reads, in words, are its text alternative."""
    svg = to_svg(drawing, f"figure-{name}", " ".join(part for part in (title, caption, reading) if part))
    return Html(FIGURE.substitute(title=text(title), caption=text(caption), svg=svg))


def grid(*figures: str, columns: int = 2) -> Html:
    """Returns figures side by side, in 2 or 3 columns where there is room."""
    return Html(f'<div class="grid{columns}">\n' + "".join(figures) + "</div>")


def section(name: str, title: str, *body: str) -> Html:
    """Returns a section under a heading."""
    return Html(SECTION.substitute(name=name, title=text(title), body="\n".join(part for part in body if part)))


def details(title: str, *body: str) -> Html:
    """Returns a part that is folded away at first."""
    return Html(DETAILS.substitute(title=text(title), body="\n".join(body)))
