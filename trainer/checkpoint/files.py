"""The files of a checkpoint folder: tensors in safetensors, and a manifest with a hash of everything, itself included.

    {"checksum": xxh3 of this file with the checksum's 32 digits as zeros, "format": 2, "meta": {...},
     "files": {"model-rank0000-001.safetensors": {"bytes": ..., "xxh3": ...}, ...},
     "tensors": {"embed.weight": {"group": "model", "dtype": "float32", "shape": [49152, 576],
                                  "pieces": [["model-rank0000-001.safetensors", 0, 14155776], ...]}}}

A tensor is stored in one or more pieces: elements [start, stop) of the flattened tensor, under the tensor's name in the named
file, as whole rows where the cut falls between rows. Format 1 (one file per tensor, no checksum) is still read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.files import sync
from chatmill.run_files import MANIFEST

FORMAT = 2
_NO_CHECKSUM = "0" * 32
_CHECKSUM_AT = len(b'{"checksum": "')


class CheckpointError(ConfigError):
    """A checkpoint that is missing, incomplete or damaged; the message names the file."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a tensor: elements [start, start + tensor.numel()) of the flattened tensor of this shape."""

    group: str
    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.tensor.numel()


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is stored. pieces: (file, first element, one past the last), in order and without a gap."""

    group: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int, int], ...]


def write_shares(folder: Path, shares: Iterable[Share], prefix: str, shard_bytes: int) -> dict[str, Any]:
    """Write shares to folder/GROUP-prefix-001.safetensors ...; returns their part of a manifest ({"files", "tensors"}).

    A new file begins after shard_bytes. Every file is synced to disk. Raises OSError or SafetensorError.
    """
    writer = ShareWriter(folder, prefix, shard_bytes)
    for share in shares:
        writer.add(share)
    return writer.finish()


class ShareWriter:
    """Collects shares into files of about shard_bytes; `finish` gives their part of the manifest."""

    def __init__(self, folder: Path, prefix: str, shard_bytes: int) -> None:
        self.folder, self.prefix, self.shard_bytes = folder, prefix, shard_bytes
        self._pending: dict[str, list[Share]] = {}
        self._counts: dict[str, int] = {}
        self._facts: dict[str, Any] = {"files": {}, "tensors": {}}

    def add(self, share: Share) -> None:
        """Take a share (its tensor on the CPU and contiguous); writes a file once enough has gathered."""
        pending = self._pending.setdefault(share.group, [])
        pending.append(share)
        if sum(s.tensor.nbytes for s in pending) >= self.shard_bytes:
            self._flush(share.group)

    def finish(self) -> dict[str, Any]:
        """Write the rest; returns the part of the manifest."""
        for group in list(self._pending):
            self._flush(group)
        return self._facts

    def _flush(self, group: str) -> None:
        pending = self._pending.pop(group)
        self._counts[group] = self._counts.get(group, 0) + 1
        number = f"{self.prefix}-{self._counts[group]:03d}" if self.prefix else f"{self._counts[group]:05d}"
        path = self.folder / f"{group}-{number}.safetensors"
        path.touch()
        mode = path.stat().st_mode  # safetensors writes 0600: nobody else on a cluster could read it
        save_file({share.name: share.tensor for share in pending}, path)
        path.chmod(mode)
        self._facts["files"][path.name] = file_facts(path)
        for share in pending:
            self._facts["tensors"][share.name] = {
                "group": share.group,
                "dtype": str(share.tensor.dtype).removeprefix("torch."),
                "shape": list(share.shape),
                "pieces": [[path.name, share.start, share.stop]],
            }


def merge_parts(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The ranks' parts of a manifest, merged. Raises CheckpointError when a tensor is not covered exactly once."""
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        files |= part["files"]
        for name, entry in part["tensors"].items():
            if name in tensors:
                tensors[name]["pieces"] += entry["pieces"]
            else:
                tensors[name] = dict(entry)
    for name, entry in tensors.items():
        entry["pieces"] = sorted(entry["pieces"], key=lambda piece: piece[1])
        at = 0
        for _, start, stop in entry["pieces"]:
            if start != at:
                raise CheckpointError(
                    f"tensor {name}: the ranks' pieces leave a gap or overlap at element {at} (next: {start})"
                )
            at = stop
        if at != prod(entry["shape"]):
            raise CheckpointError(f"tensor {name}: the ranks hold {at} of {prod(entry['shape'])} elements")
    return {"files": files, "tensors": tensors}


def write_manifest(folder: Path, meta: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write and sync manifest.json; its checksum covers every byte of it."""
    text = json.dumps({"checksum": _NO_CHECKSUM, "format": FORMAT, "meta": meta, **facts}) + "\n"
    data = text.encode()
    checksum = xxhash.xxh3_128_hexdigest(data).encode()
    path = folder / MANIFEST
    path.write_bytes(data[:_CHECKSUM_AT] + checksum + data[_CHECKSUM_AT + 32 :])
    sync(path)
    sync(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; checks its checksum. Raises CheckpointError."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(data)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in (1, FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{path / MANIFEST}: checkpoint format {found!r}, this version reads 1 and {FORMAT}")
    if manifest["format"] == FORMAT:
        zeroed = data[:_CHECKSUM_AT] + _NO_CHECKSUM.encode() + data[_CHECKSUM_AT + 32 :]
        if manifest.get("checksum") != xxhash.xxh3_128_hexdigest(zeroed):
            raise CheckpointError(f"{path / MANIFEST}: contents differ from what was written (hash mismatch)")
    return manifest


def tensor_index(path: Path, manifest: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Where each tensor of a checkpoint is stored; for format 1 read from the headers of its files."""
    if manifest["format"] == FORMAT:
        return {
            name: TensorEntry(
                entry["group"],
                entry["dtype"],
                tuple(entry["shape"]),
                tuple((str(file), int(start), int(stop)) for file, start, stop in entry["pieces"]),
            )
            for name, entry in manifest["tensors"].items()
        }
    by_file: dict[str, list[str]] = {}
    for name, file in manifest["tensors"].items():
        by_file.setdefault(file, []).append(name)
    index = {}
    for file, names in by_file.items():
        try:
            with safe_open(path / file, framework="pt") as handle:
                for name in names:
                    part = handle.get_slice(name)
                    shape = tuple(part.get_shape())
                    index[name] = TensorEntry(file.split("-")[0], part.get_dtype(), shape, ((file, 0, prod(shape)),))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / file}: cannot be read ({error})") from None
    return {name: index[name] for name in manifest["tensors"]}


def not_finite(tensor: Tensor) -> str:
    """`holds NaN or infinite values (N of M)`, or "" for a tensor of finite numbers. Takes one pass and no memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    low, high = torch.aminmax(tensor)  # both are NaN where one value is
    if bool(low.isfinite() & high.isfinite()):
        return ""
    return f"holds NaN or infinite values ({int((~tensor.isfinite()).sum()):,} of {tensor.numel():,})"


def file_problem(path: Path, facts: Mapping[str, Any], contents: bool = True) -> str:
    """What is wrong with a file, or "". contents: check its hash too, not only its size."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {facts['bytes']} bytes"
    if contents and hash_file(path) != facts["xxh3"]:
        return f"{path}: contents differ from what was written (hash mismatch)"
    return ""


def file_facts(path: Path) -> dict[str, Any]:
    """Size and hash of a file that was just written; syncs it to disk."""
    facts = {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
    sync(path)
    return facts


def hash_file(path: Path) -> str:
    """xxh3-128 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()
