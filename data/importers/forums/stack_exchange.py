"""Stack Exchange `Posts.xml`: a question and its accepted, or else its best-voted, answer.

Two streaming passes: the first keeps a few numbers per question, the second keeps the questions that still wait for their
answer, both in tables on disk (spill.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from chatmill.config import ConfigError

from ...cleaning.html_text import html_to_text
from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import RECORD_CHARS, TOO_LONG
from ...raw.spill import Spill, packed, unpacked
from ...recipe import SourceSection
from ..unread import Unread

PIECE_BYTES = 1 << 20
_DEPTH = 100


def recognise(head: bytes, name: str) -> bool:
    """<posts> and rows with a PostTypeId."""
    return b"<posts" in head[:1000] and b"PostTypeId=" in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One two-turn dialogue per answered question, in the order of the answers."""
    unread = Unread(ledger)
    with Spill(*_TABLES) as db:
        for row in _rows(file):
            if row.get("PostTypeId") == "1" and row.get("AcceptedAnswerId"):
                db.execute("INSERT OR REPLACE INTO accepted VALUES (?, ?)", (row.get("Id", ""), row["AcceptedAnswerId"]))
            elif row.get("PostTypeId") == "2":
                db.execute("INSERT INTO answers VALUES (?, ?, ?)", (row.get("ParentId", ""), _score(row), row.get("Id", "")))
        for statement in _CHOOSE:
            db.execute(statement)
        for row in _rows(file):
            kind = row.get("PostTypeId")
            if kind in ("1", "2") and not row.get("Id"):
                ledger.drop("row without an Id", f"{file.label}: {row.get('Title') or row.get('Body', '')}")
            elif kind == "1":
                if db.one("SELECT 1 FROM chosen WHERE question = ?", (row["Id"],)):
                    db.execute("INSERT OR REPLACE INTO waiting VALUES (?, ?)", (row["Id"], packed(row)))
                else:
                    ledger.drop("question without an answer", f"{file.label}:{row['Id']}: {row.get('Title', '')}")
            elif kind == "2":
                asked = db.one(
                    "SELECT waiting.entry FROM chosen JOIN waiting ON waiting.question = chosen.question "
                    "WHERE chosen.question = ? AND chosen.answer = ?",
                    (row.get("ParentId", ""), row["Id"]),
                )
                if asked is None:
                    ledger.change("answer that is not the best left out", f"{file.label}:{row['Id']}")
                    continue
                db.execute("DELETE FROM waiting WHERE question = ?", (row.get("ParentId", ""),))
                ledger.keep()
                question = unpacked(asked[0])[0]
                found = _dialogue(question, row, file, source)
                for turn, read_row in zip(found.turns, (question, row), strict=True):
                    if not unread.is_known(read_row):
                        unread.note(read_row, (turn.content,), found.origin)
                yield found
        for (number,) in db.execute("SELECT question FROM waiting ORDER BY rowid"):
            ledger.drop("answer stands before its question", f"{file.label}:{number}")


_TABLES = (
    "CREATE TABLE accepted (question PRIMARY KEY, answer) WITHOUT ROWID",
    "CREATE TABLE answers (question, score INTEGER, answer)",
    "CREATE TABLE chosen (question PRIMARY KEY, answer) WITHOUT ROWID",
    "CREATE TABLE waiting (question PRIMARY KEY, entry)",
)
# The best-voted answer, the first of equals; then the accepted one, where the question has any answer in the file.
_CHOOSE = (
    "CREATE INDEX best ON answers (question, score DESC)",
    "INSERT OR IGNORE INTO chosen SELECT question, answer FROM answers ORDER BY question, score DESC, rowid",
    "UPDATE chosen SET answer = (SELECT answer FROM accepted WHERE accepted.question = chosen.question) "
    "WHERE question IN (SELECT question FROM accepted)",
)


def _dialogue(question: dict[str, str], answer: dict[str, str], file: RawFile, source: str) -> Conversation:
    origin = f"{file.label}:{question['Id']}"
    asked = f"{question.get('Title', '')}\n\n{html_to_text(question.get('Body', ''))}".strip()
    meta: dict[str, object] = {"score": _score(answer), "tags": question.get("Tags", ""), "answer": answer["Id"]}
    meta["authors"] = [a for a in (question.get("OwnerUserId"), answer.get("OwnerUserId")) if a]
    turns = (Turn("user", asked), Turn("assistant", html_to_text(answer.get("Body", ""))))
    return Conversation(make_uid(source, origin), turns, source, origin, meta)


def _score(row: dict[str, str]) -> int:
    try:
        return max(-(2**62), min(2**62, int(row.get("Score") or "0")))
    except ValueError:
        return 0


def _rows(file: RawFile) -> Iterator[dict[str, str]]:
    with file.open() as raw:
        parser: Any = ElementTree.XMLPullParser(("start", "end"))
        open_ones: list[Any] = []
        unread = 0  # bytes since an element began or ended
        try:
            while piece := raw.read(PIECE_BYTES):
                parser.feed(piece)
                unread += len(piece)
                for event, element in parser.read_events():
                    unread = 0
                    if event == "start":
                        open_ones.append(element)
                        if len(open_ones) > _DEPTH:
                            raise ValueError(f"more than {_DEPTH} elements in each other")
                        continue
                    open_ones.pop()
                    if element.tag == "row":
                        yield dict(element.attrib)
                    element.clear()
                    if open_ones:
                        open_ones[-1].clear()
                if unread > RECORD_CHARS:
                    raise ValueError(f"an element {TOO_LONG}")
            parser.close()
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # also an encoding that nobody knows
            raise ConfigError(f"{file.label}: the XML is damaged or cut short ({error})") from error
