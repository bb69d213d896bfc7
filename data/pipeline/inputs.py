"""The raw files of a data recipe: which are read, in which format, and what identifies their bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from chatmill.files import sha256_file

from ..importers.registry import importer, is_recognised, recognise, source_files
from ..raw.files import RawFile, distinct
from ..recipe import DataRecipe
from ..remote.files import RemotePath


def raw_files(recipe: DataRecipe) -> tuple[list[tuple[int, RawFile]], list[str]]:
    """(source number, file) of all raw files that are read, and the labels of those of a folder or glob that no format fits.

    A file that a source names itself must be readable; beside others a picture or a README is no mistake.
    """
    found = [(number, file) for number, source in enumerate(recipe.sources) for file in source_files(source)]
    labelled = zip((number for number, _ in found), distinct([file for _, file in found]), strict=True)
    files, left_out = list[tuple[int, RawFile]](), list[str]()
    per_source = Counter(number for number, _ in found)
    for number, file in labelled:
        guessed = per_source[number] > 1 and recipe.sources[number].format == "auto"
        if guessed and not is_recognised(file):
            left_out.append(file.label)
        else:
            files.append((number, file))
    for number in sorted(set(per_source) - {number for number, _ in files}):
        recognise(next(file for n, file in found if n == number))  # says what is wrong with the first
    return files, left_out


def describe_inputs(recipe: DataRecipe, files: list[tuple[int, RawFile]]) -> list[dict[str, Any]]:
    """One record per raw file: source, file, format, bytes, sha256; each file is hashed once."""
    once = {file.path: file for _, file in files}
    with ThreadPoolExecutor(8) as pool:
        hashes = dict(zip(once, pool.map(input_sha256, once.values()), strict=True))
    records: list[dict[str, Any]] = []
    for number, file in files:
        given = recipe.sources[number].format
        kind = given if given != "auto" else recognise(file)
        importer(kind)
        records.append(
            {"source": number, "file": file.label, "format": kind, "bytes": input_bytes(file), "sha256": hashes[file.path]}
        )
    return records


def input_sha256(file: RawFile) -> str:
    """sha256 of a raw file; of a folder, over the names and hashes of its files."""
    if not file.path.is_dir():
        return _raw_sha256(file.path)
    lines = [f"{part.path.name} {_raw_sha256(part.path)}" for part in file.parts()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _raw_sha256(path: Path | RemotePath) -> str:
    return path.sha256() if isinstance(path, RemotePath) else sha256_file(path)


def input_bytes(file: RawFile) -> int:
    """Size of a raw file or of all files of a folder."""
    return sum(part.path.stat().st_size for part in RawFile(file.path).parts())
