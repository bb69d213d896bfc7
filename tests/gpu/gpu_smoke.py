"""One step of each operation at real size against fp64: a first look at whether the kernels are right on this GPU.

    python tests/gpu/gpu_smoke.py --op "attention triton D128 packed" --out results/smoke      one operation, in this process
    python tests/gpu/gpu_smoke.py --list

Forward and backward, and that nothing waits for the GPU. The result is OUT/NAME.json: errors
relative to fp64, the limits, seconds. --small takes tiny sizes: then the same code runs on a CPU with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chatmill.kernels.attention.decode import decode_attention, decode_attention_reference
from chatmill.kernels.attention.interface import attention, attention_reference
from chatmill.kernels.attention.rules import Rules
from chatmill.kernels.attention.tile_map import make_tile_map
from chatmill.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from chatmill.kernels.layer.rms_norm import rms_norm, rms_norm_reference
from chatmill.kernels.layer.rope import rope, rope_reference
from chatmill.kernels.layer.swiglu import swiglu, swiglu_reference

LIMIT = 2e-2  # relative error of bf16 results; a wrong tile or mask gives more than 0.1
Errors = dict[str, float]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error(got: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of the truth; infinite where got is not finite."""
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30))


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16().requires_grad_()


def compare(
    run: Callable[..., Any], truth: Callable[..., Any], leaves: Sequence[Tensor], names: str, waits: bool = False
) -> Errors:
    """Errors of the outputs and of the leaves' gradients. On a GPU run must not wait for it."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outs = [out if isinstance(out, tuple) else (out,) for out in (run(*leaves), truth(*wide))]
    upstream = [torch.randn_like(out) for out in outs[0]]
    if DEVICE.type == "cuda":
        torch.autograd.grad(outs[0], leaves, upstream)  # compiled now
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        again = run(*leaves)
        outs[0] = again if isinstance(again, tuple) else (again,)
    found = torch.autograd.grad(outs[0], leaves, upstream)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    exact = torch.autograd.grad(outs[1], wide, [u.double() for u in upstream])
    errors = {f"out {i}": error(a, b.detach()) for i, (a, b) in enumerate(zip(*outs, strict=True))}
    return errors | {name: error(a, b) for name, a, b in zip(names.split(), found, exact, strict=True)}


def attend(impl: str, D: int, packed: bool, small: bool) -> Errors:
    """2048 channels of queries in 4 times as many heads as keys; packed: chats of 7 to 900 tokens and rows of none."""
    T, heads = (96, 4) if small else (4096, 2048 // D)
    lengths = (7, 30, 1, 40) if small else (7, 900, 1, 500, 64, 128, 333, 2000)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()] if packed else [0, T]
    tier, fused = impl.removesuffix("-fused"), impl.endswith("-fused")
    tile_map = make_tile_map(bounds, T, head_dim=D, device=DEVICE, impl=tier).to(DEVICE)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "impl": tier, "tile_map": tile_map, "deterministic": not fused}
    leaves = [random(T, heads, D), random(T, heads // 4, D), random(T, heads // 4, D)]

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # per key head, so that the scores of all heads are not in memory together
        parts = [
            attention_reference(q[:, 4 * h : 4 * h + 4], k[:, h : h + 1], v[:, h : h + 1], cu_seqlens=cu_seqlens)[0]
            for h in range(k.shape[1])
        ]
        return torch.cat(parts, 1)

    return compare(lambda q, k, v: attention(q, k, v, **options), truth, leaves, "dq dk dv")


def loss(products: Any, master: bool, small: bool) -> Errors:
    """Two chunks of rows and more, a third of the targets ignored; master: an fp32 head under bf16 products."""
    N, H, V = (40, 64, 300) if small else (6144, 2048, 128_256)
    hidden, weight = random(N, H), random(V, H, scale=H**-0.5)
    if master:
        weight = weight.detach().float().requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    targets[::3] = -100
    rows = (targets != -100).nonzero().squeeze(1)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(x, w, targets, rows=rows, impl="triton", products=products)

    def truth(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(x[rows] @ (w.bfloat16().double() if master else w).T, targets[rows])

    return compare(run, truth, [hidden, weight], "d_hidden d_weight")


def given_logits(small: bool) -> Errors:
    N, V = (24, 300) if small else (2048, 128_256)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    return compare(
        lambda z: cross_entropy(z, targets, impl="triton")[0], lambda z: F.cross_entropy(z, targets), [random(N, V)], "d_logits"
    )


def norm(small: bool) -> Errors:
    T, H = (10, 64) if small else (4096, 4096)

    def truth(x: Tensor, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_reference(x + r, w), x + r

    leaves = [random(T, H), random(H), random(T, H)]
    return compare(lambda x, w, r: rms_norm(x, w, 1e-6, r, impl="triton"), truth, leaves, "dx d_weight d_residual")


def turn(small: bool) -> Errors:
    T, heads, D = (10, 4, 64) if small else (4096, 32, 128)
    angles = torch.arange(T, device=DEVICE)[:, None] * 1e4 ** (-torch.arange(D // 2, device=DEVICE) / (D // 2))
    cos, sin = angles.cos(), angles.sin()
    leaves = [random(T, heads, D), random(T, heads // 4, D)]
    truth = lambda q, k: rope_reference(q, k, cos.double(), sin.double())  # noqa: E731
    return compare(lambda q, k: rope(q, k, cos, sin, impl="triton"), truth, leaves, "dq dk")


def gate(small: bool) -> Errors:
    shape = (10, 100) if small else (4096, 14336)
    return compare(lambda g, u: swiglu(g, u, impl="triton"), swiglu_reference, [random(*shape), random(*shape)], "d_gate d_up")


def decode(small: bool) -> Errors:
    B, C, heads, D = (2, 64, 4, 64) if small else (16, 4096, 32, 128)
    q, k, v = random(B, heads, D).detach(), random(B, C, heads // 4, D).detach(), random(B, C, heads // 4, D).detach()
    lengths = torch.randint(1, C + 1, (B,), device=DEVICE, dtype=torch.int32)
    exact = decode_attention_reference(q.double(), k.double(), v.double(), lengths, Rules(True, 0, 0.0, D**-0.5))
    return {"out": error(decode_attention(q, k, v, lengths, impl="triton"), exact)}


OPS: dict[str, Callable[[bool], Errors]] = {
    **{
        f"attention {impl} D{D} {'packed' if packed else 'long'}": lambda small, impl=impl, D=D, packed=packed: attend(
            impl, D, packed, small
        )
        for impl in ("triton", "hopper", "hopper-fused")
        for D in (64, 128)
        for packed in (False, True)
    },
    **{
        f"loss products {products} {'fp32' if master else 'bf16'}": lambda small, products=products, master=master: loss(
            products, master, small
        )
        for products in ("triton", "torch")
        for master in (False, True)
    },
    "cross_entropy": given_logits,
    "rms_norm": norm,
    "rope": turn,
    "swiglu": gate,
    "decode": decode,
}


def file_of(out: Path, op: str) -> Path:
    return out / f"{op.replace(' ', '-')}.json"


def main() -> int:
    """Run one operation; 1 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--out", type=Path, default=Path("smoke"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if options.list or options.op is None:
        print("\n".join(OPS))
        return 0
    torch.manual_seed(0)
    began = time.monotonic()
    try:
        errors = OPS[options.op](options.small)
        wrong = {name: value for name, value in errors.items() if not value <= LIMIT}
        result: dict[str, Any] = {"ok": not wrong, "errors": errors, "limit": LIMIT}
    except Exception as problem:
        result = {"ok": False, "problem": f"{type(problem).__name__}: {problem}"[:800]}
    result["seconds"] = round(time.monotonic() - began, 1)
    options.out.mkdir(parents=True, exist_ok=True)
    file_of(options.out, options.op).write_text(json.dumps(result) + "\n")
    print(options.op, json.dumps(result), flush=True)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
