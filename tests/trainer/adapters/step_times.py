"""CPU seconds and peak memory of a training step: full, LoRA, and TRL with peft, on the same packs and in the same precision.

    python -m tests.trainer.adapters.step_times runs/smollm2 out/smollm2-hf corpora/chitchat --tokens 256 --rounds 3

Times: the sides take turns in one process, on one thread, and its CPU seconds are counted, so that other work on the machine
does not count. Compute and base are fp32 on every side but `demo-lora, bf16`, which has the recipe's own base. TRL's side is
what its trainer calls for a step (training_step, clipping, optimizer) with the pack's own positions: all compute the same loss.
Head: the loss of the pack's rows with a trained and with a frozen classifier, forward and backward, beside nothing else.
Memory: a process of its own for each side, two steps; the peak of its resident memory, and what it was before the model.
Needs trl and peft for their side, which is left out without them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.kernels.linear_cross_entropy import linear_cross_entropy
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe

from .conftest import engine_on

Step = Callable[[PackedBatch], float]
TRL = "trl + peft"
SIDES = {"demo": ("demo", ()), "demo-lora": ("demo-lora", ("model.base_precision=fp32",)), "demo-lora, bf16": ("demo-lora", ())}


def ours(side: str, options: argparse.Namespace) -> Step:
    """A step of a shipped recipe."""
    name, more = SIDES[side]
    words = [f"model.checkpoint={options.checkpoint}", f"data.path={options.data}", f"data.sequence_length={options.tokens}"]
    recipe = load_recipe(name, [*words, "train.precision=fp32", *more])
    engine = engine_on(open_checkpoint(options.checkpoint, verify=False), recipe)

    def step(batch: PackedBatch) -> float:
        sums = engine.forward_backward([batch])
        engine.step(1e-4)
        return float(sums.loss_sum) / batch.step_loss_tokens

    return step


def theirs(options: argparse.Namespace, scratch: str) -> Step:
    """A step of TRL's SFTTrainer with the same LoRA."""
    import datasets
    import peft
    import transformers
    import trl

    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(options.hf, dtype=torch.float32),
        args=trl.SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=1,
            gradient_checkpointing=False,
            report_to=[],
            max_length=None,
            learning_rate=1e-4,
            weight_decay=0.0,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}),
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=transformers.AutoTokenizer.from_pretrained(options.hf),
        data_collator=lambda rows: rows,
    )
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    assert dtypes == {torch.float32}, dtypes
    trainer.create_optimizer_and_scheduler(1000)

    def step(batch: PackedBatch) -> float:
        labels = torch.full_like(batch.targets, -100)
        labels[1:] = batch.targets[:-1]
        inputs = {"input_ids": batch.tokens.long()[None], "labels": labels[None], "position_ids": batch.positions.long()[None]}
        loss = trainer.training_step(trainer.model, inputs, num_items_in_batch=torch.tensor(batch.step_loss_tokens))
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss)

    return step


def built(side: str, options: argparse.Namespace, scratch: str) -> Step:
    return theirs(options, scratch) if side == TRL else ours(side, options)


def packs(options: argparse.Namespace) -> Any:
    return iter(PackedStream(TokenDataset.open(options.data, "train"), sequence_length=options.tokens, prefetch=0))


def head_step(options: argparse.Namespace, trained: bool) -> Step:
    """Loss and gradients of the tied classifier on random hidden states of a pack's rows."""
    weight = open_checkpoint(options.checkpoint, verify=False).tensor("embed.weight").float().requires_grad_(trained)

    def step(batch: PackedBatch) -> float:
        x = torch.randn(len(batch.tokens), weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight.grad = None
        loss = linear_cross_entropy(x, weight, batch.targets, reduction="sum", rows=batch.rows)
        loss.backward()
        return float(loss.detach()) / batch.step_loss_tokens

    return step


def take_turns(steps: dict[str, Step], options: argparse.Namespace) -> dict[str, list[float]]:
    """CPU seconds of every counted round; losses and seconds are printed as they come. The first round is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    stream = packs(options)
    for number in range(options.rounds + 1):
        batch = next(stream)
        for name, step in steps.items():
            began = time.process_time()
            loss = step(batch)
            spent[name].append(time.process_time() - began)
            print(f"{number}  {name:<16} loss {loss:.5f}  {spent[name][-1]:.2f} CPU s", flush=True)
    return {name: values[1:] for name, values in spent.items()}


def show(spent: dict[str, list[float]], unit: str) -> None:
    for name, values in spent.items():
        ratios = [a / b for a, b in zip(values, spent[unit], strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:<16} {statistics.median(values):6.2f} CPU s   x {unit}: {ratio}")


def peak_mib() -> float:
    """Of this program alone: getrusage also counts what the process was before it became this program."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def print_peak(side: str, options: argparse.Namespace, scratch: str) -> None:
    """The memory of two steps of one side in this process."""
    if side == TRL:
        import trl  # noqa: F401
    before, stream = peak_mib(), packs(options)
    step = built(side, options, scratch)
    for _ in range(2):
        step(next(stream))
    print(f"{side:<16} peak {peak_mib():,.0f} MiB, {before:,.0f} of them before the model", flush=True)


def main() -> None:
    """Print the losses and CPU seconds of every round, the medians with their ratios, then the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "hf", "data"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sides = [*SIDES, *([TRL] if importlib.util.find_spec("trl") else [])]
    with tempfile.TemporaryDirectory() as scratch:
        if options.peak:
            print_peak(options.peak, options, scratch)
            return
        show(take_turns({side: built(side, options, scratch) for side in sides}, options), "demo-lora")
        heads = {"head trained": head_step(options, True), "head frozen": head_step(options, False)}
        show(take_turns(heads, options), "head frozen")
    for side in sides:
        subprocess.run([sys.executable, "-m", __spec__.name, *sys.argv[1:], "--peak", side], check=True)


if __name__ == "__main__":
    main()
