"""From a conversation to what a chat template reads: messages with calls of tools, their results and thoughts, and the tools.

    messages, more = prompt_parts(conversation, abilities)       # template.render(messages, more=more)

Only what the template can print is given as structure. Where it has no form for calls, they stay lines of JSON in the content;
declarations that it does not print are left out. `not_printed` says so, for the report of a build.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...conversation import Conversation, Turn
from .abilities import Abilities


def declared_tools(conversation: Conversation) -> list[dict[str, Any]]:
    """The declarations of a conversation's tools, in OpenAI's form; empty where there are none that can be read."""
    found = conversation.meta.get("tools")
    tools = [found] if isinstance(found, Mapping) else found
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return []
    return [_declaration(tool) for tool in tools]


def _declaration(tool: Mapping[str, Any]) -> dict[str, Any]:
    inner = tool.get("function")
    if isinstance(inner, Mapping):
        return {"type": "function", **tool}
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def prompt_parts(conversation: Conversation, can: Abilities) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, further variables of the template)."""
    tools = declared_tools(conversation) if can.tools else []
    return list(_messages(conversation.turns, can)), {"tools": tools} if tools else {}


def _messages(turns: Sequence[Turn], can: Abilities) -> Iterator[dict[str, Any]]:
    calls, waiting = 0, list[str]()  # ids that no result has answered
    for turn in turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.role == "assistant" and turn.calls and can.calls is not None:
            message = {"role": turn.role, "content": turn.said, "tool_calls": []}
            for k, call in enumerate(turn.tool_calls):
                calls += 1
                # Nine letters and digits are what Mistral's template asks for.
                name = turn.call_ids[k] if k < len(turn.call_ids) and turn.call_ids[k] else None
                name = f"call{calls:05d}" if name is None and can.needs_ids else name
                function = {"name": call["name"], "arguments": _as(can.calls, call["arguments"])}
                waiting += [name] if name else []
                message["tool_calls"].append({**({"id": name} if name else {}), "type": "function", "function": function})
        elif turn.role == "tool" and can.calls is not None:
            name = turn.answers or (waiting[0] if can.needs_ids and waiting else None)
            if name in waiting:
                waiting.remove(name)
            message |= {"tool_call_id": name} if name else {}
            message |= {"name": turn.name} if turn.name else {}
        if turn.role == "assistant" and turn.reasoning:
            message["reasoning_content"] = turn.reasoning
        yield message


def _as(form: str, arguments: Any) -> Any:
    if form == "string":
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return arguments


def not_printed(conversation: Conversation, can: Abilities) -> Iterator[tuple[str, int]]:
    """(what the template does not print as it is meant, how often)."""
    tools, calls = conversation.meta.get("tools"), sum(turn.calls for turn in conversation.turns)
    if tools and not can.tools:
        yield "declarations of tools kept, not in the prompt: the chat template does not print them", 1
    elif tools and not declared_tools(conversation):
        yield "declarations of tools kept, not in the prompt: they are not JSON objects", 1
    if calls and can.calls is None:
        yield "call of a tool learned as a line of JSON: the chat template has no form for it", calls


def is_plain(message: Mapping[str, Any]) -> bool:
    """Does a message have nothing but a role and a content?"""
    return message.keys() == {"role", "content"}


def has_structure(conversation: Conversation) -> bool:
    """Are there tools? Most conversations need not know what their template can print."""
    return "tools" in conversation.meta or any(turn.calls or turn.role == "tool" for turn in conversation.turns)
