"""One thread that answers many requests: at every step all active replies get their next token together.

    batcher = Batcher(chat)         # or several that are adapters of one model: Batcher(base, one, other)
    batcher.submit(job)             raises BusyError when the queue is full; events arrive through job.emit
    job.cancel()                    the reply is dropped before its next token, and its cache with it

At most `max_active` replies get tokens at once; they join and leave between steps. Requests take turns: the next place goes to
the one that has the fewest, and of those to the one that has waited longest since it got one. Where
none is free, the request with the most gives one up, if it has two more: its newest reply pauses and keeps its cache. So a
request for 64 replies has the whole batch while it is alone, and delays nobody by a reply.
Several adapters on one base in memory take turns as one: a batch may have replies of all of them.
Each reply has its own cache and random generator: others affect it only through the rounding of a wider matrix product.

Prompts are read in stretches between the steps, so that a long prompt does not hold up other replies. When a conversation
continues, only the new turn is read (`chatmill.trainer.generation.prefix_store`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from chatmill.config import ConfigError

from ...generation.batched import joint_logits
from ...generation.generation import PREFILL_CHUNK, Generation, TokenStep
from ...generation.prefix_store import PrefixStore, is_out_of_memory
from ...generation.text_stream import TextStream
from ..chat_model import ChatModel
from .gate import Gate
from .jobs import ENDING, BusyError, ClosedError, Counts, Done, Failed, Job, Piece

STRETCH = 256  # tokens of prompts read per step while others get their replies
JOIN_S = 3.0  # for the step in progress when the server ends
IDLE_S = 0.5  # without a request, before what is idle is given back


@dataclass(slots=True, eq=False)
class _Active:
    job: Job
    steps: Generation
    text: TextStream
    held: list[TokenStep] = field(default_factory=list)


def _job(waiting: Job | _Active) -> Job:
    return waiting if isinstance(waiting, Job) else waiting.job


class Batcher:
    """Owns the model while it runs. close() ends the thread and fails whatever is unfinished.

    chats: with different names; several are variants of one model in memory, share the places and have counts of their own.
    keep_tokens: of finished replies, kept for the next turn (default: two full contexts). gate: where long pieces of other work
    take turns with the steps. on_idle: called on the thread, with submit() waiting, when there has been no work for IDLE_S.
    """

    def __init__(self, *chats: ChatModel, max_active: int = 8, max_waiting: int = 64, keep_tokens: int | None = None) -> None:
        self.chats, self.chat = chats, chats[0]
        assert all(chat.model is self.chat.model for chat in chats)
        self.max_active, self.max_waiting = max_active, max_waiting
        self.counts_of = {chat.name: Counts() for chat in chats}
        self.gate = Gate()
        self.on_idle: Callable[[], None] = lambda: None
        self._kept = PrefixStore(2 * self.chat.model.config.context if keep_tokens is None else keep_tokens)
        self._waiting: dict[int, deque[Job]] = {}  # of each request, by the id of its turn
        self._turns: WeakKeyDictionary[object, int] = WeakKeyDictionary()  # when a request came, or last got a place
        self._clock = itertools.count()
        self._active: list[_Active] = []
        self._paused: list[_Active] = []
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="chatmill-batcher", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        """Of all chats together."""
        return Counts.sum_of(self.counts_of.values())

    @property
    def load(self) -> tuple[int, int]:
        """(active, waiting) replies; one that pauses waits."""
        return len(self._active), sum(map(len, list(self._waiting.values()))) + len(self._paused)

    def load_of(self, chat: ChatModel) -> tuple[int, int]:
        """`load` of one of the chats."""
        waiting = [job for jobs in list(self._waiting.values()) for job in list(jobs)] + [a.job for a in list(self._paused)]
        active = [active.job for active in list(self._active)]
        return sum(self._chat_of(job) is chat for job in active), sum(self._chat_of(job) is chat for job in waiting)

    def _chat_of(self, job: Job) -> ChatModel:
        return job.chat or self.chat

    def _counts(self, job: Job) -> Counts:
        return self.counts_of[self._chat_of(job).name]

    def submit(self, job: Job) -> None:
        """Queue a job."""
        with self._news:
            if self._closed:
                raise ClosedError(ENDING.message)
            key = id(job.turn)
            if key not in self._waiting and len(self._waiting) >= self.max_waiting:
                self._drop_cancelled()
            if key not in self._waiting and len(self._waiting) >= self.max_waiting:
                self._counts(job).refused += 1
                raise BusyError(f"{self.max_waiting} requests are waiting already; try again later.")
            self._counts(job).requests += 1
            self._turns.setdefault(job.turn, next(self._clock))
            self._waiting.setdefault(key, deque()).append(job)
            self._news.notify()

    def _drop_cancelled(self) -> None:
        kept = {key: deque(job for job in jobs if not job.is_cancelled) for key, jobs in self._waiting.items()}
        self._waiting = {key: jobs for key, jobs in kept.items() if jobs}

    def close(self) -> None:
        """Stop; every unfinished job gets a Failed, at once: a step in progress may take long, and nobody waits for it."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._tell_the_end()
        self._thread.join(timeout=JOIN_S)

    def _tell_the_end(self) -> None:
        with self._news:
            started = [active.job for active in (*self._active, *self._paused)]
            for job in itertools.chain(started, *self._waiting.values()):
                if not job.is_cancelled:
                    job.cancel()
                    job.emit(ENDING)

    def _work(self) -> None:
        while True:
            with self._news:
                if not self._has_work():
                    self._rest()
                if self._closed:
                    break
            self._active = [active for active in self._active if not self._is_over(active.job)]
            self._paused = [active for active in self._paused if not self._is_over(active.job)]
            self._end_overdue()
            while (chosen := self._next_turn()) is not None:
                self._admit(chosen)
            with self.gate.step():
                self._active = self._advance(self._active)
        self.gate.rest()
        self._tell_the_end()
        self._active, self._paused = [], []
        self._waiting.clear()

    def _has_work(self) -> bool:
        return bool(self._waiting or self._active or self._paused or self._closed)

    def _rest(self) -> None:
        """Until there is work. on_idle is called once, after IDLE_S."""
        self.gate.rest()
        if not self._news.wait_for(self._has_work, IDLE_S):
            self.on_idle()
            self._news.wait_for(self._has_work)

    def _next_turn(self) -> Job | _Active | None:
        """Take what gets a place now out of its queue, having made room; None where nobody waits or all have their share."""
        with self._news:
            held = Counter(id(active.job.turn) for active in self._active)
            queue: list[Job | _Active] = [*self._paused, *(jobs[0] for jobs in self._waiting.values())]
            if not queue:
                return None
            chosen = min(queue, key=lambda waiting: self._turn(waiting, held))
            turn = _job(chosen).turn
            if len(self._active) >= self.max_active:
                most = max(held.values())
                if most - held[id(turn)] < 2 or len(self._paused) >= self.max_active:
                    return None
                newest = next(a for a in reversed(self._active) if held[id(a.job.turn)] == most)
                self._active.remove(newest)
                self._paused.append(newest)
            if isinstance(chosen, Job):
                jobs = self._waiting[id(turn)]
                jobs.popleft()
                if not jobs:
                    del self._waiting[id(turn)]
            else:
                self._paused.remove(chosen)
            self._turns[turn] = next(self._clock)
            return chosen

    def _turn(self, waiting: Job | _Active, held: Counter[int]) -> tuple[int, int]:
        """Who has the fewest places comes first; of equals, who has waited longest since it got one."""
        turn = _job(waiting).turn
        return held[id(turn)], self._turns[turn]

    def _end_overdue(self) -> None:
        """End what waits past its time: its place may be far."""
        with self._news:
            for key, jobs in list(self._waiting.items()):
                while jobs and self._is_over(jobs[0]):
                    jobs.popleft()
                if not jobs:
                    del self._waiting[key]

    def _admit(self, chosen: Job | _Active) -> None:
        if isinstance(chosen, _Active):
            self._active.append(chosen)
            return
        job = chosen
        if self._is_over(job):
            return
        chat, counts = self._chat_of(job), self._counts(job)
        try:
            steps = Generation(
                chat.model,
                job.prompt_ids,
                max_new_tokens=job.max_new_tokens,
                sampling=job.sampling,
                stop_ids=chat.tokenizer.stop_ids,
                seed=job.seed,
                logprobs=job.logprobs,
                prompt_logprobs=job.prompt_logprobs,
                grammar=job.grammar,
                variant=chat.variant,
            )
            counts.reused_tokens += self._kept.lend(steps)
            text = TextStream(
                chat.tokenizer,
                job.stop_strings,
                min_tokens=job.sampling.min_tokens,
                skip_special=not job.keeps_special,
                before=job.prompt_ids if job.continues_prompt else (),
            )
            self._active.append(_Active(job, steps, text))
            counts.prompt_tokens += len(job.prompt_ids)
        except Exception as error:  # one bad request must not end the thread that serves all others
            self._fail(job, error)

    def _advance(self, group: list[_Active]) -> list[_Active]:
        """One token for each reply; returns the unfinished ones. An error ends the reply that it concerns, not the server."""
        try:
            rows = joint_logits(self.chat.model, [active.steps for active in group])
        except Exception:  # for example out of memory: one by one, only the reply at fault ends
            rows = {}
        shares = shares_of_prompts([len(active.steps.pending) for active in group])
        unfinished = []
        for i, active in enumerate(group):
            try:
                if i in rows:
                    step = active.steps.accept(rows[i])
                elif len(active.steps.pending) > 1:
                    logits = active.steps.read_some(shares[i]) if shares[i] else None
                    if logits is None:
                        unfinished.append(active)
                        continue
                    step = active.steps.accept(logits)
                else:
                    step = next(active.steps, None)
                if self._take(active, step):
                    unfinished.append(active)
            except Exception as error:
                self._fail(active.job, error)
        return unfinished

    def _take(self, active: _Active, step: TokenStep | None) -> bool:
        """Pass a token on; False when the reply is over."""
        if step is None:
            return self._finish(active)
        self._counts(active.job).generated_tokens += 1
        active.held.append(step)
        text = active.text.push(step.id)
        if active.text.stopped:
            active.steps.stop()
            return self._finish(active, text)
        if text:
            active.job.emit(Piece(text, tuple(active.held)))
            active.held.clear()
        return True

    def _finish(self, active: _Active, text: str = "") -> bool:
        text += active.text.finish()
        if text or active.held:
            active.job.emit(Piece(text, tuple(active.held)))
        assert active.steps.finish_reason is not None
        self._counts(active.job).finished += 1
        steps = active.steps
        self._kept.keep(steps)
        active.job.emit(Done(active.steps.finish_reason, len(steps.ids), tuple(steps.prompt_steps), steps.stop_step))
        return False

    def _is_over(self, job: Job) -> bool:
        if job.is_cancelled:
            self._counts(job).cancelled += 1
            return True
        if time.monotonic() > job.deadline:
            self._counts(job).failed += 1
            job.emit(Failed("timeout", "the reply took longer than the server allows."))
            return True
        return False

    def _fail(self, job: Job, error: Exception) -> None:
        self._counts(job).failed += 1
        if isinstance(error, ConfigError):
            job.emit(Failed("refused", str(error)))
            return
        if is_out_of_memory(error):
            self._kept.clear()
        job.emit(Failed("error", f"{type(error).__name__}: {error}"))


def shares_of_prompts(pending: Sequence[int]) -> list[int]:
    """Tokens that each reply may read in one step, first come first served; pending: what each has not read yet.

    One pending token is a reply in progress: beside such, prompts get STRETCH tokens together, else PREFILL_CHUNK.
    """
    room = STRETCH if 1 in pending else PREFILL_CHUNK
    shares = []
    for count in pending:
        share = min(room, count) if count > 1 else 0
        shares.append(share)
        room -= share
    return shares
