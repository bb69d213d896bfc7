"""Numbers and times for people.

    number(1234567)    "1.23 M"
    duration(3725)     "1 h 2 min"
    counted(3, "node") "3 nodes"

Standard library only.
"""

from __future__ import annotations

import math


def number(value: float | None, digits: int = 3) -> str:
    """1234567 -> 1.23 M, 0.00031 -> 3.1e-4; NaN and None -> a dash."""
    if value is None or isinstance(value, bool) or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if size >= limit:
            return f"{value / (limit if suffix != ' k' else 1e3):.{digits}g}{suffix}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 1, 1)}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if size < 100 else f"{value:.1f}" if digits > 3 else f"{value:.0f}"


def counted(count: float, noun: str) -> str:
    """3, "node" -> 3 nodes; 1, "node" -> 1 node."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """3725 -> 1 h 2 min; what is not finite or negative -> a dash."""
    if not math.isfinite(seconds) or seconds < 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
