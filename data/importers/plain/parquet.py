"""Parquet and Arrow (IPC file or stream) tables, record batch by record batch. Needs the package pyarrow.

Columns `messages`, `conversations` or `instruction`/`output`, and pairs of usual names, are read like the JSON formats of the
same shape; others by sources.columns or by common column names (data/importers/plain/table.py). pyarrow runs in a process of
its own (columnar.py), because a damaged file can end the process that reads it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..datasets import alpaca, openai_messages, pairs, sharegpt, utterances
from ..records import read_records
from .table import column_map, json_cell, rows_to_conversations

BATCH_ROWS = 1024
SCRIPT = Path(__file__).with_name("columnar.py")


def recognise(head: bytes, name: str) -> bool:
    """By their magic numbers."""
    return head[:4] == b"PAR1" or head[:6] == b"ARROW1" or name.lower().endswith(".arrow")


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Rows in file order."""
    if file.member is not None or file.path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz"):
        raise ConfigError(f"{file.label}: Parquet and Arrow files are read in place; unpack this one first")
    rows = _rows(file, ledger)
    first = next(rows, None)
    if first is None:
        ledger.drop("empty table", file.label)
        return
    numbered = chain([first], rows)
    if not options.columns:
        shapes = (openai_messages, sharegpt, alpaca, pairs, utterances)
        head = json.dumps(first[1]).encode()
        if module := next((shape for shape in shapes if shape.recognise(head, "")), None):
            yield from read_records(numbered, module.dialogue, file, source, ledger)
            return
    columns = column_map(list(first[1]), options.columns, file.label)
    yield from rows_to_conversations(numbered, columns, file, options, source, ledger)


def _rows(file: RawFile, ledger: Ledger) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of the rows that can be read; the others are counted."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{file.label}: reading Parquet and Arrow needs the package pyarrow (pip install pyarrow)")
    if not isinstance(file.path, Path):
        raise ConfigError(f"{file.label}: Parquet and Arrow files are read from disks only; copy this one first")
    command = [sys.executable, "-P", str(SCRIPT), str(file.path), str(BATCH_ROWS)]
    number, last = 0, dict[str, Any]()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last = _printed(line)
                if "row" in last:
                    number += 1
                    yield number, {name: json_cell(value) for name, value in last["row"].items()}
                elif "bad" in last:
                    number += 1
                    ledger.drop("bad record", f"{file.label}:{number}: {last['bad']}")
        finally:
            process.kill()
    if "error" in last:
        raise ConfigError(f"{file.label}: damaged or not a table ({last['error']})")
    if last.get("end") != number:
        raise ConfigError(
            f"{file.label}: damaged: the process that read it ended after {number} rows (exit status {process.returncode}). "
            "Take the file out of the recipe's sources, or make it again."
        )


def _printed(line: bytes) -> dict[str, Any]:
    """A line of columnar.py; nothing for half a line, as a process leaves that ends amid one."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return found
