"""Stack Exchange `Posts.xml`: a question and its accepted, or else its best-voted, answer.

Two streaming passes: the first keeps a few numbers per question, the second one the questions still waiting for their answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation, Turn, make_uid
from chatmill.data.html_text import html_to_text
from chatmill.data.importers.raw_file import RawFile
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection


def recognise(head: bytes, name: str) -> bool:
    """<posts> and rows with a PostTypeId."""
    return b"<posts" in head[:1000] and b"PostTypeId=" in head


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """One two-turn dialogue per answered question."""
    best: dict[str, tuple[int, str]] = {}
    accepted: dict[str, str] = {}
    for row in _rows(file):
        if row.get("PostTypeId") == "1" and row.get("AcceptedAnswerId"):
            accepted[row["Id"]] = row["AcceptedAnswerId"]
        elif row.get("PostTypeId") == "2":
            question, score = row.get("ParentId", ""), int(row.get("Score", "0"))
            if question not in best or score > best[question][0]:
                best[question] = (score, row["Id"])
    chosen = {question: answer for question, (_, answer) in best.items()} | {q: a for q, a in accepted.items() if q in best}
    waiting: dict[str, dict[str, str]] = {}
    for row in _rows(file):
        kind = row.get("PostTypeId")
        if kind == "1":
            if row["Id"] in chosen:
                waiting[row["Id"]] = row
            else:
                ledger.drop("question without an answer", f"{file.label}:{row['Id']}: {row.get('Title', '')}")
        elif kind == "2" and row["Id"] == chosen.get(row.get("ParentId", "")) and row["ParentId"] in waiting:
            ledger.keep()
            yield _dialogue(waiting.pop(row["ParentId"]), row, file, source)
        elif kind == "2":
            ledger.change("answer that is not the best left out", f"{file.label}:{row['Id']}")
    for number in waiting:
        ledger.drop("answer stands before its question", f"{file.label}:{number}")


def _dialogue(question: dict[str, str], answer: dict[str, str], file: RawFile, source: str) -> Conversation:
    origin = f"{file.label}:{question['Id']}"
    asked = f"{question.get('Title', '')}\n\n{html_to_text(question.get('Body', ''))}".strip()
    meta: dict[str, object] = {"score": int(answer.get("Score", "0")), "tags": question.get("Tags", ""), "answer": answer["Id"]}
    meta["authors"] = [a for a in (question.get("OwnerUserId"), answer.get("OwnerUserId")) if a]
    turns = (Turn("user", asked), Turn("assistant", html_to_text(answer.get("Body", ""))))
    return Conversation(make_uid(source, origin), turns, source, origin, meta)


def _rows(file: RawFile) -> Iterator[dict[str, str]]:
    with file.open() as raw:
        try:
            root = None
            for event, element in ElementTree.iterparse(raw, events=("start", "end")):
                if event == "start":
                    root = element if root is None else root
                elif element.tag == "row":
                    yield dict(element.attrib)
                    element.clear()
                    if root is not None:
                        root.clear()
        except ElementTree.ParseError as error:
            raise ConfigError(f"{file.label}: the XML is damaged or cut short ({error})") from error
