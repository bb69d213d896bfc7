"""The decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, on packed dialogues of any length.

    h = x + o(attention(rope(q(n1(x)), k(n1(x))), v(n1(x))))        n1, n2: RMSNorm
    y = h + down(silu(gate(n2(h))) * up(n2(h)))

What families of models do otherwise (norms behind the branches, scales, soft-caps …) are fields of ModelConfig.
All tensors are packed: T tokens of S documents, document s is tokens[cu_seqlens[s]:cu_seqlens[s+1]] and sees nothing else.
Shapes: T tokens, H hidden, Hq/Hk query/key heads, D channels per head, F feed-forward, V vocabulary, S documents.

Precision: parameters keep their dtype. The compute dtype is autocast's where it is on, else that of the parameters; the
residual stream has it too, so DDP with autocast, FSDP2 and ZeRO all round alike. Norms, rotary angles, logits and loss are
computed in fp32 inside their operations.

The loss is part of forward, and every parameter is used inside the forward of the module that owns it: engines that shard
parameters (FSDP2, ZeRO-3) gather them in hooks around exactly those calls.
Sources: Llama (arXiv:2302.13971, 2407.21783), Mistral 7B (2310.06825), Qwen2 (2407.10671), Qwen3 (2505.09388), Gemma 2 and 3
(2408.00118, 2503.19786), OLMo 2 (2501.00656).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...data.stream import Division
from ...kernels.attention import TileMap, attention
from ...kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_with_metrics
from ...kernels.dispatch import Impl
from ...kernels.layer.rope import rope_one
from ..model_config import KernelSection, ModelConfig
from ..parallel.context import ContextGroup, SharedBatch
from .kv_cache import CacheRows, KVCache
from .language_model import LanguageModel, LossOutput, recompute_in_words
from .parts import FeedForward, HeadNorm, Linear, RMSNorm
from .recompute import Recompute, keep_attention
from .rotary import Rotary, pairs_apart

__all__ = ["Decoder", "KVCache", "LossOutput", "TokenMemory"]


class TokenMemory(Protocol):
    """What tokens outside a pack attend to: a cache, a batch of caches, or a prefix that several replies share.

    attend: q ["T Hq D"], k, v ["T Hk D"] of one layer, rotated already; returns ["T Hq D"].
    """

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None, scale: float | None
    ) -> Tensor: ...


class Layout(NamedTuple):
    """Where documents lie in the pack; the same for every layer."""

    turn: tuple[Tensor, Tensor]  # cos and sin, Float32["T D/2"] each
    window_turn: tuple[Tensor, Tensor]  # those of layers with a sliding window; mostly the same
    cu_seqlens: Tensor | None  # Int32["S+1"]; None where a memory replaces the pack
    max_seqlen: int | None
    tile_maps: Mapping[int | None, TileMap] | None  # by sliding window
    shared: SharedBatch | None = None  # where several ranks divide the pack


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions inside each document."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelSection) -> None:
        super().__init__()
        H, D = config.hidden_size, config.d_head
        self.layer = layer
        self.d_head = D
        self.window = config.window_of(layer)
        self.softcap = config.attention_softcap
        self.scale = config.attention_scale
        self.turns = layer not in (config.nope_layers or ())
        self.rotary, self.interleaved = config.rotary_dim or D, config.rope_interleaved
        self.kernels = kernels
        self.q = Linear(H, config.heads * D, bias=config.qkv_bias)
        self.k = Linear(H, config.kv_heads * D, bias=config.qkv_bias)
        self.v = Linear(H, config.kv_heads * D, bias=config.qkv_bias)
        self.o = Linear(config.heads * D, H, bias=config.output_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            whole = config.qk_norm_over == "projection"
            self.q_norm, self.k_norm = (
                RMSNorm(heads * D, config, kernels.elementwise) if whole else HeadNorm(D, config, kernels.elementwise)
                for heads in (config.heads, config.kv_heads)
            )

    def forward(self, x: Tensor, layout: Layout, memory: TokenMemory | None = None) -> Tensor:
        T, D = x.shape[0], self.d_head
        turn = (layout.turn if self.window is None else layout.window_turn) if self.turns else None
        q = self._placed(self.q(x), self.q_norm, turn)  # (T, Hq, D)
        k = self._placed(self.k(x), self.k_norm, turn)  # (T, Hk, D)
        v = self.v(x).view(T, -1, D)
        if memory is None:
            maps = layout.tile_maps
            out = (attention if layout.shared is None else layout.shared.attend)(
                q,
                k,
                v,
                cu_seqlens=layout.cu_seqlens,
                window=self.window,
                softcap=self.softcap,
                scale=self.scale,
                impl=self.kernels.attention,
                tile_map=None if maps is None else maps.get(self.window),
                max_seqlen=layout.max_seqlen,
                complete=True,  # a batch's cu_seqlens end at T
            )
        else:
            out = memory.attend(self.layer, q, k, v, window=self.window, softcap=self.softcap, scale=self.scale)
        projected: Tensor = self.o(out.reshape(T, -1))
        return projected

    def _placed(self, x: Tensor, norm: RMSNorm | None, turn: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys ["T heads*D"] normed and turned, ["T heads D"]; in an order of channels that is the same for both."""
        plain = self.rotary == self.d_head and not self.interleaved
        if norm is not None and not isinstance(norm, HeadNorm):
            x = norm(x)
        x = x.view(len(x), -1, self.d_head)
        if isinstance(norm, HeadNorm):
            x = norm(x, turn if plain else None)
            if plain:
                return x
        if turn is None:
            return x
        x = x if plain else pairs_apart(x, self.rotary, self.interleaved)
        return rope_one(x, *turn, impl=self.kernels.elementwise)


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm, before a norm, or both, and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, kernels: KernelSection) -> None:
        super().__init__()

        def norm(where: str) -> RMSNorm | None:
            return RMSNorm(config.hidden_size, config, kernels.elementwise) if config.norms in (where, "around") else None

        self.attention_norm = norm("before")
        self.attention = Attention(config, layer, kernels)
        self.attention_post_norm = norm("after")
        self.mlp_norm = norm("before")
        self.mlp = FeedForward(config, kernels.elementwise)
        self.mlp_post_norm = norm("after")
        self.residual_scale = config.residual_scale
        self.recompute: Recompute = "none"
        self.draws = False  # whether it draws random numbers (dropout), which a second pass must draw again

    def forward(self, x: Tensor, layout: Layout, memory: TokenMemory | None = None) -> Tensor:
        if self.recompute == "none" or memory is not None or not torch.is_grad_enabled():
            return self._forward(x, layout, memory)
        # inside the block's own forward: engines gather its weights around it, and torch.compile sees the recomputation
        contexts: dict[str, Any] = {"context_fn": keep_attention} if self.recompute == "selective" else {}
        options = {"use_reentrant": False, "preserve_rng_state": self.draws, **contexts}
        out: Tensor = checkpoint(self._forward, x, layout, **options)
        return out

    def _forward(self, x: Tensor, layout: Layout, memory: TokenMemory | None = None) -> Tensor:
        mixed = self.attention(x if self.attention_norm is None else self.attention_norm(x), layout, memory)
        mixed = self._scaled(mixed, self.attention_post_norm)
        if self.mlp_norm is None:
            x = normed = x + mixed
        else:
            normed, x = self.mlp_norm(mixed, residual=x)
        return x + self._scaled(self.mlp(normed), self.mlp_post_norm)

    def _scaled(self, branch: Tensor, norm: RMSNorm | None) -> Tensor:
        branch = branch if norm is None else norm(branch)
        return branch if self.residual_scale == 1.0 else branch * self.residual_scale


