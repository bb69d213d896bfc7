"""Token shards, read exactly: random access to checked blocks of one split.

    dataset = TokenDataset.open("corpora/chitchat", "train"); block = dataset.read_block(0)

A shard is a plain WebDataset tar (`webdataset.WebDataset(shard)` reads every sample). This reader needs one pread per block,
checks its xxh3, and never yields fewer dialogues than the manifest promises: damage is an error that names the file.
Blocks in the data set's quarantine (data/shards/quarantine.py) are left out where the reader agrees to it, and only those.
Dialogues that a longer export has replaced (data/shards/manifest.py) are not there for whoever reads here.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.files import read_unchanged

from .index import DamagedShardError, ShardIndex, TokenBlock, block_hash, decode_block
from .manifest import as_of, dropped, fingerprint, fingerprints, read_manifest
from .quarantine import HeldBlock, check_consent, read_quarantine


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where the bytes of a block lie. shard: its number in the split; offset, size: in bytes; xxh3: what they hash to."""

    shard: int
    offset: int
    size: int
    xxh3: int


class TokenDataset:
    """Random access to the blocks of one split. Opening reads the manifest and the indices, no tokens.

    Only `block_bytes` reads token shards: a remote data set overrides it, and `block_name`.
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
        self._first_blocks = np.cumsum([0, *(len(i.offset) for i in indices)])  # of each shard
        self._number = np.arange(len(counts))  # of each block, as the shards count
        self._written: dict[int, tuple[NDArray[np.bool_], NDArray[np.uint32]]] = {}
        if gone := dropped(manifest, split):
            self._leave_out(np.array(gone))
        self._files: dict[int, int] = {}
        self.grown_to: int | None = None  # dialogues that the split holds now, where an earlier generation of it is read here
        self.held: tuple[HeldBlock, ...] = ()
        self.quarantined: frozenset[int] = frozenset()

    def _leave_out(self, gone: NDArray[np.int64]) -> None:
        """Take the dialogues at these places of the shards out of all that is public, and blocks that hold no others."""
        stays = np.ones(len(self.lengths), dtype=np.bool_)
        stays[gone] = False
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(stays)])[self.block_starts]
        self._number = used = np.flatnonzero(np.diff(before))
        for b, number in enumerate(used.tolist()):
            part = slice(int(self.block_starts[number]), int(self.block_starts[number + 1]))
            if not stays[part].all():  # which of its dialogues stay, and the lengths of all
                self._written[b] = stays[part], self.lengths[part]
        self.lengths, self.loss_tokens = self.lengths[stays], self.loss_tokens[stays]
        self.block_starts = np.append(before[:-1][used], before[-1])
        self._block_shard, self._offset = self._block_shard[used], self._offset[used]
        self._size, self._xxh3 = self._size[used], self._xxh3[used]

    @classmethod
    def open(cls, path: str | Path, split: str, *, damaged_blocks: float = 0.0, fingerprint: str | None = None) -> TokenDataset:
        """Open one split of a data-set folder. Raises ConfigError naming what is missing or damaged.

        damaged_blocks: largest share of the split's blocks that its quarantine may leave out (data/shards/quarantine.py).
        fingerprint: of an earlier generation of a set that has grown since: that generation is opened. Where the set never had
        it, all of it is opened; its own fingerprint tells.
        """
        folder = Path(path)

        def read() -> TokenDataset:
            whole = manifest = read_manifest(folder)
            held = read_quarantine(folder, fingerprints(manifest)).get(split, ())
            if fingerprint is not None and split in manifest["splits"]:
                manifest = as_of(manifest, split, fingerprint) or manifest
                names = {record["name"] for record in manifest["splits"][split]["shards"]}
                held = tuple(block for block in held if block.shard in names)
            dataset = cls.from_manifest(folder, manifest, split, held, damaged_blocks)
            dataset.grown_to = None if manifest is whole else int(whole["splits"][split]["dialogues"])
            return dataset

        return read_unchanged(folder, read)  # a build may publish another one meanwhile

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
        records = self.manifest["splits"][self.split]["shards"]
        starts = dict(zip((record["name"] for record in records), self._first_blocks.tolist(), strict=False))
        place = {number: b for b, number in enumerate(self._number.tolist())}
        numbers = [starts[block.shard] + block.block for block in held]
        self.held = held
        self.quarantined = frozenset(place[number] for number in numbers if number in place)

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
        return f"{self._shards[int(self._block_shard[b])]}, block {self._number[b]}"

    def block_bytes(self, b: int) -> bytes:
        """The bytes of block b as they lie there; `read_block` checks them."""
        place = self.block_place(b)
        return os.pread(self._descriptor(place.shard), place.size, place.offset)

    def read_block(self, b: int) -> TokenBlock:
        """Block b, its xxh3 and its lengths checked."""
        where = self.block_name(b)
        if b in self.quarantined:
            raise DamagedShardError(f"{where}: in the quarantine of the data set; it must not be read.")
        data, place = self.block_bytes(b), self.block_place(b)
        if len(data) != place.size or block_hash(data) != place.xxh3:
            raise DamagedShardError(
                f"{where}: bytes differ from those written (xxh3).\nRestore it: chatmill data verify {self.path} --repair\n"
                f"or continue without it: chatmill data verify {self.path} --quarantine SHARE"
            )
        block = decode_block(data, where)
        if (written := self._written.get(b)) is not None and len(block.uids) == len(written[0]):
            if not np.array_equal(np.diff(block.offsets), written[1]):
                raise DamagedShardError(f"{where}: lengths differ from the index. Rebuild the data set.")
            block = block.keeping(written[0])
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
