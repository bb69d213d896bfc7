"""Tiny models of today's architectures, made by transformers with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
GROUPED = {**ROUTED, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}

# each architecture with what makes it special; `rows`: layers that cannot be packed
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3_moe": {**ROUTED, "num_experts": 4, "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    "deepseek_v3": {
        **GROUPED, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**WINDOWS, "query_pre_attn_scalar": 8},
    "phi3": {},
    "glm4": {},
    "glm4_moe": {**GROUPED, "n_group": 1},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "cohere2": {**WINDOWS, "logit_scale": 0.25},
    "smollm3": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {
        **ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
    "mamba": {"state_size": 4},
}  # fmt: skip
ROWS = ("qwen3_next", "mamba")


def make_folder(name: str, folder: Path, **changes: Any) -> Any:
    """Save a tiny random model as transformers does; returns the model."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name].from_dict({"model_type": name, **SHAPE, **ARCHITECTURES[name], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.ndim > 1):
            parameter.normal_(0.0, 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.save_pretrained(folder)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
