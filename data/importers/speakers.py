"""Who speaks in chats between people, and the refusal to make one assistant out of several of them.

    check_one_assistant(ledger.speakers, "sources.0 (chat.txt)")

Where no recipe, label or owner says who the model is to become, the role rule takes whoever does not begin a conversation: in a
chat of two that is now one of them and now the other. The ledger counts the turns that got their roles in this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from chatmill.config import ConfigError

# In these everybody may answer everybody: who wrote the post is the user. The names of all who answer are not kept.
FORUMS = ("reddit", "stack_exchange")
WHOEVER_ANSWERS = "whoever answers a post"
Speakers = Mapping[str, Mapping[str, int]]  # name -> role -> turns
NAMED = 8


def together(parts: Iterable[Speakers]) -> dict[str, dict[str, int]]:
    """The turns of several files, added."""
    found: dict[str, dict[str, int]] = {}
    for part in parts:
        for name, roles in part.items():
            mine = found.setdefault(name, {})
            for role, turns in roles.items():
                mine[role] = mine.get(role, 0) + turns
    return found


def assistants(speakers: Speakers) -> list[str]:
    """Those who would be the assistant somewhere, the most talkative first."""
    found = [(roles.get("assistant", 0), name) for name, roles in speakers.items() if roles.get("assistant")]
    return [name for _, name in sorted(found, key=lambda item: (-item[0], item[1]))]


def in_words(speakers: Speakers) -> str:
    """`Ann 812, Bob 790`: turns of everybody, the most talkative first."""
    ranked = sorted(((sum(roles.values()), name) for name, roles in speakers.items()), key=lambda item: (-item[0], item[1]))
    named = [f"{name} {turns:,}" for turns, name in ranked[:NAMED]]
    return ", ".join(named + ([f"and {len(ranked) - NAMED:,} more"] if len(ranked) > NAMED else []))


def check_one_assistant(speakers: Speakers, source: int, path: str | None) -> None:
    """ConfigError where the order of speaking makes several people of one source the assistant."""
    found = assistants(speakers)
    if len(found) < 2:
        return
    raise ConfigError(
        f"sources.{source} ({path}) is a chat between people, and nothing says whom the model is to become.\n"
        f"Who speaks, with turns: {in_words(speakers)}.\n"
        f"Without a name, {len(found):,} of them would be the assistant, each in the dialogues that somebody else begins.\n"
        f"Name one: `assistant: {found[0]}` in this source, or sources.{source}.assistant={found[0]!r} after the command. "
        f"To mix them on purpose: mix_speakers: true."
    )
