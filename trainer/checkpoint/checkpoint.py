"""Checkpoints without pickle: safetensors, JSON and a manifest that is written last.

    with CheckpointWriter(folder, config) as writer:      # holds one shard of tensors at a time
        writer.add("embed.weight", tensor)
    checkpoint = open_checkpoint("runs/demo")             # newest good checkpoint of a run, or a folder itself
    checkpoint.load_into(model)
    checkpoint.read("embed.weight", 0, 4096)              # some elements of the flattened tensor; only those are read

A folder holds config.json (ModelConfig), model-*.safetensors, the tokenizer's files, and for a training checkpoint
optimizer-*.safetensors, state.json and rng-*.safetensors. manifest.json lists every file with its size and xxh3 hash and says
which part of a tensor lies where (files.py); a folder without a manifest is not a checkpoint. A checkpoint is written into a
hidden sibling folder, synced to disk and published by one rename, so a reader sees a whole one or none. Hashes are there
because a flipped bit loads silently from safetensors and torch alike. In a training run every rank writes its share (saver.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from chatmill.config import ConfigError, read_json
from chatmill.files import folder_beside, publish_folder, read_unchanged, remove_leftovers
from chatmill.run_files import MANIFEST, list_checkpoints, step_of

from ..backends.choose import tensor_shapes
from ..foreign_config import read_config
from ..model.language_model import LanguageModel
from ..model_config import ModelConfig
from .files import (
    FileStamp,
    Share,
    ShareWriter,
    TensorEntry,
    file_facts,
    file_problem,
    merge_parts,
    not_finite,
    open_tensors,
    stamp_of,
    tensor_index,
    write_small_file,
)
from .manifest import DTYPES, CheckpointError, read_manifest, write_manifest

BEST = "best.json"
WEIGHTS = ("float32", "bfloat16", "float16")
_LAYER = re.compile(r"(?:.*?\.)?(?:layers|h|blocks)\.\d+(?=\.)")


class CheckpointWriter:
    """Writes a checkpoint folder from one process: publishes it on a clean exit, leaves nothing behind on an error.

    meta: JSON values kept in the manifest (step, lineage ...).
    shard_bytes: tensors are written to a file once this many bytes have gathered.
    """

    def __init__(
        self, folder: str | Path, config: ModelConfig, meta: Mapping[str, Any] | None = None, shard_bytes: int = 2 << 30
    ) -> None:
        self.folder = Path(folder)
        self.meta = dict(meta or {})
        self._names: set[str] = set()
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / MANIFEST).is_file():
            raise CheckpointError(
                f"{self.folder} holds something other than a checkpoint and is not replaced. Choose another folder."
            )
        with contextlib.ExitStack() as stack:
            self._temporary = stack.enter_context(folder_beside(self.folder))
            self._shares = ShareWriter(self._temporary, "", shard_bytes)
            self.add_file("config.json", config_bytes(config))
            self._held = stack.pop_all()

    def add(self, name: str, tensor: Tensor, group: str = "model") -> None:
        """Add a tensor; group names the file family (`model`, `optimizer`, `rng`). The tensor is copied to the CPU."""
        if name in self._names:
            raise ValueError(f"checkpoint tensor {name!r} was added twice")
        self._names.add(name)
        copy = tensor.detach().to("cpu", copy=tensor.device.type == "cpu" and not tensor.is_contiguous()).contiguous()
        self._shares.add(Share(group, name, tuple(copy.shape), 0, copy))

    def add_file(self, name: str, data: bytes) -> None:
        """Add a small file (tokenizer.json, state.json ...)."""
        write_small_file(self._temporary / name, data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._held:
            if kind is None:
                publish(self._temporary, self.folder, self.meta, merge_parts([self._shares.finish()]))


def config_bytes(config: ModelConfig) -> bytes:
    """config.json of a checkpoint."""
    return (config.model_dump_json(indent=2) + "\n").encode()


def publish(temporary: Path, folder: Path, meta: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the manifest of a finished temporary folder and give it the name `folder`; what was there before is deleted.

    facts: {"files", "tensors"} of the tensor files, which are synced already; the small files are hashed and synced here.
    """
    files = dict(facts["files"])
    for path in sorted(temporary.iterdir()):
        if path.name not in files and not path.name.startswith("."):  # NFS hides a file that is removed while it is open
            files[path.name] = file_facts(path)
    write_manifest(temporary, meta, {"files": files, "tensors": facts["tensors"]})
    publish_folder(temporary, folder)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder. Tensors are read on demand, memory-mapped; `close` releases the files."""

    path: Path
    config: ModelConfig
    meta: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(repr=False)
    index: Mapping[str, TensorEntry] = field(repr=False)
    _stamps: Mapping[str, FileStamp] = field(default_factory=dict, repr=False, compare=False)
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def names(self, group: str = "model") -> list[str]:
        """Tensor names of a file family."""
        return [name for name, entry in self.index.items() if entry.group == group]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._entry(name).shape

    def tensor(self, name: str) -> Tensor:
        """One tensor by name."""
        entry = self._entry(name)
        if len(entry.pieces) == 1:
            whole: Tensor = self._handle(entry.pieces[0][0]).get_tensor(name)
            return whole.reshape(entry.shape)
        return self.read(name, 0, prod(entry.shape)).reshape(entry.shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; only the rows around them are read from disk."""
        parts = []
        for file, first, last in self._entry(name).pieces:
            low, high = max(start, first) - first, min(stop, last) - first
            if low >= high:
                continue
            stored = self._handle(file).get_slice(name)
            shape = stored.get_shape()
            row = prod(shape[1:])
            top, bottom = low // row, -(-high // row)
            values = stored[top:bottom] if shape else self._handle(file).get_tensor(name)
            parts.append(values.reshape(-1)[low - top * row : high - top * row])
        if not parts:
            return torch.empty(0, dtype=getattr(torch, self._entry(name).dtype, torch.float32))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(self, group: str = "model") -> Iterator[tuple[str, Tensor]]:
        """All (name, tensor) pairs of a file family, in the order of the files."""
        for name in sorted(self.names(group), key=lambda name: self.index[name].pieces[0][0]):
            yield name, self.tensor(name)

    def files(self) -> dict[str, Path]:
        """The checkpoint's files that hold no tensors: tokenizer, template, state."""
        return {name: self.path / name for name in self.manifest["files"] if not name.endswith(".safetensors")}

    def close(self) -> None:
        """Release the memory-mapped files."""
        self._open.clear()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.index[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r} in this checkpoint") from None

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            handle = open_tensors(path, self.index)
            if self._stamps and stamp_of(path) != self._stamps.get(file):
                raise CheckpointError(f"{path}: the checkpoint was replaced while it was read. Run the command again.")
            self._open[file] = handle
        return self._open[file]

    def check_model(self) -> None:
        """Compare the tensors with those that config.json implies. Nothing is read: call it before a model takes memory.

        Raises CheckpointError.
        """
        names = self.names()
        layers = {found.group() for name in names if (found := _LAYER.match(name))}
        if len(layers) != self.config.layers:  # before a decoder of so many layers is described
            raise CheckpointError(f"{self.path}: config.json says {self.config.layers} layers, its tensors {len(layers)}.")
        shapes = tensor_shapes(self.config)
        self._check_names(set(shapes))
        for name, shape in shapes.items():
            if self.shape(name) != tuple(shape):
                raise CheckpointError(f"{self.path}: {name} has shape {self.shape(name)}, config.json implies {tuple(shape)}.")
            if (kind := DTYPES.get(self.index[name].dtype, self.index[name].dtype)) not in WEIGHTS:
                raise CheckpointError(f"{self.path}: {name} is {kind}; expected {', '.join(WEIGHTS)}.")

    def check_values(self, part: tuple[int, int] = (0, 1)) -> list[str]:
        """The weights that hold NaN or infinite values, one line each. part: (rank, world size), to share the reading."""
        names = self.names()[part[0] :: part[1]]
        return [f"{self.path}: {name} {problem}" for name in names if (problem := not_finite(self.tensor(name)))]

    def _check_names(self, wanted: set[str]) -> None:
        held = self.names()
        missing, extra = sorted(wanted - set(held)), sorted(set(held) - wanted)
        if missing or extra:
            raise CheckpointError(
                f"{self.path}: its tensors do not match the model.\n"
                f"  missing: {_few(missing)}\n  not in the model: {_few(extra)}"
            )

    def load_into(self, model: nn.Module) -> None:
        """Copy every tensor into model (names must match exactly). Raises CheckpointError, also for NaN."""
        constants = model.constants() if isinstance(model, LanguageModel) else ()
        targets: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(constants)}
        self._check_names(set(targets))
        with torch.no_grad():
            for name, tensor in self.tensors():
                if tensor.shape != targets[name].shape:
                    raise CheckpointError(
                        f"{self.path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(targets[name].shape)}"
                    )
                if problem := not_finite(tensor):
                    raise CheckpointError(f"{self.path}: {name} {problem}. Such a model answers nothing; use another one.")
                targets[name].copy_(tensor)


