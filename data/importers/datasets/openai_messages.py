"""Messages with roles, one dialogue per JSON line or element: OpenAI's fine-tuning format and its relatives.

    {"messages": [{"role", "content", "name"?, "weight"?, "loss"?, "tool_calls"?, "reasoning_content"?}, …], "tools"?}
    {"conversations": [{"role", "content"}, …]}  ·  [{"role", "content"}, …]  ·  {"contents": [{"role", "parts"}], …}

content is a string, null, or a list of parts, of which text is said and thinking is the thought before the reply. weight 0 and
loss false turn off a turn's loss. Calls of tools become the last lines of the assistant's content, one JSON object {"name",
"arguments"} each, because no text form is shared by all templates; Turn.calls says how many. Tools' declarations are kept in
meta, and a record's own `system` becomes a turn. Other fields of a message that hold something are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...conversation import Conversation, Role, Turn
from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.json_lines import first_object, json_lines
from ...recipe import SourceSection
from ...tokenizer.calls.forms import FORMS
from ..labels import role_of
from ..messengers.dated import seconds_of
from ..records import BadRecordError, Record, entry_of, read_records, text_of

LISTS = ("messages", "conversations", "conversation", "contents")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
_RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_PLAIN = {"role", "content"}  # most messages hold nothing else
_USED = {
    "role", "content", "parts", "name", "weight", "loss", "time", "tool_calls", "function_call", "tool_call_id",
    "reasoning_content", "reasoning", "thinking", "id", "turn", "index", "type",
}  # fmt: skip


def recognise(head: bytes, name: str) -> bool:
    """First line (or first element of an array) is an object with messages that have roles."""
    first = first_object(head)
    if first is None:
        return head.lstrip()[:1] in (b"{", b"[") and b'"messages"' in head[:4000] and b'"role"' in head and b'"content"' in head
    messages = messages_of(first)
    return isinstance(messages, list) and (
        (not messages and "messages" in first) or bool(messages and isinstance(messages[0], dict) and "role" in messages[0])
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """All dialogues; a bad line is counted and skipped."""
    yield from read_records(json_lines(file, options.encoding, ledger), dialogue, file, source, ledger)


def messages_of(record: Record) -> Any:
    """The list of messages, whatever it is called; None without one."""
    return next((record[key] for key in LISTS if isinstance(record.get(key), list)), None)


def dialogue(record: Record, origin: str, ledger: Ledger) -> tuple[list[Turn], dict[str, Any]]:
    """Turns of a record."""
    messages = messages_of(record)
    if messages is None:
        raise BadRecordError("no messages list", sorted(record)[:8])
    names: dict[str, str] = {}
    turns: list[Turn] = []
    for message in messages:
        try:
            turns.append(turn_of(message, names))
        except BadRecordError as error:
            raise BadRecordError("bad message", error.detail) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadRecordError("bad message", error) from error
        note_message(message, origin, ledger)
    return [*system_turn(record, turns), *called_in_text(turns, origin, ledger)], kept_fields(record)


def note_message(message: Record, origin: str, ledger: Ledger) -> None:
    """Count what a message holds beside its words."""
    if message.keys() == _PLAIN and isinstance(message["content"], str):
        return
    if others := other_parts(message.get("content") or message.get("parts")):
        ledger.change("picture, sound or file left out of a message", f"{origin}: {others}", len(others))
    for field in message.keys() - _USED:
        if message[field]:
            ledger.change(f"field of a message not used: {field}", origin)
    weight = message.get("weight")
    if isinstance(weight, float) and 0 < weight < 1:
        ledger.change("weight between 0 and 1 counts as 1", f"{origin}: {weight}")


def system_turn(record: Record, turns: list[Turn]) -> list[Turn]:
    """The system turn of a record's own field, unless the turns begin with one."""
    found = record.get("system") or record.get("systemInstruction") or record.get("system_instruction")
    if isinstance(found, dict):
        found = _text(found.get("parts"))
    if not found or (turns and turns[0].role == "system"):
        return []
    return [Turn("system", text_of(found, "system"))]


def kept_fields(record: Record) -> dict[str, Any]:
    """What a record says beside its turns: id, license, meta, declarations of tools (also where they are JSON in a text)."""
    kept = {key: record[key] for key in ("id", "license", "meta") if key in record}
    tools = record.get("tools") or record.get("functions")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            tools = [tools]
    return kept | ({"tools": tools} if tools else {})


