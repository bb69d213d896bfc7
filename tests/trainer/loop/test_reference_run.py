"""A training run against transformers and plain PyTorch: same weights, same dialogues one at a time, torch's own AdamW."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.run_files import read_jsonl
from chatmill.trainer.checkpoint.checkpoint import CheckpointWriter, open_checkpoint
from chatmill.trainer.config import load_recipe
from chatmill.trainer.convert.hf import export_hf
from chatmill.trainer.convert.names import hf_name
from chatmill.trainer.loop.loop import train
from chatmill.trainer.model.decoder import Decoder

STEPS, ACCUMULATION, LR = 6, 2, 3e-3


def dialogues(batch: PackedBatch) -> list[tuple[Tensor, Tensor]]:
    """(ids, labels) of each dialogue of a packed batch, labels on the token itself: transformers shifts."""
    found = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        ids, targets = batch.tokens[start:end].long(), batch.targets[start:end]
        labels = torch.cat((torch.tensor([-100]), targets[:-1]))
        assert bool(((labels == -100) | (labels == ids)).all())
        found.append((ids, labels))
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_has_the_losses_of_transformers_with_plain_pytorch(family: str, write_recipe, tmp_path: Path) -> None:
    shape = {"family": family, "qk_norm": family == "qwen3", "tied_embeddings": family == "llama", "initializer_range": 0.1}
    file = write_recipe(
        "ours",
        model=shape,
        optimizer={"lr": LR, "weight_decay": 0.1},
        schedule={"name": "constant", "warmup_steps": 0},
        train={"steps": STEPS, "accumulation": ACCUMULATION, "micro_batch": 2},
        evaluation={"at_end": False},
    )
    recipe = load_recipe(str(file))
    model = Decoder(recipe.model.shape())
    model.init_weights(3)
    with CheckpointWriter(tmp_path / "start", recipe.model.shape()) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        tokenizer = Path(recipe.data.path) / "tokenizer"
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            writer.add_file(name, (tokenizer / name).read_bytes())
    train(load_recipe(str(file), [f"model.checkpoint={tmp_path / 'start'}"]))
    run = tmp_path / "runs" / "ours"
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]

    export_hf(open_checkpoint(tmp_path / "start"), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    matrices = [p for n, p in theirs.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in theirs.named_parameters() if p.ndim != 2 or "embed" in n]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps)
    stream = iter(
        PackedStream(
            TokenDataset.open(recipe.data.path, "train"),
            sequence_length=recipe.data.sequence_length,
            micro_batch=2,
            accumulation=ACCUMULATION,
            seed=recipe.train.seed,
            prefetch=0,
        )
    )
    for step in range(STEPS):
        chats = [chat for batch in islice(stream, ACCUMULATION) for chat in dialogues(batch)]
        count = sum(int((labels != -100).sum()) for _, labels in chats)
        total = torch.zeros(())
        for ids, labels in chats:
            if bool((labels != -100).any()):
                logits = theirs(input_ids=ids[None]).logits[0]
                total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        loss = total / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert lines[step]["loss_tokens"] == count
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5), step
        assert lines[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-4), step
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1  # it learned something on the way
    weights = dict(theirs.named_parameters())
    for name, tensor in open_checkpoint(run).tensors():
        difference = float((tensor - weights[hf_name(name)]).norm() / tensor.norm())
        assert difference < 1e-4, (name, difference)
