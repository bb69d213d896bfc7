"""Long work shows itself: on a terminal with bars, in a log with a line now and then, on stderr alone."""

from __future__ import annotations

import io
import os
import pty
import time

import pytest

from chatmill.progress import LongWork, Phase


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_is_that_of_the_mean_speed_since_the_phase_began() -> None:
    phase = Phase("2/6 clean", first=50, total=100, began=100.0, done=60)  # 50 were done before a kill
    assert phase.words(110.0) == "10 s, about 40 s left"
    assert phase.line(110.0) == "2/6 clean: 60 of 100, 10 s, about 40 s left"
    phase.done = 50
    assert phase.words(110.0) == "10 s"  # nothing to go by
    assert Phase("3/6 dedup", 0, 1, 0.0).line(75.0) == "3/6 dedup: 1 min 15 s"


def test_a_log_gets_a_line_now_and_then_also_while_nothing_is_reported() -> None:
    stream = io.StringIO()
    with LongWork(["read", "train"], stream=stream, line_s=0.05) as show:
        show("read", 1, 4)
        show("read", 4, 4)
        show("train", 0, 1)
        time.sleep(0.3)  # no report in between
    lines = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("2/2 train: ") for line in lines)
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_short_work_writes_nothing_and_quiet_work_never_does() -> None:
    for quiet in (False, True):
        stream = io.StringIO()
        with LongWork(["read"], quiet, stream, line_s=0.05 if quiet else 10.0) as show:
            for number in range(100):
                show("read", number, 100)
            time.sleep(0.12 if quiet else 0)
        assert stream.getvalue() == ""
    stream = io.StringIO()
    with LongWork(["read"], True, stream) as show:
        show.say("BLEU left out")  # no progress: it is said in any case
    assert stream.getvalue() == "BLEU left out\n"


def test_a_terminal_gets_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with LongWork(["read", "write"], stream=stream) as show:
        show("read", 2, 2)
        show("write", 1, 2)
        show.say("[bold]as it is[/]")
    text = stream.getvalue()
    assert "1/2 read" in text and "2/2 write" in text and "100 %" in text and " 50 %" in text and "[bold]as it is[/]" in text
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with LongWork(["read"], stream=stream) as show:
        show("read", 1, 2)
    assert "\x1b" not in stream.getvalue()


def test_what_the_work_prints_goes_to_stdout_beside_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with LongWork(["read"], stream=stream) as show:
        show("read", 0, 2)
        print('{"in": "a pipe"}')
    assert capsys.readouterr().out == '{"in": "a pipe"}\n' and "pipe" not in stream.getvalue()


def test_a_report_costs_a_hot_loop_little() -> None:
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as stream, LongWork(["read"], stream=stream, line_s=60) as show:
        began = time.process_time()
        for number in range(20_000):
            show("read", number, 20_000)
        assert time.process_time() - began < 0.4  # 20 us each; 1 us is usual
    os.close(parent)
