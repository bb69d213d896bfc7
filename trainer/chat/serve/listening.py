"""Sockets that are open before a model loads, and a server that tells every client when it ends.

sockets = open_sockets("127.0.0.1", 8000)        ConfigError where the port is taken
server = make_server(Batcher(chat), token=None)   one batcher per model
server.run(sockets=sockets)                      until SIGTERM or Ctrl-C, then at most EXIT_S more
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from dataclasses import replace
from types import FrameType

import uvicorn

from chatmill.config import ConfigError

from .app import Service, create_app
from .batcher import JOIN_S, Batcher
from .bounded_log import bound_logs
from .completion import Limits
from .connections import KEPT, Connection, Door

ACCEPTED_AT_ONCE = 16  # connections per turn of the event loop, so that these are few beyond those that are counted
QUEUE = 1024  # connections that wait to be accepted, in the system
RESERVE = 64 + 4 * ACCEPTED_AT_ONCE  # descriptors for all else: files, libraries, connections that begin or end
SWITCH_S = 0.0002  # a step calls torch about a hundred times, and may wait so long for Python's lock each time
CLOSE_S = 5  # for clients to read what is left for them
EXIT_S = 10  # from the signal to the end; the rest is JOIN_S and turns of the event loop


class Listener(socket.socket):
    """A socket whose queue is QUEUE long. The event loop wants it as long as what it accepts at once, which is few."""

    def listen(self, backlog: int = QUEUE) -> None:
        """Take connections into the queue."""
        super().listen(max(backlog, QUEUE))


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of a host; port 0 is any free one. Raises ConfigError that names what is in the way."""
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"serve: the host {host!r} is not known ({error}). Give an address of this machine.") from None
    found: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(places):
        try:
            opened = Listener(family, kind, protocol)
        except OSError as error:  # for example a machine without IPv6
            problem = error
            continue
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind((address[0], port, *address[2:]))
            opened.listen()
        except OSError as error:
            opened.close()
            problem = error
            if error.errno != errno.EADDRNOTAVAIL:
                break
        else:
            found.append(opened)
            port = opened.getsockname()[1]
            continue
    if found and (problem is None or problem.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)):
        return found
    for other in found:
        other.close()
    assert problem is not None
    raise ConfigError(f"serve: {_cause(problem, host, port)}") from None


def _cause(problem: OSError, host: str, port: int) -> str:
    if problem.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken by another program. Stop it, or choose another with --port (0: any free one)."
    if problem.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} may not be opened by this user. Choose one from 1024 on with --port."
    if problem.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {host}. Choose one of its own with --host."
    return f"port {port} of {host} cannot be opened: {problem.strerror or problem}."


def most_connections(wanted: int) -> int:
    """As many of the wanted connections as there are descriptors for; the soft limit is raised where it may be."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return wanted
    needed = wanted + KEPT + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):  # then what there is must do
            pass
        if soft < 1 + KEPT + RESERVE:
            raise ConfigError(f"serve: a server needs {1 + KEPT + RESERVE} open files, {soft} are allowed. Raise ulimit -n.")
        return min(wanted, soft - KEPT - RESERVE)
    return wanted


class ChatServer(uvicorn.Server):
    """uvicorn's server; make it with `make_server`."""

    def __init__(self, config: uvicorn.Config, service: Service, limits: Limits) -> None:
        super().__init__(config)
        self.limits = limits
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End after EXIT_S in any case: the system ends a process that is too busy to do it itself."""
        if hasattr(signal, "alarm"):
            signal.alarm(EXIT_S)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End every reply with an error that says why, and give its reader CLOSE_S to read it."""
        ending = asyncio.create_task(self._service.close())
        await super().shutdown(sockets)
        await ending


def make_server(
    *batchers: Batcher, token: str | None = None, limits: Limits | None = None, log_level: str = "warning"
) -> ChatServer:
    """The server for one model or several. It closes the batchers when it ends."""
    assert CLOSE_S + JOIN_S < EXIT_S
    limits = limits or Limits()
    limits = replace(limits, max_connections=most_connections(limits.max_connections))
    door, service = Door(limits), Service(batchers, limits)
    config = uvicorn.Config(
        create_app(service, token=token, door=door),
        http=Connection.bound_to(door),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level=log_level,
        access_log=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=CLOSE_S,
    )
    bound_logs()
    sys.setswitchinterval(SWITCH_S)
    return ChatServer(config, service, limits)
