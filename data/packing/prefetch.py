"""A thread that works ahead of its consumer, and ends with it.

    with Prefetcher(items, ahead=2) as ready:
        for item in ready: ...

The thread ends when the items do, when the block is left (break, exception, garbage collection of a generator), or when the
interpreter exits; an exception of the producer is raised in the consumer, after the items before it.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Shared(Generic[T]):
    """What producer and consumer share. Apart from the Prefetcher, so that the thread does not keep that alive."""

    def __init__(self, ahead: int) -> None:
        self.changed = threading.Condition()
        self.ready: deque[T] = deque()
        self.ahead = ahead
        self.stopped = False
        self.finished = False
        self.error: BaseException | None = None


class Prefetcher(Generic[T]):
    """Iterates `items`, up to `ahead` of them made early by a thread; ahead=0 iterates them in place."""

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items = items
        self._shared: _Shared[T] = _Shared(ahead)
        self._thread: threading.Thread | None = None
        if ahead > 0:
            self._thread = threading.Thread(target=_produce, args=(items, self._shared), name="chatmill-prefetch", daemon=True)
            self._thread.start()
            self._end = weakref.finalize(self, _stop, self._shared, self._thread)  # also at interpreter exit

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and wait for it."""
        if self._thread is not None:
            self._end()

    def __iter__(self) -> Iterator[T]:
        if self._thread is None:
            yield from self._items
            return
        shared = self._shared
        while True:
            with shared.changed:
                shared.changed.wait_for(lambda: shared.ready or shared.finished or shared.stopped)
                if not shared.ready:
                    if shared.error is not None:
                        raise shared.error
                    return
                item = shared.ready.popleft()
                shared.changed.notify_all()
            yield item


def _produce(items: Iterator[T], shared: _Shared[T]) -> None:
    try:
        for item in items:
            with shared.changed:
                shared.changed.wait_for(lambda: shared.stopped or len(shared.ready) < shared.ahead)
                if shared.stopped:
                    return
                shared.ready.append(item)
                shared.changed.notify_all()
            del item
    except BaseException as error:
        shared.error = error
    finally:
        with shared.changed:
            shared.finished = True
            shared.changed.notify_all()


def _stop(shared: _Shared[Any], thread: threading.Thread) -> None:
    with shared.changed:
        shared.stopped = True
        shared.ready.clear()
        shared.changed.notify_all()
    if thread is not threading.current_thread():
        thread.join()
