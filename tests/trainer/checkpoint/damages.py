"""Damages of a checkpoint: every one is named, and the checkpoint before it is used.

    python -m tests.trainer.checkpoint.damages 1500 [seed]

Damaged bytes: a bit flipped, the end cut off, bytes added, zeroed or moved, a file deleted, emptied, or exchanged with another
or with that of an older checkpoint. Forged: a value of the manifest is replaced, or a tensor is stored in another shape, dtype
or name, and all hashes are made to fit; what opens all the same must give the true values or a named error.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chatmill.config import ConfigError
from chatmill.trainer.checkpoint.checkpoint import CheckpointError, config_bytes, open_checkpoint, publish, verify_files
from chatmill.trainer.checkpoint.files import file_facts, merge_parts, write_shares
from chatmill.trainer.checkpoint.manifest import MANIFEST, manifest_bytes
from chatmill.trainer.checkpoint.sharding import shares_of
from chatmill.trainer.model.decoder import Decoder
from chatmill.trainer.model_config import ModelConfig

SHAPE = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1)
ODD: list[Any] = [
    None, True, -1, 0, 1, 1.5, float("nan"), 10**30, 2**62, "", "x", "..", "../x", "/etc/passwd", "a\nb", "\ud83d", [], {},
    [[]], [None], {"x": 1},
]  # fmt: skip


def make(run: Path) -> dict[str, torch.Tensor]:
    """Two checkpoints as two ranks write them; the tensors of the newer one."""
    tensors: dict[str, torch.Tensor] = {}
    (run / "checkpoints").mkdir()
    for step in (1, 2):
        model = Decoder(SHAPE)
        model.init_weights(step)
        named = [("model", name, tensor.detach()) for name, tensor in model.named_parameters()]
        named += [("optimizer", f"{name}.exp_avg", tensor * step) for _, name, tensor in named]
        named += [("rng", "rng.cpu.0", torch.full((600,), step, dtype=torch.uint8))]
        temporary = run / "new"
        temporary.mkdir(parents=True)
        (temporary / "config.json").write_bytes(config_bytes(SHAPE))
        (temporary / "state.json").write_text(json.dumps({"step": step, "stream": {}}))
        parts = [write_shares(temporary, shares_of(named, rank, 2), f"rank{rank:04d}", 3000) for rank in range(2)]
        publish(temporary, run / "checkpoints" / f"step-{step:08d}", {"step": step}, merge_parts(parts))
        tensors = {name: tensor for _, name, tensor in named}
    return tensors


# ---------------------------------------------------------------- damaged bytes


def _damaged(kind: str, data: bytes, chance: random.Random, other: bytes) -> bytes | None:
    at = chance.randrange(len(data))
    size = chance.randint(1, 64)
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case "cut":
            return data[:at]
        case "add":
            return data[:at] + chance.randbytes(size) + data[at:]
        case "zero":
            return data[:at] + b"\0" * min(size, len(data) - at) + data[at + size :]
        case "move":
            return data[at:] + data[:at]
        case "empty":
            return b""
        case "delete":
            return None
    return other


BYTES = ("flip", "cut", "add", "zero", "move", "empty", "delete", "other file", "older file")


def damage_bytes(run: Path, chance: random.Random) -> str:
    """Damage one file of the newest checkpoint, look, and put it back; the kind, or "" where nothing changed."""
    older, newest = sorted((run / "checkpoints").iterdir())
    kind, path = chance.choice(BYTES), chance.choice(sorted(newest.iterdir()))
    whole = path.read_bytes()
    source = chance.choice(sorted(newest.iterdir())) if kind == "other file" else older / path.name
    data = _damaged(kind, whole, chance, source.read_bytes())
    if data == whole:
        return ""
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    try:
        if path.name != MANIFEST or data is not None:  # without a manifest it is no checkpoint any more
            name = (
                "" if (kind, path.name) == ("older file", MANIFEST) else path.name
            )  # sealed: the other files are then at fault
            assert any(name in line for line in verify_files(newest)), f"{kind} of {path.name}: not noticed"
            try:
                open_checkpoint(newest)
            except CheckpointError as error:
                assert name in str(error), f"{kind} of {path.name}: not named in {error}"
            else:
                raise AssertionError(f"{kind} of {path.name}: opened")
        assert open_checkpoint(run).path == older, f"{kind} of {path.name}: the older one was not taken"
    finally:
        path.write_bytes(whole)
    return kind


# ---------------------------------------------------------------- forged


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*path, key), *_places(item, (*path, key))]]


def _forge_manifest(folder: Path, manifest: dict[str, Any], chance: random.Random) -> str:
    place = chance.choice([p for p in _places(manifest) if p[0] != "meta"])
    parent = manifest
    for key in place[:-1]:
        parent = parent[key]
    match chance.choice(("replace", "delete", "rename", "change")):
        case "delete" if len(place) > 1:
            del parent[place[-1]]
        case "rename" if isinstance(parent, dict) and len(place) > 1:
            parent[str(chance.choice(ODD))] = parent.pop(place[-1])
        case "change" if isinstance(parent[place[-1]], int):
            parent[place[-1]] += chance.choice((-1, 1, 2**40))
        case _:
            parent[place[-1]] = copy.deepcopy(chance.choice(ODD))
    return "manifest"


def _forge_header(folder: Path, manifest: dict[str, Any], chance: random.Random) -> str:
    path = chance.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match chance.choice(("dtype", "shape", "name", "more", "rows")):
        case "dtype":
            tensors[name] = tensor.to(torch.int32)
        case "shape":
            tensors[name] = tensor.reshape(2, -1) if tensor.ndim != 2 and tensor.numel() % 2 == 0 else tensor.reshape(-1, 1)
        case "name":
            tensors[f"{name}.x"] = tensor
        case "more":
            tensors |= {name: tensor, "another": torch.ones(1)}
        case _:
            tensors[name] = torch.cat([tensor, tensor])
    path.unlink()  # its tensors are still mapped
    save_file(tensors, path)
    manifest["files"][path.name] = file_facts(path)
    return "header"


def forge(run: Path, tensors: dict[str, torch.Tensor], chance: random.Random) -> str:
    """Change a copy of the newest checkpoint and make its hashes fit; what opens and reads must be the truth."""
    folder = run / "forged"
    shutil.copytree(sorted((run / "checkpoints").iterdir())[-1], folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest.pop("checksum")
        kind = chance.choice((_forge_manifest, _forge_header))(folder, manifest, chance)
        (folder / MANIFEST).write_bytes(manifest_bytes(manifest))
        try:
            found = open_checkpoint(folder)
            found.check_model()
            for name in found.index:
                tensor = found.tensor(name)
                assert name not in tensors or torch.equal(tensor, tensors[name]), f"{kind}: {name} was read wrong"
        except ConfigError as error:
            assert str(folder) in str(error), f"{kind}: the folder is not named in {error}"
            return f"{kind}, refused"
        return f"{kind}, read true"
    finally:
        shutil.rmtree(folder)


def damage(count: int, seed: int = 0) -> Counter[str]:
    """So many damages, a third of them forged; how many of each kind. Raises AssertionError, or what should not be raised."""
    chance, kinds = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="chatmill-damages-") as place:
        tensors = make(Path(place))
        acts: list[Callable[[], str]] = [
            lambda: damage_bytes(Path(place), chance),
            lambda: damage_bytes(Path(place), chance),
            lambda: forge(Path(place), tensors, chance),
        ]
        while kinds.total() < count:
            if kind := chance.choice(acts)():
                kinds[kind] += 1
        assert open_checkpoint(place).meta["step"] == 2, "put back each time"
    return kinds


if __name__ == "__main__":
    found = damage(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{found.total()} damages, all noticed and named: " + ", ".join(f"{kind} {n}" for kind, n in sorted(found.items())))
