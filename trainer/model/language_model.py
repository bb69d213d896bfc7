"""What training, checkpoints and generation need of a model, whoever wrote its layers.

Two classes implement it: our decoder (decoder.py) and any causal language model of transformers (chatmill.trainer.backends).
All tensors are packed: T tokens of S documents, document s is tokens[cu_seqlens[s]:cu_seqlens[s+1]] and sees nothing else.
Shapes: T tokens, H hidden, V vocabulary, S documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ...data.stream import Division
from ..model_config import ModelConfig
from ..parallel.context import ContextGroup


class LossOutput(NamedTuple):
    """What forward returns when it is given targets: sums over this batch's loss tokens, for any normaliser."""

    loss_sum: Tensor  # Float32[""], differentiable
    correct: Tensor  # Int64[""], targets that were the most likely token
    count: Tensor  # type: ignore[assignment]  # Int64[""], targets that are not -100; hides tuple.count


class Cache(Protocol):
    """What a model keeps of the tokens read so far. length: their number; at most capacity."""

    capacity: int
    length: int

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens. Raises ValueError."""

    def reserve(self, tokens: int) -> None:
        """Raise ValueError for tokens that do not fit. Called before anything is written."""


class LanguageModel(nn.Module):
    """A causal language model on packed documents, built with undefined weights: init_weights or a checkpoint fills them.

    layers: what engines shard, compile and recompute one by one. context: the ranks that divide a batch.
    Every parameter is used inside the forward of the module that owns it, because engines that shard parameters (FSDP2,
    ZeRO-3) gather them in hooks around exactly those calls.
    """

    config: ModelConfig
    layers: nn.ModuleList
    context: ContextGroup | None = None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        tile_maps: Mapping[int | None, Any] | None = None,
        max_seqlen: int | None = None,
        objective: Callable[[Tensor], LossOutput] | None = None,
        division: Division | None = None,
    ) -> Tensor | LossOutput:
        """Logits Float32["T V"], or with targets the loss of the batch.

        tokens, positions: Int["T"]; positions restart at 0 in each document. cu_seqlens: Int32["S+1"].
        targets: Int64["T"], targets[t] is the token after tokens[t], -100 where there is no loss.
        rows: Int["R"], the t with a target, padded with -1; the others skip the vocabulary-wide product.
        tile_maps, max_seqlen: made on the host beside the batch, for the attention kernel.
        objective: makes the loss of the tokens' negative log-probabilities Float["T"] (0 without target), instead of their sum.
        division: the tokens are this rank's stripe of a batch that the ranks of `context` divide; all of them call forward.
        """
        raise NotImplementedError

    def hidden_states(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Normed states ["T H"] of the last layer, of packed documents."""
        raise NotImplementedError

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits Float32["n V"] of hidden states ["n H"]."""
        raise NotImplementedError

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that belong to the weights and are never trained: no engine shards, moves or rounds them."""
        return iter(())

    def interval_figures(self, add: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """Figures of metrics.jsonl since the last call that only this kind of model has; add: sums a list over all ranks."""
        return {}

    def init_weights(self, seed: int) -> None:
        """Random weights, a function of the seed alone."""
        raise NotImplementedError

    def set_loss_scale(self, scale: float | None) -> None:
        """What a loss will be multiplied by before its backward pass, if known: its gradients then have this factor."""
        raise NotImplementedError

    @property
    def recompute(self) -> str:
        """What the backward pass recomputes: none, full, selective, or e.g. `full (8 of 32 layers)`."""
        raise NotImplementedError

    def set_recompute(self, value: bool | Literal["full", "selective"], layers: int | None = None) -> None:
        """True or `full`: recompute each layer from its input; `selective`: keep the attention's result as well; False: none.

        layers: only the first N layers; the others spend memory instead of a second pass.
        """
        raise NotImplementedError

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile each layer in place; parameter names stay."""
        for layer in self.layers:
            layer.compile(backend=backend)

    def new_cache(self, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Any:
        """An empty Cache of this model for `capacity` tokens."""
        raise NotImplementedError

    def cached_logits(self, tokens: Tensor, cache: Any, *, all_positions: bool = False) -> Tensor:
        """Logits after the given tokens, which continue those in the cache and enter it.

        tokens: Int["Tq"]. Returns Float32["V"], the distribution after the last one, or ["Tq V"] with all_positions.
        """
        raise NotImplementedError

    def joint_logits(self, tokens: Tensor, caches: Sequence[Any]) -> Tensor:
        """Logits Float32["B V"] after one more token of each of B caches, tokens Int["B"]; they enter the caches together."""
        raise NotImplementedError


def recompute_in_words(kinds: Sequence[str]) -> str:
    """LanguageModel.recompute from the kinds of all layers."""
    some = sum(kind != "none" for kind in kinds)
    return kinds[0] if some in (0, len(kinds)) else f"{kinds[0]} ({some} of {len(kinds)} layers)"
