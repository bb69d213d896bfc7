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
    names = _user_names(file)
    for day in file.parts():
        with day.open() as raw:
            try:
                entries = json.load(raw)
            except ValueError as error:
                raise ConfigError(f"{day.label}: not JSON ({error})") from error
        for entry in sorted(entries, key=lambda e: float(e.get("ts", 0))):
            where = f"{day.label}:{entry.get('ts')}"
            if entry.get("type") != "message" or entry.get("subtype") not in _PEOPLE_SUBTYPES:
                ledger.change(f"{entry.get('subtype') or entry.get('type')} left out", where)
                continue
            user = entry.get("user")
            if user is None:
                ledger.change("bot left out", where)
                continue
            text = _LINK.sub(partial(_resolve, names), entry.get("text") or "")
            thread = entry.get("thread_ts")
            sender = names.get(user, user) if options.assistant in (names.get(user), None) else user
            yield ChatMessage(sender, html.unescape(text), float(entry["ts"]), entry["ts"], thread=thread)


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
    with users.open() as raw:
        entries: list[dict[str, Any]] = json.load(raw)
    return {
        u["id"]: (u.get("profile") or {}).get("display_name") or u.get("real_name") or u.get("name") or u["id"] for u in entries
    }
