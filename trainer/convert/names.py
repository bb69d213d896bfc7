"""Names of the decoder's parameters: here, in Hugging Face folders, in GGUF files.

hf_name("layers.0.attention.q.weight")      "model.layers.0.self_attn.q_proj.weight"
gguf_name("layers.0.attention.q.weight")    "blk.0.attn_q.weight"
"""

from __future__ import annotations

import torch

from ..model.decoder import Decoder
from ..model_config import ModelConfig

# ours: (Hugging Face's, GGUF's)
NAMES = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "attention.q": ("self_attn.q_proj", "attn_q"),
    "attention.k": ("self_attn.k_proj", "attn_k"),
    "attention.v": ("self_attn.v_proj", "attn_v"),
    "attention.o": ("self_attn.o_proj", "attn_output"),
    "attention.q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "attention.k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp.up": ("mlp.up_proj", "ffn_up"),
    "mlp.down": ("mlp.down_proj", "ffn_down"),
}


def hf_name(name: str) -> str:
    """Our parameter name in a Hugging Face folder."""
    return _translated(name, 0, "model.layers.")


def gguf_name(name: str) -> str:
    """Our parameter name in a GGUF file."""
    return _translated(name, 1, "blk.")


def _translated(name: str, column: int, layers: str) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module][column]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"{layers}{layer}.{NAMES[part][column]}.{kind}"


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Every parameter of the decoder with its shape; nothing is allocated."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Decoder(config).named_parameters()}
