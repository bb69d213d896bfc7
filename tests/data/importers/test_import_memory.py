"""Importers hold a conversation, never a file: what they allocate does not grow with what they read."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.importers.forums import stack_exchange
from chatmill.data.importers.plain import parquet
from chatmill.data.importers.registry import read_file, source_files
from chatmill.data.ledger import Ledger
from chatmill.data.raw import files, json_lines, json_text
from chatmill.data.raw.spill import Spill, key, packed, unpacked
from chatmill.data.recipe import SourceSection

from .importer_formats import FORMATS, TWO_TURNS, fit_dialogue


def dialogues(n: int) -> list[list[str]]:
    """n dialogues of four turns, each some 300 characters long and all different."""
    return [[f"turn {k} of talk {i}: " + f"{i * 7 + k} is a number " * 16 + "so" for k in range(4)] for i in range(n)]


def peak_bytes(path: Path) -> tuple[int, int]:
    """(largest sum of what was allocated during the import, number of conversations)."""
    section, count = SourceSection(path=str(path)), 0
    gc.collect()
    tracemalloc.start()
    try:
        for file in source_files(section):
            for _ in read_file(file, section, Ledger()):
                count += 1
        return tracemalloc.get_traced_memory()[1], count
    finally:
        tracemalloc.stop()


# Those of one JSON object per dialogue are read by one function: one of them speaks for the others.
ALIKE = {"claude", "gemini", "signal", "pairs", "utterances", "chatgpt", "chatmill", "preference"}
# One layout of each format, and those that nest what others have at the top.
ONE_OF_EACH = {kind: name for name, (kind, _, _) in reversed(FORMATS.items()) if kind not in ALIKE}
NAMES = sorted({*ONE_OF_EACH.values(), "telegram account", "slack zip", "cornell", "ubuntu"})


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "_PIECE_CHARS", 1 << 12)
    monkeypatch.setattr(stack_exchange, "PIECE_BYTES", 1 << 12)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 8)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 1 << 12)
    monkeypatch.setattr(json_lines, "_FIRST_LINE_BYTES", 1 << 12)
    _, render, limits = FORMATS[name]
    peaks, sizes, parts = [], [], []
    few = {"mbox": 45, "messenger": 120}.get(name, 60)  # the parser of the standard library is slow, more so when watched
    # The first pays for modules and regular expressions; all are larger than what is read at a time.
    for n in (few, few, 3 * few):
        folder = tmp_path / f"{len(peaks)}"
        folder.mkdir()
        path = render(folder, [fit_dialogue(d, limits) for d in dialogues(n)])
        peak, count = peak_bytes(path)
        assert count == n
        peaks.append(peak)
        sizes.append(sum(len(t) for d in dialogues(n) for t in (d[:2] if TWO_TURNS in limits else d)))
        parts.append(sum(len(file.parts()) for file in source_files(SourceSection(path=str(path)))))
    # The names of the files of a folder or a zip are known from the beginning.
    allowed = 100_000 + 0.15 * (sizes[2] - sizes[1]) + 2000 * (parts[2] - parts[1])
    assert peaks[2] - peaks[1] < allowed, f"{peaks[1:]} bytes at most for {sizes[1:]} characters in {parts[1:]} files"


def test_a_spill_leaves_nothing_behind_and_keeps_what_text_cannot_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    odd: list[Any] = ["half \ud83d", "nul \0", None, 1.5]
    with Spill("CREATE TABLE t (k, entry)") as db:
        db.execute("INSERT INTO t VALUES (?, ?)", (key(odd[0]), packed(*odd)))
        assert unpacked(next(iter(db.execute("SELECT entry FROM t WHERE k = ?", (key(odd[0]),))))[0]) == odd
        assert list(tmp_path.rglob("*.sqlite"))
    assert not list(tmp_path.iterdir())