class TokenTable(nn.Module):
    """One row per token of the vocabulary: the embedding at the bottom, the classifier at the top, or both when tied."""

    # What a loss will be multiplied by before its backward pass, if known: its gradients are then made with this factor.
    loss_scale: float | None = None

    def __init__(self, config: ModelConfig, impl: Impl) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.softcap = config.logit_softcap
        self.logit_divisor = config.logit_divisor
        self.impl = impl

    def forward(
        self,
        x: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        embed: bool = False,
        objective: Callable[[Tensor], LossOutput] | None = None,
        norm: RMSNorm | None = None,
    ) -> Tensor | LossOutput:
        """x: Int token ids ["T"] with embed=True; else hidden states ["T H"], to logits Float32["T V"] or a loss.

        norm: the final norm, where x is not normed yet: the loss applies it only to the rows with a target.
        """
        if embed:
            return F.embedding(x, self.weight)
        return self.classify(self.weight, x, targets, objective, rows=rows, norm=norm)

    def classify(
        self, weight: Tensor, x: Tensor, targets: Tensor | None, objective: Any, **options: Any
    ) -> Tensor | LossOutput:
        """Logits, or a loss, of hidden states with the given classifier ["V H"]; options: rows and norm of `forward`."""
        if self.logit_divisor != 1.0:  # of the states, for every tier of the loss
            divisor, norm = self.logit_divisor, options.get("norm")
            if targets is None or norm is None:
                x = x / divisor
            else:
                options["norm"] = lambda rows: norm(rows) / divisor
        if targets is None:
            logits = F.linear(x, weight.to(x.dtype)).float()
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        options |= {"softcap": self.softcap, "impl": self.impl}
        if objective is not None:
            return objective(linear_cross_entropy(x, weight, targets, reduction="none", **options))
        scale = self.loss_scale if torch.is_grad_enabled() else None
        options |= {"reduction": "sum"} if scale is None else {"reduction": "mean", "normalizer": 1 / scale}
        loss_sum, metrics = linear_cross_entropy_with_metrics(x, weight, targets, **options)
        if scale is not None:  # times scale again, its gradient is exactly 1, and no pass over the weight's gradient follows
            loss_sum = loss_sum / loss_sum.new_tensor(scale)
        return LossOutput(loss_sum.float(), metrics.correct, metrics.count)


