"""Dialogues as bare lists of texts whose speakers take turns: LCCC, KdConv, NaturalConv and their like.

    ["我 饿 了", "去 食 堂 吃 吧"]  ·  {"dialog": […]}  ·  {"messages": [{"message": …}, …]}  ·  {"content": […]}

The first speaker is the user, the other the assistant. Where every two Chinese characters have a blank between them (LCCC is
cut into words), the blanks are taken out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..records import BadRecordError, Record, read_records, text_of

_LISTS = ("dialog", "dialogue", "dialogs", "utterances", "turns", "messages", "conversation", "content")
_TEXTS = ("message", "text", "utterance", "content", "value")
_HAN = "[\u3005\u3007\u3400-\u9fff\uff00-\uffef\u3000-\u303f]"
_APART = re.compile(rf"(?<={_HAN}) +(?={_HAN})")
_TOGETHER = re.compile(rf"{_HAN}{_HAN}")


def recognise(head: bytes, name: str) -> bool:
    """A list of texts, or of objects with a text and no speaker."""
    first = first_object(head)
    return first is not None and _texts(first) is not None


def _texts(record: Record) -> list[Any] | None:
    for key in _LISTS:
        items = record.get(key)
        if not isinstance(items, list) or len(items) < 2:
            continue
        if all(isinstance(item, str) for item in items):
            return items
        if all(isinstance(item, dict) and not {"role", "from", "sender", "speaker", "author"} & set(item) for item in items):
            name = next((name for name in _TEXTS if all(isinstance(item.get(name), str) for item in items)), None)
            if name is not None:
                return [item[name] for item in items]
    return None


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per list."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    texts = _texts(record)
    if texts is None:
        raise BadRecordError("no list of two or more texts", sorted(record)[:8])
    texts = [text_of(text) for text in texts]
    whole = "\n".join(texts)
    if _APART.search(whole) and not _TOGETHER.search(whole):
        ledger.change("blanks between Chinese characters taken out", f"{origin}: {texts[0]}")
        texts = [_APART.sub("", text) for text in texts]
    kept: dict[str, Any] = {key: record[key] for key in ("id", "dialog_id", "name", "license") if key in record}
    return [Turn("user" if k % 2 == 0 else "assistant", text) for k, text in enumerate(texts)], kept
