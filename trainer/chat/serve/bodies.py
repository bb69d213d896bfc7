"""Bodies of requests: limited in size, in time, and in what all of them hold together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from ...generation.prompt import bad_text
from .completion import Limits
from .errors import RequestError

MAX_VALUES = 50_000  # in objects and lists; more would keep the replies of others waiting
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NUMBERS = frozenset({int, float, bool, type(None)})
DISCARDED = 16  # times the largest body: so much is still read, for a client that is sending does not see an answer
HELD = 8  # times the largest body: what all bodies may hold
SMALL = 64 << 10  # bytes of a body that is always read
TOO_MANY = RequestError(400, f"the body has more than {MAX_VALUES:,} values, besides those in lists of numbers.")
ENDING = "the server is shutting down."
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of malloc.h


class Bodies:
    """Reads bodies, and ends it for all when the server ends."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0  # bytes of all large bodies that are in memory
        self._waits: set[asyncio.Timeout] = set()
        self._is_closing = False

    def close(self) -> None:
        """Refuse every body that has not arrived."""
        self._is_closing = True
        for wait in self._waits:
            wait.reschedule(0)

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytearray]:
        """The body, which counts as held until the block ends. Raises RequestError."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "expected Content-Type: application/json.")
        body = bytearray()
        try:
            await self._fill(body, request)
            yield body
        finally:
            if len(body) > SMALL:
                self._held -= len(body)
                if not self._held:
                    give_memory_back()

    async def _fill(self, body: bytearray, request: Request) -> None:
        most = self._limits.max_body_bytes
        too_large = RequestError(413, f"the body is larger than {most:,} bytes.")
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdigit() else 0
        if size > DISCARDED * most:
            raise too_large
        has_room = True
        try:
            async with asyncio.timeout(0 if self._is_closing else self._limits.body_timeout_s) as wait:
                self._waits.add(wait)
                try:
                    async for chunk in request.stream():
                        size = max(size, len(body) + len(chunk))
                        if size <= most:
                            has_room = has_room and self._take(body, chunk)
                        elif not declared:
                            raise too_large
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if self._is_closing:
                raise RequestError(503, ENDING, code="shutting_down") from None
            raise RequestError(408, f"the body did not arrive within {self._limits.body_timeout_s:.0f} s.") from None
        if size > most:
            raise too_large
        if not has_room:
            raise RequestError(503, "too many large requests at once; try again later.", code="overloaded")

    def _take(self, body: bytearray, chunk: bytes) -> bool:
        """Add to a body. False: there is no room, and what it held is dropped; the rest is read, so that its sender listens."""
        before = len(body) if len(body) > SMALL else 0
        after = len(body) + len(chunk)
        if after > SMALL:
            if self._held - before + after > HELD * self._limits.max_body_bytes:
                self._held -= before
                body.clear()
                return False
            self._held += after - before
        body += chunk
        return True


def set_large_blocks_apart() -> None:
    """Have glibc map every block of a megabyte or more by itself, and return it when it is freed.

    After the first large body glibc takes such blocks from a heap, one for each thread, where later small ones keep them.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        library.mallopt(_M_ARENA_MAX, 2)


def give_memory_back() -> None:
    """Let glibc return what large bodies leave behind: otherwise it keeps their pages for later. Takes milliseconds."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def parse_json(body: bytes | bytearray, most_numbers: int = 1 << 20) -> Any:
    """The value that a body says. most_numbers: in lists, what more cannot be a prompt. Raises RequestError."""
    try:
        check_lists(body, most_numbers)
        found = json.loads(body, parse_constant=_no_number)
        check_size(found)
        place = bad_text(found)
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply.") from None
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: byte {error.start} cannot be read.") from None
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError) and "digits" in str(error):
            longest = max(map(len, re.findall(rb"\d+", body)))
            error = ValueError(f"a number has {longest:,} digits; at most {sys.get_int_max_str_digits():,} are read")
        raise RequestError(400, f"the body is not JSON: {error}.") from None
    if place is not None:
        raise RequestError(400, f"{place[:200]}: not valid Unicode: it holds half of a character (a lone surrogate).")
    return found


def check_lists(body: bytes | bytearray, most_numbers: int) -> None:
    """Raise RequestError for more objects, lists and numbers than a request can have, before making them takes seconds."""
    most = MAX_VALUES + most_numbers
    if body.count(b"[") + body.count(b"{") > MAX_VALUES or body.count(b",") > most:
        bare = STRING.sub(b"", body)
        if bare.count(b"[") + bare.count(b"{") > MAX_VALUES:
            raise TOO_MANY
        if bare.count(b",") > most:
            raise RequestError(400, f"the body has more than {most:,} values, which this model's context cannot hold.")


def check_size(value: Any) -> None:
    """Raise RequestError for more than MAX_VALUES values. Those in lists of numbers are read fast, and not counted."""
    count, rest = 0, [value]
    while rest:
        value = rest.pop()
        if isinstance(value, list) and NUMBERS.issuperset(map(type, value)):
            continue
        count += len(value) if isinstance(value, (dict, list)) else 0
        if count > MAX_VALUES:
            raise TOO_MANY
        if isinstance(value, dict):
            rest += [item for item in value.values() if isinstance(item, (dict, list))]
        elif isinstance(value, list):
            rest += [item for item in value if isinstance(item, (dict, list))]


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