class Decoder(LanguageModel):
    """A causal language model on packed dialogues. Built with undefined weights: call init_weights or load a checkpoint."""

    def __init__(self, config: ModelConfig, kernels: KernelSection | None = None) -> None:
        super().__init__()
        kernels = kernels or KernelSection()
        self.config = config
        self.embed = TokenTable(config, kernels.cross_entropy)
        self.layers = nn.ModuleList(Block(config, layer, kernels) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config, kernels.elementwise)
        self.head = None if config.tied_embeddings else TokenTable(config, kernels.cross_entropy)
        self._rotary = Rotary(config)
        self._window_rotary = None if config.window_rope_theta is None else Rotary(config, windowed=True)
        self.context: ContextGroup | None = None  # the ranks that divide batches with this one

    @property
    def recompute(self) -> str:
        """See LanguageModel."""
        return recompute_in_words([cast(Block, block).recompute for block in self.layers])

    def set_recompute(self, value: bool | Literal["full", "selective"], layers: int | None = None) -> None:
        """See LanguageModel."""
        recompute: Recompute = ("full" if value else "none") if isinstance(value, bool) else value
        for number, block in enumerate(self.layers):
            cast(Block, block).recompute = recompute if layers is None or number < layers else "none"

    def set_loss_scale(self, scale: float | None) -> None:
        """See LanguageModel."""
        (self.head or self.embed).loss_scale = scale

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        *,
        targets: Tensor | None = None,
        rows: Tensor | None = None,
        tile_maps: Mapping[int | None, TileMap] | None = None,
        max_seqlen: int | None = None,
        objective: Callable[[Tensor], LossOutput] | None = None,
        division: Division | None = None,
    ) -> Tensor | LossOutput:
        """See LanguageModel."""
        layout = self._layout(positions, cu_seqlens, max_seqlen, tile_maps)
        if division is not None:
            if self.context is None:
                raise ValueError("forward: a divided batch needs the ranks that divide it: set Decoder.context.")
            shared = SharedBatch(self.context, division, positions)
            layout = layout._replace(cu_seqlens=division.cu_seqlens, shared=shared)
        x = self._stream(tokens, layout)
        table = self.head or self.embed
        options: dict[str, Any] = {"targets": targets, "rows": rows, "objective": objective, "norm": self.norm}
        out: Tensor | LossOutput = table(self.norm(x)) if targets is None else table(x, **options)
        return out

    @torch.no_grad()
    def cached_logits(self, tokens: Tensor, cache: KVCache, *, all_positions: bool = False) -> Tensor:
        """See LanguageModel."""
        if tokens.ndim != 1 or tokens.numel() == 0:
            raise ValueError(f"cached_logits: expected at least one token in one dimension, got shape {tuple(tokens.shape)}.")
        cache.reserve(tokens.numel())
        start, end = cache.length, cache.length + tokens.numel()
        positions = torch.arange(start, end, device=tokens.device)
        hidden = self.hidden_states(tokens, positions, memory=cache)
        cache.length = end
        logits = self.classify(hidden if all_positions else hidden[-1:])
        return logits if all_positions else logits[0]

    def new_cache(self, capacity: int, dtype: torch.dtype, device: torch.device | str) -> KVCache:
        """See LanguageModel."""
        return KVCache(self.config, capacity, dtype, device)

    @torch.no_grad()
    def joint_logits(self, tokens: Tensor, caches: Sequence[KVCache]) -> Tensor:
        """See LanguageModel. An exception leaves all caches as they were."""
        for cache in caches:
            cache.reserve(1)
        positions = torch.tensor([cache.length for cache in caches], device=tokens.device)
        logits = self.classify(self.hidden_states(tokens, positions, memory=CacheRows(caches)))
        for cache in caches:
            cache.length += 1
        return logits

    def hidden_states(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor | None = None, *, memory: TokenMemory | None = None
    ) -> Tensor:
        """Normed states ["T H"] of the last layer; the tokens attend within cu_seqlens, or as the memory says.

        Modules that own parameters are called as in forward; only engines that gather in hooks of the root cannot use it.
        """
        if (cu_seqlens is None) == (memory is None):
            raise ValueError("hidden_states: give either cu_seqlens, for packed documents, or a memory.")
        normed: Tensor = self.norm(self._stream(tokens, self._layout(positions, cu_seqlens, None, None), memory))
        return normed

    def classify(self, hidden: Tensor) -> Tensor:
        """Logits Float32["n V"] of hidden states ["n H"]."""
        logits: Tensor = (self.head or self.embed)(hidden)
        return logits

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Random weights: normal with initializer_range (o and down smaller by sqrt(2 layers)); norms multiply by 1, biases 0.

        Each tensor is drawn on the CPU from its own generator, seeded by (seed, parameter name): the weights depend neither on
        the device, nor on other tensors, nor on the order of construction.
        """
        shrink = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0 - self.config.norm_offset)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                # a hash of both: torch's CPU generator looks at the lowest 32 bits of its seed only
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                values = torch.empty(parameter.shape, dtype=torch.float32)
                std = self.config.initializer_range * (shrink if name.endswith((".o.weight", ".down.weight")) else 1.0)
                parameter.copy_(values.normal_(0.0, std, generator=generator))

    def _layout(
        self,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        tile_maps: Mapping[int | None, TileMap] | None,
    ) -> Layout:
        turn = self._rotary(positions)
        window_turn = turn if self._window_rotary is None else self._window_rotary(positions)
        return Layout(turn, window_turn, cu_seqlens, max_seqlen, tile_maps)

    def _stream(self, tokens: Tensor, layout: Layout, memory: TokenMemory | None = None) -> Tensor:
        """The residual stream ["T H"] behind the last layer, before the final norm."""
        x = self.embed(tokens, embed=True)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        elif x.dtype != self.norm.weight.dtype:  # a frozen table in bf16, with fp32 compute
            x = x.to(self.norm.weight.dtype)
        if self.config.embedding_scale != 1.0:  # rounded to the compute dtype, as in Gemma
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device="cpu")
        for block in self.layers:
            x = block(x, layout, memory)
        return x
