"""Adapters as folders of PEFT: adapter_config.json and adapter_model.safetensors.

    import_peft("someones-lora", "runs/smollm2", "adapters/theirs")     # folder + its base -> adapter checkpoint
    export_peft("runs/demo-lora", "out/demo-lora")                      # adapter checkpoint or run -> folder that peft loads

Tensors keep their dtype and bits, and an imported adapter_config.json goes out as it came. What changes the base (PiSSA without
conversion, LoftQ), what a rank per module or a trained bias would need, and all else that is not a LoRA or DoRA of one rank, is
refused. A PiSSA of ours goes out as a plain LoRA of twice the rank: scale (B A - B0 A0).
Run: chatmill import FOLDER OUT --base CHECKPOINT; chatmill export RUN OUT --to peft. Names as in peft 0.21.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from chatmill.config import ConfigError, read_json
from chatmill.files import folder_beside, publish_folder, sync

from ...data.tokenizer.folder import FILES
from ..adapter_config import QUANTISED, AdapterSection
from ..adapters.merging import META, AdapterFacts, facts_for, facts_of, open_base, with_base
from ..checkpoint.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from ..checkpoint.files import not_finite, save_tensors, write_small_file
from ..model.shapes import parameter_shapes
from ..model_config import ModelConfig
from .hf import refuse_foreign_folder, refuse_links_out
from .hf_weights import open_weights
from .names import hf_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDINGS = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b", ".lora_magnitude_vector": "magnitude"}
TABLE_ENDINGS = {".lora_embedding_A": "lora_a", ".lora_embedding_B": "lora_b"}
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights", "bias"}
# of no effect on a trained adapter: names, how its values began, and which modules it was put on (the tensors say that)
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "task_type", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "megatron_core", "qalora_group_size"),
    *("eva_config", "ensure_weight_tying", "runtime_config"),
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def is_peft_folder(path: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (path / CONFIG).is_file()


def import_peft(
    source_dir: str | Path, base_path: str | Path, out_dir: str | Path, *, origin: Mapping[str, str] | None = None
) -> Checkpoint:
    """Write the adapter checkpoint out_dir from a PEFT folder and the checkpoint of its base. Raises ConfigError.

    origin: what the checkpoint says of its source (default: the folder's name).
    """
    source = Path(source_dir)
    refuse_foreign_folder(out_dir)
    refuse_links_out(source)
    base = open_checkpoint(base_path)
    if facts_of(base) is not None:
        raise ConfigError(f"--base {base_path} is an adapter itself: merge it first (chatmill merge).")
    raw = read_json(source / CONFIG, "a folder that peft wrote")
    names = _their_modules(base.config, source)
    held: dict[str, Tensor] = {}
    with open_weights(source / WEIGHTS) as handle:
        for theirs in sorted(handle.keys()):
            name, tensor = _our_name(theirs, names, source), handle.get_tensor(theirs)
            if problem := not_finite(tensor):
                raise ConfigError(f"{source / WEIGHTS}: {theirs} {problem}. The weights are damaged; fetch the file again.")
            if not name.endswith(".base_layer"):
                held[name] = tensor
            elif not torch.equal(tensor, base.tensor(f"{name.removesuffix('.base_layer')}.weight").to(tensor.dtype)):
                raise ConfigError(f"{source / WEIGHTS}: {theirs} is not the table of {base.path}: the base is another model.")
    settings = _settings(raw, held, source)
    _check_shapes(held, base, settings, source)
    facts = facts_for(base, base_path, settings, "fp32")
    meta = {
        META: facts.as_meta(),
        "source": {
            **(origin or {"imported_from": source.resolve().name}),
            "base": raw.get("base_model_name_or_path"),
        },
    }
    files = base.files()
    with CheckpointWriter(out_dir, base.config, meta) as writer:
        for name, tensor in held.items():
            writer.add(name, tensor)
        writer.add_file(CONFIG, (source / CONFIG).read_bytes())
        for file in (name for name in FILES if name in files):
            writer.add_file(file, files[file].read_bytes())
    with_base(found := open_checkpoint(out_dir, verify=False), verify=False)
    return found


def export_peft(checkpoint: Checkpoint | str | Path, out_dir: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder that `peft.PeftModel.from_pretrained(base, folder)` loads. Returns its path. Raises ConfigError."""
    found = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    facts = facts_of(found)
    if facts is None:
        raise ConfigError(f"{found.path} holds a whole model, not an adapter. Use --to hf.")
    if facts.settings.init == "pissa" and facts.precision in QUANTISED:
        raise ConfigError(
            f"{found.path}: PiSSA on a base in {facts.precision} quantises what is left of it, which PEFT cannot express.\n"
            "Merge it: chatmill merge RUN OUT."
        )
    out = Path(out_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not (overwrite and is_peft_folder(out)):
        raise ConfigError(f"{out} exists already. Choose another folder" + (": it holds no adapter." if overwrite else "."))
    base = open_base(facts, found.path, verify=False)
    modules = {ours: theirs for theirs, ours in _their_modules(base.config, found.path).items()}
    tensors, rank = _their_tensors(found, base, facts, modules)
    imported = found.files().get(CONFIG)
    config = imported.read_bytes() if imported else _their_config(found, facts, modules, rank)
    with folder_beside(out) as temporary:
        save_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_small_file(temporary / CONFIG, config)
        for path in temporary.iterdir():
            sync(path)
        publish_folder(temporary, out)
    return out


def _their_modules(config: ModelConfig, where: Path) -> dict[str, str]:
    """Hugging Face's module name -> ours. Raises ConfigError for a family whose folders fuse matrices."""
    found = hf_tensors(config)
    if fused := next((theirs for theirs, ours in found.items() if len(ours) > 1), None):
        raise ConfigError(
            f"{where}: {config.family} fuses matrices ({fused}), whose adapters cannot be told apart.\n"
            "Merge the adapter instead: chatmill merge RUN OUT."
        )
    return {
        theirs.removesuffix(".weight"): ours[0].removesuffix(".weight")
        for theirs, ours in found.items()
        if theirs.endswith(".weight")
    }


def _our_name(theirs: str, modules: Mapping[str, str], source: Path) -> str:
    """`layers.0.attention.q.lora_a`, `norm.weight` or `embed.base_layer` for a tensor of a PEFT folder. Raises ConfigError."""
    inner = theirs.removeprefix(PREFIX)
    for ending, kind in {**ENDINGS, **TABLE_ENDINGS, ".base_layer.weight": "base_layer", ".weight": "weight"}.items():
        module = modules.get(inner.removesuffix(ending)) if inner.endswith(ending) else None
        fits = kind in ("base_layer", "weight") or (module == "embed") == (ending in TABLE_ENDINGS)
        if module is not None and fits:
            return f"{module}.{kind}"
    raise ConfigError(f"{source / WEIGHTS}: {theirs} belongs to no module of the base. The adapter is of another model.")


def _settings(raw: Mapping[str, Any], held: Mapping[str, Tensor], source: Path) -> AdapterSection:
    where = source / CONFIG
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{where}: peft_type is {raw.get('peft_type')!r}; only LORA (with DoRA) can be imported.")
    if raw.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights={raw['init_lora_weights']!r} changed the base, which is not in the folder.\n"
            "Save it as a plain LoRA: path_initial_model_for_weight_conversion of peft's save_pretrained."
        )
    neutral: tuple[Any, ...] = (None, False, [], {}, "none")
    odd = [key for key, value in raw.items() if key not in READ | HARMLESS and value not in neutral]
    if raw.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ConfigError(f"{where}: {odd[0]}={raw[odd[0]]!r} is not supported: one rank, one alpha and no trained bias are.")
    modules = sorted(name.removesuffix(".lora_a") for name in held if name.endswith(".lora_a"))
    whole = sorted(name for name in held if name.endswith(".weight"))
    try:
        return AdapterSection(
            method="dora" if raw.get("use_dora") else "lora",
            rank=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            dropout=raw.get("lora_dropout", 0.0),
            rslora=bool(raw.get("use_rslora")),
            targets=tuple(modules),
            train=tuple(whole),
        )
    except ValidationError as error:
        raise ConfigError(f"{where}: {error.errors()[0]['loc']} {error.errors()[0]['msg']}") from None


def _check_shapes(held: Mapping[str, Tensor], base: Checkpoint, settings: AdapterSection, source: Path) -> None:
    shapes = parameter_shapes(base.config)
    for module in settings.targets:
        rows, columns = shapes[f"{module}.weight"]
        inside, outside = (rows, columns) if module == "embed" else (columns, rows)
        wanted: dict[str, tuple[int, ...]] = {
            f"{module}.lora_a": (settings.rank, inside),
            f"{module}.lora_b": (outside, settings.rank),
        }
        if settings.method == "dora":
            wanted[f"{module}.magnitude"] = (outside,)
        for name, shape in wanted.items():
            if name not in held:
                raise ConfigError(f"{source / WEIGHTS}: {name} is missing. Fetch the file again.")
            if tuple(held[name].shape) != shape:
                raise ConfigError(f"{source / WEIGHTS}: {name} has shape {tuple(held[name].shape)}, expected {shape}.")
    for name in settings.train:
        if held[name].shape != shapes[name]:
            raise ConfigError(
                f"{source / WEIGHTS}: {name} has shape {tuple(held[name].shape)}, expected {tuple(shapes[name])}."
            )


def _their_tensors(
    found: Checkpoint, base: Checkpoint, facts: AdapterFacts, modules: Mapping[str, str]
) -> tuple[dict[str, Tensor], int]:
    """(tensors under PEFT's names, their rank)."""
    pissa = facts.settings.init == "pissa"
    tensors: dict[str, Tensor] = {}
    for name in found.names():
        module, _, kind = name.rpartition(".")
        if kind.startswith("initial_"):
            continue
        endings = TABLE_ENDINGS if module == "embed" else ENDINGS
        ending = next((theirs for theirs, ours in endings.items() if ours == kind), f".{kind}")
        tensor = found.tensor(name)
        if pissa and kind == "lora_a":
            tensor = torch.cat([tensor, found.tensor(f"{module}.initial_a")])
        elif pissa and kind == "lora_b":
            tensor = torch.cat([tensor, -found.tensor(f"{module}.initial_b")], dim=1)
        tensors[f"{PREFIX}{modules[module]}{ending}"] = tensor.contiguous()
        if kind == "lora_a" and module in ("embed", "head"):  # as peft does, once a table is among the targets
            tensors[f"{PREFIX}{modules[module]}.base_layer.weight"] = base.tensor(f"{module}.weight")
    return tensors, facts.settings.rank * (2 if pissa else 1)


def _their_config(found: Checkpoint, facts: AdapterFacts, modules: Mapping[str, str], rank: int) -> bytes:
    settings = facts.settings
    adapted = [modules[name.removesuffix(".lora_a")] for name in found.names() if name.endswith(".lora_a")]
    whole = [modules[name.removesuffix(".weight")] for name in found.names() if name.endswith(".weight")]
    alpha = settings.alpha if rank == settings.rank else settings.scale * (rank**0.5 if settings.rslora else rank)
    values = {
        "base_model_name_or_path": facts.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings.dropout,
        "modules_to_save": sorted(whole) or None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(adapted),
        "task_type": "CAUSAL_LM",
        "use_dora": settings.method == "dora",
        "use_rslora": settings.rslora,
    }
    return (json.dumps(values, indent=2) + "\n").encode()
