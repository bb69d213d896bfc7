"""Charts as HTML, CSS and SVG: numbers in, markup out. A page that shows them puts STYLE into its <style>.

    columns([("16", 120), ("32", 300)], "tokens per dialogue")        bars([("en", 420)], total=500)
    draw("Loss", [Series("training", steps, losses)], note="nats per token").html()
    parallel("Trials", [Axis("lr", ((0.0, "1e-4"), (1.0, "1e-2"))), ...], [Line((0.3, 1.0), "complete")])

Lines are an SVG stretched to its box (1000 x 1000 units, strokes that do not scale); labels are HTML placed by percentage. So a
chart keeps its text size at any width and needs no script to be read. Nothing is loaded. All texts are escaped here.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

from chatmill.formatting import number

STYLE = Path(__file__).with_name("charts.css").read_text(encoding="utf-8")
MAX_POINTS = 700  # per series: more than the pixels of a chart only makes the file large
SIZE = 1000.0  # SVG units per side


def percent(share: float) -> str:
    """0.0004 as <0.1 %."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def columns(values: Sequence[tuple[str, int]], what: str) -> str:
    """Upright columns, each with its count above and its label below."""
    most = max((count for _, count in values), default=0) or 1
    parts = [
        f'<div class="column"><span>{number(count) if count else ""}</span>'
        f'<i style="--share:{count / most:.4f}"></i><em>{escape(label)}</em></div>'
        for label, count in values
    ]
    described = ", ".join(f"{label}: {count}" for label, count in values)
    return f'<figure class="columns" role="img" aria-label="{escape(f"{what}: {described}")}">{"".join(parts)}</figure>'


@dataclass(frozen=True, slots=True)
class BarRow:
    """A lying bar: label, (class, share of the width) of each piece, figure and small print behind it."""

    label: str
    pieces: tuple[tuple[str, float], ...]
    figure: str
    note: str

    def html(self) -> str:
        """Three cells of the grid."""
        track = "".join(f'<i class="{kind}" style="width:{100 * share:.2f}%"></i>' for kind, share in self.pieces)
        behind = f"{escape(self.figure)} <small>{escape(self.note)}</small>"
        return f'<span>{escape(self.label)}</span><div class="track">{track}</div><span class="n">{behind}</span>'


def bar_rows(rows: Sequence[BarRow]) -> str:
    """Lying bars below one another."""
    return f'<div class="bars">{"".join(row.html() for row in rows)}</div>'


def bars(values: Sequence[tuple[str, int]], total: int) -> str:
    """Lying bars with label, count and share of the total."""
    shares = [count / (total or 1) for _, count in values]
    return bar_rows(
        [
            BarRow(label, (("kept", share),), f"{count:,}", percent(share))
            for (label, count), share in zip(values, shares, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True)
class Series:
    """One line or set of points. slot: colour number 0..5 of the palette. labels: what each point says under the pointer.

    kind: line, faint (raw values behind a smooth line), points (on a line) or dots (without one).
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    slot: int = 0
    kind: str = "line"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tick:
    """An axis label at a percentage of the axis' length (from the left, or from the top)."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series laid out. dots: (SVG path, label). hover: (x %, y %, text)."""

    name: str
    slot: int
    kind: str
    path: str
    dots: tuple[tuple[str, str], ...]
    hover: tuple[tuple[float, float, str], ...]

    def svg(self) -> str:
        """The line, then its points on a halo."""
        out = f'<path class="s{self.slot % 6} {self.kind}" d="{self.path}"/>' if self.path else ""
        if self.dots:
            out += f'<path class="halo" d="{"".join(path for path, _ in self.dots)}"/>'
        for label, dots in itertools.groupby(self.dots, key=lambda dot: dot[1]):
            title = f"<title>{escape(label)}</title>" if label else ""
            out += f'<path class="dots s{self.slot % 6}" d="{"".join(path for path, _ in dots)}">{title}</path>'
        return out


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart laid out."""

    title: str
    note: str
    series: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    clipped: str
    summary: str
    x_label: str

    def html(self, *, tall: bool = False, hover: bool = False) -> str:
        """hover: with the values that the page's script shows under the pointer."""
        area = "".join(
            f'<i class="grid" style="top:{t.at:.2f}%"></i><span class="y" style="top:{t.at:.2f}%">{escape(t.text)}</span>'
            for t in self.y_ticks
        )
        area += "".join(f'<span class="x" style="left:{t.at:.2f}%">{escape(t.text)}</span>' for t in self.x_ticks)
        area += _svg("".join(s.svg() for s in self.series))
        if hover:
            points = [{"name": s.name, "slot": s.slot % 6, "kind": s.kind, "points": s.hover} for s in self.series]
            data = json.dumps(points).replace("<", "\\u003c")
            area += '<div class="hair" hidden></div><div class="tip" hidden></div>'
            area += f'<script type="application/json">{data}</script>'
        clipped = f'<p class="clip">{escape(self.clipped)}</p>' if self.clipped else ""
        keys = [(s.name, f"s{s.slot % 6} {s.kind}") for s in self.series] if len(self.series) > 1 else []
        plot = f'<div class="area">{area}</div><span class="axis">{escape(self.x_label)}</span>'
        return (
            _figure("chart tall" if tall else "chart", (self.title, self.note), keys, self.summary, plot)
            + clipped
            + "</figure>"
        )


def _svg(body: str) -> str:
    return f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{body}</svg>'


def _figure(kind: str, head: tuple[str, str], keys: Sequence[tuple[str, str]], summary: str, plot: str) -> str:
    """Caption, legend and plot of a figure, which is left open."""
    note = f'<span class="note">{escape(head[1])}</span>' if head[1] else ""
    items = "".join(f'<li><span class="key {style}"></span>{escape(name)}</li>' for name, style in keys)
    legend = f'<ul class="legend">{items}</ul>' if keys else ""
    caption = f"<figcaption><h3>{escape(head[0])}</h3>{note}</figcaption>"
    plot = f'<div class="plot" tabindex="0" role="img" aria-label="{escape(summary)}">{plot}</div>'
    return f'<figure class="{kind}">{caption}{legend}{plot}'


def finite(series: Series) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(x) and math.isfinite(y)]


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
    return replace(series, x=tuple(series.x[i] for i in order), y=tuple(series.y[i] for i in order))


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
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    zero: bool = False,
    x_label: str = "step",
    log_x: bool = False,
) -> Chart | None:
    """Lay a chart out. zero: the vertical axis starts at 0. None when there is nothing to draw."""
    points = {id(s): finite(s) for s in series}
    shown = [s for s in series if points[id(s)]]
    if not shown:
        return None
    ys = sorted(y for s in shown for _, y in points[id(s)])
    low, high, clipped = ys[0], ys[-1], ""
    calm = ys[int(0.97 * (len(ys) - 1))]
    typical = calm - statistics.median(ys)
    if len(ys) >= 30 and typical > 0 and high > calm + 8 * typical:
        at = max((p for s in shown for p in points[id(s)]), key=lambda p: p[1])
        clipped = f"Peak {number(at[1])} at {x_label} {at[0]:,.0f} is beyond the scale."
        high = calm + 2 * typical
    if zero:
        low = min(0.0, low)
    constant = high - low <= 1e-9 * max(abs(high), abs(low))  # perhaps with rounding errors of smoothing
    pad = (abs(high) * 0.1 or 1.0) if constant else (high - low) * 0.06
    low, high = (low if zero and low == 0 else low - pad), high + pad
    bend: Callable[[float], float] = math.log if log_x else float
    xs = [x for s in shown for x, _ in points[id(s)]]
    x_low, x_high = bend(min(xs)), bend(max(xs))
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (bend(x) - x_low) / (x_high - x_low), min(1.0, max(0.0, (high - y) / (high - low)))

    y_ticks = nice_ticks(low, high)
    if log_x:
        x_ticks = [Tick(100 * place(x, low)[0], number(x)) for x in dict.fromkeys((min(xs), max(xs)))]
    else:
        whole = [t for t in nice_ticks(x_low, x_high, 6) if t == int(t)] or [x_low]
        x_ticks = [Tick(100 * place(t, low)[0], f"{t:,.0f}") for t in whole]
    last = max(shown, key=lambda s: s.kind != "faint")
    ends = f"{number(points[id(last)][0][1])} to {number(points[id(last)][-1][1])}"
    return Chart(
        title=title,
        note=note,
        series=tuple(_draw_series(thin(s), place) for s in shown),
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(Tick(100 * place(min(xs), t)[1], _tick_text(t, y_ticks)) for t in y_ticks),
        clipped=clipped,
        summary=f"{title}: {last.name}, {ends} between {x_label}s {min(xs):,.0f} and {max(xs):,.0f}.",
        x_label=x_label,
    )


