"""CPU seconds of a training step: full, LoRA, and TRL with peft, in turns in one process, on the same packs.

    python -m tests.trainer.adapters.step_times runs/smollm2 out/smollm2-hf corpora/chitchat --tokens 256 --rounds 5

Times are of this process's CPU, on one thread, so that other work on the machine does not count. TRL's side is what its trainer
calls for a step (training_step, clipping, optimizer) with the pack's own positions: both compute the same loss. Needs trl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.trainer.checkpoint.checkpoint import open_checkpoint
from chatmill.trainer.config import load_recipe

from .conftest import engine_on

Step = Callable[[PackedBatch], float]


def ours(name: str, options: argparse.Namespace) -> Step:
    """A step of a shipped recipe."""
    words = [f"model.checkpoint={options.checkpoint}", f"data.path={options.data}", f"data.sequence_length={options.tokens}"]
    recipe = load_recipe(name, [*words, f"train.precision={options.precision}"])
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

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(options.hf, dtype=dtype),
        args=trl.SFTConfig(
            output_dir=scratch,
            use_cpu=True,
            bf16=options.precision == "bf16",
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


def main() -> None:
    """Print the losses and CPU seconds of every round, then the medians and their ratios to demo-lora."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("checkpoint", "hf", "data"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        steps: dict[str, Step] = {name: ours(name, options) for name in ("demo", "demo-lora")}
        steps["trl + peft"] = theirs(options, scratch)
        spent: dict[str, list[float]] = {name: [] for name in steps}
        stream: Any = iter(PackedStream(TokenDataset.open(options.data, "train"), sequence_length=options.tokens, prefetch=0))
        for number in range(options.rounds + 1):  # the first one is not counted
            batch, losses = next(stream), {}
            for name, step in steps.items():
                began = time.process_time()
                losses[name] = step(batch)
                spent[name].append(time.process_time() - began)
            print(
                number, *(f"{name}: loss {losses[name]:.5f}, {spent[name][-1]:.2f} s" for name in steps), sep="  ", flush=True
            )
    medians = {name: statistics.median(values[1:]) for name, values in spent.items()}
    for name, median in medians.items():
        print(f"{name:<11} {median:6.2f} CPU s per step   {median / medians['demo-lora']:.2f} x demo-lora")


if __name__ == "__main__":
    main()
