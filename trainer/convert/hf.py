"""Import from and export to Hugging Face folders, one tensor at a time.

    import_hf("Llama-3.2-1B-Instruct", "models/llama-1b")        # folder -> Chatmill checkpoint
    export_hf("runs/demo", "out/demo-hf")                        # checkpoint or run -> folder that transformers loads

Weights keep their dtype and their bits. Source files are memory-mapped and at most one output shard is held, so the memory
needed does not grow with the model. Both directions write beside the target and rename at the end: an error leaves nothing.
Run: chatmill import SOURCE OUT; chatmill export CHECKPOINT --to hf OUT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from chatmill.config import ConfigError, read_json
from chatmill.files import folder_beside, publish_folder, sync
from chatmill.progress import Report, silent
from chatmill.run_files import MANIFEST

from ...data.tokenizer.generation_settings import GENERATION, as_setting, end_ids, read_settings, to_bytes, with_ids
from ..adapters.merging import open_model
from ..checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..checkpoint.files import not_finite, write_small_file
from ..config import ModelConfig
from ..foreign_config import ForeignConfig
from .endings import Endings, endings
from .family import families
from .hf_config import read_hf_config, write_hf_config
from .hf_weights import DTYPES, INDEX, check_names, check_shapes, read_tensors, tensor_files, write_weights
from .model_card import model_card
from .names import hf_tensors, parameter_shapes
from .tokenizer_class import as_it_is

Impl = Literal["auto", "own", "transformers"]
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

READ = {*TOKENIZER_FILES, GENERATION, INDEX, "config.json", "adapter_config.json"}


def import_hf(
    source_dir: str | Path,
    out_dir: str | Path,
    *,
    impl: Impl = "auto",
    shard_bytes: int = 2 << 30,
    origin: Mapping[str, str] | None = None,
    progress: Report = silent,
) -> Checkpoint:
    """Write the Chatmill checkpoint out_dir from a Hugging Face folder with safetensors weights.

    impl: who computes the model: our decoder (own: known families only), transformers, or transformers where the family is
    not known (auto).
    shard_bytes: size of the checkpoint's files, and about the memory needed. origin: what the checkpoint says of its source,
    instead of the folder's name. Raises ConfigError for what does not fit.
    """
    source = Path(source_dir)
    refuse_foreign_folder(out_dir)
    refuse_links_out(source)
    raw = read_json(source / "config.json", "a Hugging Face model folder")
    where = tensor_files(source)
    if impl == "transformers" or (impl == "auto" and is_foreign(raw)):
        return import_foreign(source, raw, where, Path(out_dir), shard_bytes, origin, progress)
    config = read_hf_config(raw, str(source / "config.json"), where)
    wanted, rows = hf_tensors(config), parameter_shapes(config)
    check_names(wanted, where, config, source)
    check_shapes({theirs: _stacked([rows[name] for name in names]) for theirs, names in wanted.items()}, where)
    _check_vocabulary(source, config)
    settings = _generation_settings(source, raw)
    with CheckpointWriter(out_dir, config, meta={"source": _origin(source, raw, origin)}, shard_bytes=shard_bytes) as writer:
        for number, (theirs, tensor) in enumerate(read_tensors(source, where, wanted)):
            progress("weights", number, len(wanted))
            names = wanted[theirs]
            for name, part in zip(names, tensor.split([rows[name][0] for name in names]), strict=True):
                writer.add(name, part)
        _add_companions(writer, source, settings)
    progress("weights", len(wanted), len(wanted))
    return open_checkpoint(out_dir, verify=False)


def is_foreign(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json names a family that our decoder does not know, and transformers may."""
    name = raw.get("model_type")
    if not isinstance(name, str) or find_spec("transformers") is None:
        return False
    family = families().get(name)
    return family is None or (family.computes is not None and not family.computes(raw))


def import_foreign(
    source: Path,
    raw: Mapping[str, Any],
    where: Mapping[str, Path],
    out: Path,
    shard_bytes: int,
    origin: Mapping[str, str] | None,
    progress: Report,
) -> Checkpoint:
    """import_hf of a model that transformers computes: its loader holds all weights in memory. Raises ConfigError."""
    from ..backends.weights import load_pretrained

    progress("weights", 0, 1)
    model, remark = load_pretrained(source, raw, where)
    _check_vocabulary(source, model.config)
    settings = _generation_settings(source, raw)
    meta = {**_origin(source, raw, origin), **remark}
    with CheckpointWriter(out, model.config, meta={"source": meta}, shard_bytes=shard_bytes) as writer:
        for name, tensor in (*model.named_parameters(), *model.constants()):
            if problem := not_finite(tensor):
                raise ConfigError(f"{source}: {name} {problem}. The weights are damaged; fetch the files again.")
            writer.add(name, tensor)
        _add_companions(writer, source, settings)
    progress("weights", 1, 1)
    return open_checkpoint(out, verify=False)


