"""`chatmill checkpoint ls RUN | verify PATH | diff A B`: which checkpoints there are, whether they are intact, how two differ.

Exit codes: 0 intact, or no difference; 1 damaged, or different; 2 not a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatmill.progress import Report, silent
from chatmill.run_files import MANIFEST, list_checkpoints, step_of

from .checkpoint import (
    Checkpoint,
    CheckpointError,
    best_of,
    open_checkpoint,
    verify_files,
)
from .manifest import read_manifest, unlisted_tensors


@dataclass(frozen=True)
class TensorDifference:
    """How far apart two tensors are. largest: max |a - b|; relative: the same / max |b|; note: why neither is known."""

    name: str
    largest: float = 0.0
    relative: float = 0.0
    elements: int = 0
    note: str = ""


def ls(run_dir: str) -> int:
    """One line per checkpoint of a run, oldest first; sizes are checked, contents are not (`verify` does that)."""
    folders = _folders(run_dir)
    try:
        best = best_of(Path(run_dir)).name
    except CheckpointError:
        best = ""
    print(f"{'checkpoint':<16} {'size':>10} {'tokens':>15}  {'written by':<16} {'saved':<19}  state")
    damaged = 0
    for folder in folders:
        try:
            found = open_checkpoint(folder, verify=False)
        except CheckpointError as error:
            damaged += 1
            print(f"{folder.name:<16} {'':>10} {'':>15}  {'':<16} {'':<19}  DAMAGED: {error}")
            continue
        size = sum(facts["bytes"] for facts in found.manifest["files"].values())
        saved = time.strftime("%F %T", time.localtime((folder / MANIFEST).stat().st_mtime))
        writer = f"{found.meta.get('strategy', '?')} x {found.meta.get('world_size', '?')}"
        tokens = f"{found.meta['tokens']:,}" if "tokens" in found.meta else "?"
        state = "complete" + (", best" if folder.name == best else "")
        print(f"{folder.name:<16} {_size(size):>10} {tokens:>15}  {writer:<16} {saved:<19}  {state}")
    return 1 if damaged else 0


def verify(path: str, progress: Report = silent) -> int:
    """Read every file of a checkpoint, or of all checkpoints of a run, and report what is damaged or missing."""
    problems = []
    folders = _folders(path)
    for number, folder in enumerate(folders):
        progress("files", number, len(folders))
        found = verify_files(folder)
        if not found:
            more = unlisted_tensors(folder, read_manifest(folder))
            found = [f"{folder / name}: not in the manifest; no command reads it. Remove it." for name in more]
        problems += found
        if not found:
            print(f"{folder}: whole ({len(read_manifest(folder)['files'])} files)")
    for problem in problems:
        print(problem)
    if problems:
        print(f"damaged files: {len(problems)}; checkpoints checked: {len(folders)}")
    return 1 if problems else 0


def diff(first: str, second: str, limit: int = 20) -> int:
    """How two checkpoints differ: tensors (largest absolute and relative difference), config, and lineage."""
    a, b = open_checkpoint(first), open_checkpoint(second)
    print(f"a: {a.path}\nb: {b.path}")
    settings = [
        *_unequal("config", a.config.model_dump(mode="json"), b.config.model_dump(mode="json")),
        *_unequal("meta", dict(a.meta), dict(b.meta)),
        *_unequal("state", _state(a), _state(b)),
    ]
    for line in settings:
        print(line)
    differing = [difference for difference in compare(a, b) if difference.note or difference.largest > 0]
    total = len(set(a.index) | set(b.index))
    if differing:
        print(f"{'tensor':<48} {'max |a-b|':>11} {'relative':>11} {'elements':>12}")
    for difference in sorted(differing, key=lambda d: (not d.note, -d.relative))[:limit]:
        if difference.note:
            print(f"{difference.name:<48} {difference.note}")
        else:
            print(f"{difference.name:<48} {difference.largest:>11.3e} {difference.relative:>11.3e} {difference.elements:>12,}")
    if len(differing) > limit:
        print(f"... and {len(differing) - limit} more")
    print(f"{len(differing)} of {total} tensors differ" if differing else f"all {total} tensors are equal bit for bit")
    return 1 if differing or any(line.startswith("config") for line in settings) else 0


def compare(a: Checkpoint, b: Checkpoint) -> Iterable[TensorDifference]:
    """Every tensor of two checkpoints, one pair in memory at a time. elements: how many are unequal."""
    for name in sorted(set(a.index) | set(b.index)):
        if name not in a.index or name not in b.index:
            yield TensorDifference(name, note=f"only in {'a' if name in a.index else 'b'}")
            continue
        left, right = a.tensor(name), b.tensor(name)
        if left.shape != right.shape or left.dtype != right.dtype:
            yield TensorDifference(name, note=f"{_kind(left)} in a, {_kind(right)} in b")
            continue
        unequal = left.contiguous().view(-1) != right.contiguous().view(-1)
        apart = (left.double() - right.double()).abs()
        if not bool(torch.isfinite(apart).all()):
            same = bool((left.nan_to_num() == right.nan_to_num()).all()) and bool((left.isnan() == right.isnan()).all())
            if not same:
                yield TensorDifference(name, note="NaN or inf in one of them")
            continue
        largest = float(apart.max()) if apart.numel() else 0.0
        scale = float(right.double().abs().max()) if right.numel() else 0.0
        yield TensorDifference(name, largest, largest / max(scale, 1e-300) if largest else 0.0, int(unequal.sum()))


def _unequal(what: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [f"{what}.{key}: {a.get(key)!r} | {b.get(key)!r}" for key in sorted(set(a) | set(b)) if a.get(key) != b.get(key)]


def _state(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.files().get("state.json")
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file else {}
    values.pop("lineage", None)  # shown as meta
    values.pop("losses", None)  # the guard's window: long, and of no interest here
    stream = values.pop("stream", {})
    return values | {f"stream.{key}": value for key, value in stream.items()}


def _folders(path: str) -> list[Path]:
    if (Path(path) / MANIFEST).is_file():
        return [Path(path)]
    folders = list_checkpoints(path)
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint. Give a run folder or a checkpoint folder.")
    return sorted(folders, key=step_of)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
