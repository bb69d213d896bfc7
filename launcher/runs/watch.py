"""`chatmill watch RUN`: the report of a run as a page that follows it while it trains.

    http://127.0.0.1:8010/          the page; its script asks /stamp every two seconds
    http://127.0.0.1:8010/stamp     changes when the run has written something; then the page takes over what is new

Only files of the run folder are read, so a run on another machine or under Slurm is watched wherever its folder can be seen.
The page is made when somebody looks, and no more often than takes a fifth of a core. It is for this machine alone: 127.0.0.1,
and requests that name another host, as those of a foreign page may, are refused.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError
from chatmill.formatting import duration

from ...trainer.report.page import render
from ...trainer.report.reading import read_run
from .status import ACTIVE, RunStatus, describe, find_run, last_job, query_slurm

HOST = "127.0.0.1"
PORT = 8010
SHARE = 0.2  # of a core, at most, for making the page again
SLURM_S = 30.0  # squeue is asked no more often
WATCHED = ("metrics.jsonl", "events.jsonl", "samples.jsonl", "config.yaml", "logs/attempts.jsonl")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
KINDS = {"finished": "good", "failed": "bad", "killed": "bad"}


def watch(name: str, port: int = PORT, open_page: bool = True) -> int:
    """Serve the page until Ctrl-C. Raises ConfigError for a folder that holds no run, and for a port that is taken."""
    page = LivePage(find_run(name))
    page.html()  # says at once what is wrong with the folder
    server = make_server(page, port)
    try:
        url = f"http://{HOST}:{server.server_address[1]}/"
        print(f"{page.run_dir.name}: {url}  (Ctrl-C ends watching, not the run)", flush=True)
        if host := os.environ.get("SSH_CONNECTION", "").split():
            port = server.server_address[1]
            print(f"from your own machine: ssh -N -L {port}:{HOST}:{port} {host[2]}, then open the same address", flush=True)
        if open_page and has_display():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        server.serve_forever()
    finally:
        server.server_close()
    return 0


def has_display() -> bool:
    """Whether a browser would open in a window; elsewhere one may take over the terminal."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class LivePage:
    """The page of a run, made again when its files have changed. clock: seconds, for tests."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir, self.clock = run_dir, clock
        self._lock = threading.Lock()
        self._stamp = self._html = ""
        self._next = 0.0
        self._queue: dict[str, tuple[str, str]] = {}
        self._asked = -SLURM_S

    def stamp(self) -> str:
        """What the page holds: another text where it would be another page."""
        self._make_if_due()
        return self._stamp

    def html(self) -> str:
        """The page."""
        self._make_if_due()
        return self._html

    def _make_if_due(self) -> None:
        with self._lock:
            began = self.clock()
            if self._html and began < self._next:
                return
            one = self._status(began)
            stamp = f"{self._files()} {one.state} {one.detail}"
            if stamp != self._stamp:
                self._html = render([read_run(self.run_dir)], pill(one), live=True)
                self._stamp = stamp
            self._next = self.clock() + (self.clock() - began) / SHARE

    def _files(self) -> str:
        """Size and time of all files that the page is made from."""
        marks = []
        for path in (*(self.run_dir / name for name in WATCHED), *sorted(self.run_dir.glob("evaluation*.json"))):
            try:
                state = path.stat()
            except OSError:
                continue
            marks.append(f"{path.name}:{state.st_size}:{state.st_mtime_ns}")
        return " ".join(marks)

    def _status(self, now: float) -> RunStatus:
        if now - self._asked >= SLURM_S:
            self._queue, self._asked = query_slurm([last_job(self.run_dir)]), now
        return describe(self.run_dir, self._queue)


def pill(one: RunStatus) -> dict[str, str]:
    """The state beside the run's name: "running, step 120 of 400, 12 min left"."""
    parts = [one.state.lower()]
    if one.state != "finished":
        parts.append(f"step {one.step:,} of {one.steps:,}" if one.steps else f"step {one.step:,}")
    if one.eta_s is not None and one.state in ACTIVE:
        parts.append(f"{duration(one.eta_s)} left")
    text = ", ".join(parts)
    return {"kind": KINDS.get(one.state, "flat" if one.state in ACTIVE else "warn"), "text": text[:1].upper() + text[1:]}


def make_server(page: LivePage, port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0: any free one. Raises ConfigError where it cannot be had."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # of a connection that sends nothing

        def do_GET(self) -> None:
            named = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if named not in (HOST, "localhost"):
                self._send(HTTPStatus.FORBIDDEN, "text/plain", f"This page is for {HOST} alone.")
            elif self.path == "/stamp":
                self._answer("text/plain", page.stamp)
            elif self.path == "/":
                self._answer("text/html", page.html)
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "Not here; the page is /.")

        def _answer(self, kind: str, make: Callable[[], str]) -> None:
            try:
                body = make()
            except (ConfigError, OSError) as error:  # a folder that went away, or records damaged since
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))
            else:
                self._send(HTTPStatus.OK, kind, body)

        def _send(self, code: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode("utf-8", "replace")
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs share the port

        def handle_error(self, *_: Any) -> None:
            pass  # the browser went away

    try:
        return Server((HOST, port), Handler)
    except OverflowError:
        raise ConfigError(f"watch: port {port}: expected 0 to 65535.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is taken by another program. Stop it, or choose another with --port (0: any free one)."
        elif error.errno in (errno.EACCES, errno.EPERM):
            why = "may not be opened by this user. Choose one from 1024 on with --port."
        else:
            why = f"cannot be opened: {error.strerror or error}."
        raise ConfigError(f"watch: port {port} of {HOST} {why}") from None
