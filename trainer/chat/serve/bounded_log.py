"""Keeps a log from growing without end: of each kind of message, few are written per minute, and how many were left out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

PER_MINUTE = 5
MOST_KINDS = 100  # further ones count as one
LOGGERS = ("asyncio", "uvicorn.error")


class Bounded(logging.Filter):
    """Passes `PER_MINUTE` messages of a kind: of one logger and one text before its values are filled in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock, self._lock = clock, threading.Lock()
        self._kinds: dict[tuple[str, str], tuple[float, int]] = {}  # (beginning of its minute, messages in it)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it. The first message of a new minute tells how many were left out."""
        with self._lock:
            failure = type(record.exc_info[1]).__name__ if record.exc_info else ""
            kind = (record.name, str(record.msg).partition("\n")[0][:200] + failure)
            if kind not in self._kinds and len(self._kinds) >= MOST_KINDS:
                kind = (record.name, "")
            now = self._clock()
            start, count = self._kinds.get(kind, (now, 0))
            if now - start >= 60:
                if count > PER_MINUTE:
                    record.msg = f"{record.msg} ({count - PER_MINUTE:,} more like the last ones were not written)"
                start, count = now, 0
            self._kinds[kind] = (start, count + 1)
            return count < PER_MINUTE


def bound_logs() -> None:
    """Bound what the server and the event loop write."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(found, Bounded) for found in logger.filters):
            logger.addFilter(Bounded())
