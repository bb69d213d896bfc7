"""Weights of foreign models: read by transformers' own loader, proved, and written under the names that they came with.

    model, remark = load_pretrained(folder, raw, where)         # a ForeignModel with the weights of a Hugging Face folder
    for name, tensor in as_it_came(checkpoint): ...             # tensors for a Hugging Face folder, one layer at a time

transformers fuses some weights while it loads (the experts of a layer become one tensor); a checkpoint holds them fused, and an
export takes them apart again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from chatmill.config import ConfigError

from ...data.tokenizer.generation_settings import as_setting, end_ids
from ..foreign_config import ForeignConfig
from .architecture import Foreign, build_foreign, context_of, taken_apart, transformers_config
from .experts import experts_of
from .foreign_model import ForeignModel
from .packed_attention import window_of

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LENGTHS = (9, 1, 14)  # tokens of the documents of the proof


def load_pretrained(source: Path, raw: Mapping[str, Any], where: Mapping[str, Path]) -> tuple[ForeignModel, dict[str, Any]]:
    """The model of a folder, and what an import should say of it. where: file of each tensor. Raises ConfigError."""
    config = transformers_config(raw, str(source / "config.json"))
    dtypes = _dtypes(where)
    from transformers import AutoModelForCausalLM

    try:
        causal, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtypes[0] if len(dtypes) == 1 else torch.float32, attn_implementation="eager",
            use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, OSError) as error:
        raise ConfigError(f"{source}: transformers cannot load it: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            raise ConfigError(f"{source}: {kind.replace('_keys', '')} tensors: {', '.join(names[:5])}.")
    found = taken_apart(causal.eval().requires_grad_(False), str(source))
    _check_tied(found, source, where)
    remark: dict[str, Any] = {}
    if left := sorted(set(where) - set(_theirs(causal, dict(causal.state_dict())))):
        left = [name for name in left if not name.endswith("rotary_emb.inv_freq") and name != f"{found.head_name}.weight"]
        remark |= {"left_out": left[:100]} if left else {}
    shape = describe(found, raw, str(source / "config.json"))
    model = ForeignModel(shape, built=found).eval()
    if why := prove(model):
        remark |= {"documents": "rows", "why": why}
    _narrow(model, dtypes[0])
    return model, remark


def describe(model: Foreign, raw: Mapping[str, Any], where: str) -> ForeignConfig:
    """Everything that plans and engines need to know of a model. Raises ConfigError."""
    config = model.causal.config
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    heads = _whole(config, "num_attention_heads", 1)
    head_dim = _whole(config, "qk_head_dim", 0) or _whole(config, "head_dim", 0) or max(2, hidden // heads)
    kv_heads = _whole(config, "num_key_value_heads", heads)
    tables = [name for name, p in model.causal.named_parameters() if p is model.body.get_input_embeddings().weight]  # type: ignore[operator]
    tied = model.head.weight is model.body.get_input_embeddings().weight  # type: ignore[operator]
    if not tied:
        tables.append(f"{model.head_name}.weight")
    try:
        windows = tuple(window_of(config, layer) for layer in range(layers))
    except ConfigError:
        windows = ()
    experts, taken = experts_of(model.body)
    ends = as_setting(end_ids(raw, where))
    return ForeignConfig(
        source={**raw, "vocab_size": config.vocab_size},
        table_names=tuple(tables),
        windows=windows if any(windows) else (),
        parts=parts_of(model, tables),
        experts=experts,
        experts_per_token=taken,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        intermediate_size=_whole(config, "intermediate_size", 4 * hidden),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads if heads % kv_heads == 0 else heads,
        head_dim=head_dim + head_dim % 2,
        context=context_of(config),
        tied_embeddings=tied,
        initializer_range=getattr(config, "initializer_range", None) or 0.02,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=ends if ends is None or isinstance(ends, int) else tuple(ends),
        pad_token_id=raw.get("pad_token_id"),
    )


def parts_of(model: Foreign, tables: list[str]) -> dict[str, int]:
    """Elements of the parameters by part."""
    counts = dict.fromkeys(("embedding", "attention", "mlp", "experts", "norms", "head"), 0)
    for name, parameter in model.causal.named_parameters():
        if name in tables:
            part = "embedding" if name == tables[0] else "head"
        elif parameter.ndim < 2:
            part = "experts" if ".experts." in name else "norms"
        elif ".experts." in name:
            part = "experts"
        else:
            part = "attention" if "attn" in name or "attention" in name else "mlp"
        counts[part] += parameter.numel()
    return counts


def _whole(config: Any, name: str, default: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


@torch.no_grad()
def prove(model: ForeignModel) -> str:
    """Run the model on three documents in one pack, as rows and alone; keep them apart as `rows` where packing is not right.

    Returns why packing is not, or "". Raises ConfigError where even padding changes what stands before it.
    """
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    tokens = torch.randint(0, model.config.vocab_size, (total,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    cu_seqlens = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.25  # of the length of a token's state
    model.keep_apart("rows")
    rows = model.hidden_states(tokens, positions, cu_seqlens, max(LENGTHS))
    alone = torch.cat([model._run(part[None], torch.arange(len(part))[None])[0] for part in tokens.split(LENGTHS)])
    if (worst := _difference(rows, alone)) > tolerance:
        raise ConfigError(
            f"{model.config.model_type}: what stands behind a text changes it (by {worst:.2g}): it is no causal language model."
        )
    causal, config = model.causal, model.causal.config
    dropout = {name: value for name in ("attention_dropout", "attn_pdrop") if (value := getattr(config, name, 0))}
    if not causal._supports_attention_backend or dropout:
        return f"its attention has dropout {dropout}" if dropout else "its attention is not reached by transformers' interface"
    model.keep_apart("packed")
    try:
        packed = model.hidden_states(tokens, positions, cu_seqlens, max(LENGTHS))
    except (ConfigError, ValueError, TypeError) as error:
        why = str(error)
    else:
        if (worst := _difference(packed, rows)) <= tolerance:
            return ""
        why = f"its layers look beyond a document's ends (hidden states differ by {worst:.2g})"
    model.keep_apart("rows")
    return why


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest relative difference of a token's state; infinite for NaN."""
    found = ((a - b).float().norm(dim=-1) / b.float().norm(dim=-1).clamp(min=1e-6)).max()
    return float(found) if found == found else float("inf")


