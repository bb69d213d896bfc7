"""Reads a Parquet or Arrow file in a process of its own and prints its rows as JSON lines: parquet.py starts it.

    python columnar.py FILE ROWS_PER_BATCH

A file from somewhere else may be made so that pyarrow reads beyond its memory. Here that ends this process only; parquet.py
says which file it was. Lines: {"row": {…}}, {"bad": "why"} for a row that cannot be read, and {"end": n} or {"error": "why"}
last.
Imports nothing of Chatmill, so that it starts quickly.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pyarrow  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]

SILENT_S = 300  # pyarrow may work on one batch for so long; a damaged file could keep it for ever
MOST_MEMORY = 32 << 30


def batches(path: str, rows: int) -> Iterator[Any]:
    """Record batches of a file, fully validated."""
    with open(path, "rb") as raw:  # noqa: PTH123 (a plain script)
        start = raw.read(6)
        raw.seek(0)
        if start[:4] == b"PAR1":
            found = pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=rows)
        elif start == b"ARROW1":
            reader = pyarrow.ipc.open_file(raw)
            found = (reader.get_batch(k) for k in range(reader.num_record_batches))
        else:
            found = iter(pyarrow.ipc.open_stream(raw))
        for batch in found:
            batch.validate(full=True)
            for first in range(0, batch.num_rows, rows):
                yield batch.slice(first, rows)


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch, or one by one what cannot be read in them."""
    try:
        yield from ({"row": row} for row in batch.to_pylist())
    except (ValueError, TypeError, OverflowError, ArithmeticError, pyarrow.ArrowException):
        for k in range(batch.num_rows):
            try:
                yield {"row": batch.slice(k, 1).to_pylist()[0]}
            except (ValueError, TypeError, OverflowError, ArithmeticError, pyarrow.ArrowException) as error:
                yield {"bad": f"{type(error).__name__}: {error}"[:300]}


def plain(value: Any) -> Any:
    """What JSON cannot say: times as ISO 8601, bytes as text where they are UTF-8, everything else as printed."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def main(path: str, rows: int) -> None:
    """Print the rows of a file."""
    alarm = hasattr(signal, "alarm")
    count = 0
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # no such limits here
    try:
        found = batches(path, rows)
        while True:
            if alarm:
                signal.alarm(SILENT_S)
            batch = next(found, None)
            lines = None if batch is None else list(rows_of(batch))
            if alarm:
                signal.alarm(0)  # whoever reads may take their time
            if lines is None:
                break
            for line in lines:
                print(json.dumps(line, default=plain))
                count += 1
    except (OSError, ValueError, TypeError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}), flush=True)
        return
    print(json.dumps({"end": count}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
