"""One base in memory with several adapters, in one batch: every token is computed by the adapter of its variant.

    model = shared_model([one, other])        # two opened adapter checkpoints with their base (merging.open_model)
    with using(2): model.cached_logits(tokens, cache)               # variant k is adapters[k - 1], variant 0 the base

    y = factor_k (W x + scale_k B_k (A_k x)) + b_k

The adapters of a matrix lie end to end in one A ["R I"] and one B ["R O"], R the sum of their ranks; scale is part of B.
Tokens of one adapter use its rows alone. For tokens of several, A x is made for all, what is not a token's own becomes 0, and
B adds it up: two small products whatever the number of adapters, and no gathered copies of A and B.
factor_k ["O"] is DoRA's m / ||W + scale B A||, b_k a bias that was trained whole. PiSSA is an adapter of twice the rank.

What changes the base beyond this cannot share it: `why_alone` says so. Source: arXiv:2310.18547 (S-LoRA), without its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter_config import Precision
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import not_finite
from ..checkpoint.manifest import CheckpointError
from ..model.decoder import Decoder, TokenTable
from ..model.parts import Linear
from ..model.variants import chosen
from .merging import MergedCheckpoint, frozen_tensor, weights_mark


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter does to one matrix. a ["r I"], b ["r O"] with its scale; factor and bias ["O"] or None."""

    a: Tensor
    b: Tensor
    factor: Tensor | None = None
    bias: Tensor | None = None


class Parts(nn.Module):
    """The parts of several adapters for one matrix; parts[k - 1] is None where adapter k leaves it alone.

    bias: the base's. is_embedding: A is kept as the table ["I R"] that it is.
    """

    def __init__(
        self, parts: Sequence[Part | None], bias: Tensor | None = None, *, shape: tuple[int, int], is_embedding: bool = False
    ) -> None:
        super().__init__()
        outside, inside = shape
        ends = [0, 0]
        for part in parts:
            ends.append(ends[-1] + (0 if part is None else len(part.a)))
        self.spans = [slice(*ends[k : k + 2]) for k in range(len(parts) + 1)]
        held = [part for part in parts if part is not None]
        a = torch.cat([part.a for part in held]) if held else torch.empty(0, inside)
        self.register_buffer("a", a.T.contiguous() if is_embedding else a)
        self.register_buffer("b", torch.cat([part.b for part in held]) if held else torch.empty(0, outside))
        owner = [k for k, span in enumerate(self.spans) for _ in range(span.stop - span.start)]
        self.register_buffer("owner", torch.tensor(owner, dtype=torch.long))
        factors = [None if part is None else part.factor for part in parts]
        self.register_buffer("factors", _table(factors, torch.ones(outside)))
        biases = [None if part is None else part.bias for part in parts]
        self.register_buffer("biases", _table(biases, torch.zeros(outside) if bias is None else bias))
        self.a: Tensor
        self.b: Tensor
        self.owner: Tensor
        self.factors: Tensor | None
        self.biases: Tensor | None

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A x ["T r"], B ["r O"]) of what was chosen; what is not a token's own is 0. x ["T I"], or ids of an embedding."""
        which = chosen()
        span = slice(None) if isinstance(which, Tensor) else self.spans[which]
        made = F.linear(x, self.a[span]) if x.is_floating_point() else F.embedding(x, self.a)[:, span]
        if isinstance(which, Tensor):
            made = made.masked_fill(self.owner != which[:, None], 0.0)
        return made, self.b[span]

    def add(self, base: Tensor, x: Tensor) -> Tensor:
        """W x ["T O"] with what the chosen adapters add to it."""
        made, b = self.inner(x)
        return torch.addmm(base, made, b) if len(b) else base


def _table(rows: Sequence[Tensor | None], plain: Tensor) -> Tensor | None:
    """["variants O"]: the rows, with `plain` for the base and where there is none; None where all are plain."""
    if all(row is None for row in rows):
        return None
    return torch.stack([plain, *(plain if row is None else row for row in rows)])


