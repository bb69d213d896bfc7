"""Parquet and Arrow (IPC file or stream) tables, record batch by record batch. Needs the package pyarrow.

Columns `messages`, `conversations` or `instruction`/`output` are read like the JSON formats of the same shape; others by
sources.columns or by common column names (data/importers/plain/table.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from chatmill.config import ConfigError

from ...conversation import Conversation
from ...ledger import Ledger
from ...raw.files import RawFile
from ...recipe import SourceSection
from ..datasets import alpaca, openai_messages, sharegpt
from ..records import read_records
from .table import column_map, json_cell, rows_to_conversations

BATCH_ROWS = 1024


def recognise(head: bytes, name: str) -> bool:
    """By their magic numbers."""
    return head[:4] == b"PAR1" or head[:6] == b"ARROW1" or name.lower().endswith(".arrow")


def read(file: RawFile, options: SourceSection, source: str, ledger: Ledger) -> Iterator[Conversation]:
    """Rows in file order."""
    if file.member is not None or file.path.suffix.lower() in (".gz", ".zst", ".bz2", ".xz"):
        raise ConfigError(f"{file.label}: Parquet and Arrow files are read in place; unpack this one first")
    rows = _rows(file)
    first = next(rows, None)
    if first is None:
        ledger.drop("empty table", file.label)
        return

    def numbered() -> Iterator[tuple[int, dict[str, Any]]]:
        yield 1, first
        yield from enumerate(rows, 2)

    names = set(first)
    for column, module in (("messages", openai_messages), ("conversations", sharegpt), ("instruction", alpaca)):
        if column in names and not options.columns:
            yield from read_records(numbered(), module.dialogue, file, source, ledger)
            return
    columns = column_map(list(first), options.columns, file.label)
    yield from rows_to_conversations(numbered(), columns, file, options, source, ledger)


def _rows(file: RawFile) -> Iterator[dict[str, Any]]:
    arrow, parquet = _pyarrow(file)
    try:
        with file.path.open("rb") as raw:
            if file.head(4) == b"PAR1":
                batches = parquet.ParquetFile(raw).iter_batches(batch_size=BATCH_ROWS)
            elif file.head(6) == b"ARROW1":
                reader = arrow.ipc.open_file(raw)
                batches = (reader.get_batch(k) for k in range(reader.num_record_batches))
            else:
                batches = iter(arrow.ipc.open_stream(raw))
            for batch in batches:
                for row in batch.to_pylist():
                    yield {name: json_cell(value) for name, value in row.items()}
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"{file.label}: damaged or not a table ({error})") from error


def _pyarrow(file: RawFile) -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(f"{file.label}: reading Parquet and Arrow needs the package pyarrow (pip install pyarrow)") from error
