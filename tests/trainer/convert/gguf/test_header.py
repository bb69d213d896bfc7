"""Counts in the header of a GGUF file that the file cannot hold: refused at once. The library filled the memory."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.trainer.convert.gguf.header import check_header


def text_of(word: bytes) -> bytes:
    return struct.pack("<Q", len(word)) + word


def gguf(tensors: int, values: int, *rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(rest) + b"\0" * 64


HUGE = 1 << 62
ABSURD = {
    "values": gguf(0, HUGE),
    "tensors": gguf(HUGE, 0),
    "text": gguf(0, 1, struct.pack("<Q", HUGE)),
    "numbers": gguf(0, 1, text_of(b"general.x"), struct.pack("<IIQ", 9, 0, HUGE)),  # filled the memory
    "texts": gguf(0, 1, text_of(b"general.x"), struct.pack("<IIQ", 9, 8, HUGE)),
    "lists of lists": gguf(0, 1, text_of(b"general.x"), struct.pack("<IIQ", 9, 9, 1)),
    "type": gguf(0, 1, text_of(b"general.x"), struct.pack("<I", 99)),
    "dimensions": gguf(1, 0, text_of(b"token_embd.weight"), struct.pack("<I", 1 << 31)),
    "shape": gguf(1, 0, text_of(b"token_embd.weight"), struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),
}


@pytest.mark.parametrize("data", ABSURD.values(), ids=ABSURD.keys())
def test_a_gguf_file_that_asks_for_more_than_it_holds_is_refused_before_it_is_read(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"a\.gguf: (not a readable GGUF file|its header asks for|a tensor of)"):
        check_header(tmp_path / "a.gguf")
    assert time.monotonic() - began < 1
