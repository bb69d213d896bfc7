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
# of safetensors -> of torch; format 1 has the former in its index
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error})") from None
    if isinstance(manifest, dict) and "splits" in manifest:
        raise CheckpointError(f"{path} is a data set, not a checkpoint. Give a checkpoint folder or a run folder.")
    if not isinstance(manifest, dict) or manifest.get("format") not in (1, FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{path / MANIFEST}: checkpoint format {found!r}, this version reads 1 and {FORMAT}")
    if manifest["format"] == FORMAT:
        zeroed = data[:_CHECKSUM_AT] + _NO_CHECKSUM.encode() + data[_CHECKSUM_AT + 32 :]
        if manifest.get("checksum") != xxhash.xxh3_128_hexdigest(zeroed):
            raise CheckpointError(f"{path / MANIFEST}: contents differ from what was written (hash mismatch)")
    if problem := _structure_problem(manifest):
        raise CheckpointError(f"{path / MANIFEST}: {problem}. It was not written by Chatmill.")
    return manifest


def _structure_problem(manifest: Mapping[str, Any]) -> str:
    """What keeps a manifest from being read further, or ""; nothing in it is trusted before."""
    meta, files, tensors = (manifest.get(key) for key in ("meta", "files", "tensors"))
    if not (isinstance(meta, dict) and isinstance(files, dict) and isinstance(tensors, dict)):
        return "meta, files or tensors is missing"
    for name, facts in files.items():
        if Path(name).name != name:
            return f"{name!r} is not the name of a file in this folder"
        if not isinstance(facts, dict) or not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("xxh3"), str):
            return f"{name} has no size and hash"
    for name, entry in tensors.items():
        held = [str(entry)] if manifest["format"] == 1 else _pieces(entry)
        if held is None:
            return f"tensor {name}: its group, dtype, shape or pieces are missing, or leave a gap"
        if unknown := [file for file in held if file not in files]:
            return f"tensor {name} lies in {unknown[0]!r}, which is not among the files"
    return ""


def _pieces(entry: Any) -> list[str] | None:
    """The files of a tensor, or None where its entry makes no sense."""
    try:
        group, dtype, shape, pieces = (entry[key] for key in ("group", "dtype", "shape", "pieces"))
        at = 0
        for _, start, stop in pieces:
            if start != at or stop < start:
                return None
            at = stop
        whole = all(isinstance(size, int) and size >= 0 for size in shape) and at == prod(shape)
        return [str(file) for file, _, _ in pieces] if whole and isinstance(group, str) and isinstance(dtype, str) else None
    except (KeyError, TypeError, ValueError):
        return None


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
        kind, count = DTYPES.get(part.get_dtype(), part.get_dtype()), prod(part.get_shape())
        wanted = sum(stop - start for file, start, stop in entry.pieces if file == path.name)
        if kind != DTYPES.get(entry.dtype, entry.dtype) or count != wanted:
            raise CheckpointError(
                f"{path}: tensor {name} has {count} elements of {kind}, the manifest says {wanted} of {entry.dtype}."
            )
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
