"""Two classic corpora: Cornell Movie-Dialogs (`movie_conversations.txt` next to `movie_lines.txt`), Ubuntu Dialogue Corpus.

Cornell: fields separated by ` +++$+++ `, ISO-8859-1, a conversation is a list of line ids. Ubuntu: one TSV file per dialogue,
time, from, to, text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from chatmill.config import ConfigError

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.spill import Spill
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation

_FIELD = " +++$+++ "
_UBUNTU = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z\t[^\t\n]+\t[^\t\n]*\t")


def recognise(head: bytes, name: str) -> bool:
    """Cornell's separator, or Ubuntu's three leading columns."""
    first = head.split(b"\n")[0].decode("utf-8", "replace")
    return _FIELD in first or _UBUNTU.match(first) is not None


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues of the file; movie_lines.txt itself holds none."""
    if _FIELD.encode() in file.head(2000):
        yield from _cornell(file, options, source, ledger)
    else:
        yield from _ubuntu(file, options, source, ledger)


def _cornell(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    if "conversations" not in file.stem:
        ledger.change("file without conversations passed over", file.label)
        return
    lines_file = file.sibling("movie_lines.txt")
    if lines_file is None:
        raise ConfigError(f"{file.label}: movie_lines.txt must lie beside it")
    with Spill("CREATE TABLE said (line PRIMARY KEY, sender, text) WITHOUT ROWID") as db:
        for number, line in lines_file.text_lines("iso-8859-1", ledger):
            fields = line.rstrip("\r\n").split(_FIELD)
            if len(fields) == 5:
                db.execute("INSERT OR REPLACE INTO said VALUES (?, ?, ?)", (fields[0], fields[1], fields[4]))
            else:
                ledger.change("damaged line left out", f"{lines_file.label}:{number}: {line}")
        yield from _cornell_talks(db, file, options, source, ledger)


def _cornell_talks(db: Spill, file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    for number, line in file.text_lines("iso-8859-1", ledger):
        keys = re.findall(r"L\d+", line.rpartition(_FIELD)[2])
        found_lines = [(key, db.one("SELECT sender, text FROM said WHERE line = ?", (key,))) for key in keys]
        messages = [ChatMessage(said[0], said[1], key=key) for key, said in found_lines if said is not None]
        if len(messages) < len(keys):
            ledger.change("line without its text left out", f"{file.label}:{number}", len(keys) - len(messages))
        found = to_conversation(
            messages, source=source, origin=f"{file.label}:{number}", ledger=ledger, assistant=options.assistant
        )
        if found is not None:
            yield found


def _ubuntu(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    messages = []
    for number, line in file.text_lines(options.encoding, ledger):
        fields = line.rstrip("\r\n").split("\t", 3)
        if len(fields) != 4:
            ledger.change("damaged line left out", f"{file.label}:{number}: {line}")
            continue
        try:
            time = datetime.fromisoformat(fields[0].replace("Z", "+00:00")).timestamp()
        except ValueError:
            time = None
        messages.append(ChatMessage(fields[1], fields[3], time, str(number)))
    found = to_conversation(messages, source=source, origin=file.label, ledger=ledger, assistant=options.assistant)
    if found is not None:
        yield found
