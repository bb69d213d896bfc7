"""Charts: points land where their values say, ticks are round, texts are escaped."""

from __future__ import annotations

import math

from chatmill.data.report.charts import Axis, Line, Series, draw, nice_ticks, parallel, thin


def test_ticks_are_round_and_inside() -> None:
    assert nice_ticks(0, 300, 6) == [0, 50, 100, 150, 200, 250, 300]
    assert nice_ticks(2.93, 4.02) == [3.0, 3.25, 3.5, 3.75, 4.0]
    assert nice_ticks(1, 1) == [1]


def test_points_land_where_their_values_say() -> None:
    chart = draw("t", [Series("s", (0, 5, 10), (0.0, math.nan, 100.0))], zero=True)
    assert chart is not None
    assert chart.series[0].path == "M0.0 1000.0M1000.0 56.6"  # top padding 6 %; the NaN lifts the pen
    assert [t.text for t in chart.y_ticks] == ["0", "25", "50", "75", "100"]
    assert [t.at for t in chart.x_ticks] == [0, 20, 40, 60, 80, 100]
    assert draw("t", [Series("s", (1,), (math.nan,))]) is None
    assert draw("t", [Series("s", (1,), (2.0,))]) is not None


def test_thinning_keeps_spikes_and_ends() -> None:
    y = [1.0] * 100_000
    y[54_321], y[77_777] = 99.0, -99.0
    small = thin(Series("s", tuple(map(float, range(100_000))), tuple(y)))
    assert len(small.x) < 1000 and {99.0, -99.0} <= set(small.y)
    assert small.x[0] == 0 and small.x[-1] == 99_999


def test_a_logarithmic_axis_puts_the_geometric_mean_in_the_middle() -> None:
    chart = draw("t", [Series("s", (10.0, 100.0, 1000.0), (1.0, 2.0, 3.0), kind="dots", labels=("a", "<b>", "c"))], log_x=True)
    assert chart is not None
    assert [path for path, _ in chart.series[0].dots][1] == "M500.0 500.0h0" and chart.series[0].path == ""
    assert [(t.at, t.text) for t in chart.x_ticks] == [(0, "10"), (100, "1,000")]
    page = chart.html()
    assert "<title>&lt;b&gt;</title>" in page and "<script" not in page and "<script" in chart.html(hover=True)


def test_parallel_coordinates_cross_each_axis_at_their_height() -> None:
    page = parallel("t", [Axis("<lr>", ((0.0, "low"), (1.0, "high"))), Axis("b", ())], [Line((0.25, 1.0), "trial 1")])
    assert 'd="M0.0 750.0L1000.0 0.0"><title>trial 1</title>' in page and "&lt;lr&gt;" in page
