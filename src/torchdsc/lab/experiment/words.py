"""Figures and settings in words."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import DASH, TIMES, Interval

__all__ = ["duration", "format_millions", "format_ratio", "format_settings", "format_span", "join_words"]


def format_ratio(value: Interval | None) -> str:
    """ "0.84× (0.82–0.86)", the median and its 95 % interval; a dash for None."""
    if value is None:
        return DASH
    text = f"{value.mean:.2f}{TIMES}"
    return text if value.low is None else f"{text} ({value.low:.2f}{DASH}{value.high:.2f})"


def format_millions(count: float) -> str:
    """ "35.01 M"; "0.054 M" below a tenth of a million, "0" for none."""
    millions = count / 1e6
    return f"{millions:,.2f} M" if millions >= 0.1 else f"{millions:.2g} M" if count else "0"


def format_span(values: Sequence[str | int]) -> str:
    """ "3 to 10" of sorted values, or the only one; empty for none."""
    texts = [f"{value:,}" if isinstance(value, int) else value for value in values]
    return " to ".join(dict.fromkeys([texts[0], texts[-1]])) if texts else ""


def format_settings(settings: Mapping[str, Any]) -> str:
    """ "learning_rate 0.004, aux_weight 0.01"."""
    parts = (format_settings(v) if isinstance(v, Mapping) else f"{k} {v}" for k, v in settings.items())
    return ", ".join(parts)


def join_words(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if math.isnan(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
