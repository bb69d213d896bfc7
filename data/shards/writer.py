"""Write token shards: plain WebDataset tars and a sidecar index each (layout: data/shards/index.py).

    writer = ShardWriter(folder, "train", vocab_size=49152); writer.add(dialogue, source, origin) ...; records = writer.close()

The tars are written here and not by `webdataset.TarWriter`, whose import loads torch and which hands out neither the place nor
the bytes of a block; its members would be the same bytes (tests/data/shards/test_webdataset.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import naming, sync, write_durably

from ..conversation import TokenizedDialogue
from .index import TAR_END, ShardIndex, block_hash, encode_block, tar_member
from .manifest import FORMAT_VERSION

SHARD_BYTES = 256 << 20


class TarFile:
    """A tar while it is written. It appears under its name only when whole."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.size = folder, name, 0
        self._partial = folder / f".{name}.partial"
        self._file = self._partial.open("wb")
        self._digest = hashlib.sha256()

    def put(self, data: bytes) -> None:
        """Append whole members."""
        with naming(self.folder / self.name):
            self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> dict[str, Any]:
        """End the tar and give it its name; the beginning of its manifest record."""
        self.put(TAR_END)
        with naming(self.folder / self.name):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._partial.replace(self.folder / self.name)
        sync(self.folder)
        return {"name": self.name, "bytes": self.size, "sha256": self._digest.hexdigest()}

    def abandon(self) -> None:
        """Remove the unfinished tar."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


class ShardWriter:
    """Appends dialogues to numbered shards of one split, cutting blocks and shards at fixed sizes.

    block_dialogues: dialogues per block; shard_bytes: a shard is closed once it is at least this large; first: its number.
    The bytes depend only on the dialogues, their order and these sizes.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        meta: Mapping[str, Any] | None = None,
        block_dialogues: int = 512,
        shard_bytes: int = SHARD_BYTES,
        first: int = 0,
    ) -> None:
        self.folder, self.split, self.vocab_size, self.first = folder / split, split, vocab_size, first
        self.block_dialogues, self.shard_bytes = block_dialogues, shard_bytes
        self._header = json.dumps({"format": FORMAT_VERSION, "split": split, **(meta or {})}, sort_keys=True).encode()
        self._pending: list[TokenizedDialogue] = []
        self._sources: list[tuple[str, str]] = []
        self._records: list[dict[str, Any]] = []
        self._tar: TarFile | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, dialogue: TokenizedDialogue, source: str, origin: str) -> None:
        """Append one dialogue."""
        if int(dialogue.ids.max()) >= self.vocab_size:
            raise ConfigError(f"dialogue {dialogue.uid}: token id {int(dialogue.ids.max())}, vocabulary is {self.vocab_size}")
        self._pending.append(dialogue)
        self._sources.append((source, origin))
        if len(self._pending) >= self.block_dialogues:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; one manifest record per shard."""
        if self._pending:
            self._flush()
        if self._tar is not None:
            self._finish_shard(self._tar)
        return self._records

    def abandon(self) -> None:
        """Remove the unfinished shard, after a failure."""
        if self._tar is not None:
            self._tar.abandon()
            self._tar = None

    def _flush(self) -> None:
        if self._tar is None:
            self._tar = TarFile(self.folder, f"{self.split}-{self.first + len(self._records):05d}.tar")
            self._tar.put(tar_member("__meta__/shard.json", self._header))
            self._places: list[tuple[int, int, int, int]] = []  # offset, size, xxh3, dialogues of each block
            self._lengths: list[NDArray[np.uint32]] = []
            self._loss: list[NDArray[np.uint32]] = []
        data, lengths, loss = encode_block(self._pending, self._sources, len(self._places), id_dtype(self.vocab_size))
        self._places.append((self._tar.size, len(data), block_hash(data), len(lengths)))
        self._lengths.append(lengths)
        self._loss.append(loss)
        self._tar.put(data)
        self._pending, self._sources = [], []
        if self._tar.size >= self.shard_bytes:
            self._finish_shard(self._tar)

    def _finish_shard(self, tar: TarFile) -> None:
        offset, size, xxh3, dialogues = zip(*self._places, strict=True)
        index = ShardIndex(
            np.array(offset, dtype=np.int64),
            np.array(size, dtype=np.int64),
            np.array(xxh3, dtype=np.uint64),
            np.array(dialogues, dtype=np.uint32),
            np.concatenate(self._lengths),
            np.concatenate(self._loss),
        )
        raw = index.to_bytes()
        write_durably(self.folder / index_path(tar.name), raw)
        self._records.append(
            tar.finish()
            | {
                "index": index_path(tar.name),
                "index_sha256": hashlib.sha256(raw).hexdigest(),
                "blocks": len(index.offset),
                "dialogues": len(index.lengths),
                "tokens": int(index.lengths.sum(dtype=np.int64)),
                "loss_tokens": int(index.loss_tokens.sum(dtype=np.int64)),
            }
        )
        self._tar = None


def id_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


def index_path(shard: str) -> str:
    """Name of the sidecar index of a shard."""
    return shard.removesuffix(".tar") + ".index.npz"
