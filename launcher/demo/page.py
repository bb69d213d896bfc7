"""The chat page beside the demo: it stays open while the demo goes on, and until Ctrl-C at the end.

with ChatPage(command, opened=True) as page:
    ...
    page.stay()
"""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Sequence
from typing import Self

from chatmill.shell import own_command

PORT = 8000


class ChatPage:
    """A `chatmill serve` that runs where somebody can see it; elsewhere only its command is printed, and nothing waits."""

    def __init__(self, command: Sequence[str], opened: bool) -> None:
        self._command, self._opened = list(command), opened
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        told = f"{own_command()} {shlex.join(self._command[3:])}"
        if not self._opened:
            print("\nBoth models side by side, in the browser (Ctrl-C ends it):")
            print(f"$ {told}   # http://127.0.0.1:{PORT}/")
            return self
        port = free_port()
        print(f"\nBoth models side by side: http://127.0.0.1:{port}/ opens in the browser in some seconds.")
        print(f"$ {told} --port {port} --open", flush=True)
        self._server = subprocess.Popen([*self._command, "--port", str(port), "--open"], stdin=subprocess.DEVNULL)
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(15)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()

    def stay(self) -> None:
        """Until Ctrl-C, or the server's own end."""
        if self._server is not None and self._server.poll() is None:
            print("The chat page stays open until Ctrl-C.", flush=True)
            try:
                self._server.wait()
            except KeyboardInterrupt:  # the server got it, too
                print()


def free_port() -> int:
    """PORT, or where that is taken any free one."""
    for wanted in (PORT, 0):
        with socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return int(found.getsockname()[1])
    return PORT  # serve says what is wrong
