"""How a variant is drawn: colour and marker are its method's, fill and dashes tell it from others of the method."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchdsc.baselines.methods import METHODS

from .style import COLORS, MARKERS

# More lines than these in a figure could not be told apart.
NAMED = 10
# Their number has no divisor in common with the two fills: ten variants of a method differ.
_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1.2), (6, 1.5, 1, 1.5), (2, 2.5))


@dataclass(frozen=True)
class Look:
    """Of a variant.

    Attributes:
        color: Name in :data:`~torchdsc.lab.figures.style.PALETTE`.
        marker: Matplotlib's.
        dashes: Lengths of dashes and gaps of its line, in widths of the line; none where it is solid.
        is_hollow: Whether its marker is.
        is_named: Whether figures name it; others stand in the background.
    """

    color: str
    marker: str
    dashes: tuple[float, ...] = ()
    is_hollow: bool = False
    is_named: bool = True

    @property
    def ink(self) -> str:
        """The colour on a light page, which pages replace by a variable; faint where it is not named."""
        return COLORS[self.color if self.is_named else "faint"]

    @property
    def line(self) -> dict[str, Any]:
        """Of a line of matplotlib."""
        return {"color": self.ink, "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def point(self) -> dict[str, Any]:
        """Of a marker of matplotlib, without a line."""
        fill = COLORS["page"] if self.is_hollow else self.ink
        return {"color": self.ink, "marker": self.marker, "markerfacecolor": fill, "linestyle": "none"}


@dataclass(frozen=True)
class Group:
    """Variants in one figure: its title, and their names, best first."""

    title: str
    names: Sequence[str]


def choose_looks(methods: Mapping[str, str], groups: Sequence[Group], reference: str) -> dict[str, Look]:
    """A look for each variant; in each group, the best and the reference are named.

    Args:
        methods: By variant, in the experiment's order. A method that is none of the library's takes the colour of one
            that is not here.
        groups: Each variant is in one.
        reference: Name of a variant.
    """
    left = [name for name in METHODS if name not in methods.values()]
    others = [name for name in dict.fromkeys(methods.values()) if name not in METHODS]
    colors = {name: name for name in METHODS} | dict(zip(others, left, strict=False))
    looks: dict[str, Look] = {}
    for group in groups:
        named = sorted(group.names, key=lambda name: name != reference)[:NAMED]
        count = Counter[str]()
        for variant, method in methods.items():
            if variant in group.names:
                color, is_named = colors.get(method, "faint"), variant in named
                index = count[color] if is_named else 0
                count[color] += is_named
                dashes = _DASHES[index % len(_DASHES)]
                looks[variant] = Look(color, MARKERS.get(color, "o"), dashes, index % 2 == 1, is_named)
    return looks
