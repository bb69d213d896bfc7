"""What it costs to count text in fields that no importer reads: imports with and without it, in turns.

    PYTHONPATH=src python -m tests.data.importers.unread_cost 6000 chatgpt "whatsapp ios"

The arguments are the number of dialogues and names of importer_formats.py. Printed: seconds of processor time, the fastest of
ROUNDS, and the median of the ratios of the pairs.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.importers.unread import Unread
from chatmill.data.ledger import Ledger
from chatmill.data.recipe import SourceSection

from .importer_formats import FORMATS, fit_dialogue

ROUNDS = 9
WORDS = (
    "question",
    "a",
    "of",
    "and",
    "model",
    "data",
    "what",
    "is",
    "this",
    "good",
    "very",
    "answer",
    "今天",
    "天气",
    "不错",
    "模型",
)
NOTE, IS_KNOWN = Unread.note, Unread.is_known


def switch(on: bool) -> None:
    """Count, or pass over every record."""
    Unread.note = NOTE if on else lambda *_, **__: None  # type: ignore[method-assign]
    Unread.is_known = IS_KNOWN if on else lambda *_: True  # type: ignore[method-assign]


def seconds(section: SourceSection) -> float:
    """Processor time of one import."""
    start, ledger = time.process_time(), Ledger()
    for file in source_files(section):
        for _ in read_file(file, section, ledger):
            pass
    return time.process_time() - start


def main(arguments: list[str]) -> None:
    """One line for each format."""
    rng = random.Random(0)
    for name in arguments[1:]:
        kind, render, limit = FORMATS[name]
        talks = [
            [" ".join(rng.choices(WORDS, k=rng.randrange(5, 120))) for _ in range(2 * rng.randrange(1, 6))]
            for _ in range(int(arguments[0]))
        ]
        with tempfile.TemporaryDirectory() as folder:
            path = render(Path(folder), [fit_dialogue(talk, limit) for talk in talks])
            taken: dict[bool, list[float]] = {True: [], False: []}
            for number in range(ROUNDS):
                for on in (True, False) if number % 2 else (False, True):
                    switch(on)
                    taken[on].append(seconds(SourceSection(path=str(path), format=kind)))
        ratio = statistics.median(a / b for a, b in zip(taken[True], taken[False], strict=True))
        print(
            f"{name}: without {min(taken[False]):.3f} s, with {min(taken[True]):.3f} s, ratio of pairs {ratio:.3f}", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
