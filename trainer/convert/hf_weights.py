"""The tensors of a Hugging Face folder: found, checked before anything is read, read and written one at a time.

    where = tensor_files(folder)                             # name -> file, from the headers of all weight files
    check_names(hf_tensors(config), where, config, folder)
    for theirs, tensor in read_tensors(folder, where, names): ...
    write_weights(checkpoint, folder, dtype, shard_bytes)

A file's tensors are memory-mapped and released before the next file; at most one output shard is held.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatmill.config import ConfigError, read_json
from chatmill.progress import Report, silent

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import not_finite, save_tensors
from ..foreign_config import ForeignConfig
from ..model_config import ModelConfig
from .names import hf_tensors

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)\.safetensors")


def tensor_files(source: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Without an index all safetensors files of the folder are its shards."""
    named: dict[str, Path] = {}
    if (source / INDEX).is_file():
        weights = read_json(source / INDEX).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ConfigError(f"{source / INDEX}: it has no weight_map. The file is damaged.")
        if odd := [file for file in weights.values() if not isinstance(file, str) or Path(file).name != file]:
            raise ConfigError(f"{source / INDEX}: {odd[0]!r} is not the name of a file in this folder.")
        named = {name: source / file for name, file in weights.items()}
        files = sorted(set(named.values()))
    elif (source / SINGLE).is_file():
        files = [source / SINGLE]
    else:
        files = sorted(source.glob("*.safetensors"))
    if not files or (source / "adapter_config.json").is_file():
        raise ConfigError(f"{source}: {_without_weights(source)}")
    expected = {path.name for path in files} | _other_numbers(files)
    if missing := sorted(name for name in expected if not (source / name).is_file()):
        told = f"named by {INDEX} " if named else ""
        raise ConfigError(f"{source}: weight files {told}are missing: {', '.join(missing)}. Fetch them again.")
    where: dict[str, Path] = {}
    for file in files:
        with open_weights(file) as handle:
            for name in list(handle.keys()):
                if name in where:
                    raise ConfigError(f"{source}: {name} is in {where[name].name} and in {file.name}. Remove one of the files.")
                where[name] = file
    for name, file in named.items():
        if where.get(name) != file:
            raise ConfigError(f"{file}: {name} is not in it, although {INDEX} says so. Fetch the file again.")
    return where


def _other_numbers(files: list[Path]) -> set[str]:
    """model-00001-of-00003.safetensors: the names of all three."""
    found: set[str] = set()
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            start, digits, of, count = match.groups()
            if int(count) <= 10_000:
                found |= {f"{start}{n + 1:0{len(digits)}d}{of}{count}.safetensors" for n in range(int(count))}
    return found


def _without_weights(source: Path) -> str:
    if (source / "adapter_config.json").is_file():
        return "an adapter (adapter_config.json), not a whole model. Merge it into its base model and save that."
    pickles = sorted(p.name for p in source.glob("*.bin"))
    hint = " It has {}: pickled weights can run code and are not read; save the model as safetensors."
    return "no .safetensors file found." + (hint.format(pickles[0]) if pickles else "")


def check_names(wanted: Collection[str], held: Collection[str], config: ModelConfig, source: Path) -> None:
    """Refuse a folder that lacks a tensor, or has one that the decoder would ignore. Raises ConfigError."""
    if missing := sorted(set(wanted) - set(held)):
        hint = ""
        if HEAD in missing:
            hint = f"\nWithout {HEAD} the embeddings must be tied: config.json needs tie_word_embeddings=true."
        raise ConfigError(f"{source}: {len(missing)} tensor(s) missing: {', '.join(missing[:5])}.{hint}")
    # old files carry the rotary frequencies, which config.json determines
    extra = sorted(name for name in set(held) - set(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if config.tied_embeddings and HEAD in extra:
        extra.remove(HEAD)  # compared with the embedding while reading
    if extra:
        raise ConfigError(f"{source}: {len(extra)} tensor(s) that this architecture does not have: {', '.join(extra[:5])}.")


def check_shapes(shapes: dict[str, tuple[int, ...]], where: dict[str, Path]) -> None:
    """Compare the headers with the shapes that config.json implies, before any weight is read. Raises ConfigError."""
    known = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
    for file in sorted({where[name] for name in shapes}):
        with open_weights(file) as handle:
            for name in sorted(name for name in shapes if where[name] == file):
                part = handle.get_slice(name)
                shape, dtype = tuple(part.get_shape()), _dtype_name(part.get_dtype())
                if shape != shapes[name]:
                    raise ConfigError(
                        f"{file}: {name} has shape {shape}, config.json implies {shapes[name]}.\n"
                        "The weights and config.json are of different models."
                    )
                if dtype not in known:
                    raise ConfigError(f"{file}: {name} is {dtype}; expected bf16, fp16 or fp32 weights.")


def _dtype_name(name: str) -> str:
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(name, name)


def read_tensors(source: Path, where: dict[str, Path], wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor) file by file. Raises ConfigError for NaN, and for a tied head that differs from the embedding."""
    tied_copy = HEAD if HEAD in where and HEAD not in wanted else None
    by_file: dict[Path, list[str]] = {}
    for name in sorted(wanted):
        by_file.setdefault(where[name], []).append(name)
    for file, names in by_file.items():
        with open_weights(file) as handle:
            for name in names:
                tensor = handle.get_tensor(name)
                if problem := not_finite(tensor):
                    raise ConfigError(f"{file}: {name} {problem}. The weights are damaged; fetch the file again.")
                if tied_copy and name == EMBEDDING:
                    with open_weights(where[tied_copy]) as other:
                        if not torch.equal(other.get_tensor(tied_copy), tensor):
                            raise ConfigError(
                                f"{source}: tie_word_embeddings is true, yet {HEAD} differs from the embedding.\n"
                                f"Set tie_word_embeddings=false in config.json to keep both, or remove {HEAD}."
                            )
                yield name, tensor


def open_weights(file: Path) -> Any:
    """safe_open with its errors in words."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file}: not a readable safetensors file ({error}). Fetch it again.") from None


def write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Report = silent
) -> dict[str, Any] | None:
    """Write the weight files; returns their index, or None where there is one file."""
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = held = 0

    def flush() -> None:
        nonlocal held
        save_tensors(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()
        held = 0

    for name, ours, tensor in _their_tensors(checkpoint, progress):
        if problem := not_finite(tensor):
            raise ConfigError(f"{checkpoint.path}: {ours} {problem}. A model with such weights is not exported.")
        tensor = tensor.contiguous() if dtype is None else tensor.to(dtype).contiguous()
        if pending and held + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    if pending:
        flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return None
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _their_tensors(checkpoint: Checkpoint, progress: Report) -> Iterator[tuple[str, str, Tensor]]:
    """(name in a Hugging Face folder, ours, tensor) of a checkpoint, in the order in which they are written."""
    config = checkpoint.config
    if isinstance(config, ForeignConfig):
        from ..backends.weights import as_it_came

        names = checkpoint.names()
        read = {name: partial(checkpoint.tensor, name) for name in names}
        for name, tensor in as_it_came(config, read, partial(progress, "weights")):
            yield name, name, tensor
        return
    wanted = hf_tensors(config)
    for number, (name, parts) in enumerate(wanted.items()):
        progress("weights", number, len(wanted))
        tensors = [checkpoint.tensor(part) for part in parts]
        yield name, ", ".join(parts), tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    progress("weights", len(wanted), len(wanted))
