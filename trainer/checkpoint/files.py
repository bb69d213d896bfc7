"""The tensor files of a checkpoint folder: written, opened and compared with the manifest (manifest.py).

A tensor is stored in one or more pieces: elements [start, stop) of the flattened tensor, under the tensor's name in the named
file, as whole rows where the cut falls between rows.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
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

from chatmill.files import naming, sync

from .manifest import DTYPES, FORMAT, CheckpointError

FileStamp = tuple[int, int, int]
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how the safetensors library reports one


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

    A new file begins after shard_bytes. Every file is synced to disk. Raises OSError.
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
        save_tensors({share.name: share.tensor for share in pending}, path)
        self._facts["files"][path.name] = file_facts(path)
        for share in pending:
            self._facts["tensors"][share.name] = {
                "group": share.group,
                "dtype": str(share.tensor.dtype).removeprefix("torch."),
                "shape": list(share.shape),
                "pieces": [[path.name, share.start, share.stop]],
            }


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """save_file of safetensors, readable for whomever the umask lets read. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # safetensors writes 0600: nobody else on a cluster could read it
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = _OS_ERROR.search(str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None
    path.chmod(mode)


def write_small_file(path: Path, data: bytes) -> None:
    """Write a file of a folder that is not published yet. Raises OSError that names it."""
    with naming(path):
        path.write_bytes(data)


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


def open_tensors(path: Path, index: Mapping[str, TensorEntry]) -> Any:
    """A safetensors file of a checkpoint, its header compared with the manifest. Raises CheckpointError."""
    try:
        handle = safe_open(path, framework="pt").__enter__()
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    expected = {name: entry for name, entry in index.items() if any(file == path.name for file, _, _ in entry.pieces)}
    held = set(handle.keys())
    if apart := sorted(held ^ set(expected)):
        known = "is not in the manifest" if apart[0] in held else "is missing"
        raise CheckpointError(f"{path}: tensor {apart[0]} {known} ({len(apart)} such). The file is of another checkpoint.")
    for name, entry in expected.items():
        part = handle.get_slice(name)
        kind, shape = DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
        wanted = sum(stop - start for file, start, stop in entry.pieces if file == path.name)
        said = DTYPES.get(entry.dtype, entry.dtype)
        problem = ""
        if kind != said or prod(shape) != wanted:
            problem = f"has {prod(shape)} elements of {kind}, the manifest says {wanted} of {said}"
        elif shape != (wanted,) and (len(shape) != len(entry.shape) or shape[1:] != entry.shape[1:]):
            # neither elements in one row (ZeRO cuts anywhere) nor whole rows of the tensor
            problem = f"is stored as {list(shape)}, the manifest says rows of {list(entry.shape)}"
        if problem:
            raise CheckpointError(f"{path}: tensor {name} {problem}.")
    return handle


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
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        return f"{path}: a link out of the folder ({path.readlink()}). Put the file itself there"
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != facts["bytes"]:
        return f"{path}: {path.stat().st_size} bytes, expected {facts['bytes']} bytes"
    if contents and hash_file(path) != facts["xxh3"]:
        return f"{path}: contents differ from what was written (hash mismatch)"
    return ""


def stamp_of(path: Path) -> FileStamp:
    """What tells a file from another one under its name: inode, size, time of its last change in ns; zeros if it is gone."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


def file_facts(path: Path) -> dict[str, Any]:
    """Size and hash of a file that was just written; syncs it to disk."""
    facts = {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
    sync(path)
    return facts


def hash_file(path: Path) -> str:
    """xxh3-128 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()
