"""What the batcher takes and what it tells: one `Job` per reply, and the events of a reply.

job = Job(prompt_ids, max_new_tokens=64, emit=print)      # emit gets Pieces of text, then one Done or Failed
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

from ...generation.generation import FinishReason, TokenStep
from ...generation.grammar import Grammar
from ...generation.sampling import Sampling
from ..chat_model import ChatModel


class BusyError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The server ends."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, with the tokens generated since the last piece."""

    text: str
    steps: tuple[TokenStep, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a reply. completion_tokens: generated ones, the stop id not among them.

    prompt_steps: the prompt's tokens after the first, where the job asked to score them; stop_step: the stop id, if one came.
    """

    finish_reason: FinishReason
    completion_tokens: int
    prompt_steps: tuple[TokenStep, ...] = ()
    stop_step: TokenStep | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The reply could not be finished. refused: because of what was asked, for example a grammar that leads nowhere."""

    kind: Literal["timeout", "error", "refused", "shutting_down"]
    message: str


Event = Piece | Done | Failed
ENDING = Failed("shutting_down", "the server is shutting down.")


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """One reply to make. emit is called on the batcher's thread and must not block."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    emit: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None  # of this job alone
    chat: ChatModel | None = None  # which of the batcher's models; None: its first
    keeps_special: bool = False  # special tokens stay in the text
    continues_prompt: bool = False  # the reply's text goes on with the prompt's, instead of beginning anew
    request: object = None  # jobs of one request share their turn; None: a request of its own
    deadline: float = float("inf")  # time.monotonic()
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Stop working on it; nothing more is emitted after the token in progress."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Nobody waits for the reply any more."""
        return self._cancelled.is_set()

    @property
    def turn(self) -> object:
        """Whose turn it takes."""
        return self if self.request is None else self.request


@dataclass(slots=True)
class Counts:
    """Totals since the start, for /metrics."""

    requests: int = 0
    refused: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0

    @classmethod
    def sum_of(cls, several: Iterable[Counts]) -> Counts:
        """All of them together."""
        return cls(*map(sum, zip(*(astuple(counts) for counts in several), strict=True)))
