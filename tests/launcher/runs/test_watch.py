"""`chatmill watch`: the page follows the run, on this machine alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.trainer.report.test_report import make_run

from chatmill.launcher.__main__ import main as chatmill
from chatmill.launcher.runs import watch as watching
from chatmill.launcher.runs.watch import HOST, LivePage, has_display, make_server
from chatmill.run_files import append_jsonl


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path, steps=40)


@pytest.fixture
def address(run: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(watching, "SHARE", 1e9)  # no pause between two looks
    server = make_server(LivePage(run), 0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://{HOST}:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
        return str(answer.read().decode())


def test_the_page_follows_the_run(run: Path, address: str) -> None:
    page, stamp = get(f"{address}/"), get(f"{address}/stamp")
    assert 'fetch("/stamp"' in page and "Live, " in page and "aww sorry to hear that" in page
    assert get(f"{address}/stamp") == stamp  # nothing new, nothing made
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 1.2')  # a line that is just being written
    get(f"{address}/")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('345, "time": 1790000090.0}\n')
    append_jsonl(run / "samples.jsonl", {"step": 41, "prompt": "What is the capital of France?", "reply": "Paris <b>again</b>"})
    assert get(f"{address}/stamp") != stamp
    page = get(f"{address}/")
    assert "1.234" in page and "Paris &lt;b&gt;again&lt;/b&gt;" in page
    (run / "config.yaml").unlink()
    assert "config.yaml is missing" in get(f"{address}/")


def test_it_is_made_no_more_often_than_takes_a_fifth_of_a_core(run: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0  # a look takes one second
        return now[0]

    page = LivePage(run, clock)
    first = page.stamp()
    append_jsonl(run / "metrics.jsonl", {"step": 41, "loss": 2.0})
    assert page.stamp() == first
    now[0] += 10
    assert page.stamp() != first


def test_other_hosts_and_other_paths_are_refused(address: str) -> None:
    for url, host in ((f"{address}/", "evil.example"), (f"{address}/config.yaml", "")):
        with pytest.raises(urllib.error.HTTPError) as found:
            get(url, **({"Host": host} if host else {}))
        assert found.value.code == (403 if host else 404)
    with socket.create_connection((HOST, int(address.rpartition(":")[2]))) as own:
        assert own.getpeername()[0] == "127.0.0.1"


def test_a_taken_port_and_a_folder_without_a_run_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        assert chatmill(["watch", str(run), "--port", str(port), "--no-open"]) == 2
    assert f"watch: port {port} of 127.0.0.1 is taken by another program" in capsys.readouterr().err
    assert chatmill(["watch", "runs/nowhere", "--no-open"]) == 2
    assert "runs/nowhere: no run there" in capsys.readouterr().err
    assert chatmill(["watch", str(run), "--port", "70000", "--no-open"]) == 2
    assert "0 to 65535" in capsys.readouterr().err


def test_ctrl_c_ends_watching_with_130_and_prints_where_the_page_is(run: Path) -> None:
    words = [sys.executable, "-m", "chatmill", "watch", str(run), "--port", "0", "--no-open"]
    environment = os.environ | {"SSH_CONNECTION": "10.0.0.9 5022 10.0.0.1 22"}

    def interruptible() -> None:  # a background job of a shell inherits an ignored SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=interruptible) as process:
        assert process.stdout is not None
        line, tunnel = process.stdout.readline(), process.stdout.readline()
        assert "http://127.0.0.1:" in line and tunnel.startswith("from your own machine: ssh -N -L ")
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_a_browser_is_opened_only_where_there_is_a_window_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_display()


def test_a_run_that_slurm_or_a_supervisor_leads_says_its_state(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "logs").mkdir()
    begun = {"event": "begin", "attempt": 1, "job": "77", "time": 1.79e9, "step": 0, "nodes": ["n1"]}
    (run / "logs/attempts.jsonl").write_text(json.dumps(begun) + "\n")
    events = run / "events.jsonl"
    events.write_text("".join(line + "\n" for line in events.read_text().splitlines() if "finished" not in line))
    monkeypatch.setattr(watching, "query_slurm", lambda jobs: {"77": ("RUNNING", "None")} if jobs == ["77"] else {})
    assert ">Running, step 40 of 40" in LivePage(run).html()
