"""The figures of a report: lines over training and over learning rates, what a measure costs, differences, and loads.

Each ``draw_...`` takes figures by variant and the looks of variants, and returns a matplotlib ``Figure``, or None where
there is nothing to draw; :func:`~torchdsc.lab.figures.style.to_svg` makes it part of a page.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("torchdsc.lab.figures needs matplotlib: pip install 'torchdsc[lab]'") from error
