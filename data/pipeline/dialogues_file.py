"""What the stage import, clean or pair of a build made, as one JSONL file of OpenAI messages to look at and edit.

    write_dialogues(work, "clean", Path("cleaned.jsonl"))  ->  1234

One dialogue per line, in the order of the raw files, with uid, source, origin and meta beside its messages. As a source of a
recipe the file gives the same dialogues again (data/importers/datasets/written.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.files import beside

from ..cleaning.clean import Cleaner
from ..importers.datasets.written import written_line
from ..ledger import Ledger
from .stages import read_lines
from .work_folder import WorkFolder

# Line ends for Unicode, though not for JSON: editors break lines at them. They stand in JSON texts only.
_ESCAPED = [(c.encode(), json.dumps(c)[1:-1].encode()) for c in "\u0085\u2028\u2029"]
STAGES = ("import", "clean", "pair")


def check_dialogues_file(path: str | Path, stage: str) -> None:
    """ConfigError for a stage that makes no dialogues, or a place where the file cannot be written."""
    path = Path(path)
    if stage not in STAGES:
        raise ConfigError(
            f"--out {path}: {stage!r} makes no dialogues. `data import`, `data clean` and `data pair` write them."
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: expected the name of a file in a folder that exists.")


def write_dialogues(work: WorkFolder, stage: str, path: Path) -> int:
    """Number of dialogues written. The file appears whole or not at all."""
    count = 0
    with beside(path) as file:
        for line in _lines(work, stage):
            for code, escape in _ESCAPED:
                line = line.replace(code, escape)
            file.write(line)
            count += 1
    return count


def _lines(work: WorkFolder, stage: str) -> Iterator[bytes]:
    for chunk in sorted((work.folder / ("prepare" if stage == "pair" else "import")).glob("c*.jsonl")):
        if stage == "clean":  # the stages clean and pair share a pass, which keeps the result of the second
            cleaner = Cleaner(work.recipe.clean)
            cleaned = (cleaner.apply(conversation, Ledger()) for conversation in read_lines(chunk))
            yield from (written_line(conversation).encode() for conversation in cleaned if conversation is not None)
        else:
            yield from (written_line(conversation).encode() for conversation in read_lines(chunk))
