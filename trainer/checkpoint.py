"""Checkpoints without pickle: safetensors, JSON and a manifest that is written last.

    with CheckpointWriter(folder, config) as writer:      # streams: one shard of tensors is held at a time
        writer.add("embed.weight", tensor)
    checkpoint = open_checkpoint("runs/demo")             # newest good checkpoint of a run, or a folder itself
    checkpoint.load_into(model)

A folder holds config.json (ModelConfig), model-00001.safetensors ..., the tokenizer's files, and for a training checkpoint
optimizer-*.safetensors, state.json and rng.safetensors. manifest.json lists every file with its size and xxh3 hash; a folder
without a manifest is not a checkpoint. Writing goes to a hidden sibling, is synced to disk and published by one rename, so a
reader sees a whole checkpoint or none. Hashes are there because a flipped bit loads silently from safetensors and torch alike.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from chatmill.config import ConfigError, validate
from chatmill.trainer.config import ModelConfig

FORMAT = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})$")


class CheckpointError(ConfigError):
    """A checkpoint that is missing, torn or damaged; the message names the file."""


class CheckpointWriter:
    """Writes one checkpoint folder; publishes it on a clean exit, leaves nothing on an error.

    meta: JSON values kept in the manifest (step, lineage ...).
    shard_bytes: tensors are flushed to a file when so many bytes have gathered.
    """

    def __init__(
        self, folder: str | Path, config: ModelConfig, meta: Mapping[str, Any] | None = None, shard_bytes: int = 2 << 30
    ) -> None:
        self.folder = Path(folder)
        self.meta = dict(meta or {})
        self._shard_bytes = shard_bytes
        self._temporary = self.folder.with_name(f".{self.folder.name}.writing-{os.getpid()}")
        self._pending: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, int] = {}
        self._tensors: dict[str, str] = {}
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{self.folder} holds other things than a checkpoint: it is not replaced. Choose another folder."
            )
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        self.add_file("config.json", (config.model_dump_json(indent=2) + "\n").encode())

    def add(self, name: str, tensor: Tensor, group: str = "model") -> None:
        """Add a tensor; group names the file family (`model`, `optimizer`, `rng`). The tensor is copied to the CPU."""
        if name in self._tensors:
            raise ValueError(f"checkpoint tensor {name!r} was added twice")
        pending = self._pending.setdefault(group, {})
        pending[name] = tensor.detach().to("cpu", copy=tensor.device.type == "cpu" and not tensor.is_contiguous()).contiguous()
        self._tensors[name] = ""
        if sum(t.nbytes for t in pending.values()) >= self._shard_bytes:
            self._flush(group)

    def add_file(self, name: str, data: bytes) -> None:
        """Add a small file (tokenizer.json, state.json ...)."""
        (self._temporary / name).write_bytes(data)

    def _flush(self, group: str) -> None:
        pending = self._pending.pop(group, None)
        if not pending:
            return
        self._counts[group] = self._counts.get(group, 0) + 1
        name = f"{group}-{self._counts[group]:05d}.safetensors"
        save_file(pending, self._temporary / name)
        (self._temporary / name).chmod(0o666 & ~_umask())  # safetensors writes 0600: nobody else on a cluster could read it
        self._tensors.update(dict.fromkeys(pending, name))

    def _publish(self) -> None:
        for group in list(self._pending):
            self._flush(group)
        files = {}
        for path in sorted(self._temporary.iterdir()):
            files[path.name] = {"bytes": path.stat().st_size, "xxh3": hash_file(path)}
            _sync(path)
        manifest = {"format": FORMAT, "meta": self.meta, "files": files, "tensors": self._tensors}
        target = self._temporary / MANIFEST
        target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(target)
        _sync(self._temporary)
        retired = self.folder.with_name(f".{self.folder.name}.retired-{os.getpid()}")
        if self.folder.exists():
            self.folder.replace(retired)
        self._temporary.replace(self.folder)
        _sync(self.folder.parent)
        shutil.rmtree(retired, ignore_errors=True)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Tensors are read on demand, memory-mapped."""

    path: Path
    config: ModelConfig
    meta: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(repr=False)

    def names(self, group: str = "model") -> list[str]:
        """Tensor names of a file family."""
        return [name for name, file in self.manifest["tensors"].items() if file.startswith(f"{group}-")]

    def tensor(self, name: str) -> Tensor:
        """One tensor by name."""
        try:
            file = self.manifest["tensors"][name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} in this checkpoint") from None
        with safe_open(self.path / file, framework="pt") as handle:
            return handle.get_tensor(name)

    def tensors(self, group: str = "model") -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) pairs of a file family, one file open at a time."""
        by_file: dict[str, list[str]] = {}
        for name in self.names(group):
            by_file.setdefault(self.manifest["tensors"][name], []).append(name)
        for file, names in by_file.items():
            with safe_open(self.path / file, framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name)

    def files(self) -> dict[str, Path]:
        """The checkpoint's files that hold no tensors: tokenizer, template, state."""
        return {name: self.path / name for name in self.manifest["files"] if not name.endswith(".safetensors")}

    def load_into(self, model: nn.Module) -> None:
        """Copy every parameter into model (names must match exactly). Raises CheckpointError."""
        targets = dict(model.named_parameters())
        held = self.names()
        missing, extra = sorted(set(targets) - set(held)), sorted(set(held) - set(targets))
        if missing or extra:
            raise CheckpointError(
                f"{self.path}: its tensors do not fit the model.\n  missing: {_few(missing)}\n  not in the model: {_few(extra)}"
            )
        with torch.no_grad():
            for name, tensor in self.tensors():
                if tensor.shape != targets[name].shape:
                    raise CheckpointError(
                        f"{self.path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(targets[name].shape)}"
                    )
                targets[name].copy_(tensor)


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest good checkpoint of a run folder.

    verify: read every file and compare its hash (about 5 GB/s); sizes and presence are always checked.
    In a run folder a damaged checkpoint is passed over, with a warning on stderr; raises CheckpointError when none is good.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _open_folder(path, verify)
    folders = list_checkpoints(path)
    if not folders:
        known = "no such folder" if not path.exists() else "it has no manifest.json and no checkpoints/step-*"
        raise CheckpointError(
            f"{path} is not a checkpoint: {known}.\nGive a checkpoint folder, a run folder, or make one with `chatmill import`."
        )
    problems = []
    for folder in reversed(folders):
        try:
            checkpoint = _open_folder(folder, verify)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            os.write(2, f"warning: {problem}\nwarning: using the older {checkpoint.path} instead\n".encode())
        return checkpoint
    raise CheckpointError(f"{path}: no good checkpoint.\n" + "\n".join(problems))


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Published checkpoints of a run, oldest first (their contents are not looked at)."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if STEP_FOLDER.match(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def prune(run_dir: str | Path, keep: int, protect: frozenset[str] = frozenset()) -> None:
    """Delete all but the newest `keep` checkpoints; names in `protect` stay. Leftovers of killed writers go too."""
    for folder in list_checkpoints(run_dir)[:-keep]:
        if folder.name not in protect:
            (folder / MANIFEST).unlink()  # no longer a checkpoint, even if the deletion is cut short
            shutil.rmtree(folder, ignore_errors=True)
    root = Path(run_dir) / "checkpoints"
    for leftover in [*root.glob(".*.writing-*"), *root.glob(".*.retired-*")]:
        if not leftover.name.endswith(f"-{os.getpid()}"):
            shutil.rmtree(leftover, ignore_errors=True)


def verify_files(path: str | Path) -> list[str]:
    """Problems of a checkpoint folder, one line each; empty when every file is whole."""
    path = Path(path)
    manifest = _read_manifest(path)
    problems = []
    for name, facts in manifest["files"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file.stat().st_size != facts["bytes"]:
            problems.append(f"{file}: {file.stat().st_size} bytes, the manifest says {facts['bytes']}")
        elif hash_file(file) != facts["xxh3"]:
            problems.append(f"{file}: contents differ from what was written (hash mismatch)")
    return problems


def hash_file(path: Path) -> str:
    """xxh3-128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error})") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}")
    return manifest


def _open_folder(path: Path, verify: bool) -> Checkpoint:
    manifest = _read_manifest(path)
    for name, facts in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            raise CheckpointError(f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {facts['bytes']} bytes")
    if verify and (problems := verify_files(path)):
        raise CheckpointError("damaged checkpoint: " + "; ".join(problems))
    config = validate(ModelConfig, json.loads((path / "config.json").read_text(encoding="utf-8")), str(path / "config.json"))
    return Checkpoint(path, config, manifest["meta"], manifest)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
