"""Slack export: `<channel>/YYYY-MM-DD.json` day files next to `users.json`, in a folder or in the zip itself.

Threads (`thread_ts`) are separate conversations; silences divide the rest. `<@U…>`, `<#C…|name>` and `<url|label>` are
resolved. Joins, bots and other subtypes are left out and counted. One channel is one raw file: its days are read in order.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from chatmill.config import ConfigError

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..messages import ChatMessage
from ..rebuild import conversations
from ..records import MALFORMED, read_messages, why_bad
from ..unread import Unread
from .dated import seconds_of

_LINK = re.compile(r"<([@#!]?)([^<>|]+)(?:\|([^<>]*))?>")
_PEOPLE_SUBTYPES = (None, "thread_broadcast", "me_message", "file_comment")


def recognise(head: bytes, name: str) -> bool:
    """An array of messages with Slack's ts."""
    start = head[:4000]
    return (
        start.lstrip()[:1] == b"[" and b'"ts"' in start and b'"type"' in start and (b'"user"' in start or b'"bot_id"' in start)
    )


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Conversations of one channel (a folder of day files) or of one day file."""
    yield from conversations(messages(file, options, ledger), file, options, source, ledger)


def messages(file: RawFile, options: SourceSection, ledger: Ledger) -> Iterator[ChatMessage]:
    """Every message that a person typed, in order of time."""
    names, unread = _user_names(file), Unread(ledger)
    for day in file.parts():
        try:
            entries = json.loads(day.whole())
        except MALFORMED as error:
            why_bad(error)
            raise ConfigError(f"{day.label}: not JSON ({error})") from error
        if not isinstance(entries, list):
            raise ConfigError(f"{day.label}: expected a list of messages, found a {type(entries).__name__}")
        found = read_messages(entries, partial(_message, names, options.assistant), day, ledger, unread)
        yield from sorted(found, key=lambda message: message.time or 0.0)


def _message(names: dict[str, str], assistant: str | None, entry: dict[str, Any]) -> ChatMessage | str:
    """A message, or why it is left out."""
    if entry.get("type") != "message" or entry.get("subtype") not in _PEOPLE_SUBTYPES:
        return f"{entry.get('subtype') or entry.get('type')} left out"
    user, thread = entry.get("user"), entry.get("thread_ts")
    if user is None:
        return "bot left out"
    text = _LINK.sub(partial(_resolve, names), entry.get("text") or "")
    sender = names.get(user, str(user)) if assistant in (names.get(user), None) else str(user)
    time = seconds_of(entry["ts"])
    return ChatMessage(sender, html.unescape(text), time, str(entry["ts"]), thread=None if thread is None else str(thread))


def _resolve(names: dict[str, str], match: re.Match[str]) -> str:
    kind, target, label = match.groups()
    if kind == "@":
        return "@" + (label or names.get(target, target))
    if kind in ("#", "!"):
        return ("#" if kind == "#" else "@") + (label or target).removeprefix("subteam^")
    return label or target


def _user_names(file: RawFile) -> dict[str, str]:
    users = file.sibling_above("users.json")
    if users is None:
        return {}
    try:
        entries: list[dict[str, Any]] = json.loads(users.whole())
        return {str(user["id"]): str(_name(user)) for user in entries}
    except MALFORMED as error:
        why_bad(error)
        raise ConfigError(f"{users.label}: not Slack's list of users ({type(error).__name__}: {error})") from error


def _name(user: dict[str, Any]) -> Any:
    return (user.get("profile") or {}).get("display_name") or user.get("real_name") or user.get("name") or user["id"]
