"""Messages and tools of a request, and what the chat template gets of them.

turns = template_messages(request.messages, can)         # for ChatTokenizer.prompt_ids, with {"tools": tools}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ....data.tokenizer.calls.abilities import Abilities
from ..serve.errors import RequestError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())  # "1" and true are no numbers
FIRST = Field(fail_fast=True)  # the first problem of a list is enough: a million of them take minutes and gigabytes
PART_FIELDS = ("type", "text", "cache_control", "prompt_cache_breakpoint")  # the last two: hints to a cache
OF_A_ROLE = {
    "assistant": {"tool_calls", "reasoning_content"},
    "tool": {"tool_call_id", "name"},
}
NO_FORM = "the chat template of this model has no form for tools that is known here"
_NAME = re.compile(r"[\w.-]{1,128}")


class Called(BaseModel):
    """Name and arguments, JSON in a text, of a call."""

    model_config = STRICT

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    """One call of an earlier reply."""

    model_config = STRICT

    id: str | None = None
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None  # of a stream that was put together


class Function(BaseModel):
    """A declaration. parameters: a JSON schema."""

    model_config = STRICT

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("expected 1 to 128 letters, digits, _, . and -")
        return name


class Tool(BaseModel):
    """A tool that may be called."""

    model_config = STRICT

    type: Literal["function"]
    function: Function

    def declared(self) -> dict[str, Any]:
        """What the template gets: what the client wrote, without `strict`."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class NamedFunction(BaseModel):
    """A name."""

    model_config = STRICT

    name: str


class NamedTool(BaseModel):
    """The tool that must be called."""

    model_config = STRICT

    type: Literal["function"]
    function: NamedFunction


class Message(BaseModel):
    """One turn; content may come as a list of text parts. What would not reach the model is refused, not ignored."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], FIRST]
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_more(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept: dict[str, Any] = {}
        role = raw.get("role")
        known = OF_A_ROLE.get(role, set()) if isinstance(role, str) else set()
        for name, value in raw.items():
            if name in ("role", "content"):
                kept[name] = value
            elif value is None or value in ([], {}, ""):
                continue
            elif name in known:
                kept[name] = value
            elif name == "function_call":
                raise ValueError("function_call is not supported: give tool_calls")
            else:
                raise ValueError(f"{name[:100]!r} is not supported: the template gets role and content of a message")
        if (kept.get("content", "") is None and kept.get("tool_calls")) or ("content" not in kept and kept.get("tool_calls")):
            kept["content"] = ""
        return kept

    @property
    def text(self) -> str:
        """The content as one string. Raises RequestError for parts that are not text."""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(400, "messages: only text content is supported.", param="messages")
            if more := [name for name, value in part.items() if value is not None and name not in PART_FIELDS]:
                text = f"messages: {more[0][:100]!r} in a text part is not supported."
                raise RequestError(400, text, param="messages", code="unknown_parameter")
        return "".join(p["text"] for p in self.content)

    @property
    def size(self) -> int:
        """Bytes of UTF-8 of all that it says."""
        called = sum(len(json.dumps(call.model_dump()).encode()) for call in self.tool_calls or ())
        return len(self.text.encode()) + len((self.reasoning_content or "").encode()) + called


def template_messages(messages: Sequence[Message], can: Abilities) -> list[dict[str, Any]]:
    """The messages as data have them (data/tokenizer/calls/messages.py). Raises RequestError for calls without a form."""
    names: dict[str, str] = {}
    found = list[dict[str, Any]]()
    for message in messages:
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        if (message.tool_calls or message.role == "tool") and can.calls is None:
            raise RequestError(400, f"messages: calls of tools and their results: {NO_FORM}.", param="messages")
        if message.tool_calls:
            turn["tool_calls"] = [_call(call, can) for call in message.tool_calls]
            names |= {call.id: call.function.name for call in message.tool_calls if call.id}
        if message.role == "tool":
            name = message.name or names.get(message.tool_call_id or "")
            turn |= {"tool_call_id": message.tool_call_id} if message.tool_call_id else {}
            turn |= {"name": name} if name else {}
        if message.reasoning_content:
            turn["reasoning_content"] = message.reasoning_content
        found.append(turn)
    return found


def _call(call: ToolCall, can: Abilities) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if can.calls == "object" and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise RequestError(400, "messages: the arguments of a call are not JSON.", param="messages") from None
    elif can.calls == "string" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function: Mapping[str, Any] = {"name": call.function.name, "arguments": arguments}
    return {**({"id": call.id} if call.id else {}), "type": "function", "function": function}
