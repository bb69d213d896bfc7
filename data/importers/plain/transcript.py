"""Plain transcripts: `Ann: hello`, one speaker per paragraph; a line of ---, === or *** separates dialogues.

Lines without a speaker, or with one who never speaks again, continue the turn above. Speakers called User, Human, Q … and
Assistant, AI, Bot, A … have those roles; otherwise the role rule of chats applies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ...conversation import Conversation, Role, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage, to_conversation

_SAID = re.compile(r"^([^\W\d][^:\n\t]{0,38}):(?:\s(.*)|)$", re.S)
_RULE = re.compile(r"^\s*([-=*])(\s*\1){2,}\s*$")
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("user", "human", "q", "question", "customer", "client"), "user"),
    **dict.fromkeys(("assistant", "ai", "bot", "a", "answer", "agent", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("system",), "system"),
}


def recognise(head: bytes, name: str) -> bool:
    """At least four turns by at most a dozen speakers, who speak repeatedly."""
    if not name.lower().endswith((".txt", ".md", ".text", ".log")):
        return False
    lines = [line for line in head.decode("utf-8", "ignore").splitlines()[:400] if line.strip() and not _RULE.match(line)]
    names = [match[1] for match in map(_SAID.match, lines) if match]
    return bool(lines) and _SAID.match(lines[0]) is not None and len(names) >= 4 and len(set(names)) <= min(12, len(names) // 2)


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues of the file."""
    said: list[ChatMessage] = []
    known = _speakers(file, options.encoding)
    with file.text(options.encoding) as text:
        for number, line in enumerate(text, 1):
            line = line.rstrip("\r\n")
            found = _SAID.match(line)
            if _RULE.match(line):
                yield from _finish(said, file, options, source, ledger)
                said = []
            elif found and found[1].strip() in known:
                said.append(ChatMessage(found[1].strip(), found[2] or "", key=str(number)))
            elif said:
                said[-1] = ChatMessage(said[-1].sender, f"{said[-1].text}\n{line}", key=said[-1].key)
            elif line.strip():
                ledger.change("line before the first speaker left out", f"{file.label}:{number}: {line}")
    yield from _finish(said, file, options, source, ledger)


def _speakers(file: RawFile, encoding: str) -> set[str]:
    """Names that open a line twice or more; all of them where fewer than two do. `Note: …` inside a turn is not a speaker."""
    with file.text(encoding) as text:
        counts = Counter(found[1].strip() for found in map(_SAID.match, text) if found)
    often = {name for name, count in counts.items() if count >= 2}
    return often if len(often) >= 2 else set(counts)


def _finish(
    said: list[ChatMessage], file: RawFile, options: SourceSection, source: str, ledger: Ledger
) -> Iterator[Conversation]:
    if not said:
        return
    said = [ChatMessage(m.sender, m.text.strip("\n"), key=m.key) for m in said]
    origin = f"{file.label}:{said[0].key}"
    if options.assistant is None and all(m.sender.lower() in _ROLES for m in said):
        turns = tuple(Turn(_ROLES[m.sender.lower()], m.text) for m in said)
        ledger.keep()
        yield Conversation(make_uid(source, origin), turns, source, origin, {})
        return
    found = to_conversation(said, source=source, origin=origin, ledger=ledger, assistant=options.assistant)
    if found is not None:
        yield found
