"""Any causal language model of transformers behind the interface of our decoder.

    model = ForeignModel(config)            # undefined weights, under transformers' names

Packed documents are kept apart in one of two ways (config.documents):
  packed   one row of T tokens; our attention stays inside cu_seqlens (packed_attention.py)
  rows     a batch with one document per row, padded on the right: nothing before a token depends on what follows it, so this
           is right for every causal architecture, recurrent layers included, at the price of the padding
The loss is our linear cross-entropy on the last hidden states; their classifier is never called.
Shapes: T tokens, H hidden, V vocabulary, S documents, L tokens of the longest one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...data.stream import Division
from ...kernels.dispatch import Impl
from ..foreign_config import ForeignConfig
from ..model.decoder import TokenTable
from ..model.language_model import LanguageModel, LossOutput, recompute_in_words
from ..model.recompute import Recompute, keep_attention
from ..model_config import KernelSection
from .architecture import Foreign, build_foreign
from .cache import ForeignCache
from .experts import ExpertLoad
from .logits import rule_of
from .packed_attention import NAME, packing, register


class Classifier(TokenTable):
    """The head of a foreign model: its logits are softcap * tanh(scale * h W^T / softcap)."""

    def __init__(self, weight: nn.Parameter, scale: float, softcap: float | None, impl: Impl) -> None:
        nn.Module.__init__(self)
        self.weight = weight
        self.scale, self.softcap, self.impl = scale, softcap, impl
        self.logit_divisor = 1.0  # the scale is applied to the hidden states

    def forward(self, x: Tensor, **options: Any) -> Tensor | LossOutput:
        """x: hidden states ["T H"]; options: targets, rows and objective of LanguageModel.forward."""
        x = x if self.scale == 1.0 else x * self.scale
        return self.classify(self.weight, x, options.pop("targets", None), options.pop("objective", None), **options)


class ForeignModel(LanguageModel):
    """See LanguageModel. Parameter names are those of transformers; buffers are held back from engines (constants)."""

    def __init__(self, config: ForeignConfig, kernels: KernelSection | None = None, built: Foreign | None = None) -> None:
        super().__init__()
        register()
        self.config: ForeignConfig = config
        self._kernels = kernels or KernelSection()
        found = built or build_foreign(config.hf_config(), config.model_type)
        scale, softcap = rule_of(config.hf_config(), config.model_type)
        head = Classifier(cast(nn.Parameter, found.head.weight), scale, softcap, self._kernels.cross_entropy)
        setattr(found.causal, found.head_name, head)
        self.add_module(found.prefix, found.body)
        self.add_module(found.head_name, head)
        # known under other names already: not registered as modules of their own
        self.__dict__ |= {"causal": found.causal, "body": found.body, "classifier": head, "layers": found.layers}
        self._held = held_back(found)
        self._place: torch.device | None = None
        for layer in found.layers:
            layer.__class__ = recomputing(type(layer))  # type: ignore[arg-type]  # functools asks for __hash__
        self.body.get_input_embeddings().register_forward_hook(_in_compute_dtype)
        self._config = found.causal.config
        self._load = ExpertLoad(found.causal, found.body, config.experts) if config.experts else None
        self.keep_apart(config.documents)

    causal: Any
    body: Any
    classifier: Classifier

    def keep_apart(self, documents: Literal["packed", "rows"]) -> None:
        """Choose how packed documents are kept apart, whatever the configuration says."""
        self.config = self.config.model_copy(update={"documents": documents})
        theirs = "sdpa" if self.causal._supports_sdpa else "eager"
        self._config._attn_implementation = NAME if documents == "packed" else theirs

    # ---------------------------------------------------------------- training

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
        """See LanguageModel."""
        if division is not None:
            raise ValueError("forward: a model of transformers cannot divide a batch among ranks.")
        with self._counting(tokens, positions, cu_seqlens, max_seqlen):
            hidden = self.hidden_states(tokens, positions, cu_seqlens, max_seqlen)
        options = {} if targets is None else {"targets": targets, "rows": rows, "objective": objective}
        out: Tensor | LossOutput = self.classifier(hidden, **options)
        return out

    def hidden_states(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
        """See LanguageModel."""
        self._to_device(tokens.device)
        if self.config.documents == "packed":
            given = packing(cu_seqlens, max_seqlen, self._kernels.attention)
            return self._run(tokens.long()[None], positions.long()[None], **given)[0]
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        longest = int(lengths.max()) if max_seqlen is None else max_seqlen
        along = torch.arange(longest, device=tokens.device)
        index = (starts[:, None] + along).clamp(max=len(tokens) - 1)  # (S, L): the padding is what follows, which nobody sees
        hidden = self._run(tokens.long()[index], along.expand(len(starts), -1))
        owner = torch.repeat_interleave(torch.arange(len(starts), device=tokens.device), lengths, output_size=len(tokens))
        return hidden[owner, positions.long()]

    @contextlib.contextmanager
    def _counting(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> Iterator[None]:
        """While a model trains, count which experts its tokens take; a document of nothing but id 0 is the pack's padding."""
        if self._load is None or not self.training or not torch.is_grad_enabled():
            yield
            return
        lengths = cu_seqlens.diff().long()
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths, output_size=len(tokens))
        real = torch.zeros(len(lengths), dtype=torch.long, device=tokens.device).index_add_(0, owner, tokens.long()) > 0
        if self.config.documents == "packed":
            self._load.mask = real[owner]
        else:
            longest = int(lengths.max()) if max_seqlen is None else max_seqlen
            along = torch.arange(longest, device=tokens.device)
            self._load.mask = ((along < lengths[:, None]) & real[:, None]).flatten()
        try:
            yield
        finally:
            self._load.mask = None

    def interval_figures(self, add: Callable[[list[float]], list[float]]) -> dict[str, float]:
        """See LanguageModel: how evenly tokens were divided among experts (experts.py)."""
        return {} if self._load is None else self._load.take(add)

    def _run(self, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
        """Last hidden states ["B L H"] of token ids and positions ["B L"], in the compute dtype."""
        options = {"use_cache": False} | options
        hidden: Tensor = self.body(input_ids=tokens, position_ids=positions, **options).last_hidden_state
        return _in_compute_dtype(None, None, hidden)

    def classify(self, hidden: Tensor) -> Tensor:
        """See LanguageModel."""
        return cast(Tensor, self.classifier(hidden))

    def set_loss_scale(self, scale: float | None) -> None:
        """See LanguageModel."""
        self.classifier.loss_scale = scale

    @property
    def recompute(self) -> str:
        """See LanguageModel."""
        return recompute_in_words([cast(str, layer.recompute) for layer in self.layers])

    def set_recompute(self, value: bool | Literal["full", "selective"], layers: int | None = None) -> None:
        """See LanguageModel."""
        kind: Recompute = ("full" if value else "none") if isinstance(value, bool) else value
        for number, layer in enumerate(self.layers):
            layer.recompute = kind if layers is None or number < layers else "none"  # type: ignore[assignment]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """transformers' own random weights, drawn on the CPU from the seed."""
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = AutoModelForCausalLM.from_config(self._config, attn_implementation="eager", dtype=torch.float32)
        values = dict(drawn.named_parameters()) | dict(drawn.named_buffers())
        for name, tensor in [*self.named_parameters(), *self.constants()]:
            tensor.copy_(values[name])

    def compile_layers(self, backend: str = "inductor") -> None:
        """See LanguageModel. The load of experts is not measured then."""
        if self._load is not None:
            self._load.remove()
            self._load = None
        super().compile_layers(backend)

    # ---------------------------------------------------------------- what engines must not touch

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """See LanguageModel: the buffers that transformers' checkpoints hold."""
        for name, module, attribute, stored in self._held:
            if stored:
                yield name, getattr(module, attribute)

    def _to_device(self, device: torch.device) -> None:
        if self._place != device:
            for _, module, attribute, _ in self._held:
                setattr(module, attribute, getattr(module, attribute).to(device))
            self._place = device

    # ---------------------------------------------------------------- generation

    def new_cache(self, capacity: int, dtype: torch.dtype, device: torch.device | str) -> ForeignCache:
        """See LanguageModel. Layers that are all attention have transformers' cache; others read the text again."""
        return ForeignCache(capacity, with_states=self.config.documents == "packed")

    @torch.no_grad()
    def cached_logits(self, tokens: Tensor, cache: ForeignCache, *, all_positions: bool = False) -> Tensor:
        """See LanguageModel."""
        if tokens.ndim != 1 or tokens.numel() == 0:
            raise ValueError(f"cached_logits: expected at least one token in one dimension, got shape {tuple(tokens.shape)}.")
        cache.reserve(tokens.numel())
        self._to_device(tokens.device)
        ids = tokens.long()
        before = self._config._attn_implementation
        self._config._attn_implementation = "eager"  # the reference, which every architecture has
        try:
            if cache.states is None:
                ids = torch.cat((*cache.ids, ids))
                hidden = self._run(ids[None], torch.arange(len(ids), device=ids.device)[None])[0][-len(tokens) :]
            else:
                positions = torch.arange(cache.length, cache.length + len(ids), device=ids.device)
                hidden = self._run(ids[None], positions[None], past_key_values=cache.states, use_cache=True)[0]
        finally:
            self._config._attn_implementation = before
        cache.add(tokens)
        logits = self.classify(hidden if all_positions else hidden[-1:])
        return logits if all_positions else logits[0]

    def joint_logits(self, tokens: Tensor, caches: Sequence[ForeignCache]) -> Tensor:
        """See LanguageModel. One reply after the other: transformers' cache is of one text."""
        for cache in caches:
            cache.reserve(1)
        return torch.stack([self.cached_logits(tokens[i : i + 1], cache) for i, cache in enumerate(caches)])


@functools.cache
def recomputing(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of layers whose forward runs inside a checkpoint where its attribute `recompute` says so.

    A class, not a function per layer: all layers then share one compiled function.
    """

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        if self.recompute == "none" or not torch.is_grad_enabled() or options.get("past_key_values") is not None:
            return kind.forward(self, *args, **options)
        contexts: dict[str, Any] = {"context_fn": keep_attention} if self.recompute == "selective" else {}
        return checkpoint(kind.forward, self, *args, use_reentrant=False, **contexts, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "recompute": "none"})


def held_back(model: Foreign) -> list[tuple[str, nn.Module, str, bool]]:
    """Make plain attributes of all buffers: (name, module, attribute, whether checkpoints of transformers hold it)."""
    found = []
    for prefix, module in list(model.causal.named_modules()):
        for name, tensor in list(module.named_buffers(recurse=False)):
            stored = name not in module._non_persistent_buffers_set
            del module._buffers[name]
            setattr(module, name, tensor)
            found.append((f"{prefix}.{name}", module, name, stored))
    return found


def _in_compute_dtype(module: Any, args: Any, x: Tensor) -> Tensor:
    """x in the dtype of autocast where it is on: the residual stream has it, as in every other engine."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
