"""Tools in a conversation in the terminal: their file, the calls of a reply, and the results that are asked for.

use = ToolUse.of(chat_model, read_tools("tools.json"))
use.begin();  words = use.push(piece);  ...;  turn = use.finish()       # the assistant's turn, calls in it
use.waiting                                                          # calls without a result: (id, name)
turn = use.result("sunny")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError

from ....data.tokenizer.calls.abilities import USER
from ..chat_model import ChatModel
from .reply_parts import Part, ReplyParts, Speech


class ToolUse:
    """tools: as OpenAI declares them. prompt: how a prompt ends. speech: how the model writes calls."""

    def __init__(self, tools: list[dict[str, Any]], speech: Speech, prompt: str) -> None:
        self.tools, self._speech, self._prompt = tools, speech, prompt
        self.waiting: list[tuple[str, str]] = []
        self.shown: list[str] = []  # the calls of the last reply, for people
        self._calls = 0
        self._parts: ReplyParts = speech.parts(prompt, with_calls=True)
        self._said: list[Part] = []

    @classmethod
    def of(cls, chat: ChatModel, tools: list[dict[str, Any]]) -> ToolUse:
        """Raises ConfigError for a model that has no form for tools."""
        speech = Speech.of(chat.tokenizer, chat.call_form)
        if speech.form is None or not speech.can.tools:
            raise ConfigError(f"--tools: the chat template of {chat.name} has no form for tools that is known here.")
        return cls(tools, speech, chat.tokenizer.template.render([USER], add_generation_prompt=True))

    def begin(self) -> None:
        """A new reply."""
        self._parts, self._said = self._speech.parts(self._prompt, with_calls=True), []

    def push(self, piece: str) -> str:
        """Words that are certain with this piece of the reply."""
        return self._words(self._parts.push(piece))

    def rest(self) -> str:
        """The last words."""
        return self._words(self._parts.finish())

    def _words(self, parts: list[Part]) -> str:
        self._said += parts
        return "".join(part.text for part in parts if part.kind == "words")

    def finish(self) -> dict[str, Any]:
        """The assistant's turn as a message."""
        words, thought = ("".join(p.text for p in self._said if p.kind == kind) for kind in ("words", "thought"))
        turn: dict[str, Any] = {"role": "assistant", "content": words}
        if thought:
            turn["reasoning_content"] = thought
        self.waiting, self.shown, calls = [], [], list[dict[str, Any]]()
        for call in (part.call for part in self._said if part.call is not None):
            self._calls += 1
            name = f"call{self._calls:05d}"
            arguments: Any = call.text if self._speech.can.calls == "string" else call.arguments
            calls.append({"id": name, "type": "function", "function": {"name": call.name, "arguments": arguments}})
            self.waiting.append((name, call.name))
            self.shown.append(f"{call.name} {call.text}")
        return turn | ({"tool_calls": calls} if calls else {})

    def result(self, text: str) -> dict[str, Any]:
        """The turn of the result of the first call that has none."""
        call_id, name = self.waiting.pop(0)
        return {"role": "tool", "tool_call_id": call_id, "name": name, "content": text}


def read_tools(file: str | Path) -> list[dict[str, Any]]:
    """The declarations in a JSON file: a list, or an object with `tools`. Raises ConfigError."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--tools {file}: expected a JSON file with a list of tools ({error}).") from None
    found = found.get("tools", [found]) if isinstance(found, dict) else found
    listed = [tool for tool in found if isinstance(tool, dict)] if isinstance(found, list) else []
    tools = [tool if "function" in tool else {"function": tool} for tool in listed]
    if not tools or not all(isinstance(t["function"], dict) and isinstance(t["function"].get("name"), str) for t in tools):
        text = 'expected a list of {"type": "function", "function": {"name": ..., "parameters": {...}}}'
        raise ConfigError(f"--tools {file}: {text}.")
    return [{"type": "function", "function": tool["function"]} for tool in tools]
