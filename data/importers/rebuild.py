"""Cut an endless chat log into conversations: reply edges first, then threads, then silences.

    for group in rebuild(messages, gap_s=1800): ...

A message that answers a known one joins its conversation; a message of a thread joins the thread; any other joins the
conversation that was last active in the log, unless that has been silent for gap_s. Conversations come out in order of their
first message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from ..conversation import Conversation
from ..ledger import Ledger
from ..raw.files import RawFile
from ..raw.spill import Spill, key, packed, unpacked
from ..recipe import SourceSection
from .messages import ChatMessage, to_conversation

GAP_MINUTES = 30.0  # of silence end a conversation, unless sources.gap_minutes says otherwise
# A reply to a message older than this starts a new conversation, because the old one has already been yielded.
OPEN_S = 14 * 86_400.0


def rebuild(messages: Iterable[ChatMessage], gap_s: float) -> Iterator[list[ChatMessage]]:
    """Groups of messages, each in log order. Memory holds the conversations of the last two weeks of the log, no more."""
    groups: dict[int, list[ChatMessage]] = {}
    by_key: dict[str, int] = {}
    by_thread: dict[str, int] = {}
    last_time: dict[int, float | None] = {}
    current, fresh, oldest = -1, 0, 0  # conversations are numbered as they begin, and leave in this order
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
            while message.time is not None and oldest < home:
                last = last_time[oldest]
                if last is None or last >= message.time - max(OPEN_S, gap_s):
                    break
                for old in groups[oldest]:
                    by_key.pop(old.key, None)
                    if old.thread is not None:
                        by_thread.pop(old.thread, None)
                yield groups.pop(oldest)
                del last_time[oldest]
                oldest += 1
        groups[home].append(message)
        last_time[home] = message.time
        if message.key:
            by_key[message.key] = home
        if message.thread is not None:
            by_thread[message.thread] = home
        else:
            current = home
    yield from groups.values()


def conversations(
    messages: Iterable[ChatMessage],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
    channel: str = "",
    owner: str | None = None,
) -> Iterator[Conversation]:
    """Rebuilt conversations of one log with roles; origin is the key of their first message. owner: as in to_conversation."""
    merge_s = None if options.merge_minutes is None else options.merge_minutes * 60
    label = f"{file.label}/{channel}" if channel else file.label
    for group in rebuild(messages, (options.gap_minutes or GAP_MINUTES) * 60):
        found = to_conversation(
            group, source=source, origin=f"{label}:{group[0].key}", ledger=ledger, assistant=options.assistant, owner=owner,
            merge_s=merge_s, people=True,
        )  # fmt: skip
        if found is not None:
            yield found


# The chats in the order of their first messages; inside a chat by time, if all of it has times, else as they stand.
_IN_ORDER = """
    SELECT said.chat, said.entry FROM said JOIN (
        SELECT chat, MIN(rowid) AS first, COUNT(time) = COUNT(*) AS timed FROM said GROUP BY chat
    ) AS place ON place.chat = said.chat ORDER BY place.first, CASE WHEN place.timed THEN said.time END, said.rowid"""


def by_chat(messages: Iterable[tuple[str, ChatMessage]]) -> Iterator[tuple[str, Iterator[ChatMessage]]]:
    """(chat, its messages in order) of (chat, message) in any order, through a table on disk. Read each before the next."""
    with Spill("CREATE TABLE said (chat, time REAL, entry)") as db:
        for chat, message in messages:
            entry = (message.sender, message.text, message.time, message.key, message.reply_to, message.thread)
            db.execute("INSERT INTO said VALUES (?, ?, ?)", (key(chat), message.time, packed(*entry)))
        db.execute("CREATE INDEX by_chat ON said (chat)")
        for chat, rows in groupby(db.execute(_IN_ORDER), key=lambda row: row[0]):
            yield chat, (ChatMessage(*unpacked(entry)) for _, entry in rows)


def chats(
    messages: Iterable[tuple[str, ChatMessage]],
    file: RawFile,
    options: SourceSection,
    source: str,
    ledger: Ledger,
    owner: str | None = None,
) -> Iterator[Conversation]:
    """As `conversations`, of a file in which several chats stand, or whose messages are not in order of time."""
    for chat, log in by_chat(messages):
        yield from conversations(log, file, options, source, ledger, channel=chat, owner=owner)
