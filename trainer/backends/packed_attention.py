"""Our attention over packed documents as an attention function of transformers.

    register()                                           # once; then config._attn_implementation = NAME
    body(input_ids, position_ids=..., **packing(cu_seqlens, max_seqlen, impl))

transformers hands every layer's queries, keys and values to the function of that name, with the keywords of the forward pass.
No mask is made: documents end at cu_seqlens, and each layer names its own window. A layer that asks for something that this
attention does not compute, or that does not name the window of its configuration, raises ConfigError.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from chatmill.config import ConfigError

from ...kernels.attention import attention

NAME = "chatmill"
KINDS = ("full_attention", "sliding_attention")
# keywords that say nothing about what attention computes here
HARMLESS = frozenset(
    {
        *("position_ids", "cu_seq_lens_k", "max_length_k", "use_cache", "output_attentions", "output_hidden_states"),
        *("output_router_logits", "cache_position", "past_key_values", "position_embeddings", "return_dict", "layer_idx"),
    }
)


def register() -> None:
    """Make the function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packing(cu_seqlens: Tensor, max_seqlen: int | None, impl: str) -> dict[str, Any]:
    """Keywords of a decoder's forward pass that say where documents end; the first four have transformers' names."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
        "chatmill_impl": impl,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    chatmill_impl: str = "auto",
    **others: Any,
) -> tuple[Tensor, None]:
    """query (1, Hq, T, D), key (1, Hk, T, D), value (1, Hk, T, Dv); returns (1, T, Hq, Dv). s_aux (Hq,): sinks."""
    kind = type(module).__name__
    odd = sorted(name for name, given in others.items() if name not in HARMLESS and given is not None and given is not False)
    if cu_seq_lens_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ConfigError(f"{kind} does not pass on where packed documents end")
    if odd or dropout or is_causal is False or getattr(module, "is_causal", True) is False:
        raise ConfigError(f"{kind} asks attention for {', '.join(odd) or 'dropout or bidirectional attention'}")
    expected = window_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    if sliding_window != expected:
        raise ConfigError(f"{kind} names a window of {sliding_window} tokens where its configuration says {expected}")
    if query.dtype != value.dtype:  # autocast: norms and rotation have left them in fp32
        query, key = query.to(value.dtype), key.to(value.dtype)
    out = attention(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seqlens=cu_seq_lens_q,
        window=sliding_window,
        softcap=softcap,
        scale=scaling,
        sinks=s_aux,
        impl=chatmill_impl,
        max_seqlen=max_length_q,
        complete=True,
    )
    return out.unsqueeze(0), None


def window_of(config: Any, layer: int | None) -> int | None:
    """Tokens that a query of a layer sees by the configuration, or None for all before it. ConfigError for other kinds."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and layer is not None:
        if kinds[layer] not in KINDS:
            raise ConfigError(f"layer {layer} is {kinds[layer]}, which is no attention that can be packed")
        return window if kinds[layer] == "sliding_attention" else None
    return None if getattr(config, "use_sliding_window", True) is False else window
