"""A reply with thought and calls in OpenAI's words: the deltas of a stream, or one message.

reply = ChatReply(speech.parts(prompt, with_calls=True), parallel=True)
for delta in (*reply.push(piece), *reply.finish()): ...          # or reply.whole(text)
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from .reply_parts import Part, ReplyParts


class ChatReply:
    """parallel: several calls may come in one reply; else the first one counts."""

    def __init__(self, parts: ReplyParts, parallel: bool) -> None:
        self._parts, self._parallel, self.calls = parts, parallel, 0

    def push(self, text: str) -> list[dict[str, Any]]:
        """Deltas of the next piece of text."""
        return self._deltas(self._parts.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """The last deltas: each call as its name and id, then its arguments."""
        return self._deltas(self._parts.finish())

    def reason(self, ended: str) -> str:
        """Why the reply ended."""
        return "tool_calls" if self.calls and ended == "stop" else ended

    def whole(self, text: str) -> dict[str, Any]:
        """The message of a whole reply."""
        words, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
        for part in (*self._parts.push(text), *self._parts.finish()):
            if part.kind == "call":
                calls += [] if calls and not self._parallel else [_opened(part) | {"function": _called(part)}]
            else:
                (words if part.kind == "words" else thoughts).append(part.text)
        self.calls = len(calls)
        said = "".join(words)
        found: dict[str, Any] = {"content": None if calls and not said.strip() else said}
        found |= {"reasoning_content": "".join(thoughts)} if thoughts else {}
        return found | ({"tool_calls": calls} if calls else {})

    def _deltas(self, parts: Iterable[Part]) -> list[dict[str, Any]]:
        found = list[dict[str, Any]]()
        for part in parts:
            if part.kind != "call":
                found.append({"content" if part.kind == "words" else "reasoning_content": part.text})
            elif self._parallel or not self.calls:
                index, called = {"index": self.calls}, _called(part)
                found.append({"tool_calls": [index | _opened(part) | {"function": called | {"arguments": ""}}]})
                found.append({"tool_calls": [index | {"function": {"arguments": called["arguments"]}}]})
                self.calls += 1
        return found


def _opened(part: Part) -> dict[str, Any]:
    return {"id": secrets.token_hex(5)[:9], "type": "function"}  # nine letters and digits, as Mistral's templates ask for


def _called(part: Part) -> dict[str, str]:
    assert part.call is not None
    return {"name": part.call.name, "arguments": part.call.text}
