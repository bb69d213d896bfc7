"""Frozen weights in 4 and 8 bits, taken apart by hand: codes and scales mean what the formats' definitions say."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from chatmill.trainer.adapters.quantised import BLOCK, dequantise, quantise, rounded

pytest.importorskip("bitsandbytes", reason="needs the extra `adapters`")


def levels_of_nf4() -> list[float]:
    """QLoRA (arXiv:2305.14314), section 3: quantiles of a normal distribution at evenly spaced places, 8 positive and 7
    negative ones and 0, over the largest of them; the outermost place is the mean of 1 - 1/32 and 1 - 1/30."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    negative = [-quantile(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    return sorted(value / max(positive) for value in (*negative, 0.0, *positive))


def a_weight() -> torch.Tensor:
    """Float32["3 128"]: two blocks to a row, one of them 0, one of large and one of tiny values."""
    weight = torch.randn(3, 2 * BLOCK, generator=torch.Generator().manual_seed(1))
    weight[0, BLOCK:] = 0
    weight[1, :BLOCK] *= 1e4
    weight[2, BLOCK:] *= 1e-6
    return weight


def test_a_block_of_nf4_dequantised_by_hand_equals_ours() -> None:
    """Two codes to a byte, the first in its upper half; one scale per 64 elements of a row in fp32 (no double quantisation)."""
    weight, levels = a_weight(), levels_of_nf4()
    codes, scales = quantise(weight, "nf4")
    assert codes.shape == (3, BLOCK) and scales.shape == (3, 2 * 4)
    absmax = weight.view(3, 2, BLOCK).abs().amax(-1)
    assert torch.equal(scales.view(torch.float32), absmax)
    by_hand = torch.empty_like(weight)
    for row in range(3):
        for byte in range(BLOCK):
            packed = int(codes[row, byte])
            for column, code in ((2 * byte, packed >> 4), (2 * byte + 1, packed & 15)):
                scale = float(absmax[row, column // BLOCK])
                by_hand[row, column] = levels[code] * scale
                apart = [abs(float(weight[row, column]) - level * scale) for level in levels]
                assert apart[code] <= min(apart) + 1e-6 * scale, "the nearest of the 16 levels"
    torch.testing.assert_close(dequantise(codes, scales, "nf4", torch.float32), by_hand, rtol=1e-6, atol=0)
    assert torch.equal(rounded(weight, "nf4"), dequantise(codes, scales, "nf4", torch.float32))
    assert torch.equal(
        dequantise(codes, scales, "nf4", torch.bfloat16), dequantise(codes, scales, "nf4", torch.float32).bfloat16()
    )


def test_a_row_of_int8_dequantised_by_hand_equals_ours() -> None:
    """One scale per row in fp32, the largest absolute value; a code is the value in 127ths of it."""
    weight = a_weight()
    codes, scales = quantise(weight, "int8")
    absmax = weight.abs().amax(1, keepdim=True)
    assert torch.equal(scales.view(torch.float32), absmax)
    assert torch.equal(codes.view(torch.int8), (weight * 127 / absmax).round().to(torch.int8))
    rows = zip(codes.view(torch.int8).tolist(), absmax[:, 0].tolist(), strict=True)
    by_hand = torch.tensor([[code * scale / 127 for code in row] for row, scale in rows])
    torch.testing.assert_close(dequantise(codes, scales, "int8", torch.float32), by_hand, rtol=1e-6, atol=0)
