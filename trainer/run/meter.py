"""Throughput, MFU and memory of the training loop.

    MFU = training FLOPs per token (6 x matrix parameters + 6 x layers x heads x head_dim x context) x tokens/s / peak

Packed chats attend within their own dialogue: context = sum(length^2) / sum(length) over the segments of this rank's batches.
Recomputation is not counted. Peaks are the dense bf16 figures of the vendors' data sheets. Required FLOPs leave out the head's
products for tokens without loss, which the fused loss never computes. Every field of a line: docs/metrics.md.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from ...data.stream import PackedBatch
from ..distributed.world import World
from ..model_config import ModelConfig
from ..plan.hardware import known_gpu
from ..plan.parts import ModelParts
from .profiling import StepProfiler


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s (hardware.py), or None if it is unknown (a CPU, another GPU)."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.bf16_flops if gpu is not None else None


class StepMeter:
    """Tokens per second since the last line, time spent waiting for data, memory. profiler: told of every step.

    parts: what is trained and what is frozen; None: all is trained.
    """

    def __init__(
        self, config: ModelConfig, world: World, profiler: StepProfiler | None = None, parts: ModelParts | None = None
    ) -> None:
        self.config, self.world, self.profiler, self.parts = config, world, profiler, parts
        self._peak = peak_flops(world.device)
        self.restart()

    def restart(self) -> None:
        """Forget the interval since the last line (after a validation or a save)."""
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
            bounds = batch.cu_seqlens if batch.division is None else batch.division.cu_seqlens
            lengths = bounds.diff().double()
            self._squares += float((lengths * lengths).sum())
            self._positions += float(lengths.sum())
        if self.profiler is not None:
            self.profiler.stepped()

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
            "tokens_per_s_per_device": rate / self.world.world_size,
            "loss_share": self._loss_tokens / max(1, self._tokens),
            "padding_share": 1.0 - self._tokens / max(1, self._capacity),
            "data_wait_share": self._wait_s / seconds,
            "time": round(time.time(), 3),
        }
        context = self._squares / max(1.0, self._positions)
        per_token = self.config.flops_per_token(context)
        if self.parts is not None:
            per_token = self.parts.flops_per_token(self.config, context)
        flops = per_token * rate / self.world.world_size
        head = (
            (6.0 if self.parts is None or not self.parts.frozen_head else 4.0)
            * self.config.vocab_size
            * self.config.hidden_size
            * (1.0 - line["loss_share"])
        )
        required = flops - head * rate / self.world.world_size
        line |= {"tflops_per_device": flops / 1e12, "required_tflops_per_device": required / 1e12}
        if self._peak:
            line |= {"mfu": flops / self._peak, "required_mfu": required / self._peak}
        line |= memory_figures(self.world.device)
        self.restart()
        return line


def memory_figures(device: torch.device) -> dict[str, int]:
    """Peak bytes of this rank since its start: of tensors and of the allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        reserved = torch.cuda.max_memory_reserved(device)
        return {"memory_peak_bytes": torch.cuda.max_memory_allocated(device), "memory_reserved_bytes": reserved}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
