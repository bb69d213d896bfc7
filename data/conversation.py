"""The records that flow through data/: Turn, Conversation, TokenizedDialogue.

A Conversation is what people said; a TokenizedDialogue is what the model reads, and which tokens carry loss.
One JSON form (`to_record` / `from_record`) is used for the dialogue shards and for the files between the stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. loss: may carry loss, if its role is assistant. time: seconds since 1970, UTC.

    reasoning: the thought before a reply, which the content does not hold. calls: so many of the content's last lines are calls
    of tools, one JSON object {"name", "arguments"} each; `tool_calls` gives them, `said` the words before them. call_ids: their
    ids, if they have any. answers: the id of the call whose result this is. thought_loss: may the thought carry loss?
    """

    role: Role
    content: str
    name: str | None = None
    time: float | None = None
    loss: bool = True
    reasoning: str | None = None
    calls: int = 0
    call_ids: tuple[str, ...] = ()
    answers: str | None = None
    thought_loss: bool = True

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls of tools, {"name", "arguments"} each."""
        lines = self.content.split("\n")[-self.calls :] if self.calls else []
        found: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return found

    @property
    def said(self) -> str:
        """The content without its calls of tools."""
        return "\n".join(self.content.split("\n")[: -self.calls]) if self.calls else self.content


@dataclass(frozen=True, slots=True)
class Conversation:
    """One dialogue. origin: raw file and line (or key) that it came from; meta: whatever the importer knows, among it "tools":
    the declarations of the tools that may be called.

    A plain document is a Conversation of a single assistant turn with meta["document"] = True: every token has loss.
    """

    uid: str
    turns: tuple[Turn, ...]
    source: str
    origin: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_document(self) -> bool:
        """Plain text for pre-training rather than a dialogue."""
        return bool(self.meta.get("document"))


@dataclass(frozen=True, slots=True)
class TokenizedDialogue:
    """ids uint32 (L,); loss_mask bool (L,): token i is a target, predicted from tokens < i. Index 0 never is."""

    uid: str
    ids: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]


def make_uid(source: str, origin: str) -> str:
    """32 hex digits naming the conversation at `origin` of `source`; the same on every machine."""
    return xxhash.xxh3_128_hexdigest(f"{source}\0{origin}".encode("utf-8", "surrogatepass"))


def part_uid(uid: str, part: int | str) -> str:
    """32 hex digits naming a sample that was cut from the conversation `uid`, by its last turn or any other name."""
    return xxhash.xxh3_128_hexdigest(f"{uid}#{part}".encode())


def to_record(conversation: Conversation) -> dict[str, Any]:
    """Plain JSON values; absent names, times and default loss flags are left out."""
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.name is not None:
            message["name"] = turn.name
        if turn.time is not None:
            message["time"] = turn.time
        if not turn.loss:
            message["loss"] = False
        if turn.reasoning is not None:
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["calls"] = turn.calls
        if turn.call_ids:
            message["call_ids"] = list(turn.call_ids)
        if turn.answers is not None:
            message["tool_call_id"] = turn.answers
        if not turn.thought_loss:
            message["thought_loss"] = False
        messages.append(message)
    return {
        "uid": conversation.uid,
        "messages": messages,
        "source": conversation.source,
        "origin": conversation.origin,
        "meta": dict(conversation.meta),
    }


def from_record(record: Mapping[str, Any]) -> Conversation:
    """Inverse of to_record."""
    turns = tuple(
        Turn(
            cast(Role, m["role"]), m["content"], m.get("name"), m.get("time"), m.get("loss", True), m.get("reasoning_content"),
            m.get("calls", 0), tuple(m.get("call_ids", ())), m.get("tool_call_id"), m.get("thought_loss", True),
        )
        for m in record["messages"]
    )  # fmt: skip
    return Conversation(record["uid"], turns, record["source"], record["origin"], record.get("meta", {}))


def dump_line(conversation: Conversation) -> str:
    """One line of JSON, keys in a fixed order, ending in a newline."""
    return json.dumps(to_record(conversation), ensure_ascii=False, separators=(",", ":")) + "\n"


def load_line(line: str | bytes) -> Conversation:
    """Inverse of dump_line."""
    return from_record(json.loads(line))
