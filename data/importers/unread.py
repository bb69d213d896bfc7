"""Text in fields that no importer reads: what a record says beside what was made of it is counted, by the name of the field.

    unread = Unread(ledger)                                # of one file
    if not unread.is_known(record):
        unread.note(record, said, origin)                  # said: the texts that were kept of the record

A text is 24 characters or more of words with blanks, or of Chinese, Japanese or Korean. A record's own fields are looked at,
and those one level deeper: of an object, of a list of texts, and of the objects of a list, where a field that is kept of one
object is taken as read. A text was kept if all of it, or a stretch from its beginning, middle or end, stands in what was said;
so an importer may cut, join and clean. METADATA are names of fields that describe a record and are not said.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ..ledger import Ledger

LONG = 24  # characters
JUDGED_BY = 200  # characters of a text, whether it is of words
LOOKED_AT = 1000  # characters of a text's beginning, middle and end that are searched for
LEARNT, EVERY = 16, 256  # records
MOST_FIELDS = 16  # texts of one record that are searched for; more count as not used
MOST_STRETCHES = 4  # of each of these
OTHERS = "others"
MOST_NAMES = 50  # of fields, that are counted apart in one file
METADATA = frozenset((
    "id", "uid", "uuid", "key", "name", "title", "subject", "topic", "category", "categories", "source", "sources",
    "origin", "url", "link", "license", "license_text", "copyright", "citation", "model", "model_slug", "dataset",
    "data_source", "tags", "labels", "meta", "metadata", "author", "authors", "user", "username", "link_title",
    "path", "file", "filename", "file_name", "filepath", "created_at", "updated_at", "create_time", "update_time",
    "date", "time", "timestamp", "lang", "language", "version",
))  # fmt: skip
_WORD = re.compile(r"[^\W\d_]{2,}")
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_EAST = re.compile(f"[{_CJK}]")
_STRETCH = re.compile(rf"[{_CJK}]{{5,}}|[^\W_{_CJK}](?:[^\W_]|[ ,'’](?=\w)){{10,}}")
_BLANKS = re.compile(r"\s+")


class Unread:
    """Counts for one file, in its ledger.

    A name of a field is known after LEARNT records in which nothing of it was lost. Of records with known names alone, one in
    EVERY is looked at. So a new name is always looked at, and one whose texts are lost is counted every time.
    ledger: may be changed, to that of the record that is being read. apart: a field whose values are looked at by themselves,
    an object of messages by their ids.
    """

    def __init__(self, ledger: Ledger, apart: str = "") -> None:
        self.ledger, self._apart = ledger, apart
        self._records = 0
        self._seen: dict[str, Counter[str]] = {"": Counter()}  # records with a name, by the field that it is inside of
        self._own = set[str]()
        self._always = list[str]()  # fields of the record itself of which nothing was ever kept
        self._known: dict[str, set[str]] = {"": self._own}
        self._inner: list[tuple[str, set[str]]] = []
        self._read = Counter[str]()
        self._lost = Counter[str]()

    def note(self, record: Mapping[str, Any], said: Sequence[str], origin: str, kept: Iterable[Any] = ()) -> None:
        """Count the texts of a record that are in none of the texts said. kept: more values of which texts were kept."""
        exact: set[str] | None = None
        joined, searched, told = "", 0, set[str]()
        if self._apart in record:
            record = {**record, self._apart: None}
        for name, text, is_in_list in _texts(record):
            if name in told or (is_in_list and self._read[name]) or not is_prose(text):
                continue
            if exact is None:
                exact = {*said, *_strings(kept)}
            if text not in exact:
                if self._read[name] or self._lost[name] < LEARNT:
                    searched += 1
                    joined = joined or _bare(" ".join(exact))
                if searched > MOST_FIELDS:
                    self._count(OTHERS, origin, text)
                    break
                if (not self._read[name] and self._lost[name] >= LEARNT) or not _stands_in(text, joined):
                    told.add(name)
                    self._count(name, origin, text)
                    continue
            self._read[name] += 1
        self._learn(record)

    def is_known(self, record: Mapping[str, Any]) -> bool:
        """Whether the record need not be looked at. Asked of every record, so all of it is done in C."""
        self._records += 1
        if not self._records % EVERY or not self._own.issuperset(record):
            return False
        for key, known in self._inner:
            value = record.get(key)
            if type(value) is dict:
                if not known.issuperset(value):
                    return False
            elif value and type(value) is list and type(value[0]) is dict:
                try:
                    if not known.issuperset(chain.from_iterable(value)):
                        return False
                except TypeError:  # not all are objects
                    return False
        for name in self._always:
            text = record.get(name)
            if type(text) is str and is_prose(text):
                self.ledger.change(f"text in a field that is not used: {name}")
        return True

    def _learn(self, record: Mapping[str, Any]) -> None:
        self._learn_names("", record)
        for key, value in record.items():
            if key in METADATA:
                continue
            if isinstance(value, dict):
                self._learn_names(key, value)
            elif isinstance(value, list):
                for item in value[:LEARNT]:
                    if isinstance(item, dict):
                        self._learn_names(key, item)

    def _learn_names(self, inside: str, names: Iterable[str]) -> None:
        if inside not in self._seen:
            if len(self._seen) > MOST_NAMES:
                return
            self._seen[inside], self._known[inside] = Counter(), set()
            self._inner = [(key, known) for key, known in self._known.items() if key]
        seen, known = self._seen[inside], self._known[inside]
        for name in names:
            if name not in known and (name in seen or len(seen) < 4 * MOST_NAMES):
                seen[name] += 1
                if seen[name] >= LEARNT and not self._lost[_path(inside, name)] and not self._lost[_path(inside, "*", name)]:
                    known.add(name)

    def _count(self, name: str, origin: str, text: str) -> None:
        if f"field of a message not used: {name.rpartition('.')[2]}" in self.ledger.changed:  # the importer has counted it
            return
        if name not in self._lost and len(self._lost) >= MOST_NAMES:
            name = OTHERS
        self._lost[name] += 1
        if self._lost[name] == LEARNT and not self._read[name] and name in self._seen[""]:
            self._own.add(name)
            self._always.append(name)
        self.ledger.change(f"text in a field that is not used: {name}", f"{origin}: {text}")


def _path(*names: str) -> str:
    return ".".join(name[:40] for name in names if name)


def _texts(record: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """(name, text, whether it is of an object in a list) of all texts that are long enough."""
    for key, value in record.items():
        if isinstance(value, str):
            if len(value) >= LONG and key not in METADATA:
                yield key[:40], value, False
        elif isinstance(value, dict):
            if key not in METADATA:
                for inner, text in value.items():
                    if isinstance(text, str) and len(text) >= LONG and inner not in METADATA:
                        yield _path(key, inner), text, False
        elif isinstance(value, list) and key not in METADATA:
            for item in value:
                if isinstance(item, str):
                    if len(item) >= LONG:
                        yield key[:40], item, True
                elif isinstance(item, dict):
                    for inner, text in item.items():
                        if isinstance(text, str) and len(text) >= LONG and inner not in METADATA:
                            yield _path(key, "*", inner), text, True


def is_prose(text: str) -> bool:
    """Whether a text is of words: no address, number, date, hash, code of JSON."""
    head = text[:JUDGED_BY].lstrip()
    if len(head) < LONG or head.startswith(("{", "[", "<", "&lt;")):
        return False
    if not head.isascii() and len(_EAST.findall(head)) * 2 >= LONG:
        return True
    return head.count(" ") >= 3 and len(_WORD.findall(head)) >= 4


def _stands_in(text: str, joined: str) -> bool:
    """Whether the text, or a stretch at its beginning, in its middle or at its end, stands in what was said."""
    bare = _bare(text)
    if bare in joined:
        return True
    for at in (0, max(0, len(bare) // 2 - LOOKED_AT // 2), max(0, len(bare) - LOOKED_AT)):
        stretches = sorted(_STRETCH.findall(bare[at : at + LOOKED_AT]), key=len)[-MOST_STRETCHES:]
        if any(stretch in joined for stretch in stretches):
            return True
    return False


def _bare(text: str) -> str:
    return _BLANKS.sub(" ", html.unescape(text)).strip()


def _strings(values: Iterable[Any]) -> Iterator[str]:
    """All texts in JSON values."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple)):
            waiting += value
