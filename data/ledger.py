"""What a stage kept, changed and dropped, and why, with a few examples of each reason.

    ledger = Ledger(unit="conversations"); ledger.drop("empty", "chat 12: …"); ledger.keep()

Ledgers of parallel chunks add up in chunk order, so a report does not depend on the number of workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EXAMPLES_KEPT = 3
EXAMPLE_CHARS = 160


@dataclass(slots=True)
class Ledger:
    """Counts of one stage. dropped and changed map a reason to a count; examples map it to the first few cases.

    speakers: of chats between people in which only the order of speaking decides the roles, name -> role -> turns; not part of
    the JSON form (data/importers/speakers.py).
    """

    unit: str = "dialogues"
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    speakers: dict[str, dict[str, int]] = field(default_factory=dict)

    def keep(self, n: int = 1) -> None:
        """Count n kept units."""
        self.kept += n

    def drop(self, reason: str, example: str = "", n: int = 1) -> None:
        """Count n dropped units."""
        self.dropped[reason] += n
        self._remember(reason, example)

    def change(self, reason: str, example: str = "", n: int = 1) -> None:
        """Count n units that stay, altered."""
        self.changed[reason] += n
        self._remember(reason, example)

    def add(self, other: Ledger) -> None:
        """Count what another ledger counted, too."""
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.changed.update(other.changed)
        for reason, cases in other.examples.items():
            for case in cases:
                self._remember(reason, case)

    def _remember(self, reason: str, example: str) -> None:
        cases = self.examples.setdefault(reason, [])
        if example and len(cases) < EXAMPLES_KEPT:
            cases.append(shorten(example))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, reasons by decreasing count."""
        return {
            "unit": self.unit,
            "kept": self.kept,
            "dropped": ranked(self.dropped),
            "changed": ranked(self.changed),
            "examples": {reason: cases for reason, cases in sorted(self.examples.items()) if cases},
        }

    @classmethod
    def total(cls, unit: str, parts: Iterable[dict[str, Any]]) -> Ledger:
        """Sum of the JSON forms of several ledgers."""
        ledger = cls(unit)
        for part in parts:
            ledger.kept += part["kept"]
            ledger.dropped.update(part["dropped"])
            ledger.changed.update(part["changed"])
            for reason, cases in part["examples"].items():
                for case in cases:
                    ledger._remember(reason, case)
        return ledger


def shorten(text: str, limit: int = EXAMPLE_CHARS) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def ranked(counter: Mapping[str, int]) -> dict[str, int]:
    """The counts, largest first; equal ones by name."""
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))