class SharedLinear(Linear):
    """A linear layer of the base with the adapters on it."""

    def __init__(self, base: nn.Linear, parts: Sequence[Part | None]) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.parts = Parts(parts, base.bias, shape=(self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        y, parts = self.parts.add(F.linear(x, self.weight), x), self.parts
        if parts.factors is not None:
            y = y * parts.factors[chosen()]
        bias = self.bias if parts.biases is None else parts.biases[chosen()]
        return y if bias is None else y + bias


class SharedTable(TokenTable):
    """The embedding or the head of the base with the adapters on it; it makes logits, no loss."""

    def __init__(self, base: TokenTable, parts: Sequence[Part | None], is_head: bool) -> None:
        nn.Module.__init__(self)
        self.weight, self.softcap, self.impl = base.weight, base.softcap, base.impl
        rows, hidden = self.weight.shape
        self.parts = Parts(parts, shape=(rows, hidden) if is_head else (hidden, rows), is_embedding=not is_head)

    def forward(self, x: Tensor, *, embed: bool = False) -> Tensor:  # type: ignore[override]
        """Embeddings ["T H"] of token ids ["T"], or logits Float32["T V"] of hidden states ["T H"]."""
        if embed:
            return self.parts.add(F.embedding(x, self.weight), x)
        logits = self.parts.add(F.linear(x, self.weight), x).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def why_alone(adapter: MergedCheckpoint) -> str:
    """Why an adapter cannot share its base with others in memory, or ""."""
    settings = adapter.facts.settings
    whole = [name for name in adapter.adapter.names() if name in adapter.base.index]
    if other := [name for name in whole if not name.endswith(".bias")]:
        return f"adapter.train changes whole parameters of the base ({other[0]})"
    if settings.init == "pissa" and base_kind(adapter.base, adapter.facts.precision) != "fp32":
        return f"adapter.init=pissa with model.base_precision={adapter.facts.precision} rounds a base of its own"
    return ""


def base_kind(base: Checkpoint, precision: Precision) -> Precision:
    """The precision by which a frozen base differs from its checkpoint: fp32 where rounding to bf16 changes nothing."""
    stored = {base.index[name].dtype for name in base.names() if len(base.shape(name)) == 2}
    return "fp32" if precision == "bf16" and stored == {"bfloat16"} else precision


def same_base(checkpoint: Checkpoint) -> tuple[str, Precision]:
    """What checkpoints must have in common to share weights in memory: those of the base, as training had it."""
    if isinstance(checkpoint, MergedCheckpoint):
        return checkpoint.facts.mark, base_kind(checkpoint.base, checkpoint.facts.precision)
    return weights_mark(checkpoint), "fp32"


def shared_model(adapters: Sequence[MergedCheckpoint]) -> Decoder:
    """A decoder in fp32 with the weights of the adapters' base; variant k is adapters[k - 1].

    The adapters have one `same_base`, and none is to be alone (`why_alone`). Raises CheckpointError.
    """
    base, precision = adapters[0].base, adapters[0].facts.precision
    assert len({same_base(adapter) for adapter in adapters}) == 1 and not any(map(why_alone, adapters))
    for adapter in adapters:
        adapter.check_model()
        for name, tensor in adapter.adapter.tensors():
            if problem := not_finite(tensor):
                raise CheckpointError(f"{adapter.path}: {name} {problem}. Such an adapter answers nothing; use another one.")
    model = Decoder(base.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(frozen_tensor(base, name, precision))
    if problems := [f"{name} {problem}" for name, p in model.named_parameters() if (problem := not_finite(p.detach()))]:
        raise CheckpointError(f"{base.path}: {problems[0]}. Such a model answers nothing; use another one.")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parts = [part_of(adapter, name, module) for adapter in adapters] if isinstance(module, Linear | TokenTable) else []
        if not any(parts):
            continue
        made = SharedLinear(module, parts) if isinstance(module, Linear) else SharedTable(module, parts, is_head=name == "head")
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
    return model


@torch.no_grad()
def part_of(adapter: MergedCheckpoint, name: str, module: nn.Module) -> Part | None:
    """What an adapter does to the module of that name, whose weight is the base's; None where it does nothing."""
    held, settings, values = set(adapter.adapter.names()), adapter.facts.settings, adapter.adapter
    bias = values.tensor(f"{name}.bias").float() if f"{name}.bias" in held else None
    weight: Tensor = module.weight  # type: ignore[assignment]
    if name not in adapter.modules:
        return (
            None
            if bias is None
            else Part(weight.new_empty(0, weight.shape[1]), weight.new_empty(0, weight.shape[0]), None, bias)
        )
    a, b = (values.tensor(f"{name}.lora_{which}").float() for which in "ab")
    b = settings.scale * b.T  # (R, O)
    if settings.init == "pissa":  # trained from there; the base as it is has that part in it
        a = torch.cat((a, values.tensor(f"{name}.initial_a").float()))
        b = torch.cat((b, -settings.scale * values.tensor(f"{name}.initial_b").float().T))
    factor = None
    if settings.method == "dora":
        factor = values.tensor(f"{name}.magnitude").float() / (weight + b.T @ a).norm(dim=1)
    return Part(a, b.contiguous(), factor, bias)