def _draw_series(series: Series, place: Callable[[float, float], tuple[float, float]]) -> Drawn:
    words: list[str] = []
    dots: list[tuple[str, str]] = []
    hover: list[tuple[float, float, str]] = []
    pen_down = False
    count = len(finite(series))
    has_dots = series.kind == "dots" or (series.kind == "points" and count <= 60) or count == 1
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        if not (math.isfinite(x) and math.isfinite(y)):
            pen_down = False
            continue
        left, top = place(x, y)
        at = f"{SIZE * left:.1f} {SIZE * top:.1f}"
        words.append(f"{'L' if pen_down else 'M'}{at}")
        pen_down = True
        hover.append((round(100 * left, 2), round(100 * top, 2), f"{x:.0f}|{number(y, 4)}"))
        if has_dots:
            dots.append((f"M{at}h0", series.labels[i] if series.labels else ""))
    path = "" if series.kind == "dots" else "".join(words)
    return Drawn(series.name, series.slot, series.kind, path, tuple(dots), tuple(hover))


@dataclass(frozen=True, slots=True)
class Axis:
    """A vertical axis of parallel coordinates. ticks: (height 0..1, text)."""

    name: str
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A line across all axes of parallel coordinates. heights: 0..1, one per axis."""

    heights: tuple[float, ...]
    label: str
    slot: int = 0
    opacity: float = 1.0


def parallel(title: str, axes: Sequence[Axis], lines: Sequence[Line], note: str = "") -> str:
    """Parallel coordinates."""
    left = [100 * i / max(1, len(axes) - 1) for i in range(len(axes))]
    paths = "".join(
        f'<path class="s{line.slot % 6} way" opacity="{line.opacity:.2f}" d="M'
        + "L".join(f"{10 * x:.1f} {SIZE * (1 - y):.1f}" for x, y in zip(left, line.heights, strict=True))
        + f'"><title>{escape(line.label)}</title></path>'
        for line in lines
    )
    labels = "".join(
        f'<i class="pole" style="left:{x:.2f}%"></i><span class="x" style="left:{x:.2f}%">{escape(axis.name)}</span>'
        + "".join(
            f'<span class="mark" style="left:{x:.2f}%;top:{100 * (1 - at):.2f}%">{escape(text)}</span>'
            for at, text in axis.ticks
        )
        for x, axis in zip(left, axes, strict=True)
    )
    summary = f"{title}: {len(lines)} lines over {', '.join(axis.name for axis in axes)}"
    area = f'<div class="area">{_svg(paths)}{labels}</div>'
    return _figure("chart tall parallel", (title, note), (), summary, area) + "</figure>"
