"""Rows of a CSV or TSV with a header, and of JSON lines, as numbered records: what tables and CSV exports of apps share."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from io import StringIO

from ...ledger import Ledger
from ...raw.files import RawFile

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


def _rows(file: RawFile, encoding: str, ledger: Ledger, header: list[str] | None) -> Iterator[tuple[int, list[str]]]:
    """(number, cells), the names first."""
    csv.field_size_limit(min(sys.maxsize, 1 << 27))
    with file.text(encoding) as text:
        if header is not None:
            yield 0, header
        reader = csv.reader(text, delimiter=delimiter_of(file.head(), file.stem))
        number = 0
        while True:
            number += 1
            try:
                yield number, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                ledger.drop("row that is not CSV", f"{file.label}:{number}: {error}")


def _named(
    found: tuple[int, list[str]] | None, rows: Iterator[tuple[int, list[str]]], file: RawFile, ledger: Ledger
) -> Iterator[tuple[int, Row]]:
    if found is None:
        return
    names = found[1]
    for number, row in rows:
        if not row:
            continue
        if len(row) != len(names):
            ledger.drop("row with another number of cells", f"{file.label}:{number}: {len(row)} instead of {len(names)}")
            continue
        yield number, dict(zip(names, row, strict=True))
