"""The two recipes that `chatmill new` writes, with comments for whoever edits them next.

    data_recipe(plan); train_recipe(plan)       # YAML texts

Pure functions of a Plan: what was found in the chats and what the user chose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...data.recipe import RECIPES as DATA_SCHEMAS
from ...trainer.config import RECIPES as TRAIN_SCHEMAS

SCHEMA = "# yaml-language-server: $schema={}"  # by which editors complete and check a recipe


@dataclass(frozen=True)
class Plan:
    """What the recipes are about.

    sources: fields of the data recipe's sources. base: the checkpoint to fine-tune, None for a new model with random weights.
    context: tokens that the model can read. tokens: in the chats, roughly. prompts: questions to answer at each validation.
    own_system: what the model's template says where a dialogue has no system message.
    """

    name: str
    source: str
    sources: Sequence[Mapping[str, Any]]
    dialogues: int
    tokens: int
    prompts: Sequence[str]
    base: str | None
    context: int = 2048
    system: str | None = None
    own_system: str | None = None
    has_gpu: bool = False
    has_bf16: bool = False

    @property
    def validation(self) -> float:
        """Share of the dialogues that is kept for validation: of few, more, so that some are left."""
        return 0.05 if self.dialogues >= 400 else 0.1

    @property
    def sequence_length(self) -> int:
        """Tokens per pack."""
        return min(self.context, 256 if self.base is None else 2048 if self.has_gpu else 1024)

    @property
    def micro_batch(self) -> int:
        """Packs per step."""
        return 8 if self.has_gpu else 4 if self.base is None else 1

    @property
    def passes(self) -> int:
        """How often the chats are read: a model that knows its language needs few readings."""
        return 3 if self.base else 30

    @property
    def steps(self) -> int:
        """Steps for that many passes, within what a CPU does in minutes and a GPU in an hour."""
        wanted = math.ceil(self.passes * self.tokens / (self.micro_batch * self.sequence_length))
        return min(max(wanted, 20), 2000 if self.has_gpu else 300)

    @property
    def vocab_size(self) -> int:
        """Of a new tokenizer."""
        return 1024 if self.tokens < 100_000 else 4096


def data_recipe(plan: Plan) -> str:
    """The data recipe as YAML."""
    lines = [
        SCHEMA.format(DATA_SCHEMAS / "schema.json"),
        f"# How {plan.source} becomes a data set. docs/data.md lists every field.",
        f"#   chatmill data build {plan.name}-data.yaml",
        f"name: {plan.name}",
        f"out: corpora/{plan.name}",
        "sources:",
    ]
    for source in plan.sources:
        for number, (field, value) in enumerate(source.items()):
            note = "  # whom the model learns to be; everybody else is the user" if field == "assistant" else ""
            lines.append(f"{'    ' if number else '  - '}{field}: {quoted(value)}{note}")
    lines += [
        "    # gap_minutes: 30  # a longer silence begins another dialogue, in a chat without end",
        "# Phone numbers, addresses, cards: `off` keeps them, `redact` writes [PHONE], `surrogate` invents others.",
        "# A model repeats what it has read: choose before you give it to anybody.",
        "clean:",
        "  privacy:",
        '    mode: "off"',
    ]
    if plan.system:
        lines += [
            "# Stands before every dialogue that has no system message; give the same one when you talk to the model.",
            "pair:",
        ]
        lines += [f"  system: {quoted(plan.system)}"]
    elif plan.own_system:
        lines += [f"# Before dialogues without a system message the template of {plan.base} says:"]
        lines += [f"#   {quoted(plan.own_system)}", "# To say something else, here and when you talk to the model:"]
        lines += ["# pair:", '#   system: "You are …"']
    lines += [
        "# This share of the dialogues is never trained on: it measures the model.",
        "split:",
        f"  validation: {plan.validation}",
    ]
    if plan.base:
        lines += [
            "# The model to fine-tune: its tokenizer and its chat template.",
            "tokenizer:",
            f"  path: {quoted(plan.base)}",
        ]
    else:
        lines += [
            "# A new tokenizer, learned from these chats. Better: `path:` of a model to fine-tune (chatmill import).",
            "tokenizer:",
            "  train:",
            f"    vocab_size: {plan.vocab_size}",
        ]
    return "\n".join(lines) + "\n"


def train_recipe(plan: Plan) -> str:
    """The training recipe as YAML."""
    few = f"{plan.tokens:,} tokens, roughly"
    passes = plan.steps * plan.micro_batch * plan.sequence_length / max(plan.tokens, 1)
    every = max(1, math.ceil(plan.steps / 5))
    lines = [
        SCHEMA.format(TRAIN_SCHEMAS / "schema.json"),
        f"# Trains on corpora/{plan.name}. Any field can be overridden: chatmill train {plan.name}-train.yaml train.steps=500",
        f"#   chatmill train {plan.name}-train.yaml      # Ctrl-C saves; the same command continues",
        "run:",
        f"  name: {plan.name}",
        "data:",
        f"  path: corpora/{plan.name}",
        f"  sequence_length: {plan.sequence_length}  # tokens of a pack; whole dialogues are packed together",
        "model:",
    ]
    if plan.base:
        lines += [f"  checkpoint: {quoted(plan.base)}  # where training starts"]
    else:
        lines += [
            "  # A small model with random weights: it learns words and tone, and knows nothing of the world. To fine-tune one",
            "  # that does, put `checkpoint: FOLDER` in place of these lines, and `path: FOLDER` into the data recipe.",
            f"  vocab_size: {plan.vocab_size}",
            *("  hidden_size: 128", "  intermediate_size: 384", "  layers: 4", "  heads: 4", "  kv_heads: 2"),
            f"  context: {plan.context}",
            "  tied_embeddings: true",
        ]
    lines += [
        "optimizer:",
        f"  lr: {'2.0e-4' if plan.base else '3.0e-3'}",
        f"  weight_decay: {'0.0' if plan.base else '0.05'}",
        "schedule:",
        "  name: linear",
        f"  warmup_steps: {max(1, plan.steps // 10)}",
        "train:",
        f"  steps: {plan.steps}  # {passes:.2g} times through the chats ({few})",
        f"  micro_batch: {plan.micro_batch}",
        f"  precision: {'bf16' if plan.has_gpu or plan.has_bf16 else 'fp32'}",
        "checkpoint:",
        f"  every_steps: {every}",
        "evaluation:",
        f"  every_steps: {every}",
        f"  max_dialogues: {200 if plan.has_gpu else 16}",
        f"  # Answered at each validation; `chatmill report runs/{plan.name}` shows how the answers change.",
        "  prompts:",
        *(f"    - {quoted(prompt)}" for prompt in plan.prompts),
    ]
    return "\n".join(lines if plan.prompts else lines[:-2]) + "\n"


def quoted(value: Any) -> str:
    """A value as YAML that reads back as it was; texts in quotation marks."""
    return json.dumps(value, ensure_ascii=False)