def _origin(source: Path, raw: Mapping[str, Any], origin: Mapping[str, str] | None) -> dict[str, Any]:
    """What the checkpoint says of its source."""
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return {**(origin or {"imported_from": source.resolve().name}), "architecture": raw.get("architectures"), "dtype": dtype}


def _add_companions(writer: CheckpointWriter, source: Path, settings: Mapping[str, Any]) -> None:
    """Tokenizer, chat template and generation settings of a folder."""
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            writer.add_file(file, (source / file).read_bytes())
    if settings:
        writer.add_file(GENERATION, to_bytes(settings))


def export_hf(
    checkpoint: Checkpoint | str | Path,
    out_dir: str | Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 4 << 30,
    overwrite: bool = False,
    progress: Report = silent,
) -> Path:
    """Write a folder that transformers, vLLM and llama.cpp's converter load, with a model card. Returns its path.

    dtype: fp32, bf16 or fp16; None keeps what the checkpoint holds. overwrite: replace an earlier export.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_model(checkpoint)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")
    out = Path(out_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not (overwrite and (out / "config.json").is_file()):
        raise ConfigError(f"{out} exists already. Choose another folder" + (": it holds no export." if overwrite else "."))
    checkpoint.check_model()
    held, found = checkpoint.tensor(checkpoint.names()[0]).dtype, endings(checkpoint)
    kind = str(DTYPES[dtype] if dtype else held).removeprefix("torch.")
    config = checkpoint.config
    raw = foreign_config(config, kind) if isinstance(config, ForeignConfig) else write_hf_config(config, kind)
    raw |= {"bos_token_id": found.bos, "eos_token_id": as_setting(found.stops), "pad_token_id": found.pad}
    with folder_beside(out) as temporary:
        index = write_weights(checkpoint, temporary, DTYPES[dtype] if dtype else None, shard_bytes, progress)
        if index is not None:
            _write_json(temporary / INDEX, index)
        _write_json(temporary / "config.json", raw)
        _write_companions(checkpoint, temporary, found)
        write_small_file(temporary / "README.md", model_card(checkpoint).encode())
        progress("to disk", 0, 1)
        for path in temporary.iterdir():
            sync(path)
        progress("to disk", 1, 1)
        publish_folder(temporary, out)
    return out


def foreign_config(config: ForeignConfig, dtype: str) -> dict[str, Any]:
    """config.json as it came, with the rows and the data type that the weights have now."""
    return config.hf_config() | {name: dtype for name in ("dtype", "torch_dtype") if name in config.source or name == "dtype"}


def refuse_links_out(source: Path) -> None:
    """Refuse a folder whose files are links to elsewhere, or no files: an import must not carry foreign files along.

    In the hub's cache, where a snapshot is made of links, they may lead to the blobs of the same model. Raises ConfigError.
    """
    roots = [source.resolve()]
    if roots[0].parent.name == "snapshots" and (roots[0].parents[1] / "blobs").is_dir():
        roots.append(roots[0].parents[1] / "blobs")
    for path in sorted(source.iterdir()):
        if path.name in READ or path.suffix == ".safetensors":
            target = path.resolve()
            if path.is_symlink() and not any(target.is_relative_to(root) for root in roots):
                raise ConfigError(f"{path}: a link out of the folder, to {target}. Put the file itself there.")
            if not target.is_file():
                raise ConfigError(f"{path}: not a file. Fetch it again.")


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


def _stacked(shapes: list[torch.Size]) -> tuple[int, ...]:
    """Shape of tensors that lie one after the other along their rows."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


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


def _write_companions(checkpoint: Checkpoint, folder: Path, found: Endings) -> None:
    """Tokenizer, chat template and generation settings."""
    files = checkpoint.files()
    for name in TOKENIZER_FILES:
        if name in files:
            write_small_file(folder / name, files[name].read_bytes())
    if (folder / "tokenizer.json").is_file():
        described = folder / "tokenizer_config.json"
        _write_json(described, as_it_is(read_json(described) if described.is_file() else {}))
    write_small_file(folder / GENERATION, to_bytes(found.settings()))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_small_file(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