def open_checkpoint(path: str | Path, verify: bool = True) -> Checkpoint:
    """Open a checkpoint folder, or the newest good checkpoint of a run folder.

    verify: read every file and compare its hash (about 5 GB/s); sizes and presence are always checked.
    In a run folder a damaged checkpoint is skipped with a warning on stderr. Raises CheckpointError when none is good.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _open_folder(path, verify)
    folders = list_checkpoints(path)
    if not folders:
        known = "no such folder" if not path.exists() else "it has no manifest.json and no checkpoints/step-*"
        raise CheckpointError(
            f"{path} is not a checkpoint: {known}.\n"
            "Give a checkpoint folder or a run folder, or make one with `chatmill import`."
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


def best_of(run_dir: Path) -> Path:
    """Folder of the run's best checkpoint. Raises CheckpointError where there is none."""
    try:
        name = json.loads((run_dir / "checkpoints" / BEST).read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{run_dir} names no best checkpoint (checkpoints/{BEST}).\n"
            "Train with checkpoint.best=loss (or accuracy) and evaluation.every_steps, or leave out --best."
        ) from None
    return run_dir / "checkpoints" / str(name)


def prune(run_dir: str | Path, keep: int, protect: frozenset[str] = frozenset(), every_steps: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints; names in `protect` and multiples of every_steps stay.

    Leftovers of killed writers, and damaged checkpoints that a resumed run set aside, are deleted too.
    """
    for folder in list_checkpoints(run_dir)[:-keep]:
        if folder.name not in protect and not (every_steps and step_of(folder) % every_steps == 0):
            (folder / MANIFEST).unlink()  # no longer a checkpoint, even if the deletion is cut short
            shutil.rmtree(folder, ignore_errors=True)
    root = Path(run_dir) / "checkpoints"
    remove_leftovers(root)
    for damaged in root.glob(".*.damaged"):
        shutil.rmtree(damaged, ignore_errors=True)


def set_aside_after(run_dir: str | Path, step: int) -> list[Path]:
    """Hide checkpoints later than `step`: a run that continues from `step` found them damaged or will compute them again.

    Otherwise they would count as the newest, and the next `prune` would delete the good one before them.
    """
    hidden = []
    for folder in list_checkpoints(run_dir):
        if step_of(folder) > step:
            target = folder.with_name(f".{folder.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)
            folder.replace(target)
            hidden.append(target)
    return hidden


def verify_files(path: str | Path, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Problems of a checkpoint folder, one line each; empty when every file is intact.

    part: (rank, world size); each rank reads only its share of the files.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    files = list(manifest["files"].items())[part[0] :: part[1]]
    return [problem for name, facts in files if (problem := file_problem(path / name, facts))]


def _open_folder(path: Path, verify: bool) -> Checkpoint:
    return read_unchanged(path, lambda: _read_folder(path, verify))


def _read_folder(path: Path, verify: bool) -> Checkpoint:
    manifest = read_manifest(path)
    problems = [problem for name, facts in manifest["files"].items() if (problem := file_problem(path / name, facts, verify))]
    if problems:
        raise CheckpointError("damaged checkpoint: " + "; ".join(problems))
    try:
        config = read_config(read_json(path / "config.json"), str(path / "config.json"))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None  # a run then has its older checkpoints
    stamps = {name: stamp_of(path / name) for name in manifest["files"]}
    return Checkpoint(path, config, manifest["meta"], manifest, tensor_index(path, manifest), stamps)


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