def turn_of(message: Any, names: dict[str, str] | None = None) -> Turn:
    """One message as a turn. names: of tools, by the ids of their calls.

    Raises KeyError, TypeError, ValueError or AttributeError for what is no message.
    """
    message = entry_of(message)
    label = message["role"]
    if message.keys() == _PLAIN and isinstance(message["content"], str) and isinstance(label, str) and label in _ROLES:
        return Turn(_ROLES[label], message["content"])
    role = _ROLES.get(label) or (role_of(label) if isinstance(label, str) else None)
    if role is None:
        raise ValueError(f"unknown role {label!r}")
    content = message.get("content") if "content" in message else message.get("parts")
    text, thought = _text(content), thought_of(message)
    calls = message.get("tool_calls") or message.get("function_call") or []
    if isinstance(calls, str):
        calls = json.loads(calls)
    called = calls if isinstance(calls, list) else [calls]
    lines = [call_line(call) for call in called]
    ids = tuple(str(call.get("id") or "") for call in called)
    name, answers = message.get("name"), message.get("tool_call_id") if role == "tool" else None
    if names is not None:
        names |= {key: json.loads(line)["name"] for key, line in zip(ids, lines, strict=True) if key}
        name = name or (names.get(str(answers)) if role == "tool" else None)
    return Turn(
        role, "\n".join([*([text] if text else []), *lines]), None if name is None else str(name),
        seconds_of(message.get("time")), carries_loss(message), thought if role == "assistant" else None, len(lines),
        ids if any(ids) else (), None if answers is None else str(answers),
    )  # fmt: skip


def called_in_text(turns: list[Turn], origin: str, ledger: Ledger) -> list[Turn]:
    """Calls and results that stand in texts between <tool_call> and <tool_response> marks (Hermes), as calls and results."""
    found, changed = list[Turn](), 0
    for turn in turns:
        if turn.role == "assistant" and not turn.calls and "<tool_call>" in turn.content:
            words, calls = FORMS["hermes"].read(turn.content)
            lines = [json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in calls]
            changed += len(lines)
            words = words.strip() if lines else turn.content
            turn = replace(turn, content="\n".join([*([words] if words else []), *lines]), calls=len(lines))
        elif (
            turn.role == "tool" and (results := _RESPONSE.findall(turn.content)) and not _RESPONSE.sub("", turn.content).strip()
        ):
            found += [replace(turn, content=result) for result in results]
            continue
        found.append(turn)
    if changed:
        ledger.change("call of a tool in the text of a reply read as a call", origin, changed)
    return found


def call_line(call: Any) -> str:
    """A call of a tool as one line of JSON, {"name", "arguments"}; arguments that are JSON in a text are decoded."""
    call = entry_of(call)
    function = entry_of(call.get("function", call))
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # else a text it is
            arguments = json.loads(arguments or "{}")
    called = {"name": text_of(function.get("name"), "name of a tool"), "arguments": arguments}
    return json.dumps(called, ensure_ascii=False)


def carries_loss(message: Record) -> bool:
    """False for weight 0 and for loss false or 0; null says nothing."""
    weight, loss = message.get("weight"), message.get("loss")
    if isinstance(loss, str):
        loss = {"true": True, "false": False}.get(loss.lower(), loss)
    return (weight is None or float(weight) > 0) and (loss is None or float(loss) > 0)


def thought_of(message: Record) -> str | None:
    """The thought before a reply, of a field or of thinking parts."""
    found = [message[key] for key in ("reasoning_content", "reasoning", "thinking") if isinstance(message.get(key), str)]
    parts = message.get("content") if isinstance(message.get("content"), list) else []
    found += [part["thinking"] for part in parts or [] if isinstance(part, dict) and isinstance(part.get("thinking"), str)]
    return "\n\n".join(text for text in found if text.strip()) or None


def other_parts(content: Any) -> list[str]:
    """Kinds of the parts that have no text: image_url, input_audio, file."""
    parts = content if isinstance(content, list) else []
    return [
        str(part.get("type"))
        for part in parts
        if isinstance(part, dict) and not isinstance(part.get("text"), str) and not isinstance(part.get("thinking"), str)
    ]


def _text(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part if isinstance(part, str) else part.get("text") or "" for part in content]
        return "".join(text_of(text) for text in texts)
    raise ValueError(f"content is a {type(content).__name__}")
