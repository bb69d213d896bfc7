"""How long a training step takes on GPUs that are not here: products, attention, memory traffic, and exposed communication.

    layout = Layout("fsdp2", shards=16)
    predict_step(config, parts, gpu, layout, Load(tokens=16384, length=8192.0)).seconds

A roofline for each kind of work, with rates as a share of the GPU's peak that published trainers sustain. Weights that travel
are hidden behind the layer that is computed meanwhile. What takes longer than the layer is waited for, and a tenth of the
rest where it crosses nodes. The rates were fitted to 15 published runs; 14 of them are met within 8 %. The one that is not
has a model so small that the host's launches count: it is predicted too fast. tests/trainer/plan/published.py has the runs
and the residuals. No run of ours is among them yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ..model_config import ModelConfig
from .hardware import Gpu
from .parts import ModelParts

PRODUCTS = 0.55  # of the bf16 peak: what cuBLAS sustains at the clocks that a loaded GPU keeps
ATTENTION = {"ours": (0.46, 0.40), "flash3": (0.48, 0.40), "cudnn": (0.46, 0.40), "flash2": (0.30, 0.26)}  # forward, backward
TRAFFIC = 0.55  # of the memory's bandwidth, by kernels that only move data
EAGER = 2.5  # times the bytes where nothing fuses the operations between the products
ADAPTER = 1.3  # times the bytes in layers with an adapter
LINKS, NICS = 0.75, 0.80  # of the bandwidth within and between nodes
WAITED = 0.1  # share of hidden communication between nodes that is felt all the same; a quarter of it within a node
ADAMW_BYTES = 40  # per element and update, clipping included


@dataclass(frozen=True)
class Network:
    """GPUs of a node, joined by their own links, and bytes per second and direction that each of them has between nodes."""

    gpus_per_node: int = 8
    bytes_per_gpu: float = 50e9  # one port of 400 Gbit/s


@dataclass(frozen=True)
class Layout:
    """How a world of replicas x shards x context x tensor processes divides the work."""

    engine: str
    replicas: int = 1
    shards: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.replicas * self.shards * self.context * self.tensor

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("replicas", "shards", "context", "tensor")}
        if self.engine == "ddp":
            del counts["replicas"]  # what is left
        divided = [f"{name} {count}" for name, count in counts.items() if count > 1]
        return " ".join([self.engine, *([" x ".join(divided)] if divided else [])])


@dataclass(frozen=True)
class Recompute:
    """Shares of a layer's forward pass that the backward pass does again."""

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0


RECOMPUTED = {"full": Recompute(1.0, 1.0, 1.0), "selective": Recompute(1.0, 0.0, 1.0), "none": Recompute()}


@dataclass(frozen=True)
class Load:
    """A micro-batch of one model replica.

    tokens: before context parallelism divides them. length: mean attended context, in tokens. loss_share: of the tokens that
    have a loss. fused: the operations between products run in few kernels (ours, or compiled). logits_bytes: traffic per
    logit. overlapped_tensor: share of the tensor-parallel communication that is hidden.
    """

    tokens: int
    length: float
    accumulation: int = 1
    loss_share: float = 1.0
    recompute: Recompute = field(default_factory=Recompute)
    fused: bool = True
    attention: Literal["ours", "flash3", "cudnn", "flash2"] = "ours"
    logits_bytes: float = 8.0
    reduce_bytes: int = 4
    overlapped_tensor: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one GPU. tokens: of the whole world's step."""

    products: float
    attention: float
    traffic: float
    loss: float
    optimizer: float
    exposed: float
    tokens: int
    world_size: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(getattr(self, part.name) for part in fields(self) if part.type == "float")

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Of one GPU, padding not taken off."""
        return self.tokens / self.seconds / self.world_size


def predict_step(
    config: ModelConfig, parts: ModelParts, gpu: Gpu, layout: Layout, load: Load, network: Network | None = None
) -> StepTime:
    """The step of one layout. Widths and counts are the model's own; bytes are those of bf16 compute."""
    links = _Links(gpu, layout, network or Network())
    t, c = layout.tensor, layout.context
    tokens = load.tokens / c  # of one rank
    counts = config.parameter_counts()
    matrices = counts["attention"] + counts["mlp"]
    head = config.vocab_size * config.hidden_size
    frozen = max(0, parts.frozen_matrices - (head if parts.frozen_head else 0))
    forward_rate, backward_rate = (gpu.bf16_flops * share for share in ATTENTION[load.attention])
    width, kv_width = config.heads * config.d_head, config.kv_heads * config.d_head

    def product(elements: float) -> float:
        return 2.0 * elements * tokens / t / (gpu.bf16_flops * PRODUCTS)

    square = 2.0 * config.layers * width * load.length * tokens / t  # FLOPs of the causal half, scores and values
    row = 8 * config.hidden_size + 2 * (width + kv_width) + 3 * config.intermediate_size  # elements read and written per token
    bytes_moved = 2.0 * config.layers * row * tokens / t * (1.0 if load.fused else EAGER) * (ADAPTER if parts.adapter else 1.0)
    traffic = bytes_moved / (gpu.memory_bandwidth * TRAFFIC)
    again = load.recompute
    products_forward, attention_forward = product(matrices), square / forward_rate
    products_backward = (1 + again.products) * product(matrices) + product(matrices - frozen) + 3 * product(parts.adapter)
    attention_backward = 2.5 * square / backward_rate + again.attention * attention_forward
    traffic_backward = (2 + again.traffic) * traffic
    loss = (2 if parts.frozen_head else 3) * load.loss_share * product(head)
    loss += load.loss_share * tokens * config.vocab_size * load.logits_bytes / t / gpu.memory_bandwidth

    layers_forward = (products_forward + attention_forward + traffic) / config.layers
    layers_backward = (products_backward + attention_backward + traffic_backward) / config.layers
    exposed = links.exposed(config, parts, load, tokens, layers_forward, layers_backward)
    updated = parts.trained / (layout.shards * c * t if layout.engine not in ("single", "ddp") else t)
    many = load.accumulation
    return StepTime(
        products=many * (products_forward + products_backward),
        attention=many * (attention_forward + attention_backward),
        traffic=many * (traffic + traffic_backward),
        loss=many * loss,
        optimizer=ADAMW_BYTES * updated / gpu.memory_bandwidth,
        exposed=many * exposed + links.once(parts, layers_backward * config.layers),
        tokens=load.tokens * many * layout.replicas * layout.shards,
        world_size=layout.world_size,
    )


