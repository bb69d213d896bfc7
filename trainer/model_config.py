"""Shape and kernels of a decoder: the part of a recipe that the model and its checkpoints need.

Imports neither torch nor numpy.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from chatmill.config import Section

# Positions are counted in fp32, which knows every whole number up to this one. The other limits are far above every model; they
# keep a damaged file from asking for more memory than there is.
MOST_CONTEXT = 1 << 24


@cache
def family_files() -> dict[str, Path]:
    """The families of Hugging Face models that the decoder computes exactly, by name: one file each."""
    found = {path.stem: path for path in (Path(__file__).parent / "convert" / "families").glob("*/*.py")}
    return {name: found[name] for name in sorted(found)}


def _known_family(name: str) -> str:
    if name not in family_files():
        raise ValueError(f"unknown family; choose one of {', '.join(family_files())}")
    return name


class RopeScaling(Section):
    """Stretching of the rotary angles for contexts longer than those of pre-training.

    kind: `linear`, `llama3` (Llama 3.1, three frequency bands), `yarn` (arXiv:2309.00071) or `longrope` (arXiv:2402.13753).
    factor: new length / original length.
    longrope: short_factor and long_factor, one number per rotating pair, divide the frequencies of texts within the original
    context and of longer ones. The decoder computes the former only: `context` may not exceed original_context.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = Field(gt=0)
    original_context: int = Field(gt=0, le=MOST_CONTEXT)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _check_bands(self) -> RopeScaling:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}")
        if (self.kind == "longrope") != (self.short_factor is not None and self.long_factor is not None):
            raise ValueError("short_factor and long_factor belong to kind longrope, which needs both")
        return self


class ModelConfig(Section):
    """Shape of one decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    family names the Hugging Face architecture that `export --to hf` writes. eos_token_id: one token, or several.
    sliding_window: tokens seen by a query, itself included; applied to the layers in `sliding_layers` (None: all).
    window_rope_theta: rotary base of the layers with a window, which then have no rope_scaling.
    norms: before attention and feed-forward, after them (what they add to the residual stream is normed), or around them.
    norm_offset: norms multiply by norm_offset + weight. qk_norm_over: one norm per head, or one over the whole projection.
    attention_scale: of the scores, None for head_dim ** -0.5. embedding_scale and residual_scale (of what each branch adds)
    multiply; logit_divisor divides, before the soft-cap. rotary_dim: channels of each head that rotate (None: all).
    rope_interleaved: pairs of channels are neighbours, instead of one of each half. nope_layers: layers without positions.
    """

    family: Annotated[str, AfterValidator(_known_family)] = "llama"
    vocab_size: int = Field(default=49152, gt=0, le=1 << 24)
    hidden_size: int = Field(default=576, gt=0, le=1 << 20)
    intermediate_size: int = Field(default=1536, gt=0, le=1 << 22)
    layers: int = Field(default=30, gt=0, le=1024)
    heads: int = Field(default=9, gt=0, le=1 << 14)
    kv_heads: int = Field(default=3, gt=0, le=1 << 14)
    head_dim: int | None = Field(default=None, gt=0, le=1 << 14)
    context: int = Field(default=8192, gt=0, le=MOST_CONTEXT)
    rope_theta: float = Field(default=10_000.0, gt=1)
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(default=1e-5, gt=0, lt=1)
    tied_embeddings: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    norms: Literal["before", "after", "around"] = "before"
    norm_offset: Literal[0, 1] = 0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    rotary_dim: int | None = Field(default=None, gt=0, le=1 << 14)
    rope_interleaved: bool = False
    window_rope_theta: float | None = Field(default=None, gt=1)
    nope_layers: tuple[int, ...] | None = None
    embedding_scale: float = Field(default=1.0, gt=0)
    attention_scale: float | None = Field(default=None, gt=0)
    residual_scale: float = Field(default=1.0, gt=0)
    logit_divisor: float = Field(default=1.0, gt=0)
    sliding_window: int | None = Field(default=None, gt=0)
    sliding_layers: tuple[int, ...] | None = None
    attention_softcap: float | None = Field(default=None, gt=0)
    logit_softcap: float | None = Field(default=None, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def d_head(self) -> int:
        """Channels per head."""
        return self.head_dim or self.hidden_size // self.heads

    @model_validator(mode="after")
    def _check_heads(self) -> ModelConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim is None and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not a multiple of heads={self.heads}; set head_dim")
        if self.d_head % 2:
            raise ValueError(f"head_dim={self.d_head} is odd; rotary positions need an even one")
        rotary = self.rotary_dim or self.d_head
        if rotary % 2 or rotary > self.d_head:
            raise ValueError(f"rotary_dim={rotary} must be even and at most head_dim={self.d_head}")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            if (counts := {len(scaling.short_factor or ()), len(scaling.long_factor or ())}) != {rotary // 2}:
                raise ValueError(f"rope_scaling has {max(counts)} factors; the heads have {rotary // 2} rotating pairs")
            if self.context > scaling.original_context:
                raise ValueError(
                    f"context={self.context} exceeds rope_scaling.original_context={scaling.original_context}: beyond it, "
                    "longrope's angles depend on the length of the whole text, which a cache that grows cannot follow"
                )
        return self

    @property
    def name(self) -> str:
        """The architecture, for people."""
        return self.family

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the parameters with one row per token, the embedding first."""
        return ("embed.weight",) if self.tied_embeddings else ("embed.weight", "head.weight")

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, or None for full causal attention."""
        if self.sliding_window is None or (self.sliding_layers is not None and layer not in self.sliding_layers):
            return None
        return self.sliding_window

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: embedding, attention, mlp, norms, head, total."""
        h, d = self.hidden_size, self.d_head
        q, kv = self.heads * d, self.kv_heads * d
        attention = h * (q + 2 * kv) + q * h
        attention += (q + 2 * kv) * self.qkv_bias + h * self.output_bias
        norms = (4 if self.norms == "around" else 2) * h
        norms += (q + kv if self.qk_norm_over == "projection" else 2 * d) * self.qk_norm
        parts = {
            "embedding": self.vocab_size * h,
            "attention": self.layers * attention,
            "mlp": self.layers * 3 * h * self.intermediate_size,
            "norms": self.layers * norms + h,
            "head": 0 if self.tied_embeddings else self.vocab_size * h,
        }
        return parts | {"total": sum(parts.values())}

    def active_parameters(self) -> int:
        """Parameters that one token passes through: all of them, but of experts only those that it takes."""
        return self.parameter_counts()["total"]

    def matrix_parameters(self) -> int:
        """Elements of the matrices that every token is multiplied with: those of the layers, and the head."""
        counts = self.parameter_counts()
        return counts["attention"] + counts["mlp"] + self.vocab_size * self.hidden_size

    def flops_per_token(self, length: float) -> float:
        """Training FLOPs per token, forward and backward, at a mean causal context of `length` tokens.

        6 x matrix parameters (with the head, without the embedding look-up) + 6 x layers x heads x head_dim x length:
        causal attention costs half of the full square. Recomputation is not counted.
        """
        return 6.0 * self.matrix_parameters() + 6.0 * self.layers * self.heads * self.d_head * length


class KernelSection(Section):
    """Which implementation of each hot operation; `auto` picks by device and shape."""

    attention: Literal[
        "auto", "hopper", "triton", "flash", "flash2", "flash3", "flash4", "sdpa", "flex", "torch", "reference"
    ] = "auto"
    cross_entropy: Literal["auto", "triton", "torch", "reference"] = "auto"
    elementwise: Literal["auto", "triton", "reference"] = "auto"
