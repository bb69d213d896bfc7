"""Rotary positions, with and without QK-norm, against complex multiplication in fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from chatmill.kernels.layer.rope import _rope_op, rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENGINES = ["torch", "triton", "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def tables(T: int, half: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    positions = torch.arange(T, dtype=torch.float64, device=DEVICE)
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=DEVICE) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def truth(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None) -> Tensor:
    """Channel i and i + D/2 as one complex number, times exp(i angle)."""
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, 1e-6)
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def error(got: Tensor | None, expected: Tensor | None) -> float:
    assert got is not None and expected is not None
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(37, 9, 3, 64), (123, 2, 2, 6), (5, 4, 1, 128), (1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_turns_and_gradients_equal_complex_multiplication(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int], norm: bool
) -> None:
    T, Hq, Hk, D = shape
    cos, sin = tables(T, D // 2)
    fused = random(T, Hq + Hk, D, seed=0, dtype=dtype)  # q and k are views of one projection
    weights = [random(D, seed=i, dtype=dtype) for i in (1, 2)] if norm else [None, None]
    up_q, up_k = random(T, Hq, D, seed=3, dtype=dtype), random(T, Hk, D, seed=4, dtype=dtype)
    results = []
    for wide, name in ((dtype, impl), (torch.float64, "")):
        leaf = fused.to(wide, copy=True).requires_grad_()
        a, b = (None if w is None else w.to(wide, copy=True).requires_grad_() for w in weights)
        q, k = leaf[:, :Hq], leaf[:, Hq:]
        if name:
            q, k = rope(q, k, cos, sin, q_norm=a, k_norm=b, norm_eps=1e-6, impl=name)
        else:
            q, k = truth(q, cos, sin, a), truth(k, cos, sin, b)
        ((q * up_q.to(wide)).sum() + (k * up_k.to(wide)).sum()).backward()
        extra = () if a is None or b is None else (a.grad, b.grad)
        results.append((q, k, leaf.grad, *extra))
    for got, exact in zip(*results, strict=True):
        assert error(got, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("impl", ENGINES)
def test_tables_of_full_width_are_hugging_faces(impl: str) -> None:
    """Hugging Face's cos and sin repeat their halves; its rotate_half is written out here."""
    q, k = random(11, 3, 16, seed=0, dtype=torch.float64), random(11, 1, 16, seed=1, dtype=torch.float64)
    cos, sin = (torch.cat((t, t), -1) for t in tables(11, 8))
    expected = q * cos[:, None] + torch.cat((-q[..., 8:], q[..., :8]), -1) * sin[:, None]
    torch.testing.assert_close(rope(q, k, cos, sin, impl=impl)[0], expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_scores_depend_on_distance_alone(impl: str) -> None:
    cos, sin = tables(40, 16)
    q, k = (random(1, 1, 32, seed=i, dtype=torch.float64).expand(40, 1, 32) for i in range(2))
    turned_q, turned_k = rope(q, k, cos, sin, impl=impl)
    scores = turned_q[:, 0] @ turned_k[:, 0].T
    for distance in (0, 7):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_slanted_gradients_are_read_as_they_lie_and_backward_may_run_twice(impl: str) -> None:
    cos, sin = tables(11, 8)
    slanted = random(16, 11, 3, seed=5, dtype=torch.float64).permute(1, 2, 0)
    for weight in (None, random(16, seed=6, dtype=torch.float64)):
        q, k = (random(11, n, 16, seed=n, dtype=torch.float64).requires_grad_() for n in (3, 1))
        out = rope(q, k, cos, sin, q_norm=weight, impl=impl)[0]
        first = torch.autograd.grad(out, q, slanted, retain_graph=True)[0]
        second = torch.autograd.grad(out, q, slanted)[0]
        exact = torch.autograd.grad(truth(q, cos, sin, weight), q, slanted)[0]
        assert torch.equal(first, second)
        torch.testing.assert_close(first, exact)


def test_operator_passes_torchs_own_checks() -> None:
    cos, sin = tables(11, 8, torch.float32)
    x = random(11, 3, 16, seed=0, dtype=torch.float32).requires_grad_()
    w = random(16, seed=1, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(_rope_op, (x, cos, sin, None, 1e-6))
    torch.library.opcheck(_rope_op, (x, cos, sin, w, 1e-6))


def test_misuse_is_refused_in_words() -> None:
    cos, sin = tables(11, 8)
    with pytest.raises(ValueError, match="even D"):
        rope(torch.zeros(11, 3, 15), torch.zeros(11, 1, 15), cos, sin)
    with pytest.raises(ValueError, match=r"shape \(12, 8\)"):
        rope(torch.zeros(12, 3, 16), torch.zeros(12, 1, 16), cos, sin)


def test_heads_further_apart_than_32_bits_are_read_where_they_lie() -> None:
    """Heads 2**29 elements apart, as of a long context stored head by head: head 4 starts at 2**31."""
    T, heads, D, apart = 3, 5, 8, 1 << 29
    store = torch.empty(((heads - 1) * apart + T * D) * 2, dtype=torch.bfloat16, device=DEVICE)
    x, dy = (part.as_strided((T, heads, D), (D, apart, 1), part.storage_offset()) for part in store.chunk(2))
    x.copy_(random(T, heads, D, seed=0, dtype=torch.bfloat16))
    dy.copy_(random(T, heads, D, seed=1, dtype=torch.bfloat16))
    cos, sin = tables(T, D // 2)
    weight = random(D, seed=2, dtype=torch.bfloat16)
    for norm in (None, weight):
        near, far = x.contiguous().requires_grad_(), x.requires_grad_()
        results = []
        for leaf, upstream in ((near, dy.contiguous()), (far, dy)):
            out = rope(leaf, leaf[:, :1], cos, sin, q_norm=norm, impl="triton")[0]
            results.append((out, torch.autograd.grad(out, leaf, upstream)[0]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
