"""Line charts for the run report: numbers in, percentages and SVG path data out; the template draws them.

The plot is an SVG stretched to its box (1000 x 1000 units, strokes that do not scale); axis labels are HTML placed
by percentage. So a chart keeps its text size at any width and needs no script to be read.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MAX_POINTS = 700  # per series: more than the pixels of a chart only makes the file large
SIZE = 1000.0  # SVG units per side


@dataclass(frozen=True, slots=True)
class Series:
    """One line. slot: colour number 0..5 of the palette. kind: line, faint (raw values behind a smooth line) or points."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    slot: int = 0
    kind: str = "line"


@dataclass(frozen=True, slots=True)
class Tick:
    """An axis label at a percentage of the axis' length (from the left, or from the top)."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series ready for the template."""

    name: str
    slot: int
    kind: str
    path: str
    dots: str
    end: tuple[float, float] | None
    hover: tuple[tuple[float, float, str], ...]  # x %, y %, text


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart ready for the template."""

    title: str
    note: str
    series: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    clipped: str = ""
    summary: str = ""

    @property
    def hover_data(self) -> list[dict[str, object]]:
        """What the script needs to show values under the pointer."""
        return [{"name": s.name, "slot": s.slot % 6, "kind": s.kind, "points": s.hover} for s in self.series]


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people: 1234567 -> 1.23 M, 0.00031 -> 3.1e-4, NaN and None -> a dash."""
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
    text = f"{value:.{digits}g}" if size < 100 else f"{value:.1f}" if digits > 3 else f"{value:.0f}"
    return text


def finite(series: Series) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


def smooth(values: Sequence[float], half_life: float) -> tuple[float, ...]:
    """Exponential moving average without start bias; NaNs are passed over and leave gaps."""
    keep, total, weight, out = 0.5 ** (1.0 / max(half_life, 1e-9)), 0.0, 0.0, []
    for value in values:
        if not math.isfinite(value):
            out.append(math.nan)
            continue
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight)
    return tuple(out)


def running_median(values: Sequence[float], width: int) -> tuple[float, ...]:
    """Median of the `width` values around each one: a single spike leaves no trace in it. NaNs leave gaps."""
    half = max(1, width // 2)
    out = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        out.append(statistics.median(near) if math.isfinite(value) else math.nan)
    return tuple(out)


def thin(series: Series, limit: int = MAX_POINTS) -> Series:
    """At most about `limit` points; of each stretch the lowest and the highest stay, so spikes remain visible."""
    n = len(series.x)
    if n <= limit:
        return series
    keep: set[int] = {0, n - 1}
    width = 2 * n / limit
    for start in (int(i * width) for i in range(math.ceil(n / width))):
        stretch = range(start, min(n, int(start + width) + 1))
        real = [i for i in stretch if math.isfinite(series.y[i])]
        if real:
            keep |= {min(real, key=lambda i: series.y[i]), max(real, key=lambda i: series.y[i])}
        keep |= {i for i in stretch if not math.isfinite(series.y[i])} if not real else set()
    order = sorted(keep)
    return Series(series.name, tuple(series.x[i] for i in order), tuple(series.y[i] for i in order), series.slot, series.kind)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) inside [low, high]."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * about >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(value) or 1.0)
    top = max((abs(t) for t in ticks), default=0.0)
    if value == 0:
        return "0"
    if top < 1e-3:
        return number(value)
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if top >= limit:
            unit = 1e3 if suffix == " k" else limit
            decimals = max(0, math.ceil(-math.log10(step / unit) - 1e-9))
            return f"{value / unit:.{decimals}f}{suffix}"
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    if round(step * 10**decimals, 6) % 1:  # steps of 2.5
        decimals += 1
    return f"{value:,.{decimals}f}"


def draw(
    title: str, series: Sequence[Series], *, note: str = "", zero: bool = False, x_range: tuple[float, float] | None = None
) -> Chart | None:
    """Lay a chart out. zero: the axis starts at 0. None when there is nothing to draw."""
    points = {id(s): finite(s) for s in series}
    shown = [s for s in series if points[id(s)]]
    if not shown:
        return None
    ys = sorted(y for s in shown for _, y in points[id(s)])
    xs = [x for s in shown for x, _ in points[id(s)]]
    low, high, clipped = ys[0], ys[-1], ""
    calm = ys[int(0.97 * (len(ys) - 1))]
    typical = calm - statistics.median(ys)
    if len(ys) >= 30 and typical > 0 and high > calm + 8 * typical:
        at = max((p for s in shown for p in points[id(s)]), key=lambda p: p[1])
        clipped = f"Peak {number(at[1])} at step {at[0]:,.0f} is beyond the scale."
        high = calm + 2 * typical
    if zero:
        low = min(0.0, low)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a constant, smoothed perhaps with rounding errors
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero and low == 0 else low - pad), high + pad
    else:
        pad = (high - low) * 0.06
        low, high = (low if zero and low == 0 else low - pad), high + pad
    x_low, x_high = x_range or (min(xs), max(xs))
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - x_low) / (x_high - x_low), min(1.0, max(0.0, (high - y) / (high - low)))

    y_ticks = nice_ticks(low, high)
    x_ticks = [t for t in nice_ticks(x_low, x_high, 6) if t == int(t)] or [x_low]
    last = max(shown, key=lambda s: s.kind != "faint")
    first_y, last_y = points[id(last)][0][1], points[id(last)][-1][1]
    return Chart(
        title=title,
        note=note,
        series=tuple(_draw_series(thin(s), place) for s in shown),
        x_ticks=tuple(Tick(100 * place(t, low)[0], f"{t:,.0f}") for t in x_ticks),
        y_ticks=tuple(Tick(100 * place(x_low, t)[1], _tick_text(t, y_ticks)) for t in y_ticks),
        clipped=clipped,
        summary=f"{title}: {last.name}, {number(first_y)} to {number(last_y)} between steps {x_low:,.0f} and {x_high:,.0f}.",
    )


def _draw_series(series: Series, place: object) -> Drawn:
    assert callable(place)
    words: list[str] = []
    dots: list[str] = []
    hover: list[tuple[float, float, str]] = []
    end: tuple[float, float] | None = None
    pen_down = False
    real = finite(series)
    for x, y in zip(series.x, series.y, strict=True):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            hover.append((-1.0, -1.0, ""))
            continue
        left, top = place(x, y)
        words.append(f"{'L' if pen_down else 'M'}{SIZE * left:.1f} {SIZE * top:.1f}")
        pen_down = True
        hover.append((round(100 * left, 2), round(100 * top, 2), f"{x:.0f}|{number(y, 4)}"))
        end = (100 * left, 100 * top)
        if (series.kind == "points" and len(real) <= 60) or len(real) == 1:
            dots.append(f"M{SIZE * left:.1f} {SIZE * top:.1f}h0")
    hover = [h for h in hover if h[0] >= 0]
    return Drawn(series.name, series.slot, series.kind, "".join(words), "".join(dots), end, tuple(hover))
