"""Rows of a CSV or TSV with a header, and of JSON lines, as numbered records: what tables and CSV exports of apps share."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from io import StringIO
from typing import IO, cast

from chatmill.formatting import counted

from ...ledger import Ledger
from ...raw.files import RawFile
from ...raw.limits import RECORD_CHARS, TOO_LONG, Lines, bounded_lines

Row = dict[str, str]


def delimiter_of(head: bytes, name: str) -> str:
    """Comma, semicolon (spreadsheets of many countries), tab or bar: whichever the header row has most of, outside quotes."""
    if name.lower().endswith(".tsv"):
        return "\t"
    header = re.sub(r'"[^"]*"', "", head.decode("utf-8", "replace").split("\n")[0])
    return max(",;\t|", key=header.count)


def header_of(head: bytes) -> list[str]:
    """The cells of the first row of a CSV that begins like this; none where it has no end."""
    text = head.decode("utf-8", "ignore").removeprefix("\ufeff")
    try:
        return [cell.strip() for cell in next(csv.reader(StringIO(text), delimiter=delimiter_of(head, "")), [])]
    except csv.Error:
        return []


def csv_rows(
    file: RawFile, encoding: str, ledger: Ledger, header: list[str] | None = None
) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    """(column names, numbered rows); a row number counts records, the header is row 1. header: the file has none of its own.

    A row with another number of cells, or one that is no CSV, is dropped and counted. The names are empty for an empty file.
    """
    rows = _rows(file, encoding, ledger, header)
    found = next(rows, None)
    return ([] if found is None else found[1]), _named(found, rows, file, ledger)


def _rows(file: RawFile, encoding: str, ledger: Ledger, header: list[str] | None) -> Iterator[tuple[int, list[str], int]]:
    """(number, cells, lines that they stand on), the names first."""
    csv.field_size_limit(RECORD_CHARS)
    with file.text(encoding) as text:
        if header is not None:
            yield 0, header, 1
        lines = _RowLines(text)
        reader = csv.reader(lines, delimiter=delimiter_of(file.head(), file.stem))
        number = 0
        while True:
            number, lines.count, lines.size = number + 1, 0, 0
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                ledger.drop("row that is not CSV", f"{file.label}:{number}: {error}", max(1, lines.count))
            else:
                if lines.cut:
                    where = f"{file.label}:{number}: a quote that does not end, on {counted(lines.count, 'line')}"
                    ledger.drop("row that is not CSV", where, lines.count)
                    return
                yield number, row, lines.count


class _RowLines:
    """The lines of a table, for csv.reader, with a limit for those of one row."""

    def __init__(self, text: IO[str]) -> None:
        self.lines = bounded_lines(cast(Lines[str], text))
        self.count = self.size = 0  # of the row that is being read
        self.cut = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        _, line = next(self.lines, (0, ""))
        if line == "":
            self.cut = self.count > 0  # the reader is inside of a quoted cell
            raise StopIteration
        self.count += 1
        self.size += RECORD_CHARS + 1 if line is None else len(line)
        if line is None or self.size > RECORD_CHARS:
            raise csv.Error(TOO_LONG)
        return line


def _named(
    found: tuple[int, list[str], int] | None, rows: Iterator[tuple[int, list[str], int]], file: RawFile, ledger: Ledger
) -> Iterator[tuple[int, Row]]:
    if found is None:
        return
    names = found[1]
    for number, row, lines in rows:
        if not row:
            continue
        if len(row) != len(names):  # a stray quote makes one row of many: each line of it may have been one
            where = f"{file.label}:{number}: {len(row)} instead of {len(names)} on {counted(lines, 'line')}"
            ledger.drop("row with another number of cells", where, max(1, lines))
            continue
        yield number, dict(zip(names, row, strict=True))
