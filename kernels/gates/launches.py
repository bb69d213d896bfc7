"""Every shipped configuration as a call of the public functions: what a dry launch compiles, and what is executed on a CPU.

    for case in launch_cases(90, Sizes()):
        case.run()

Forward and backward, through dispatch and autograd, as a training or a reply calls them. The tests of numbers are elsewhere:
here only which kernels are launched, and with which arguments, counts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ..attention.decode import decode_attention
from ..attention.interface import attention
from ..attention.tile_map import make_tile_map
from ..cross_entropy import tiles
from ..cross_entropy.interface import linear_cross_entropy
from ..cross_entropy.logits import cross_entropy
from ..layer.rms_norm import rms_norm
from ..layer.rope import rope_one
from ..layer.swiglu import swiglu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (D, Dv) of attention; queries of one key head
HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
DECODE_DIMS = ((64, 64, 3), (128, 128, 4), (128, 128, 8), (192, 128, 1), (256, 256, 8))


@dataclass(frozen=True)
class Sizes:
    """tokens: of a batch. heads: of queries and keys. loss_rows, loss_width, words: R, H and V of the loss, in chunks of
    chunk_rows. layer_rows: of norm, rotary positions and SwiGLU. cached: tokens of the longest conversation in decoding."""

    tokens: int = 512
    heads: tuple[int, int] = (8, 2)
    loss_rows: int = 384
    loss_width: int = 256
    words: int = 1_000
    chunk_rows: int = 128
    layer_rows: int = 70
    cached: int = 1_000


@dataclass(frozen=True)
class LaunchCase:
    """name: the operation first, then what is special. run: the calls."""

    name: str
    run: Callable[[], None]


def launch_cases(arch: int, sizes: Sizes) -> Iterator[LaunchCase]:
    """Every configuration that this capability may be asked for."""
    calls: list[tuple[str, Callable[[], None]]] = [
        *_attention_cases(sizes), *(_hopper_cases(sizes) if arch == 90 else ()), *_decode_cases(sizes), *_loss_cases(sizes),
        *_layer_cases(sizes),
    ]  # fmt: skip
    yield from (LaunchCase(name, run) for name, run in calls)


Calls = Iterator[tuple[str, Callable[[], None]]]


def _leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _back(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def _attend(sizes: Sizes, dims: tuple[int, int], bounds: Sequence[int], dtype: torch.dtype, **options: Any) -> None:
    """Attention and its gradients with a tile map made on the CPU, as the data stream makes it."""
    T, (heads, kv_heads), (D, DV) = bounds[-1], sizes.heads, dims
    heads, kv_heads = options.pop("heads", (heads, kv_heads))
    impl = options.pop("impl", "triton")
    q, k, v = _leaf(T, heads, D, dtype=dtype), _leaf(T, kv_heads, D, dtype=dtype), _leaf(T, kv_heads, DV, dtype=dtype)
    made = make_tile_map(
        bounds, T, head_dim=max(D, DV), dtype=dtype, window=options.get("window"), device=q.device, impl=impl.partition("-")[0]
    )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    _back(attention(q, k, v, cu_seqlens=cu_seqlens, tile_map=made, impl=impl, **options))


def _attention_cases(sizes: Sizes) -> Calls:
    run, T = functools.partial(functools.partial, _attend, sizes), sizes.tokens
    long, short = (0, T), tuple(range(0, T + 1, 16))
    for dims in HEAD_DIMS:
        for name, bounds in (("long", long), ("short", short)):
            yield f"attention D{dims[0]} bf16 {name}", run(dims, bounds, BF16)
    yield "attention D64 bf16 9 heads on 3, odd length", run((64, 64), (0, T - 5), BF16, heads=(9, 3))
    yield "attention D128 fp16 one head, window, soft-cap", run((128, 128), long, FP16, heads=(1, 1), window=100, softcap=20.0)
    yield "attention D256 bf16 soft-cap", run((256, 256), long, BF16, softcap=20.0)
    for D in (64, 128, 256):
        yield f"attention D{D} fp32", run((D, D), (0, T // 2), FP32)


def _hopper_cases(sizes: Sizes) -> Calls:
    run, T = functools.partial(functools.partial, _attend, sizes), sizes.tokens
    long, short = (0, T), tuple(range(0, T + 1, 16))
    for D in (64, 128):
        for name, bounds in (("long", long), ("short", short)):
            yield f"hopper D{D} bf16 {name}", run((D, D), bounds, BF16, impl="hopper", deterministic=False)
    yield "hopper D64 fp16 soft-cap", run((64, 64), long, FP16, impl="hopper", softcap=5.0, deterministic=False)
    yield "hopper D128 bf16 soft-cap", run((128, 128), long, BF16, impl="hopper", softcap=5.0, deterministic=False)
    yield "hopper D64 bf16 deterministic", run((64, 64), long, BF16, impl="hopper", deterministic=True)
    yield "hopper D64 bf16 9 heads on 3, odd length", run((64, 64), (0, T - 5), BF16, impl="hopper", heads=(9, 3))
    yield "hopper D128 bf16 one head, one token", run((128, 128), (0, 1), BF16, impl="hopper", heads=(1, 1))


def _decode_cases(sizes: Sizes) -> Calls:
    def decode(D: int, DV: int, group: int, dtype: torch.dtype, **options: Any) -> None:
        q, k = _leaf(3, 2 * group, D, dtype=dtype), _leaf(3, sizes.cached, 2, D, dtype=dtype)
        v, lengths = _leaf(3, sizes.cached, 2, DV, dtype=dtype), torch.tensor([3, sizes.cached, 50], dtype=torch.int32)
        with torch.no_grad():
            decode_attention(q, k, v, lengths, impl="triton", **options)

    for D, DV, group in DECODE_DIMS:
        yield f"decode D{D} group {group} bf16", functools.partial(decode, D, DV, group, BF16)
    yield "decode D128 bf16 window, soft-cap", functools.partial(decode, 128, 128, 4, BF16, window=64, softcap=20.0)
    yield "decode D64 fp16", functools.partial(decode, 64, 64, 3, FP16)
    for D in (128, 256):
        yield f"decode D{D} fp32", functools.partial(decode, D, D, 8, FP32)


def _loss_cases(sizes: Sizes) -> Calls:
    def loss(width: int, words: int, dtype: torch.dtype, kept: torch.dtype, chunk: int, grad: bool, **options: Any) -> None:
        x, w = _leaf(sizes.loss_rows, width, dtype=dtype), _leaf(words, width, dtype=kept)
        targets = torch.randint(0, words, (sizes.loss_rows,))
        with torch.set_grad_enabled(grad), mock.patch.object(tiles, "chunk_rows", lambda n, *_: min(n, chunk)):
            out = linear_cross_entropy(x, w, targets, impl="triton", **({"products": "triton"} | options))
            if grad:
                _back(out)

    def logits(words: int, dtype: torch.dtype, **options: Any) -> None:
        z, targets = _leaf(sizes.loss_rows, words, dtype=dtype), torch.randint(0, words, (sizes.loss_rows,))
        _back(cross_entropy(z, targets, impl="triton", **options)[0])

    H, V, parts, whole = sizes.loss_width, sizes.words, sizes.chunk_rows, 1 << 30
    run = functools.partial(functools.partial, loss)
    yield "loss bf16 in chunks", run(H, V, BF16, BF16, parts, True)
    yield "loss bf16 in one chunk", run(H, V, BF16, BF16, whole, True)
    yield (
        "loss bf16 in two chunks, smoothing, soft-cap",
        run(H, V, BF16, BF16, sizes.loss_rows // 2, True, label_smoothing=0.1, z_loss=1e-4, softcap=30.0),
    )
    yield "loss bf16 of each token", run(H, V, BF16, BF16, parts, True, reduction="none")
    yield "loss bf16 without gradients", run(H, V, BF16, BF16, parts, False)
    yield "loss bf16, fp32 weight", run(H, V, BF16, FP32, parts, True)
    yield "loss fp16 in chunks", run(H, V, FP16, FP16, parts, True)
    yield "loss fp32 in chunks", run(H, V, FP32, FP32, parts, True)
    yield "loss bf16 of unaligned rows", run(H - 3, V, BF16, BF16, parts, True)
    yield "loss fp32 of unaligned rows", run(H - 3, V, FP32, FP32, parts, True)
    yield "products of torch bf16 in chunks", run(H, V, BF16, BF16, parts, True, products="torch")
    yield "products of torch bf16, fp32 weight", run(H, V, BF16, FP32, parts, True, products="torch")
    yield "products of torch bf16 without gradients", run(H, V, BF16, BF16, parts, False, products="torch")
    yield "logits bf16", functools.partial(logits, V, BF16)
    yield (
        "logits fp32 smoothing, soft-cap, each token",
        functools.partial(logits, V, FP32, label_smoothing=0.1, softcap=30.0, reduction="none"),
    )


def _layer_cases(sizes: Sizes) -> Calls:
    rows = sizes.layer_rows

    def norm(width: int, dtype: torch.dtype, residual: bool) -> None:
        x, w, r = _leaf(rows, width, dtype=dtype), _leaf(width, dtype=dtype), _leaf(rows, width, dtype=dtype)
        if residual:
            _back(*rms_norm(x, w, 1e-6, r, impl="triton"))
        else:
            _back(rms_norm(x, w, 1e-6, impl="triton"))

    def turn(width: int, dtype: torch.dtype, heads: int, normed: bool) -> None:
        x, (cos, sin) = _leaf(rows, heads, width, dtype=dtype), torch.randn(2, rows, width // 2)
        _back(rope_one(x, cos, sin, norm=_leaf(width, dtype=dtype) if normed else None, impl="triton"))

    def gate(width: int, dtype: torch.dtype) -> None:
        _back(swiglu(_leaf(rows, width, dtype=dtype), _leaf(rows, width, dtype=dtype), impl="triton"))

    for width, dtype in itertools.product((64, 576, 1021, 2048, 4096, 8192), (BF16, FP32)):
        for residual in (False, True):
            name = f"rms_norm {width} {_short(dtype)}{' residual' * residual}"
            yield name, functools.partial(norm, width, dtype, residual)
    for (width, heads), normed in itertools.product(((64, 9), (80, 32), (96, 8), (128, 1), (128, 32), (256, 8)), (False, True)):
        yield f"rope {width} x {heads} bf16{' norm' * normed}", functools.partial(turn, width, BF16, heads, normed)
    yield "rope 128 x 8 fp32 norm", functools.partial(turn, 128, FP32, 8, True)
    for width, dtype in ((1536, BF16), (1021, BF16), (8192, BF16), (14336, BF16), (8192, FP32)):
        yield f"swiglu {width} {_short(dtype)}", functools.partial(gate, width, dtype)


def _short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]
