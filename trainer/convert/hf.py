"""Import from and export to Hugging Face folders, one tensor at a time.

    import_hf("Llama-3.2-1B-Instruct", "models/llama-1b")        # folder -> Chatmill checkpoint
    export_hf("runs/demo", "out/demo-hf")                        # checkpoint or run -> folder that transformers loads

Weights keep their dtype and their bits. Source files are memory-mapped and at most one output shard is held, so the memory
needed does not grow with the model. Both directions write beside the target and rename at the end: an error leaves nothing.
Run: chatmill import SOURCE OUT; chatmill export CHECKPOINT --to hf OUT.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from chatmill.config import ConfigError
from chatmill.run_files import MANIFEST

from ...data.tokenizer.generation_settings import GENERATION, as_setting, end_ids, read_settings, to_bytes, with_ids
from ..checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..config import ModelConfig
from .endings import Endings, endings
from .hf_config import read_hf_config, write_hf_config
from .model_card import model_card
from .names import hf_name, parameter_shapes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_hf(source_dir: str | Path, out_dir: str | Path, *, shard_bytes: int = 2 << 30) -> Checkpoint:
    """Write the Chatmill checkpoint out_dir from a Hugging Face folder with safetensors weights.

    shard_bytes: size of the checkpoint's files, and about the memory needed. Raises ConfigError for what does not fit.
    """
    source = Path(source_dir)
    refuse_foreign_folder(out_dir)
    raw = _read_json(source / "config.json")
    config = read_hf_config(raw, str(source / "config.json"))
    where = _tensor_files(source)
    shapes = parameter_shapes(config)
    wanted = {hf_name(name): name for name in shapes}
    _check_names(set(wanted), set(where), config, source)
    _check_vocabulary(source, config)
    settings = _generation_settings(source, raw)
    meta = {
        "imported_from": source.resolve().name,
        "architecture": raw.get("architectures"),
        "dtype": raw.get("dtype") or raw.get("torch_dtype"),
    }
    with CheckpointWriter(out_dir, config, meta={"source": meta}, shard_bytes=shard_bytes) as writer:
        for theirs, tensor in _read_tensors(source, where, set(wanted)):
            name = wanted[theirs]
            if tensor.shape != shapes[name]:
                raise ConfigError(
                    f"{where[theirs]}: {theirs} has shape {tuple(tensor.shape)}, config.json implies {tuple(shapes[name])}.\n"
                    "The weights and config.json are of different models."
                )
            if tensor.dtype not in DTYPES.values():
                raise ConfigError(f"{where[theirs]}: {theirs} is {tensor.dtype}; expected bf16, fp16 or fp32 weights.")
            writer.add(name, tensor)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                writer.add_file(file, (source / file).read_bytes())
        if settings:
            writer.add_file(GENERATION, to_bytes(settings))
    return open_checkpoint(out_dir, verify=False)


def export_hf(
    checkpoint: Checkpoint | str | Path,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 4 << 30,
    overwrite: bool = False,
) -> Path:
    """Write a folder that transformers, vLLM and llama.cpp's converter load, with a model card. Returns its path.

    dtype: fp32, bf16 or fp16; None keeps what the checkpoint holds. overwrite: replace an earlier export.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    out = Path(out_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not (overwrite and (out / "config.json").is_file()):
        raise ConfigError(f"{out} exists already. Choose another folder" + (": it holds no export." if overwrite else "."))
    held, found = checkpoint.tensor(checkpoint.names()[0]).dtype, endings(checkpoint)
    raw = write_hf_config(checkpoint.config, str(DTYPES[dtype] if dtype else held).removeprefix("torch."))
    raw |= {"bos_token_id": found.bos, "eos_token_id": as_setting(found.stops), "pad_token_id": found.pad}
    temporary = out.with_name(f".{out.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(checkpoint, temporary, DTYPES[dtype] if dtype else None, shard_bytes)
        _write_json(temporary / "config.json", raw)
        _write_companions(checkpoint, temporary, found)
        (temporary / "README.md").write_text(model_card(checkpoint), encoding="utf-8")
        if out.exists():
            retired = out.with_name(f".{out.name}.retired-{os.getpid()}")
            out.replace(retired)
            temporary.replace(out)
            shutil.rmtree(retired)
        else:
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def refuse_foreign_folder(out_dir: str | Path) -> None:
    """A checkpoint may be replaced; any other folder that is not empty may not."""
    out = Path(out_dir)
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not a Chatmill checkpoint; it will not be replaced. Choose another folder.")


def _generation_settings(source: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The folder's generation settings; a reply also ends at the tokens that config.json alone names."""
    settings = read_settings(source)
    ends = (*end_ids(settings), *end_ids(config, str(source / "config.json")))
    return with_ids(settings, ends, config.get("bos_token_id"), config.get("pad_token_id"))


def _tensor_files(source: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    index = source / INDEX
    if index.is_file():
        weights = _read_json(index).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise ConfigError(f"{index}: it has no weight_map. The file is damaged.")
        files = {name: source / file for name, file in weights.items()}
        if missing := sorted({path.name for path in files.values() if not path.is_file()}):
            raise ConfigError(f"{source}: weight files named by {INDEX} are missing: {', '.join(missing)}. Fetch them again.")
        return files
    single = source / SINGLE
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    pickles = sorted(p.name for p in source.glob("*.bin"))
    hint = (
        f" It has {pickles[0]}: pickled weights can run code and are not read; save the model as safetensors."
        if pickles
        else ""
    )
    raise ConfigError(f"{source}: neither {SINGLE} nor {INDEX} found.{hint}")


def _check_names(wanted: set[str], held: set[str], config: ModelConfig, source: Path) -> None:
    if missing := sorted(wanted - held):
        hint = ""
        if "lm_head.weight" in missing:
            hint = "\nWithout lm_head.weight the embeddings must be tied: config.json needs tie_word_embeddings=true."
        raise ConfigError(f"{source}: {len(missing)} tensor(s) missing: {', '.join(missing[:5])}.{hint}")
    # old files carry the rotary frequencies, which config.json determines
    extra = sorted(name for name in held - wanted if not name.endswith("rotary_emb.inv_freq"))
    if config.tied_embeddings and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # compared with the embedding while reading
    if extra:
        raise ConfigError(f"{source}: {len(extra)} tensor(s) that this architecture does not have: {', '.join(extra[:5])}.")


def _check_vocabulary(source: Path, config: ModelConfig) -> None:
    file = source / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{file}: not a readable tokenizer ({error})") from None
    if ids and max(ids) >= config.vocab_size:
        raise ConfigError(
            f"{file}: its largest token id is {max(ids)}, but the model has {config.vocab_size} rows of embeddings.\n"
            "Tokenizer and weights are of different models."
        )


def _read_tensors(source: Path, where: dict[str, Path], wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(their name, tensor) file by file; a file's tensors are memory-mapped and released before the next."""
    tied_copy = "lm_head.weight" if "lm_head.weight" in where and "lm_head.weight" not in wanted else None
    by_file: dict[Path, list[str]] = {}
    for name in sorted(wanted):
        by_file.setdefault(where[name], []).append(name)
    for file, names in by_file.items():
        with _open(file) as handle:
            present = set(handle.keys())
            for name in names:
                if name not in present:
                    raise ConfigError(f"{file}: {name} is not in it, although {INDEX} says so. Fetch the file again.")
                tensor = handle.get_tensor(name)
                if tied_copy and name == "model.embed_tokens.weight":
                    with _open(where[tied_copy]) as other:
                        if not torch.equal(other.get_tensor(tied_copy), tensor):
                            raise ConfigError(
                                f"{source}: tie_word_embeddings is true, yet lm_head.weight differs from the embedding.\n"
                                "Set tie_word_embeddings=false in config.json to keep both, or remove lm_head.weight."
                            )
                yield name, tensor


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a readable safetensors file ({error}). Fetch it again.") from None


def _write_weights(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    total = held = 0
    umask = os.umask(0)
    os.umask(umask)

    def flush() -> None:
        nonlocal held
        part = folder / f"part-{len(shards)}"
        save_file(pending, part, metadata={"format": "pt"})
        part.chmod(0o666 & ~umask)  # the library creates files that only their owner can read
        shards.append(list(pending))
        pending.clear()
        held = 0

    for name, tensor in checkpoint.tensors():
        tensor = tensor if dtype is None else tensor.to(dtype)
        if pending and held + tensor.nbytes > shard_bytes:
            flush()
        pending[hf_name(name)] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
    if pending:
        flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_companions(checkpoint: Checkpoint, folder: Path, found: Endings) -> None:
    """Tokenizer, chat template and generation settings."""
    files = checkpoint.files()
    for name in TOKENIZER_FILES:
        if name in files:
            shutil.copyfile(files[name], folder / name)
    described = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").is_file():
        # without a class transformers uses that of the model type, which splits text by its own rule
        settings = _read_json(described) if described.is_file() else {}
        if "tokenizer_class" not in settings:
            _write_json(described, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / GENERATION).write_bytes(to_bytes(found.settings()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing. Expected a Hugging Face model folder.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
