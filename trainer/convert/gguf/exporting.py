"""A Chatmill checkpoint as one GGUF file, for llama.cpp, Ollama and the like.

    export_gguf("runs/NAME", "model.gguf", dtype="q8_0")

The inverse of importing.py. For the architecture llama, rows of q and k get the order of llama.cpp's rotary embedding;
Qwen's stay. Tensors are written one at a time; the file appears whole or not at all. Norms and biases stay fp32.
What this writer cannot express (soft-caps, stretched rotary angles, a tokenizer with another splitting rule) is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chatmill.config import ConfigError
from chatmill.files import folder_beside, sync
from chatmill.progress import Report, silent

from ...adapters.merging import open_model
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import not_finite
from ...config import ModelConfig
from ...generation.defaults import sampling_of
from ..endings import endings
from ..family import families, family_of
from ..names import gguf_name, parameter_shapes
from .importing import END_LIST, SAMPLING_KEYS, reorder_rotary_rows, rotary_heads
from .splitting import CONTROL, NORMAL, RULES, USER_DEFINED, rule_of, steps_in_words

# our name -> name of gguf.GGMLQuantizationType
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q5_0": "Q5_0", "q4_0": "Q4_0", "mxfp4": "MXFP4"}
COARSE = ("q5_0", "q4_0", "mxfp4")  # the embedding and the head, which suffer most, stay at q8_0
FILE_TYPES = {"fp32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}  # of gguf.LlamaFileType; the others are MOSTLY_…
UNUSED = 5
# fields of a model that these files cannot say: they must have their defaults
SAME_IN_ALL = (
    *("rope_scaling", "attention_softcap", "logit_softcap", "sliding_window", "qk_norm_over", "norms", "norm_offset"),
    *("activation", "rotary_dim", "rope_interleaved", "window_rope_theta", "nope_layers"),
    *("embedding_scale", "attention_scale", "residual_scale", "logit_divisor"),
)


def export_gguf(
    checkpoint: Checkpoint | str | Path,
    out: str | Path,
    *,
    dtype: str = "bf16",
    overwrite: bool = False,
    progress: Report = silent,
) -> Path:
    """Write the file `out`. Raises ConfigError.

    dtype: fp32, fp16, bf16, or 8, 5 or 4 bits and a scale per 32 weights: q8_0, q5_0, q4_0, mxfp4.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError("writing GGUF files needs the `gguf` package: pip install gguf") from None
    if dtype not in TYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(TYPES)}.")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_model(checkpoint)
    path = Path(out)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ConfigError(f"{path} exists already. Choose another file name, or remove it.")
    config = checkpoint.config
    if family_of(config.family).gguf is None:
        known = ", ".join(name for name, family in families().items() if family.gguf)
        raise ConfigError(
            f"GGUF export: family {config.family} is not known to this writer (known: {known}).\n"
            "Use `chatmill export --to hf` and llama.cpp's convert_hf_to_gguf.py on that folder."
        )
    _check_expressible(config)
    checkpoint.check_model()
    with folder_beside(path) as folder:
        temporary = folder / path.name
        try:
            _write(gguf, checkpoint, temporary, dtype, progress)
        except OSError as error:
            number = error.errno
            if number is None:  # numpy says only that not all was written
                number = errno.ENOSPC if shutil.disk_usage(folder).free < 1 << 20 else errno.EIO
            raise OSError(number, os.strerror(number), str(path)) from error
        temporary.replace(path)
    sync(path.parent)
    return path


def _write(gguf: Any, checkpoint: Checkpoint, path: Path, dtype: str, progress: Report) -> None:
    """Write and sync the file."""
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, family_of(config.family).gguf)
    try:
        _describe(writer, checkpoint, dtype)
        _tokenizer(writer, checkpoint)
        shapes = parameter_shapes(config)
        kinds = {name: _kind(gguf, name, shape, dtype) for name, shape in shapes.items()}
        for name, shape in shapes.items():
            size = int(np.prod(gguf.quant_shape_to_byte_shape(tuple(shape), kinds[name])))
            writer.add_tensor_info(gguf_name(name), tuple(shape), np.dtype(np.float32), size, raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, name in enumerate(kinds):
            progress("weights", number, len(kinds))
            tensor = checkpoint.tensor(name)
            if problem := not_finite(tensor):
                raise ConfigError(f"{checkpoint.path}: {name} {problem}. A model with such weights is not exported.")
            values = tensor.float().numpy()
            if family_of(config.family).gguf == "llama" and (heads := rotary_heads(name, config)):
                values = reorder_rotary_rows(values, heads, to_gguf=True)
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[name]))
        writer.close()
        progress("to disk", 0, 1)
        sync(path)
        progress("to disk", 1, 1)
    except BaseException:
        with contextlib.suppress(OSError):  # it writes what it still holds, on the same disk
            writer.close()
        raise


