"""Dialogues of numbered records, one JSON object or table row each. A bad record is counted and passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..conversation import Conversation, Turn, make_uid
from ..ledger import Ledger
from ..raw.files import RawFile

Record = dict[str, Any]


class BadRecordError(ValueError):
    """A record that is not a dialogue. reason: what is counted; detail: what the example in the report shows."""

    def __init__(self, reason: str, detail: object) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# (record, its origin, ledger) -> turns and meta. Raises BadRecordError.
Reader = Callable[[Record, str, Ledger], tuple[Sequence[Turn], Mapping[str, Any]]]


def read_records(
    records: Iterable[tuple[int, Record]], reader: Reader, file: RawFile, source: str, ledger: Ledger
) -> Iterator[Conversation]:
    """One conversation per record."""
    for number, record in records:
        origin = f"{file.label}:{number}"
        try:
            turns, meta = reader(record, origin, ledger)
        except BadRecordError as error:
            ledger.drop(error.reason, f"{origin}: {error.detail}")
            continue
        ledger.keep()
        yield Conversation(make_uid(source, origin), tuple(turns), source, origin, meta)