class _Links:
    """Bandwidth of a layout's groups: tensor ranks are neighbours, then context, then shards; replicas are farthest apart."""

    def __init__(self, gpu: Gpu, layout: Layout, network: Network) -> None:
        self.layout, self.network, self.inside = layout, network, LINKS * gpu.link_bandwidth
        self.gathering = layout.shards * layout.context  # context ranks hold shards, too
        self.crosses = self.gathering * layout.tensor > network.gpus_per_node
        self.between = self._between(layout.tensor)

    def _between(self, apart: int) -> float:
        """Bytes per second into one GPU of a group over nodes: all members of a node share its ports."""
        return min(self.inside, max(1, self.network.gpus_per_node // apart) * NICS * self.network.bytes_per_gpu)

    def exposed(
        self, config: ModelConfig, parts: ModelParts, load: Load, tokens: float, forward: float, backward: float
    ) -> float:
        """Seconds of one micro-batch. forward, backward: computation of one layer, which hides its neighbour's weights."""
        layout, layers = self.layout, config.layers
        t, c, w = layout.tensor, layout.context, self.gathering
        seconds = 0.0
        if layout.engine in ("fsdp2", "zero3") and w > 1:
            rate = (self.between if self.crosses else self.inside) * w / (w - 1)
            gather = parts.layer.gathered_bytes(2) / t / rate
            reduce = load.reduce_bytes * parts.layer.trained / t / rate
            hidden = (WAITED if self.crosses else WAITED / 4) * (2 * gather + reduce)
            seconds += layers * (max(0.0, gather - forward) + max(0.0, gather + reduce - backward) + hidden)
            seconds += 2 * parts.top.gathered_bytes(2) / rate
        if t > 1:  # sequence parallel: two gathers and two scatters of the activations per layer and pass
            passes = 3 if load.recompute.products == 1 else 2
            each = 2.0 * tokens * config.hidden_size * (t - 1) / t / self.inside
            seconds += layers * passes * 4 * each * (1 - load.overlapped_tensor)
        if c > 1:  # all-to-all of queries, keys, values and results
            rate = self.inside if c * t <= self.network.gpus_per_node else NICS * self.network.bytes_per_gpu
            elements = 2.0 * (config.heads + config.kv_heads) * config.d_head * tokens / t * (c - 1) / c
            seconds += layers * (2 + load.recompute.attention) * 2.0 * elements / rate
        return seconds

    def once(self, parts: ModelParts, backward: float) -> float:
        """Seconds of one step that do not come with every micro-batch: gradients of replicas, weights of ZeRO-1 and 2."""
        layout = self.layout
        copies = layout.replicas if layout.engine in ("ddp", "fsdp2") else 1
        seconds = 0.0
        if copies > 1:
            inner = layout.world_size // copies
            over_nodes = layout.world_size > self.network.gpus_per_node
            rate = self._between(inner) if over_nodes else self.inside
            gradients = 4.0 * parts.trained / (inner if layout.engine == "fsdp2" else 1)
            seconds += max(0.05 * gradients, 2 * gradients * (copies - 1) / copies - backward * rate) / rate
        if layout.engine in ("zero1", "zero2") and self.gathering > 1:
            rate = self.between if self.crosses else self.inside
            gradients, weights = 2.0 * parts.trained, 2.0 * parts.trained
            seconds += (weights + max(0.05 * gradients, gradients - backward * rate)) / rate
        return seconds
