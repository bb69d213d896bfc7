"""Times a training step beside plain PyTorch with transformers, on the same packed batches with the same weights.

    python -m chatmill.trainer.bench.transformers_step demo --pairs 8

Both sides take turns, one step each, in one process with one number of threads. The other side is what a careful user would
write: `AutoModelForCausalLM` with SDPA, document boundaries through position_ids, cross-entropy over the logits,
clip_grad_norm_, and fused AdamW. Its losses must be ours. Prints tokens per second of both, and the ratio of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from chatmill.config import ConfigError

from ...data.packing.sources import open_mixture
from ...data.stream import PackedBatch, PackedStream
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from ..config import Recipe, load_recipe
from ..convert.hf import export_hf
from ..distributed.world import World
from ..engine.choose import build_engine
from ..engine.engine import Engine
from ..model.decoder import Decoder
from ..optim.optimizer import set_rate

Step = Callable[[PackedBatch], float]


def our_step(recipe: Recipe, engine: Engine) -> Step:
    """A step as the loop takes it; returns the loss per token."""

    def step(batch: PackedBatch) -> float:
        sums = engine.forward_backward([batch])
        engine.clip()
        engine.step(recipe.optimizer.lr)
        return float(sums.loss_sum) / max(1, batch.step_examples)

    return step


def their_step(recipe: Recipe, model: Any) -> Step:
    """The same with transformers' model."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.optimizer.lr, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps,
        weight_decay=recipe.optimizer.weight_decay, fused=True,
    )  # fmt: skip
    optimizer.param_groups[0]["lr_ratio"] = 1.0
    set_rate(optimizer, recipe.optimizer.lr)
    model.train()
    bf16 = recipe.train.precision == "bf16"

    def step(batch: PackedBatch) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch.tokens[None], position_ids=batch.positions[None].long(), use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum") / max(1, batch.step_examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def load_ours(recipe: Recipe, start: Checkpoint) -> Engine:
    """The engine of the recipe, on the CPU alone."""
    decoder = Decoder(start.config, recipe.kernels)
    engine = build_engine(recipe, decoder, World(0, 1, 0, 1, torch.device("cpu"), "none"))
    engine.load_model(start)
    return engine


def load_theirs(start: Checkpoint) -> Any:
    """transformers' model with the checkpoint's weights in fp32."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export_hf(start, Path(folder) / "hf", dtype="fp32")
        return AutoModelForCausalLM.from_pretrained(Path(folder) / "hf", dtype=torch.float32, attn_implementation="sdpa")


def alternate(ours: Step, theirs: Step, batches: Sequence[PackedBatch], clock: Callable[[], float]) -> list[dict[str, float]]:
    """One record per batch: tokens, seconds and losses of both; who goes first changes with every batch."""
    records = []
    for number, batch in enumerate(batches):
        record: dict[str, float] = {"tokens": float(batch.step_tokens)}
        sides = (("ours", ours), ("theirs", theirs))
        for name, step in sides if number % 2 else sides[::-1]:
            began = clock()
            record[f"{name} loss"] = step(batch)
            record[f"{name} s"] = clock() - began
        records.append(record)
    return records


def summary(records: Sequence[dict[str, float]]) -> list[str]:
    """Lines for people, without the first batch, which warms up."""
    kept = records[1:]
    ratios = [record["theirs s"] / record["ours s"] for record in kept]
    rates = {name: sum(r["tokens"] for r in kept) / sum(r[f"{name} s"] for r in kept) for name in ("ours", "theirs")}
    first = records[0]  # the only one before which both have the same weights to the last bit
    apart = abs(first["ours loss"] - first["theirs loss"]) / abs(first["theirs loss"])
    return [
        f"tokens/s: chatmill {rates['ours']:.0f}, transformers {rates['theirs']:.0f}",
        f"ratio: median {statistics.median(ratios):.3f} of {len(ratios)} pairs ({min(ratios):.3f} to {max(ratios):.3f})",
        f"losses of the first step differ by {apart:.1e} of their value",
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m chatmill.trainer.bench.transformers_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--pairs", type=int, default=8, help="timed pairs of steps, after one that warms up (default 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both (default: torch's)")
    busy = "seconds of processor time instead of the clock's, for a machine that others use"
    parser.add_argument("--cpu-time", action="store_true", help=busy)
    options = parser.parse_args(words)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if recipe.model.checkpoint is None or recipe.parallel.strategy != "single":
            raise ConfigError("give a recipe with model.checkpoint and parallel.strategy=single")
        torch.set_num_threads(options.threads)
        start = open_checkpoint(recipe.model.checkpoint)
        stream = PackedStream(
            open_mixture(recipe.data), sequence_length=recipe.data.sequence_length, micro_batch=recipe.train.micro_batch,
            seed=recipe.train.seed, overlong=recipe.data.overlong,
        )  # fmt: skip
        batches = list(islice(stream, options.pairs + 1))
        ours, theirs = our_step(recipe, load_ours(recipe, start)), their_step(recipe, load_theirs(start))
        clock = time.process_time if options.cpu_time else time.perf_counter
        records = alternate(ours, theirs, batches, clock)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    share = sum(b.step_loss_tokens for b in batches) / sum(b.step_tokens for b in batches)
    size = f"packs of {recipe.data.sequence_length}, {share:.0%} of the tokens with loss"
    print(f"{options.recipe}: {size}, {options.threads} thread(s)")
    print(*summary(records), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