def as_it_came(
    config: ForeignConfig, tensors: Mapping[str, Callable[[], Tensor]], progress: Callable[[int, int], object]
) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, tensor) of a checkpoint's tensors, one layer at a time. tensors: what reads them, by name."""
    with torch.device("meta"):
        causal = build_foreign(config.hf_config(), config.model_type).causal
    groups: dict[str, list[str]] = {}
    for name in tensors:
        match = re.match(r"(.*?\.\d+)\.", name)
        groups.setdefault(match.group(1) if match else name, []).append(name)
    for number, names in enumerate(groups.values(), 1):
        yield from _theirs(causal, {name: tensors[name]() for name in names}).items()
        progress(number, len(groups))


def _theirs(causal: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the pieces, of transformers' checkpoints."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, Tensor] = revert_weight_conversion(causal, state)
    return found


def _dtypes(where: Mapping[str, Path]) -> list[torch.dtype]:
    """Data types of the files' tensors, the commonest first. Raises ConfigError for quantised ones."""
    found: Counter[torch.dtype] = Counter()
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                part = handle.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise ConfigError(f"{file}: {name} is {kind}; expected bf16, fp16 or fp32 weights.")
                size = 1
                for length in part.get_shape():
                    size *= length
                found[DTYPES[kind]] += size
    return [dtype for dtype, _ in found.most_common()]


def _check_tied(model: Foreign, source: Path, where: Mapping[str, Path]) -> None:
    """Refuse a folder whose classifier differs from an embedding that it is tied to."""
    table = model.body.get_input_embeddings().weight  # type: ignore[operator]
    name = f"{model.head_name}.weight"
    if model.head.weight is table and name in where:
        with safe_open(where[name], framework="pt") as handle:
            if not torch.equal(handle.get_tensor(name).to(table.dtype), table):
                raise ConfigError(
                    f"{source}: tie_word_embeddings is true, yet {name} differs from the embedding.\n"
                    f"Set tie_word_embeddings=false in config.json to keep both, or remove {name}."
                )


@torch.no_grad()
def _narrow(model: ForeignModel, dtype: torch.dtype) -> None:
    """Give what was widened for its neighbours' sake the common dtype of the files again, where no bit is lost."""
    for parameter in model.parameters():
        lower = parameter.to(dtype)
        if parameter.dtype != dtype and torch.equal(lower.to(parameter.dtype), parameter):
            parameter.data = lower
