"""The model card of an export: what the model is, what it was trained on and how, and what was measured.

    text = model_card(checkpoint)        # README.md of the folder that `chatmill export --to hf` writes

It contains only what the checkpoint and its run folder say; unknown facts are left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from chatmill.run_files import read_jsonl

from ..checkpoint.checkpoint import Checkpoint
from .tokenizer_class import AS_IT_IS, is_replaced


def model_card(checkpoint: Checkpoint) -> str:
    """Markdown with the YAML head of the Hugging Face hub."""
    meta, config = checkpoint.meta, checkpoint.config
    source = meta.get("source") if isinstance(meta.get("source"), dict) else {}
    name = str(meta.get("run") or (source or {}).get("name") or checkpoint.path.name)
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["chatmill", "conversational"],
    }
    base = _hub_source(checkpoint)
    if base.get("license"):
        head["license"] = base["license"]
    if base.get("hub"):
        head["base_model"] = base["imported_from"]
    total = config.parameter_counts()["total"]
    loader = AS_IT_IS if is_replaced(checkpoint) else "AutoTokenizer"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {name}",
        "",
        f"A chat model of {total:,} parameters ({config.name}: {config.layers} layers, width {config.hidden_size}, "
        f"{config.heads} heads over {config.kv_heads} key/value heads, context {config.context:,} tokens, "
        f"vocabulary {config.vocab_size:,}), exported from a Chatmill checkpoint.",
        "",
        "```python",
        f"from transformers import AutoModelForCausalLM, {loader}",
        f"model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER), {loader}.from_pretrained(FOLDER)",
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,',
        '                                       return_tensors="pt", return_dict=True)',
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=100)[0]))",
        "```",
        "",
        *_training(checkpoint),
        *_data(checkpoint),
        *_evaluation(checkpoint),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _training(checkpoint: Checkpoint) -> Iterator[str]:
    meta = checkpoint.meta
    facts: dict[str, Any] = {key: meta[key] for key in ("run", "step", "tokens") if key in meta}
    if isinstance(meta.get("source"), dict):
        facts |= {f"source {key}": value for key, value in meta["source"].items() if value}
    file = checkpoint.files().get("recipe.yaml")
    recipe = _mapping(file) if file is not None else {}
    for section, fields in (
        ("model", ("checkpoint",)),
        ("optimizer", ("name", "lr", "weight_decay")),
        ("schedule", ("name", "warmup_steps")),
        ("train", ("steps", "micro_batch", "accumulation", "precision", "seed")),
        ("data", ("sequence_length",)),
        ("parallel", ("strategy",)),
    ):
        found = recipe.get(section)
        if isinstance(found, Mapping):
            facts |= {f"{section}.{field}": found[field] for field in fields if found.get(field) is not None}
    if recipe.get("objective"):
        facts["objective"] = recipe["objective"]
    if facts:
        yield "## Training"
        yield from _table(facts)


def _hub_source(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the checkpoint, or the one that its training began with, says of where it was imported from."""
    file = checkpoint.files().get("recipe.yaml")
    model = (_mapping(file) if file is not None else {}).get("model")
    found, first = checkpoint.meta.get("source"), model.get("checkpoint") if isinstance(model, Mapping) else None
    if not isinstance(found, Mapping) and first:
        manifest = _mapping(_beside(checkpoint, Path(str(first))) / "manifest.json")
        meta = manifest.get("meta")
        found = meta.get("source") if isinstance(meta, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _data(checkpoint: Checkpoint) -> Iterator[str]:
    path = checkpoint.meta.get("data")
    if not path:
        return
    yield "## Data"
    facts: dict[str, Any] = {"data set": Path(str(path)).name, "fingerprint": checkpoint.meta.get("data_fingerprint", "")}
    manifest = _mapping(_beside(checkpoint, Path(str(path))) / "manifest.json")
    if manifest:
        facts["recipe sha256"] = manifest.get("recipe_sha256", "")
        for split, figures in manifest.get("splits", {}).items():
            facts[split] = (
                f"{figures['dialogues']:,} dialogues, {figures['tokens']:,} tokens, {figures['loss_tokens']:,} supervised"
            )
        for item in manifest.get("inputs", []):
            if isinstance(item, Mapping) and item.get("sha256"):
                facts[f"input {item.get('name', '')}".strip()] = f"{item.get('format', '')} sha256 {item['sha256']}"
        shared = (manifest.get("certificate") or {}).get("shared")
        if isinstance(shared, Mapping):
            facts["shared by training and validation"] = ", ".join(f"{n} {what}" for what, n in shared.items())
    yield from _table(facts)


def _evaluation(checkpoint: Checkpoint) -> Iterator[str]:
    """The run's own validation at this step, and full evaluations that name this checkpoint."""
    step, run = checkpoint.meta.get("step"), checkpoint.path.parent.parent
    found: dict[str, Any] = {}
    if step is not None:
        for row in read_jsonl(run / "metrics.jsonl"):
            if row.get("step") == step and isinstance(row.get("eval"), dict):
                found = row["eval"]
    if found:
        yield "## Evaluation"
        yield from _table({f"validation {key}": f"{v:.4g}" if isinstance(v, float) else v for key, v in found.items()})


def _beside(checkpoint: Checkpoint, path: Path) -> Path:
    """A relative path is relative to where the run was started, usually the parent of runs/."""
    bases = [Path.cwd(), *checkpoint.path.resolve().parents]
    return next((base / path for base in bases if (base / path).is_dir()), path)


def _table(facts: Mapping[str, Any]) -> list[str]:
    rows = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in facts.items() if value not in ("", None)]
    return ["| | |", "|---|---|", *rows, ""]


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
