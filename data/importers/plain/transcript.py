"""Plain transcripts: `Ann: hello`, `小明：你好`, one speaker per paragraph; a line of ---, === or *** separates dialogues.

Lines without a speaker, or with one who never speaks again, continue the turn above. Speakers called User, Human, Q, 用户 …
and Assistant, AI, Bot, A, 助手, 客服 … have those roles; otherwise the role rule of chats applies. A `.conv` file
(Xiaohuangji 小黄鸡) has `E` above each dialogue and `M text` for its turns, the user's first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from ...cleaning.placeholders import placeholder
from ...conversation import Conversation, Turn, make_uid
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import MessageLines
from ...recipe import SourceSection
from ..labels import role_of
from ..messages import ChatMessage, to_conversation

# After a full-width colon, or after a name that is not ASCII, no blank is needed; 9:15 and http://x are no speakers.
_NAME = r"([^\W\d_][^:：\n\t。！？，；]{0,38})"
_SAID = re.compile(rf"^{_NAME}(?::(?:\s(.*)|)|：(.*)|(?<=[^\x00-\x7f]):(?!//)(\S.*))$", re.S)
_BOLD = re.compile(r"^\s*(?:#{1,6} +)?(?:\*\*|__)([^*_:：\n]{1,40})(?:([:：])(?:\*\*|__)|(?:\*\*|__)([:：]))")
_RULE = re.compile(r"^\s*([-=*])(\s*\1){2,}\s*$")

Said = tuple[str, int, MessageLines]  # speaker, number of the first line, text


def recognise(head: bytes, name: str) -> bool:
    """At least four turns by at most a dozen speakers, who speak repeatedly; or a .conv file of E and M."""
    if name.lower().endswith(".conv"):
        return head.startswith((b"E\n", b"E\r\n")) and b"\nM " in head
    if not name.lower().endswith((".txt", ".md", ".text", ".log")):
        return False
    lines = [line for line in head.decode("utf-8-sig", "ignore").splitlines()[:400] if line.strip() and not _RULE.match(line)]
    said = [_said(line) for line in lines]
    names = [found[0] for found in said if found]
    if len(names) < 4 or len(set(names)) > min(12, len(names) // 2):
        return False
    return said[0] is not None or len(names) * 2 >= len(lines)  # a title may stand above


def _said(line: str) -> tuple[str, str] | None:
    """(speaker, what follows the colon) of a line that begins with a speaker; Markdown's bold names count."""
    line = _BOLD.sub(lambda found: f"{found[1]}{found[2] or found[3]} ", line, count=1)
    found = _SAID.match(line)
    if found is None:
        return None
    return found[1].strip(), next((part for part in found.groups()[1:] if part), "").lstrip()


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues of the file."""
    if file.stem.lower().endswith(".conv"):
        yield from _conv(file, options, source, ledger)
        return
    said: list[Said] = []
    known = _speakers(file, options.encoding)
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        found = _said(line)
        if _RULE.match(line):
            yield from _finish(said, file, options, source, ledger)
            said = []
        elif found and found[0] in known:
            said.append((found[0], number, MessageLines([found[1]])))
        elif said:
            said[-1][2].add(line, f"{file.label}:{number}", ledger)
        elif line.strip():
            ledger.change("line before the first speaker left out", f"{file.label}:{number}: {line}")
    yield from _finish(said, file, options, source, ledger)


def _conv(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    said: list[Said] = []
    for number, line in file.text_lines(options.encoding, ledger):
        line = line.rstrip("\r\n")
        if line.startswith("M "):
            said.append((("User", "Assistant")[len(said) % 2], number, MessageLines([line[2:]])))
        elif line.strip() == "E":
            yield from _finish(said, file, options, source, ledger)
            said = []
        elif line.strip():
            ledger.change("line that is no turn left out", f"{file.label}:{number}: {line}")
    yield from _finish(said, file, options, source, ledger)


def _speakers(file: RawFile, encoding: str) -> set[str]:
    """Names that open a line twice or more; all of them where fewer than two do. `Note: …` inside a turn is not a speaker."""
    lines = (line.rstrip("\r\n") for _, line in file.text_lines(encoding, Ledger()))
    counts = Counter(found[0] for found in map(_said, lines) if found)
    often = {name for name, count in counts.items() if count >= 2}
    return often if len(often) >= 2 else set(counts)


def _finish(said: list[Said], file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    if not said:
        return
    origin = f"{file.label}:{said[0][1]}"
    spoken = list[ChatMessage]()
    for sender, number, lines in said:
        text = "\n".join(lines).strip("\n")
        if placeholder(text):
            ledger.change("media left out", f"{file.label}:{number}: {text}")
        else:
            spoken.append(ChatMessage(sender, text, key=str(number)))
    roles = [role_of(message.sender) for message in spoken]
    if options.assistant is None and spoken and all(roles):
        turns = tuple(Turn(role, message.text) for role, message in zip(roles, spoken, strict=True) if role)
        ledger.keep()
        yield Conversation(make_uid(source, origin), turns, source, origin, {})
        return
    found = to_conversation(spoken, source=source, origin=origin, ledger=ledger, assistant=options.assistant, people=True)
    if found is not None:
        yield found
