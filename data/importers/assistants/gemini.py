"""Gemini in Google Takeout, My Activity/Gemini Apps/MyActivity.json: one prompt and its answer per entry, the newest first.

    [{"header": "Gemini Apps", "title": "Prompted …", "time": …, "products": ["Gemini Apps"], "safeHtmlItem": [{"html": …}]}]

Takeout does not say which entries were one conversation, so each is a dialogue of two turns. The word before the prompt depends
on the account's language: where it is not a known one, it is what all titles of the file begin with.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from ...cleaning.html_text import html_to_text
from ...conversation import Conversation, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ..messengers.dated import seconds_of
from ..records import BadRecordError, Record, entry_of, read_records, text_of

_NAMES = ("gemini", "bard")
_VERB = re.compile(r"^(?:Prompted(?: with)?|Asked(?: Gemini| Bard)?|Said)(?:: ?|[ \u00a0])")
_TITLES_TRIED = 200
_ATTACHED = re.compile(r"(?<!\s)\s*\bAttached \d+ files?\.?\s*$")


def recognise(head: bytes, name: str) -> bool:
    """An activity of Gemini or Bard."""
    first = first_object(head)
    if first is None or "title" not in first or "time" not in first:
        return False
    return _is_gemini(first) or "gemini" in name.lower()


def _is_gemini(record: Record) -> bool:
    said = f"{record.get('header')} {record.get('products')}".lower()
    return any(word in said for word in _NAMES)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One dialogue per prompt that was answered."""
    reader = partial(_dialogue, _shared_beginning(file, options.encoding))
    yield from read_records(json_lines(file, options.encoding, ledger), reader, file, source, ledger)


def _shared_beginning(file: RawFile, encoding: str) -> str:
    """What all titles of Gemini begin with, up to a blank or colon; nothing if there are few."""
    titles: list[str] = []
    for _, record in json_lines(file, encoding, Ledger()):
        if record.get("safeHtmlItem") and isinstance(title := record.get("title"), str):
            titles.append(title)
        if len(titles) >= _TITLES_TRIED:
            break
    shared = os.path.commonprefix(titles) if len(titles) >= 5 else ""  # noqa: RUF071 (characters are meant)
    ends = [match.end() for match in re.finditer(r"[\s:：]+", shared)]
    return shared[: ends[-1]] if ends and ends[-1] <= 40 else ""


def _dialogue(beginning: str, record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    title = text_of(record.get("title"), "title")
    items = record.get("safeHtmlItem")
    if not _is_gemini(record) and (record.get("header") or record.get("products")):
        raise BadRecordError("activity of another product", f"{record.get('header')}: {title}")
    if not items:
        raise BadRecordError("activity without an answer", title)
    items = items if isinstance(items, list) else [items]
    answer = "\n\n".join(html_to_text(text_of(item.get("html") or item.get("htmlValue"))) for item in map(entry_of, items))
    prompt = _VERB.sub("", title, count=1) if _VERB.match(title) else title.removeprefix(beginning)
    if _ATTACHED.search(prompt):
        ledger.change("picture, sound or file left out of a message", f"{origin}: {prompt}")
        prompt = _ATTACHED.sub("", prompt)
    if not prompt.strip() or not answer.strip():
        raise BadRecordError("activity without a prompt or an answer", title)
    time = seconds_of(record.get("time"))
    return [Turn("user", prompt.strip(), time=time), Turn("assistant", answer.strip(), time=time)], {}
