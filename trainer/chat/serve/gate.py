"""Work that keeps Python's lock for long takes turns with the steps of the replies: one piece between two steps, none in one.

    gate = Gate()
    with gate.step(): ...               # the batcher's next token for every active reply
    gate.rest()                         # the batcher: no step follows for now
    with gate.piece(len(body)): ...     # elsewhere, for example json.loads of a large body

A step calls torch about a hundred times and needs the lock again after each call. A call in C that keeps it for 0.1 s
(json.loads of 660,000 numbers) could come in between every time: a queue of such bodies made a step of 20 ms last a second.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets one in at a time. most_between_steps: the most bytes of pieces between two steps of which the second one waited."""

    def __init__(self) -> None:
        self.most_between_steps = 0
        self._news = threading.Condition()
        self._inside = False
        self._is_resting = True
        self._is_pieces_turn = False
        self._pieces = 0  # that wait
        self._since_step = 0  # bytes

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wait until nobody is inside, and until one piece that waits has had its turn since the last step."""
        with self._news:
            self._news.wait_for(lambda: not self._inside and not (self._is_pieces_turn and self._pieces))
            self.most_between_steps = max(self.most_between_steps, self._since_step)
            self._inside, self._is_resting, self._since_step = True, False, 0
        try:
            yield
        finally:
            with self._news:
                self._inside, self._is_pieces_turn = False, True
                self._news.notify_all()

    def rest(self) -> None:
        """Pieces need not wait until the next step."""
        with self._news:
            if not self._is_resting:
                self._is_resting, self._since_step = True, 0
                self._news.notify_all()

    @contextmanager
    def piece(self, size: int) -> Iterator[None]:
        """Wait for the end of a step that no other piece has followed. size: bytes that are worked on."""
        with self._news:
            self._pieces += 1
            self._news.wait_for(lambda: not self._inside and (self._is_pieces_turn or self._is_resting))
            self._pieces -= 1
            self._inside, self._is_pieces_turn = True, False
        try:
            yield
        finally:
            with self._news:
                self._inside = False
                self._since_step += 0 if self._is_resting else size
                self._news.notify_all()
