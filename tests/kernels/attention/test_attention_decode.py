"""Decoding attention against the last row of packed attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from chatmill.kernels.attention.decode import decode_attention
from chatmill.kernels.attention.reference import attention_reference
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.model.kv_cache import KVCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache(B: int, C: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    (hq, hk), (d, dv) = heads, dims
    shapes = [(B, hq, d), (B, C, hk, d), (B, C, hk, dv)]
    q, k, v = (torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)
    return q, k, v


def last_row(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **options: Any) -> Tensor:
    """The same from packed attention: the query stands at the last row."""
    rows = []
    for b, n in enumerate(lengths):
        queries = torch.zeros(n, *q.shape[1:], dtype=torch.float64, device=DEVICE)
        queries[-1] = q[b]
        out, _ = attention_reference(queries, k[b, :n].double(), v[b, :n].double(), **options)
        rows.append(out[-1])
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"window": 70}, {"softcap": 2.0}, {"scale": 0.3}])
def test_it_equals_the_last_row_of_attention(impl: str, options: dict[str, Any]) -> None:
    prepare(impl)
    q, k, v = cache(3, 200, (6, 2), (16, 24), torch.float32)
    lengths = [200, 1, 67]
    out = decode_attention(q, k, v, torch.tensor(lengths, dtype=torch.int32), impl=impl, **options)
    torch.testing.assert_close(out.double(), last_row(q, k, v, lengths, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_stretches_gives_the_same(splits: int) -> None:
    prepare("triton")
    q, k, v = cache(2, 300, (4, 1), (16, 16), torch.float32)
    lengths = torch.tensor([299, 40], dtype=torch.int32)
    out = decode_attention(q, k, v, lengths, impl="triton", splits=splits)
    torch.testing.assert_close(out, decode_attention(q, k, v, lengths, impl="torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_lies_past_the_length_is_never_read(impl: str) -> None:
    prepare(impl)
    q, k, v = cache(1, 100, (2, 1), (16, 16), torch.bfloat16)
    lengths = torch.tensor([37], dtype=torch.int32)
    clean = decode_attention(q, k, v, lengths, impl=impl)
    k[:, 37:], v[:, 37:] = float("nan"), float("nan")
    assert torch.equal(decode_attention(q, k, v, lengths, impl=impl), clean)


def test_a_strided_cache_is_taken() -> None:
    prepare("triton")
    q, k, v = cache(2, 80, (4, 2), (16, 16), torch.float32)
    lengths = torch.tensor([80, 33], dtype=torch.int32)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    torch.testing.assert_close(
        decode_attention(q, *heads_first, lengths, impl="triton"), decode_attention(q, k, v, lengths, impl="triton")
    )


def test_wrong_shapes_are_refused() -> None:
    q, k, v = cache(2, 8, (4, 2), (16, 16), torch.float32)
    with pytest.raises(ValueError, match="decode_attention"):
        decode_attention(q[0], k, v, torch.tensor([1, 1]))


def prepare(impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
        if DEVICE.type == "cpu":
            from chatmill.kernels import interpreter

            interpreter.install()


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 2.0}])
def test_a_conversations_cache_is_read_by_it(options: dict[str, Any]) -> None:
    prepare("triton")
    config = ModelConfig(vocab_size=16, hidden_size=96, intermediate_size=16, layers=2, heads=6, kv_heads=2, context=64)
    replies = {}
    for decode in ("triton", ""):
        cache = KVCache(config, capacity=64, dtype=torch.float32, device=DEVICE)
        cache.decode = decode
        generator = torch.Generator().manual_seed(1)
        replies[decode] = []
        for tokens in (20, 1, 1):  # a prompt, then two tokens of the reply
            cache.reserve(tokens)
            q, k, v = (torch.randn(tokens, heads, 16, generator=generator).to(DEVICE) for heads in (6, 2, 2))
            window, softcap = options.get("window"), options.get("softcap")
            replies[decode] += [cache.attend(layer, q, k, v, window=window, softcap=softcap, scale=None) for layer in range(2)]
            cache.length += tokens
    for ours, torchs in zip(replies["triton"], replies[""], strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
