"""Speeds that others published of their trainers, beside what `predict_step` says of the same model, cards and layout.

    python -m tests.trainer.plan.published        # the table of residuals, as in docs/engines.md

Sources, all read in 2026: [T] torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (H100 with HBM2e, 2.4 TB/s, limited to
500 W; its second note puts the true peak between those of SXM and NVL: the middle is taken). [A] NeMo Automodel,
docs/performance-summary.mdx and examples/llm_benchmark. [P] prime-rl, benchmarks/results/BENCHMARKS.md, 2026-02-01. What they
do not say is assumed: torchtitan's selective checkpointing does every other product again; prime-rl's 8 cards share the
weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chatmill.trainer.config import ModelConfig, load_recipe
from chatmill.trainer.plan.hardware import Gpu, find_gpu
from chatmill.trainer.plan.parts import parts_of
from chatmill.trainer.plan.step_time import Layout, Load, Recompute, StepTime, predict_step

LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "vocab_size": 128256, "tied_embeddings": False}
QWEN2 = {**LLAMA, "vocab_size": 152064, "qkv_bias": True}
QWEN3 = {**LLAMA, "vocab_size": 151936, "qk_norm": True, "tied_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 8B": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "layers": 32},
    "Llama 70B": {**LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64},
    "Qwen2.5 7B": {**QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "layers": 28, "heads": 28, "kv_heads": 4},
    "Qwen2.5 32B": {**QWEN2, "hidden_size": 5120, "intermediate_size": 27648, "layers": 64, "heads": 40},
    "Qwen3 4B": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "layers": 36},
    "Qwen3 0.6B": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "layers": 28, "heads": 16},
}
H100, H200 = find_gpu("h100"), find_gpu("h200")
LIMITED = Gpu("h100-500w", H100.memory_bytes, (989.4e12 + 835e12) / 2, 2.4e12, 450e9, "torchtitan's note")
FULL, EVERY_OTHER = Recompute(1.0, 1.0, 1.0), Recompute(0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Row:
    """One published run: tokens per second and GPU, and how it was done. load: of Load, besides tokens and length."""

    source: str
    model: str
    gpu: Gpu
    speed: float
    layout: Layout
    tokens: int
    length: int
    lora: bool = False
    load: dict[str, Any] = field(default_factory=dict)

    def predicted(self) -> StepTime:
        """What the plan would have said."""
        shape = ModelConfig.model_validate({**MODELS[self.model], "context": 131072})
        recipe = load_recipe("8b-lora" if self.lora else "8b")  # its adapter, on this model
        # published trainers pass over their logits several times: 28 bytes each
        load = Load(self.tokens, self.length, **{"logits_bytes": 28.0, "reduce_bytes": 2, **self.load})
        return predict_step(shape, parts_of(recipe, shape), self.gpu, self.layout, load)

    @property
    def name(self) -> str:
        """For the table."""
        kind = "LoRA" if self.lora else "full" + ("" if self.load.get("fused", True) else ", eager")
        return f"{self.model} {kind}, {self.layout.world_size} x {self.gpu.name}, {self.layout}, {self.length:,}"


def fsdp(shards: int, **more: int) -> Layout:
    return Layout("fsdp2", shards=shards, **more)


EAGER_TITAN = {"recompute": EVERY_OTHER, "attention": "flash2", "fused": False}
TITAN = {**EAGER_TITAN, "fused": True}
CUDNN = {"attention": "cudnn", "accumulation": 16}
PRETRAINED = {"recompute": FULL, "attention": "cudnn", "accumulation": 4}
TENSOR = {**PRETRAINED, "overlapped_tensor": 0.5}
TWO_NODES = {**TENSOR, "accumulation": 2}
PRIME = {"recompute": FULL, "attention": "flash2", "fused": False}
SMALL = {**PRIME, "attention": "flash3"}
ONE = Layout("single")
ROWS = (
    Row("T", "Llama 8B", LIMITED, 5762, fsdp(8), 16384, 8192, load=EAGER_TITAN),
    Row("T", "Llama 8B", LIMITED, 6667, fsdp(8), 16384, 8192, load=TITAN),
    Row("T", "Llama 8B", LIMITED, 5605, fsdp(128), 16384, 8192, load=EAGER_TITAN),
    Row("T", "Llama 8B", LIMITED, 6514, fsdp(128), 16384, 8192, load=TITAN),
    Row("A", "Llama 70B", H100, 866.77, fsdp(32, context=2), 8192, 8192, load=PRETRAINED),
    Row("A", "Llama 8B", H100, 12472.87, ONE, 8192, 4096, lora=True, load=CUDNN),
    Row("A", "Qwen2.5 7B", H100, 14110.05, ONE, 8192, 4096, lora=True, load=CUDNN),
    Row("A", "Llama 70B", H100, 1091.85, fsdp(4, tensor=2), 8192, 4096, lora=True, load=TENSOR),
    Row("A", "Qwen2.5 32B", H100, 2250.31, fsdp(4, tensor=2), 8192, 4096, lora=True, load=TENSOR),
    Row("A", "Llama 70B", H100, 984.85, fsdp(8, tensor=2), 8192, 4096, lora=True, load=TWO_NODES),
    Row("A", "Qwen2.5 32B", H100, 2072.89, fsdp(8, tensor=2), 8192, 4096, lora=True, load=TWO_NODES),
    Row("P", "Qwen3 4B", H200, 53140 / 8, fsdp(8), 16384, 16384, load=PRIME),
    Row("P", "Qwen3 4B", H100, 49720 / 8, fsdp(8), 16384, 16384, load=PRIME),
    Row("P", "Qwen3 0.6B", H100, 25490, ONE, 16384, 16384, load=SMALL),
    Row("P", "Qwen3 0.6B", H100, 26010, ONE, 8192, 8192, load=SMALL),
)
MET = ROWS[:-1]  # the last is predicted too fast


def main() -> None:
    """Print published and predicted speed, the residual, and what the step consists of."""
    for row in ROWS:
        step = row.predicted()
        speed = step.tokens_per_s_per_gpu
        residual = 100 * (speed / row.speed - 1)
        parts = " ".join(
            f"{name} {100 * getattr(step, name) / step.seconds:.0f} %"
            for name in ("products", "attention", "traffic", "loss", "optimizer", "exposed")
        )
        print(f"[{row.source}] {row.name:<68} {row.speed:>8,.0f} {speed:>8,.0f} {residual:>+6.1f} %  {parts}")


if __name__ == "__main__":
    main()
