"""manifest.json of a checkpoint folder: what every file and tensor is, with a hash of everything, itself included.

    {"checksum": xxh3 of this file with the checksum's 32 digits as zeros, "format": 2, "meta": {...},
     "files": {"model-rank0000-001.safetensors": {"bytes": ..., "xxh3": ...}, ...},
     "tensors": {"embed.weight": {"group": "model", "dtype": "float32", "shape": [49152, 576],
                                  "pieces": [["model-rank0000-001.safetensors", 0, 14155776], ...]}}}

Format 1 (one file per tensor, no checksum) is still read. A manifest may come from elsewhere: nothing in it is used before its
names are those of files in this folder, and its counts fit the sizes that it gives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from chatmill.config import ConfigError
from chatmill.files import is_plain_name, naming, sync
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
ITEM_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}  # the others: 1
MOST_DIMENSIONS = 8
_NO_CHECKSUM = "0" * 32
_CHECKSUM_AT = len(b'{"checksum": "')


class CheckpointError(ConfigError):
    """A checkpoint that is missing, incomplete or damaged; the message names the file."""


def write_manifest(folder: Path, meta: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write and sync manifest.json; its checksum covers every byte of it."""
    path = folder / MANIFEST
    with naming(path):
        path.write_bytes(manifest_bytes({"format": FORMAT, "meta": meta, **facts}))
    sync(path)
    sync(folder)


def manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """The bytes of manifest.json, sealed with their checksum."""
    data = (json.dumps({"checksum": _NO_CHECKSUM, **content}) + "\n").encode()
    checksum = xxhash.xxh3_128_hexdigest(data).encode()
    return data[:_CHECKSUM_AT] + checksum + data[_CHECKSUM_AT + 32 :]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder; checks its checksum. Raises CheckpointError."""
    try:
        data = (path / MANIFEST).read_bytes()
        manifest: dict[str, Any] = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error})") from None
    if isinstance(manifest, dict) and "splits" in manifest:
        raise CheckpointError(f"{path} is a data set, not a checkpoint. Give a checkpoint folder or a run folder.")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, bool) or found not in (1, FORMAT):
        raise CheckpointError(f"{path / MANIFEST}: checkpoint format {found!r:.80}, this version reads 1 and {FORMAT}")
    if found == FORMAT:
        zeroed = data[:_CHECKSUM_AT] + _NO_CHECKSUM.encode() + data[_CHECKSUM_AT + 32 :]
        if manifest.get("checksum") != xxhash.xxh3_128_hexdigest(zeroed):
            raise CheckpointError(f"{path / MANIFEST}: contents differ from what was written (hash mismatch)")
    if problem := _structure_problem(manifest):
        raise CheckpointError(f"{path / MANIFEST}: {problem}. It was not written by Chatmill.")
    return manifest


def unlisted_tensors(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files of tensors in the folder that the manifest does not name: a part of something else."""
    return sorted(e.name for e in os.scandir(path) if e.name.endswith(".safetensors") and e.name not in manifest["files"])


def _structure_problem(manifest: Mapping[str, Any]) -> str:
    """What keeps a manifest from being read further, or ""; nothing in it is trusted before."""
    meta, files, tensors = (manifest.get(key) for key in ("meta", "files", "tensors"))
    if not (isinstance(meta, dict) and isinstance(files, dict) and isinstance(tensors, dict)):
        return "meta, files or tensors is missing"
    if "config.json" not in files:
        return "config.json: missing from its files"
    for name, facts in files.items():
        if not is_plain_name(name) or name == MANIFEST:
            return f"{name!r:.200} is not the name of a file in this folder"
        if not isinstance(facts, dict) or not _is_count(facts.get("bytes")) or not isinstance(facts.get("xxh3"), str):
            return f"{name} has no size and hash"
    held: dict[str, int] = {}
    for name, entry in tensors.items():
        pieces = [(entry, 0)] if manifest["format"] == 1 else _pieces(entry)
        if pieces is None:
            return f"tensor {name:.200}: its group, dtype, shape or pieces are missing, or leave a gap"
        for file, size in pieces:
            if not isinstance(file, str) or file not in files:
                return f"tensor {name:.200} lies in {file!r:.200}, which is not among the files"
            held[file] = held.get(file, 0) + size
    for file, size in held.items():
        if size > files[file]["bytes"]:
            return f"{file} has {files[file]['bytes']} bytes, its tensors need {size}"
    if idle := sorted(name for name in files if name.endswith(".safetensors") and name not in held):
        return f"{idle[0]} holds no tensor of the manifest"
    step = meta.get("step")
    if not (step is None or _is_count(step)):
        return f"meta.step is {step!r:.80}, not a count of steps"
    return ""


def _pieces(entry: Any) -> list[tuple[Any, int]] | None:
    """(file, bytes) of the pieces of a tensor, or None where its entry makes no sense."""
    try:
        group, dtype, shape, pieces = (entry[key] for key in ("group", "dtype", "shape", "pieces"))
        if not (isinstance(group, str) and dtype in DTYPES.values() and isinstance(shape, list) and isinstance(pieces, list)):
            return None
        if len(shape) > MOST_DIMENSIONS or not all(map(_is_count, shape)):
            return None
        at, sizes = 0, []
        for file, start, stop in pieces:
            if start != at or not _is_count(start) or not _is_count(stop) or stop < start:
                return None
            sizes.append((file, (stop - start) * ITEM_BYTES.get(dtype, 1)))
            at = stop
        files = [file for file, _ in sizes]
        return sizes if at == prod(shape) and len(set(files)) == len(files) else None
    except (KeyError, TypeError, ValueError):
        return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
