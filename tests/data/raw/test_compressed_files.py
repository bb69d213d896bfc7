"""Compressed raw files: all of one is read, whoever packed it; a damaged one is refused by name, never read short or left out.

python -m pytest tests/data/raw/test_compressed_files.py
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from chatmill.config import ConfigError
from chatmill.data.pipeline.inputs import describe_inputs, raw_files
from chatmill.data.raw.files import RawFile
from chatmill.data.recipe import DataRecipe

LINES = [f'{{"text": "{random.Random(n).random()} and more"}}\n'.encode() for n in range(8_000)]
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def count(path: Path) -> int:
    """Lines of a file."""
    return sum(1 for _ in RawFile(path).lines())


@pytest.mark.parametrize("suffix", PACK)
def test_files_packed_in_pieces_are_read_to_the_last_one(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.jsonl.{suffix}"
    path.write_bytes(PACK[suffix](b"".join(LINES[:5_000])) + PACK[suffix](b"".join(LINES[5_000:])))
    assert [line.encode() for _, line in RawFile(path).lines()] == LINES


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_that_is_cut_off_is_never_read_short(suffix: str, tmp_path: Path) -> None:
    path, packed = tmp_path / f"x.jsonl.{suffix}", PACK[suffix](b"".join(LINES))
    for size in (len(packed) // 2, len(packed) - 1):
        path.write_bytes(packed[:size])
        with pytest.raises(ConfigError, match=rf"source x\.jsonl\.{suffix}: damaged, cut off"):
            count(path)


@pytest.mark.parametrize("suffix", [*PACK, "zip"])
def test_a_text_that_calls_itself_compressed_is_refused_alone_and_among_others(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"x.jsonl.{suffix}").write_bytes(b"".join(LINES[:3]))
    (tmp_path / "good.jsonl").write_bytes(b"".join(LINES[:3]))
    for source in (tmp_path / f"x.jsonl.{suffix}", tmp_path):
        fields = {"name": "x", "sources": [{"path": str(source)}], "tokenizer": {"train": {"vocab_size": 300}}}
        recipe = DataRecipe.model_validate(fields)
        with pytest.raises(ConfigError, match=rf"source x\.jsonl\.{suffix}: .*Fetch it again, rename it, or take it out"):
            describe_inputs(recipe, raw_files(recipe)[0])


def test_a_flipped_byte_in_a_zip_is_named_with_its_member(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("in/x.jsonl", b"".join(LINES))
    packed = bytearray(buffer.getvalue())
    packed[len(packed) // 2] ^= 1
    (tmp_path / "x.zip").write_bytes(packed)
    with pytest.raises(ConfigError, match=r"source x\.zip: damaged.*in/x\.jsonl"):
        sum(1 for _ in RawFile(tmp_path / "x.zip", "in/x.jsonl").lines())
