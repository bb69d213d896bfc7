"""Throughput, MFU and memory of the training loop.

    MFU = training FLOPs per token (6 x matrix parameters + 6 x layers x heads x head_dim x context) x tokens/s / peak

Packed chats attend within their dialogue only: context = sum(length^2) / sum(length) over the segments of this rank's batches.
No recomputation is counted. Peaks are the dense bf16 figures of the vendors' data sheets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from chatmill.data.stream import PackedBatch
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.world import World

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, or None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


class StepMeter:
    """Tokens per second since the last line; time waited for data; memory."""

    def __init__(self, config: ModelConfig, world: World) -> None:
        self.config, self.world = config, world
        self._peak = peak_flops(world.device)
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last line (an evaluation or a save came between)."""
        self._since = time.monotonic()
        self._tokens = self._loss_tokens = self._capacity = 0
        self._squares = self._positions = 0.0
        self._wait_s = 0.0

    def waited(self, seconds: float) -> None:
        """Seconds that the loop waited for its next batches."""
        self._wait_s += seconds

    def stepped(self, micro: Sequence[PackedBatch]) -> None:
        """Count one step from this rank's micro-batches (their step_* counts are over all ranks)."""
        self._tokens += micro[0].step_tokens
        self._loss_tokens += micro[0].step_loss_tokens
        self._capacity += self.world.world_size * sum(batch.tokens.numel() for batch in micro)
        for batch in micro:
            lengths = batch.cu_seqlens.diff().double()
            self._squares += float((lengths * lengths).sum())
            self._positions += float(lengths.sum())

    def line(self, *, step: int, loss: float, lr: float, grad_norm: float, total_tokens: int) -> dict[str, Any]:
        """One metrics.jsonl line; starts the next interval."""
        seconds = max(1e-9, time.monotonic() - self._since)
        rate = self._tokens / seconds
        line: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": self._tokens,
            "loss_tokens": self._loss_tokens,
            "total_tokens": total_tokens,
            "tokens_per_s": rate,
            "loss_share": self._loss_tokens / max(1, self._tokens),
            "padding_share": 1.0 - self._tokens / max(1, self._capacity),
            "data_wait_share": self._wait_s / seconds,
            "time": round(time.time(), 3),
        }
        if self.world.device.type == "cuda":
            line["memory_peak_bytes"] = torch.cuda.max_memory_allocated(self.world.device)
        if self._peak:
            flops = self.config.flops_per_token(self._squares / max(1.0, self._positions)) * rate / self.world.world_size
            line["mfu"] = flops / self._peak
        self.restart()
        return line
