"""Names of the decoder's parameters: here, in Hugging Face folders, in GGUF files.

hf_name("layers.0.attention.q.weight")      "model.layers.0.self_attn.q_proj.weight"
gguf_name("layers.0.attention.q.weight")    "blk.0.attn_q.weight"
"""

from __future__ import annotations

from collections.abc import Mapping

from ..model.shapes import parameter_shapes
from ..model_config import ModelConfig
from .family import family_of

# ours: (Hugging Face's, GGUF's)
NAMES = {
    "embed": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "head": ("lm_head", "output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention_post_norm": ("", "post_attention_norm"),  # the families that have it name it
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp_post_norm": ("", "post_ffw_norm"),
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


def hf_name(name: str, family: str = "llama") -> str:
    """Our parameter name in a Hugging Face folder of the family."""
    return _translated(name, 0, "model.layers.", family_of(family).names)


def gguf_name(name: str) -> str:
    """Our parameter name in a GGUF file."""
    return _translated(name, 1, "blk.", {})


def _translated(name: str, column: int, layers: str, others: Mapping[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{NAMES[module][column]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"{layers}{layer}.{others.get(part) or NAMES[part][column]}.{kind}"


def hf_tensors(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Each tensor of a Hugging Face folder -> our parameters whose rows it holds, in order (one, unless it is fused)."""
    family = family_of(config.family)
    fused = {part: theirs for theirs, parts in family.fused.items() for part in parts}
    found: dict[str, tuple[str, ...]] = {}
    for name in parameter_shapes(config):
        part = name.rpartition(".")[0].split(".", 2)[-1]  # layers.0.attention.q.weight: attention.q
        theirs = hf_name(name, config.family)
        if part in fused:
            theirs = theirs.replace(family.names.get(part, NAMES[part][0]), fused[part])
        found[theirs] = (*found.get(theirs, ()), name)
    return found
