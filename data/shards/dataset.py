"""Token shards: write and read plain WebDataset tars exactly.

    writer = ShardWriter(folder, "train", vocab_size=49152); writer.add(dialogue, source, origin) ...; records = writer.close()
    dataset = TokenDataset.open("corpora/chitchat", "train"); block = dataset.read_block(0)

Contract: `webdataset.WebDataset(shard)` reads every sample of every shard; this reader needs one pread per block, checks its
xxh3, and never yields fewer dialogues than the manifest promises: damage is an error that names the file, never a short read.
Blocks in the data set's quarantine (data/shards/quarantine.py) are left out where the reader agrees to it, and only those.
Layout of a shard and of its sidecar index: data/shards/index.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import sha256_file, sync, write_durably

from ..conversation import TokenizedDialogue
from .index import (
    TAR_END,
    DamagedShardError,
    ShardIndex,
    TokenBlock,
    block_hash,
    decode_block,
    encode_block,
    tar_member,
)
from .quarantine import HeldBlock, check_consent, read_quarantine

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# What a manifest may call a shard: a file of its own folder. No path, no `pipe:` or URL, nothing hidden.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


def id_dtype(vocab_size: int) -> type[np.generic]:
    """The narrowest unsigned type that holds every token id."""
    return np.uint16 if vocab_size <= 65_536 else np.uint32


class ShardWriter:
    """Appends dialogues to numbered shards of one split, cutting blocks and shards at fixed sizes.

    block_dialogues: dialogues per block; shard_bytes: a shard is closed once it is at least this large.
    The bytes depend only on the dialogues, their order and these sizes. A shard appears under its name only when whole.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        meta: Mapping[str, Any] | None = None,
        block_dialogues: int = 512,
        shard_bytes: int = 256 << 20,
    ) -> None:
        self.folder, self.split, self.vocab_size = folder / split, split, vocab_size
        self.block_dialogues, self.shard_bytes = block_dialogues, shard_bytes
        self._header = json.dumps({"format": FORMAT_VERSION, "split": split, **(meta or {})}, sort_keys=True).encode()
        self._pending: list[TokenizedDialogue] = []
        self._sources: list[tuple[str, str]] = []
        self._records: list[dict[str, Any]] = []
        self._file: Any = None
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
        if self._file is not None:
            self._finish_shard()
        return self._records

    def abandon(self) -> None:
        """Close and remove the unfinished shard, after a failure."""
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _flush(self) -> None:
        if self._file is None:
            self._open_shard()
        number = len(self._offsets)
        data, lengths, loss = encode_block(self._pending, self._sources, number, id_dtype(self.vocab_size))
        self._offsets.append(self._position)
        self._sizes.append(len(data))
        self._hashes.append(block_hash(data))
        self._counts.append(len(lengths))
        self._lengths.append(lengths)
        self._loss.append(loss)
        self._put(data)
        self._pending, self._sources = [], []
        if self._position >= self.shard_bytes:
            self._finish_shard()

    def _open_shard(self) -> None:
        self._name = f"{self.split}-{len(self._records):05d}.tar"
        self._file = (self.folder / f".{self._name}.partial").open("wb")
        self._digest, self._position = hashlib.sha256(), 0
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._hashes: list[int] = []
        self._counts: list[int] = []
        self._lengths: list[NDArray[np.uint32]] = []
        self._loss: list[NDArray[np.uint32]] = []
        self._put(tar_member("__meta__/shard.json", self._header))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._position += len(data)

    def _finish_shard(self) -> None:
        self._put(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        index = ShardIndex(
            np.array(self._offsets, dtype=np.int64),
            np.array(self._sizes, dtype=np.int64),
            np.array(self._hashes, dtype=np.uint64),
            np.array(self._counts, dtype=np.uint32),
            np.concatenate(self._lengths),
            np.concatenate(self._loss),
        )
        raw = index.to_bytes()
        index_name = index_path(self._name)
        write_durably(self.folder / index_name, raw)
        (self.folder / f".{self._name}.partial").replace(self.folder / self._name)
        sync(self.folder)
        self._records.append(
            {
                "name": self._name,
                "bytes": self._position,
                "sha256": self._digest.hexdigest(),
                "index": index_name,
                "index_sha256": hashlib.sha256(raw).hexdigest(),
                "blocks": len(index.offset),
                "dialogues": len(index.lengths),
                "tokens": int(index.lengths.sum(dtype=np.int64)),
                "loss_tokens": int(index.loss_tokens.sum(dtype=np.int64)),
            }
        )


def index_path(shard: str) -> str:
    """Name of the sidecar index of a shard."""
    return shard.removesuffix(".tar") + ".index.npz"


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a data-set folder; ConfigError in words where there is none or it is damaged."""
    file = path / MANIFEST
    if not file.is_file():
        what = "has no manifest.json" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"data set {path}: {what}. Build it with: chatmill data build RECIPE\n"
            "If it lies elsewhere now: data.path=FOLDER for training, --data FOLDER for `chatmill eval`."
        )
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(raw: bytes, where: str) -> dict[str, Any]:
    """A manifest whose format is known and whose names stay inside the data-set folder."""
    try:
        manifest = json.loads(raw)
    except ValueError as error:
        raise DamagedShardError(f"{where}: not JSON ({error}). Rebuild the data set.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ConfigError(f"{where}: format {found!r}, this version reads {FORMAT_VERSION}. Rebuild the data set.")
    for name in _names(manifest):
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise DamagedShardError(f"{where}: names a file outside of the folder: {name!r}. Rebuild the data set.")
    return manifest


def _names(manifest: Mapping[str, Any]) -> Iterator[Any]:
    """Every file or folder name in a manifest, path part by path part."""
    for split, part in manifest.get("splits", {}).items():
        yield split
        for record in part["shards"]:
            yield from (record["name"], record["index"])
    for records in manifest.get("dialogues", {}).values():
        yield from (record["name"] for record in records)
    for path in manifest.get("files", {}):
        yield from path.split("/")


def fingerprints(manifest: Mapping[str, Any]) -> dict[str, str]:
    """fingerprint() of every split."""
    return {split: fingerprint(manifest, split) for split in manifest["splits"]}


def fingerprint(manifest: Mapping[str, Any], split: str) -> str:
    """sha256 that changes with any token, mask, order, tokenizer or template of the split."""
    parts = [str(manifest["tokenizer_sha256"]), str(manifest["template_sha256"]), split]
    parts += [record["sha256"] for record in manifest["splits"][split]["shards"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where the bytes of a block lie. shard: its number in the split; offset, size: in bytes; xxh3: what they hash to."""

    shard: int
    offset: int
    size: int
    xxh3: int


class TokenDataset:
    """Random access to the blocks of one split. Opening reads the manifest and the indices, no tokens.

    Where the bytes come from is `block_bytes` alone: a data set that lies elsewhere replaces it, and `block_name`.
    """

    def __init__(self, path: Path, split: str, manifest: dict[str, Any], indices: list[ShardIndex]) -> None:
        self.path, self.split, self.manifest = path, split, manifest
        self.vocab_size = int(manifest["vocab_size"])
        self.preference = bool(manifest.get("preference", False))  # dialogues are pairs (data/preference.py)
        self.fingerprint = fingerprint(manifest, split)
        self._shards = [path / split / record["name"] for record in manifest["splits"][split]["shards"]]
        empty = np.zeros(0, dtype=np.uint32)
        self.lengths: NDArray[np.uint32] = np.concatenate([empty, *(i.lengths for i in indices)])
        self.loss_tokens: NDArray[np.uint32] = np.concatenate([empty, *(i.loss_tokens for i in indices)])
        counts = np.concatenate([empty, *(i.dialogues for i in indices)])
        self.block_starts: NDArray[np.int64] = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=self.block_starts[1:])
        self._block_shard = np.repeat(np.arange(len(indices)), [len(i.offset) for i in indices])
        self._offset = np.concatenate([np.zeros(0, np.int64), *(i.offset for i in indices)])
        self._size = np.concatenate([np.zeros(0, np.int64), *(i.size for i in indices)])
        self._xxh3 = np.concatenate([np.zeros(0, np.uint64), *(i.xxh3 for i in indices)])
        self._files: dict[int, int] = {}
        self.held: tuple[HeldBlock, ...] = ()
        self.quarantined: frozenset[int] = frozenset()

    @classmethod
    def open(cls, path: str | Path, split: str, *, damaged_blocks: float = 0.0) -> TokenDataset:
        """Open one split of a data-set folder. Raises ConfigError naming what is missing or damaged.

        damaged_blocks: largest share of the split's blocks that its quarantine may leave out (data/shards/quarantine.py).
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        held = read_quarantine(folder, fingerprints(manifest)).get(split, ())
        return cls.from_manifest(folder, manifest, split, held, damaged_blocks)

    @classmethod
    def from_manifest(
        cls,
        folder: Path,
        manifest: dict[str, Any],
        split: str,
        held: tuple[HeldBlock, ...] = (),
        damaged_blocks: float = 0.0,
    ) -> TokenDataset:
        """open() with a manifest and a quarantine that are at hand, or not yet written."""
        if split not in manifest["splits"]:
            raise ConfigError(f"data set {folder}: no split {split!r}; it has {', '.join(manifest['splits'])}")
        indices = []
        advice = f"Run: chatmill data verify {folder} --repair, or rebuild the data set."
        for record in manifest["splits"][split]["shards"]:
            shard, index_file = folder / split / record["name"], folder / split / record["index"]
            known = {block.block for block in held if block.shard == record["name"]}
            for file in (shard, index_file):
                if not file.is_file() and not (file is shard and known):
                    raise ConfigError(f"data set {folder}: {file.relative_to(folder)} is missing. {advice}")
            size = shard.stat().st_size if shard.is_file() else 0
            if size != record["bytes"] and not known:
                raise DamagedShardError(f"{shard}: {size} bytes, the manifest says {record['bytes']}. {advice}")
            raw = index_file.read_bytes()
            if hashlib.sha256(raw).hexdigest() != record["index_sha256"]:
                raise DamagedShardError(f"{index_file}: not the index that was written. {advice}")
            index = ShardIndex.from_bytes(raw, str(index_file))
            lost = [b for b in np.flatnonzero(index.offset + index.size > size).tolist() if b not in known]
            if lost:
                raise DamagedShardError(f"{shard}: cut short before block {lost[0]}, not in its quarantine. {advice}")
            indices.append(index)
        dataset = cls(folder, split, manifest, indices)
        if len(dataset.lengths) == 0:
            raise ConfigError(f"data set {folder}: split {split!r} is empty")
        dataset.hold(held, damaged_blocks)
        return dataset

    def hold(self, held: tuple[HeldBlock, ...], damaged_blocks: float) -> None:
        """Leave these blocks out; ConfigError where they are more than the share agreed to."""
        if held:
            check_consent(str(self.path), self.split, held, self.n_blocks, damaged_blocks)
        first, starts = 0, {}
        for record in self.manifest["splits"][self.split]["shards"]:
            starts[record["name"]] = first
            first += int(np.count_nonzero(self._block_shard == len(starts) - 1))
        self.held = held
        self.quarantined = frozenset(starts[block.shard] + block.block for block in held)

    @property
    def identity(self) -> str:
        """sha256 over the fingerprint and the quarantine: equal on two machines that would train on the same."""
        return hashlib.sha256(f"{self.fingerprint}\n{sorted(self.quarantined)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}

    @property
    def n_blocks(self) -> int:
        """Number of blocks B."""
        return len(self._offset)

    def block_place(self, b: int) -> BlockPlace:
        """Where block b lies, by the index."""
        return BlockPlace(int(self._block_shard[b]), int(self._offset[b]), int(self._size[b]), int(self._xxh3[b]))

    def block_name(self, b: int) -> str:
        """What to call block b in an error."""
        return f"{self._shards[int(self._block_shard[b])]}, block {b}"

    def block_bytes(self, b: int) -> bytes:
        """The bytes of block b as they lie there; `read_block` checks them."""
        place = self.block_place(b)
        return os.pread(self._descriptor(place.shard), place.size, place.offset)

    def read_block(self, b: int) -> TokenBlock:
        """Block b, its xxh3 and its lengths checked."""
        where = self.block_name(b)
        if b in self.quarantined:
            raise DamagedShardError(f"{where}: in the quarantine of the data set; nobody may read it.")
        data, place = self.block_bytes(b), self.block_place(b)
        if len(data) != place.size or block_hash(data) != place.xxh3:
            raise DamagedShardError(
                f"{where}: bytes differ from those written (xxh3).\nRestore it: chatmill data verify {self.path} --repair\n"
                f"or go on without it: chatmill data verify {self.path} --quarantine SHARE"
            )
        block = decode_block(data, where)
        first, last = int(self.block_starts[b]), int(self.block_starts[b + 1])
        if not np.array_equal(np.diff(block.offsets), self.lengths[first:last]):
            raise DamagedShardError(f"{where}: lengths differ from the index. Rebuild the data set.")
        return block

    def uid(self, i: int) -> str:
        """Id of dialogue i in population order (reads its block)."""
        b = int(np.searchsorted(self.block_starts, i, side="right")) - 1
        return self.read_block(b).uids[i - int(self.block_starts[b])]

    def readable(self, i: int) -> int:
        """Dialogue i, or where its block is in the quarantine, the first one after it (around the end) whose block is not."""
        b = int(np.searchsorted(self.block_starts, i, side="right")) - 1
        for k in range(self.n_blocks):
            if (b + k) % self.n_blocks not in self.quarantined:
                return i if k == 0 else int(self.block_starts[(b + k) % self.n_blocks])
        raise DamagedShardError(f"data set {self.path}: every block of {self.split} is in its quarantine.")

    def check_shards(self) -> list[str]:
        """One line for every shard whose sha256 is not the manifest's."""
        problems = []
        for path, record in zip(self._shards, self.manifest["splits"][self.split]["shards"], strict=True):
            found = sha256_file(path)
            if found != record["sha256"]:
                problems.append(f"{path}: sha256 {found[:16]}…, the manifest says {record['sha256'][:16]}…")
        return problems

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= 64:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self._shards[shard], os.O_RDONLY)
        return self._files[shard]

    def close(self) -> None:
        """Close the open shard files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()
