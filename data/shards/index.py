"""Sidecar index of a token shard, and the tar bytes it points into.

A token shard is an ordinary tar. Each sample is one block of dialogues, five members in this order:

    NNNNNN.ids.npy   1-D uint16 (vocabulary <= 65,536) or uint32, all dialogues end to end
    NNNNNN.len.npy   uint32 (n,) tokens per dialogue
    NNNNNN.mask.npy  uint8, np.packbits of the loss mask over all tokens
    NNNNNN.uid.npy   bytes (n,) dialogue ids
    NNNNNN.src.json  list of [source, origin], one per dialogue: lineage back to the raw file and line

The index (`<shard>.index.npz`) holds the byte range and xxh3 of every block and the two lengths of every dialogue, so that
opening a data set reads no block at all. Nothing is ever unpickled.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from chatmill.config import ConfigError

from ..conversation import TokenizedDialogue

TAR_END = bytes(1024)
MEMBERS = ("ids.npy", "len.npy", "mask.npy", "uid.npy", "src.json")
_ARRAYS = ("offset", "size", "xxh3", "dialogues", "lengths", "loss_tokens")


class DamagedShardError(ConfigError):
    """A shard or index whose bytes are not those that were written."""


@dataclass(frozen=True)
class TokenBlock:
    """One block: ids uint16 or uint32 (n_tokens,), offsets int64 (n+1,), loss_mask bool (n_tokens,), n uids.

    lineage: JSON of [source, origin] of each; where: what to call the block in an error.
    """

    ids: NDArray[Any]
    offsets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    uids: list[str]
    lineage: bytes
    where: str

    @cached_property
    def sources(self) -> list[tuple[str, str]]:
        """(source, origin) of each dialogue; parsed when asked for, training never asks."""
        try:
            return [(source, origin) for source, origin in json.loads(self.lineage)]
        except ValueError as error:
            raise DamagedShardError(f"{self.where}: unreadable lineage ({error})") from error

    def keeping(self, chosen: NDArray[np.bool_]) -> TokenBlock:
        """The block with the chosen ones (n,) of its dialogues alone."""
        lengths = np.diff(self.offsets)
        tokens = np.repeat(chosen, lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[chosen])])
        uids = [uid for uid, stays in zip(self.uids, chosen.tolist(), strict=True) if stays]
        pairs = [pair for pair, stays in zip(self.sources, chosen.tolist(), strict=True) if stays]
        lineage = json.dumps(pairs, ensure_ascii=False).encode("utf-8", "surrogatepass")
        return TokenBlock(self.ids[tokens], offsets, self.loss_mask[tokens], uids, lineage, self.where)


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """offset, size int64 (B,) bytes; xxh3 uint64 (B,); dialogues uint32 (B,) per block; lengths, loss_tokens uint32 (N,)."""

    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    xxh3: NDArray[np.uint64]
    dialogues: NDArray[np.uint32]
    lengths: NDArray[np.uint32]
    loss_tokens: NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        """npz; the same arrays always give the same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: getattr(self, name) for name in _ARRAYS})
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardIndex:
        """Inverse of to_bytes; DamagedShardError when it is not such an index."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                index = cls(**{name: arrays[name] for name in _ARRAYS})
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise DamagedShardError(f"{where}: not a shard index ({error}). Rebuild the data set.") from error
        if int(index.dialogues.sum()) != len(index.lengths) or len(index.lengths) != len(index.loss_tokens):
            raise DamagedShardError(f"{where}: the index contradicts itself. Rebuild the data set.")
        return index


def tar_member(name: str, data: bytes) -> bytes:
    """Header, data and padding of one tar member, with no clock, user or mode of this machine in it."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def walk_members(data: bytes | memoryview, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, start, size) of each member in tar bytes, checksums and bounds checked. Stops at the end marker.

    Only plain files with relative names that stay inside the folder are accepted.
    """
    position, view = 0, memoryview(data)
    while position + 512 <= len(view):
        header = bytes(view[position : position + 512])
        if header == bytes(512):
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise DamagedShardError(f"{where}: bad tar header at byte {position} ({error})") from error
        if not info.isfile():
            raise DamagedShardError(f"{where}: member {info.name!r} at byte {position} is not a plain file")
        if info.name.startswith(("/", "\\")) or ".." in info.name.replace("\\", "/").split("/"):
            raise DamagedShardError(f"{where}: member {info.name!r} leads outside its folder")
        start = position + 512
        if start + info.size > len(view):
            raise DamagedShardError(
                f"{where}: member {info.name!r} is cut short: {info.size} bytes announced, {len(view) - start} there"
            )
        yield info.name, start, info.size
        position = start + info.size + (-info.size % 512)
    if position > len(view):
        raise DamagedShardError(f"{where}: cut short in the padding of its last member")
    if position != len(view):
        raise DamagedShardError(f"{where}: {len(view) - position} stray bytes after the last member")


def encode_block(
    dialogues: Sequence[TokenizedDialogue], sources: Sequence[tuple[str, str]], number: int, id_dtype: type[np.generic]
) -> tuple[bytes, NDArray[np.uint32], NDArray[np.uint32]]:
    """(tar bytes, lengths, loss tokens) of one block. Refuses masks that could not train anything."""
    for dialogue in dialogues:
        check_mask(dialogue)
    lengths = np.array([len(d.ids) for d in dialogues], dtype=np.uint32)
    loss = np.array([int(d.loss_mask.sum()) for d in dialogues], dtype=np.uint32)
    ids = np.concatenate([d.ids for d in dialogues]).astype(id_dtype)
    mask = np.packbits(np.concatenate([d.loss_mask for d in dialogues]))
    uids = np.array([d.uid.encode() for d in dialogues])
    lineage = json.dumps([list(pair) for pair in sources], ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    payload = (_npy(ids), _npy(lengths), _npy(mask), _npy(uids), lineage)
    data = b"".join(tar_member(f"{number:06d}.{name}", part) for name, part in zip(MEMBERS, payload, strict=True))
    return data, lengths, loss


def check_mask(dialogue: TokenizedDialogue) -> None:
    """Refuse a mask of the wrong length, without any target, or with the first token as a target."""
    ids, mask = dialogue.ids, dialogue.loss_mask
    if len(ids) != len(mask) or len(ids) < 2:
        raise ConfigError(f"dialogue {dialogue.uid}: {len(ids)} tokens and {len(mask)} mask entries; expected equal, 2 or more")
    if not mask.any():
        raise ConfigError(f"dialogue {dialogue.uid}: no token carries loss; such a sample trains nothing")
    if mask[0]:
        raise ConfigError(f"dialogue {dialogue.uid}: token 0 carries loss, but nothing comes before it to predict it from")


def decode_block(data: bytes, where: str) -> TokenBlock:
    """Inverse of encode_block."""
    whole = memoryview(data)
    parts = {name.partition(".")[2]: whole[start : start + size] for name, start, size in walk_members(data, where)}
    if tuple(parts) != MEMBERS:
        raise DamagedShardError(f"{where}: expected members {MEMBERS}, found {tuple(parts)}")
    return _decode_parts(parts, where)


def decode_sample(sample: Mapping[str, Any]) -> TokenBlock:
    """A block as `webdataset.WebDataset(shard)` yields it: member name -> bytes, undecoded."""
    where = f"{sample.get('__url__')}, block {sample.get('__key__')}"
    missing = [name for name in MEMBERS if name not in sample]
    if missing:
        raise DamagedShardError(f"{where}: no member {missing[0]}. Expected a token shard, and samples that are not decoded.")
    return _decode_parts({name: memoryview(sample[name]) for name in MEMBERS}, where)


def _decode_parts(parts: Mapping[str, memoryview], where: str) -> TokenBlock:
    try:
        ids, lengths, packed, uids = (_read_npy(parts[name]) for name in MEMBERS[:4])
    except (ValueError, EOFError) as error:
        raise DamagedShardError(f"{where}: unreadable block ({error})") from error
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] != len(ids) or len(uids) != len(lengths) or len(packed) != (len(ids) + 7) // 8:
        raise DamagedShardError(f"{where}: lengths, ids, mask and uids of the block do not belong together")
    mask = np.unpackbits(packed, count=len(ids)).view(np.bool_)
    return TokenBlock(ids, offsets, mask, [uid.decode() for uid in uids.tolist()], bytes(parts["src.json"]), where)


def block_hash(data: bytes) -> int:
    """xxh3-64 of a block's tar bytes."""
    return xxhash.xxh3_64_intdigest(data)


_PLAIN_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][uiS]\d+)', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.S
)


def _read_npy(data: memoryview) -> NDArray[Any]:
    """np.load without a copy, and without its evaluation of the header for plain 1-D arrays, which costs 50 us each."""
    header = _PLAIN_NPY.match(data[:128])
    if header is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        return array
    kind, count = np.dtype(header[2].decode()), int(header[3])
    if len(data) != header.end() + count * kind.itemsize:
        raise ValueError(f"{len(data) - header.end()} bytes, the header announces {count} of {kind.itemsize}")
    return np.frombuffer(data, kind, count, header.end())


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