def _check_expressible(config: ModelConfig) -> None:
    for field in SAME_IN_ALL:
        if getattr(config, field) != ModelConfig.model_fields[field].default:
            raise ConfigError(
                f"GGUF export: {field} is set, which this writer cannot express.\n"
                "Use `chatmill export --to hf` and llama.cpp's convert_hf_to_gguf.py on that folder."
            )


def _describe(writer: Any, checkpoint: Checkpoint, dtype: str) -> None:
    import gguf

    config = checkpoint.config
    name = str(checkpoint.meta.get("run") or checkpoint.path.name)
    # llama.cpp strips blanks after special tokens, and wants tokens of Phi-3, where the name holds one of these
    writer.add_name(re.sub("phi-?3", lambda found: f"{found[0][:3]} 3", name, flags=re.IGNORECASE))
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES.get(dtype, f"MOSTLY_{TYPES[dtype]}")))
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.d_head)
    writer.add_key_length(config.d_head)
    writer.add_value_length(config.d_head)


def _tokenizer(writer: Any, checkpoint: Checkpoint) -> None:
    files, config = checkpoint.files(), checkpoint.config
    if "tokenizer.json" not in files:
        raise ConfigError(f"{checkpoint.path} has no tokenizer.json; a GGUF file carries its tokenizer.")
    described = json.loads(files["tokenizer.json"].read_text(encoding="utf-8"))
    model = described["model"]
    rule = rule_of(described)
    if rule is None:
        raise ConfigError(
            f"GGUF export: {checkpoint.path}/tokenizer.json splits text by a rule that this writer does not know\n"
            f"({steps_in_words(described)}; known: {', '.join(RULES)}).\n"
            "Use `chatmill export --to hf` and llama.cpp's convert_hf_to_gguf.py on that folder."
        )
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in described.get("added_tokens", ()):
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    _ends(writer, checkpoint)
    writer.add_add_bos_token(False)  # the chat template says where one belongs
    if "chat_template.jinja" in files:
        writer.add_chat_template(files["chat_template.jinja"].read_text(encoding="utf-8"))


def _ends(writer: Any, checkpoint: Checkpoint) -> None:
    """The tokens that end a reply, and the sampling settings of the source.

    llama.cpp knows three places: eos (which templates print, too), eot (end of turn) and eom (end of message), and ends a reply
    at each. Ollama reads a list. A fourth token is in the list alone.
    """
    import gguf

    found = endings(checkpoint)
    for name, index in (("bos", found.bos), ("eos", found.eos), ("pad", found.pad)):
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    others = [index for index in found.stops if index != found.eos]
    for name, index in zip(("eot", "eom"), others, strict=False):
        getattr(writer, f"add_{name}_token_id")(index)
    if others:
        writer.add_array(END_LIST, list(found.stops))
    known = sampling_of(found.source)
    for name, key in SAMPLING_KEYS.items():
        if (value := known.get(name)) is not None and hasattr(gguf.Keys.General, key):  # older releases lack them
            add = writer.add_int32 if name == "top_k" else writer.add_float32
            add(getattr(gguf.Keys.General, key), value)


def _kind(gguf: Any, name: str, shape: torch.Size, dtype: str) -> Any:
    """Type of a tensor in the file: vectors stay fp32; rows whose length is no multiple of the format's block become fp16."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    wanted = getattr(kinds, TYPES["q8_0" if dtype in COARSE and name.partition(".")[0] in ("embed", "head") else dtype])
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else kinds.F16
