"""The connections of a server: how many there may be, and how long each may take to send a request and to read the answer.

uvicorn has a time-out for connections that idle between requests (`timeout_keep_alive`), none for a request that arrives slowly
or an answer that nobody reads. Its `limit_concurrency` counts half-open connections, so that these shut everybody out. Here:

    a request's head takes longer than `Limits.head_timeout_s`          the connection is closed
    its body takes longer than `Limits.body_timeout_s`                  408, and closed if more of it comes
    nothing of the answer is read for `Limits.send_timeout_s`           closed
    more than `Limits.max_connections` requests in progress             503; GET /health is still answered
    more connections than that                                          the one that has waited longest for a request is closed
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .completion import Limits
from .errors import RequestError, refusal

KEPT = 8  # connections beyond the requests in progress: for /health and for refusals
SLOW_BODY_S = 5.0  # a body that takes longer gives its place up when there is no other
GRACE_S = 2.0  # after `body_timeout_s`, for the answer 408 to be made
READ_AT_LEAST = 64 << 10  # bytes per `send_timeout_s`


class Door:
    """Counts connections and requests, and makes room for new ones."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.open: set[Connection] = set()
        self.busy = 0  # requests in progress

    def let_in(self, new: Connection) -> bool:
        """Make room for a new connection. False: all others have sent a request, or are sending a body, and stay."""
        self.open.add(new)
        return len(self.open) <= self.limits.max_connections + KEPT or self._close_longest(h11.IDLE, besides=new)

    def has_place(self) -> bool:
        """Whether one more request can be in progress, if need be in place of one whose body comes slowly."""
        return self.busy < self.limits.max_connections or self._close_longest(h11.SEND_BODY, at_least_s=SLOW_BODY_S)

    def _close_longest(self, state: object, *, at_least_s: float = 0.0, besides: Connection | None = None) -> bool:
        """Close the connection that has been in a state for longest; False where there is none."""
        now = asyncio.get_running_loop().time()
        found = [c for c in self.open if c.conn.their_state is state and c is not besides and now - c.since >= at_least_s]
        if not found:
            return False
        longest = min(found, key=lambda c: c.since)
        self.open.discard(longest)
        longest.transport.abort()
        return True


class Connection(H11Protocol):
    """One connection. `bound_to` gives the class its door."""

    door: Door

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.since = self.loop.time()  # the beginning of the phase
        self._phase: tuple[Any, Any] | None = None
        self._head_or_body: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    @classmethod
    def bound_to(cls, door: Door) -> type[Connection]:
        """The class for the connections of one server."""
        return type("BoundConnection", (cls,), {"door": door})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Watch it from its first moment."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing says at once that bytes wait
        if not self.door.let_in(self):
            transport.write(FULL)
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take more of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Expect the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.door.open.discard(self)
        for timer in (self._head_or_body, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Bytes wait to be read."""
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        """All are read."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self) -> None:
        """Give the phase that has begun its time."""
        phase = (self.conn.their_state, self.cycle)
        if phase == self._phase:
            return
        self._phase, self.since = phase, self.loop.time()
        if self._head_or_body is not None:
            self._head_or_body.cancel()
        limits = self.door.limits
        most = {h11.IDLE: limits.head_timeout_s, h11.SEND_BODY: limits.body_timeout_s + GRACE_S}.get(phase[0])
        self._head_or_body = None if most is None else self.loop.call_later(most, self.transport.close)

    def _expect_reading(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self.door.limits.send_timeout_s, self._check_reading, waiting)

    def _check_reading(self, before: int) -> None:
        if before - self.transport.get_write_buffer_size() < min(READ_AT_LEAST, before):
            self.transport.abort()
        else:
            self._expect_reading()


class CrowdCheck:
    """Answers 503 to a request for which there is no place; GET /health needs none."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        if not self._door.has_place():
            answer = refusal(CROWDED)
            answer.headers["Connection"] = "close"
            await answer(scope, receive, send)
            return
        self._door.busy += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.busy -= 1


CROWDED = RequestError(503, "too many requests at once; try again later.", code="overloaded")
_BODY = json.dumps(CROWDED.body()).encode()
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s"
) % (len(_BODY), _BODY)
