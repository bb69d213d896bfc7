"""Dialogues of numbered records, one JSON object or table row each. A bad record is counted and passed over, never an error.

for conversation in read_records(records, reader, file, source, ledger): ...
for message in read_messages(entries, reader, file, ledger): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from chatmill.config import ConfigError

from ..conversation import Conversation, Turn, make_uid
from ..ledger import Ledger
from ..raw.files import RawFile
from ..raw.json_lines import Place
from .messages import ChatMessage
from .unread import Unread

Record = dict[str, Any]
# What reading a value of an unexpected type or size raises: null for a number, a text for a list, 1e999 for a time.
MALFORMED = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)


class BadRecordError(ValueError):
    """A record that is not a dialogue. reason: what is counted; detail: what the example in the report shows."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# (record, its origin, ledger) -> turns and meta. Raises BadRecordError.
Reader = Callable[[Record, str, Ledger], tuple[Sequence[Turn], Mapping[str, Any]]]


def why_bad(error: Exception) -> tuple[str, str]:
    """(what is counted, what the example shows) of a record that could not be read. Raises ConfigError again, as it is."""
    if isinstance(error, ConfigError):
        raise error
    if isinstance(error, BadRecordError):
        return error.reason, str(error.detail)
    return "bad record", f"{type(error).__name__}: {error}"


def read_records(
    records: Iterable[tuple[Place, Record]], reader: Reader, file: RawFile, source: str, ledger: Ledger, apart: str = ""
) -> Iterator[Conversation]:
    """One conversation per record. apart: a field whose texts the reader itself counts where they are not used."""
    unread = Unread(ledger, apart)
    for number, record in records:
        origin = f"{file.label}:{number}"
        noted = Ledger()  # what a record changed counts only if the record stays
        try:
            turns, meta = reader(record, origin, noted)
        except MALFORMED as error:
            reason, detail = why_bad(error)
            ledger.drop(reason, f"{origin}: {detail}")
            continue
        ledger.add(noted)
        ledger.keep()
        if not unread.is_known(record):
            unread.note(record, [turn.content for turn in turns], origin, (meta, [turn.reasoning for turn in turns]))
        yield Conversation(make_uid(source, origin), tuple(turns), source, origin, meta)


def read_messages(
    entries: Iterable[Any],
    reader: Callable[[Record], ChatMessage | str],
    file: RawFile,
    ledger: Ledger,
    unread: Unread | None = None,
) -> Iterator[ChatMessage]:
    """What `reader` makes of every entry of a chat. A text says why one is left out, and so does whatever is wrong with it.

    unread: of the chats of the same form that were read before, so that what their fields are is known.
    """
    unread = unread or Unread(ledger)
    unread.ledger = ledger
    for number, entry in enumerate(entries, 1):
        detail = ""
        try:
            found = reader(entry_of(entry))
            if not isinstance(found, str):
                text_of(found.text)
        except MALFORMED as error:
            bad, detail = why_bad(error)
            found = f"{bad} left out"
        if isinstance(found, str):
            key = entry.get("id", number) if isinstance(entry, dict) else number
            ledger.change(found, f"{file.label}:{key}: {detail}")
        else:
            if not unread.is_known(entry):
                unread.note(entry, (found.text,), f"{file.label}:{number}")
            yield found


def entry_of(value: Any) -> Record:
    """A JSON value as an object. Raises BadRecordError for anything else."""
    if not isinstance(value, dict):
        raise BadRecordError("not a JSON object", type(value).__name__)
    return value


def text_of(value: Any, what: str = "text") -> str:
    """A JSON value as a text. Raises BadRecordError for anything else."""
    if not isinstance(value, str):
        raise BadRecordError(f"{what} is not a text", type(value).__name__)
    return value
