"""The Hugging Face families that the decoder computes exactly, one entry each.

A family that differs in names, fused weights, defaults or biases is one more entry of FAMILIES and one more name in
ModelConfig.family. What the decoder computes differently (another norm, partial rotation) needs more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ROPE_KINDS = ("linear", "llama3", "yarn")  # beside `default`


@dataclass(frozen=True)
class Family:
    """What an architecture fixes, and what transformers assumes for keys that config.json may omit.

    qkv_bias, output_bias: always or never there, or the key of config.json that says so.
    windows: on no layer, on all layers when `sliding_window` is set, or as use_sliding_window and layer_types say.
    fused: their module -> our modules whose rows lie in it one after the other.
    rope: kinds of rotary scaling that transformers computes for it. extra: further keys of an exported config.json.
    """

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "all", "layers"] = "none"
    rope: tuple[str, ...] = ROPE_KINDS
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_position_embeddings": 32768, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", qkv_bias="attention_bias", output_bias="attention_bias", extra={"mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", QWEN, qkv_bias=True, windows="layers"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN, "head_dim": 128},
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        windows="layers",
    ),
    # Its only rotary scaling, longrope, takes other angles for texts beyond the original context: those of one text would
    # depend on its length, which packed dialogues and a cache that grows cannot follow.
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows="all",
        rope=(),
        fused={
            "self_attn.qkv_proj": ("attention.q", "attention.k", "attention.v"),
            "mlp.gate_up_proj": ("mlp.gate", "mlp.up"),
        },
        extra={"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True},
        qkv_bias="attention_bias",
        output_bias="attention_out_bias",
        extra={"mlp_bias": False, "residual_dropout": 0.0},
    ),
}
