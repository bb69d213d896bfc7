"""Cut an endless chat log into conversations: reply edges first, then threads, then silences.

    for group in rebuild(messages, gap_s=1800): ...

A message that answers a known one joins its conversation; a message of a thread joins the thread; any other joins the
conversation that was last active in the log, unless that has been silent for gap_s. Conversations come out in order of their
first message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..conversation import Conversation
from ..ledger import Ledger
from ..raw.files import RawFile
from ..recipe import SourceSection
from .messages import ChatMessage, to_conversation

# A reply to a message older than this starts a new conversation, because the old one has already been yielded.
OPEN_S = 14 * 86_400.0


def rebuild(messages: Iterable[ChatMessage], gap_s: float) -> Iterator[list[ChatMessage]]:
    """Groups of messages, each in log order. Memory holds the conversations of the last two weeks of the log, no more."""
    groups: dict[int, list[ChatMessage]] = {}
    by_key: dict[str, int] = {}
    by_thread: dict[str, int] = {}
    last_time: dict[int, float | None] = {}
    current, fresh = -1, 0
    for message in messages:
        home = -1
        if message.reply_to is not None:
            home = by_key.get(message.reply_to, -1)
        if home not in groups and message.thread is not None:
            home = by_thread.get(message.thread, -1)
        if home not in groups and message.thread is None and current in groups:
            before = last_time[current]
            near = message.time is None or before is None or message.time - before <= gap_s
            home = current if near else -1
        if home not in groups:
            home, fresh = fresh, fresh + 1
            groups[home] = []
            if message.time is not None:
                yield from _retire(groups, by_key, by_thread, last_time, message.time - max(OPEN_S, gap_s))
        groups[home].append(message)
        last_time[home] = message.time
        if message.key:
            by_key[message.key] = home
        if message.thread is not None:
            by_thread[message.thread] = home
        else:
            current = home
    yield from (groups[home] for home in sorted(groups))


def _retire(
    groups: dict[int, list[ChatMessage]],
    by_key: dict[str, int],
    by_thread: dict[str, int],
    last_time: dict[int, float | None],
    before: float,
) -> Iterator[list[ChatMessage]]:
    """Yield the leading conversations that have been silent since `before`."""
    for home in sorted(groups):
        last = last_time.get(home)
        if last is None or last >= before or not groups[home]:
            return
        for message in groups[home]:
            by_key.pop(message.key, None)
            if message.thread is not None:
                by_thread.pop(message.thread, None)
        yield groups.pop(home)
        last_time.pop(home)


def conversations(
    messages: Iterable[ChatMessage], file: RawFile, options: SourceSection, source: str, ledger: Ledger, channel: str = ""
) -> Iterator[Conversation]:
    """Rebuilt conversations of one log with roles; origin is the key of their first message."""
    merge_s = None if options.merge_minutes is None else options.merge_minutes * 60
    label = f"{file.label}/{channel}" if channel else file.label
    for group in rebuild(messages, options.gap_minutes * 60):
        found = to_conversation(
            group, source=source, origin=f"{label}:{group[0].key}", ledger=ledger, assistant=options.assistant, merge_s=merge_s
        )
        if found is not None:
            yield found
