"""The public attention function on a CPU, against the fp64 reference and against PyTorch's own attention."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chatmill.kernels.attention import attention, attention_reference, attention_with_lse, interface
from chatmill.kernels.attention import operators as module


def inputs(
    T: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    (hq, hk), (d, dv) = heads, dims

    def make(h: int, c: int) -> Tensor:
        return torch.randn(T, h, c, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return make(hq, d), make(hk, d), make(hk, dv)


def gradients(out: Tensor, lse: Tensor, leaves: tuple[Tensor, ...], with_lse: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    loss = (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)).sum()
    if with_lse:
        finite = torch.where(lse.isfinite(), lse, torch.zeros((), dtype=lse.dtype))
        loss = loss + (finite * torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype)).sum()
    return torch.autograd.grad(loss, leaves)


LAYOUTS = {
    "one document": None,
    "chats": [0, 13, 14, 52, 90, 123],
    "one token each": list(range(124)),
    "an empty one and a tail outside": [0, 30, 30, 99],
    "long enough to be cut into query blocks": [0, 507],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 1}, {"window": 17}, {"softcap": 3.0}, {"causal": False}, {"causal": False, "window": 9}, {"scale": 0.3}],
)
@pytest.mark.parametrize("dims", [(16, 16), (24, 8)])
def test_output_lse_and_gradients_equal_the_reference(layout: str, options: dict[str, Any], dims: tuple[int, int]) -> None:
    bounds = LAYOUTS[layout]
    T = 507 if bounds and bounds[-1] == 507 else 123
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    q, k, v = inputs(T, (4, 2), dims)
    for with_lse in (False, True):
        out, lse = attention_with_lse(q, k, v, cu_seqlens=cu_seqlens, **options)
        expected, expected_lse = attention_reference(q, k, v, cu_seqlens=cu_seqlens, **options)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
        mine, truth = (gradients(o, s, (q, k, v), with_lse) for o, s in ((out, lse), (expected, expected_lse)))
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_reference_equals_pytorch_on_one_document() -> None:
    q, k, v = inputs(65, (6, 3), (32, 32))
    out, lse = attention_reference(q, k, v)
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, theirs[0].transpose(0, 1))
    scores = (q.transpose(0, 1) @ k.repeat_interleave(2, 1).permute(1, 2, 0)) / math.sqrt(32)
    torch.testing.assert_close(lse[:, 4], torch.logsumexp(scores[:, 4, :5], -1))


def test_a_change_in_one_document_leaves_the_others_bitwise_alone() -> None:
    q, k, v = (x.detach() for x in inputs(90, (4, 2), (16, 16), torch.float32))
    cu_seqlens = torch.tensor([0, 20, 61, 90], dtype=torch.int32)
    before = attention(q, k, v, cu_seqlens=cu_seqlens)
    for x in (q, k, v):
        x[20:61] += 5.0
    after = attention(q, k, v, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[61:], after[61:])
    assert not torch.allclose(before[20:61], after[20:61])


def test_the_future_is_not_seen() -> None:
    q, k, v = (x.detach() for x in inputs(40, (2, 1), (16, 16), torch.float32))
    before = attention(q, k, v)
    k[30:] = 100.0
    v[30:] = -100.0
    torch.testing.assert_close(attention(q, k, v)[:30], before[:30], rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_sinks_take_weight_and_get_gradients(impl: str) -> None:
    q, k, v = inputs(50, (4, 2), (16, 16))
    sinks = torch.tensor([-1.0, 0.0, 1.0, 8.0], dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 21, 47], dtype=torch.int32)
    out, lse = attention(q, k, v, cu_seqlens=cu_seqlens, sinks=sinks, return_lse=True, impl=impl)
    expected, expected_lse = attention_reference(q, k, v, cu_seqlens=cu_seqlens, sinks=sinks)
    plain = attention(q, k, v, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out[:47, 3].abs().mean() < 0.2 * plain[:47, 3].abs().mean()
    for a, b in zip(
        gradients(out, lse, (q, k, v, sinks), True), gradients(expected, expected_lse, (q, k, v, sinks), True), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    q, k, v = inputs(200, (4, 2), (64, 64), dtype)
    truth, _ = attention_reference(*(x.double() for x in (q, k, v)))
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)
    error = (attention(q, k, v).double() - truth).abs().max()
    assert error <= 2 * (theirs[0].transpose(0, 1).double() - truth).abs().max() + 1e-6


def test_strided_inputs_and_gradients_are_taken() -> None:
    q, k, v = inputs(33, (4, 2), (16, 16))
    packed = torch.cat([q, k, v], 1)
    views = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    expected = attention(q, k, v)
    assert not views[0].is_contiguous()
    torch.testing.assert_close(attention(*views), expected)
    wide = torch.randn(33, 16, 4, dtype=torch.float64).transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(expected, (q, k, v), wide, retain_graph=True),
        torch.autograd.grad(expected, (q, k, v), wide.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_two_runs_are_bitwise_equal() -> None:
    q, k, v = inputs(150, (4, 2), (32, 32), torch.float32)
    cu_seqlens = torch.tensor([0, 7, 15, 22, 150], dtype=torch.int32)
    runs = []
    for _ in range(2):
        out = attention(q, k, v, cu_seqlens=cu_seqlens)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"window": 0}, "window=0"),
        ({"softcap": -1.0}, "softcap"),
        ({"scale": 0.0}, "scale"),
        ({"cu_seqlens": torch.tensor([0.0, 8.0])}, "cu_seqlens"),
        ({"impl": "cuda"}, "cuda"),
    ],
)
def test_bad_arguments_are_refused_in_words(arguments: dict[str, Any], words: str) -> None:
    q, k, v = inputs(8, (4, 2), (16, 16))
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, **arguments)


def test_heads_that_do_not_divide_are_refused() -> None:
    q, k, v = inputs(8, (4, 3), (16, 16))
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, k, v)


def test_opcheck_passes() -> None:
    q, k, v = inputs(24, (4, 2), (16, 16), torch.float32)
    cu_seqlens = torch.tensor([0, 5, 24], dtype=torch.int32)
    arguments = (q, k, v, cu_seqlens, None, [], True, 0, 0.0, 0.25, "torch")
    torch.library.opcheck(torch.ops.chatmill.attention_forward.default, arguments)


@pytest.mark.parametrize("layout", [None, [0, 9, 40, 41]])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}, {"causal": False, "window": 5}, {"scale": 0.2}])
def test_sdpa_gives_the_same_per_document(layout: list[int] | None, options: dict[str, Any]) -> None:
    q, k, v = inputs(44 if layout else 41, (4, 2), (16, 16))
    cu_seqlens = None if layout is None else torch.tensor(layout, dtype=torch.int32)
    expected, _ = attention_reference(q, k, v, cu_seqlens=cu_seqlens, **options)
    out = attention(q, k, v, cu_seqlens=cu_seqlens, impl="sdpa", **options)
    torch.testing.assert_close(out, expected)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("impl", "arguments", "words"),
    [
        ("sdpa", {"softcap": 2.0}, "SDPA has no soft-cap"),
        ("sdpa", {"return_lse": True}, "gives no log-sum-exp"),
        ("flex", {}, "no backward on CPU"),
        ("hopper", {}, "hopper"),
    ],
)
def test_a_library_that_cannot_do_a_call_says_why(impl: str, arguments: dict[str, Any], words: str) -> None:
    q, k, v = inputs(8, (4, 2), (16, 16))
    with pytest.raises(ValueError, match=words):
        attention(q, k, v, impl=impl, **arguments)


def test_it_compiles_into_one_graph_and_gives_the_same() -> None:
    q, k, v = inputs(48, (4, 2), (16, 16), torch.float32)
    cu_seqlens = torch.tensor([0, 11, 48], dtype=torch.int32)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q * 2, k, v, cu_seqlens=cu_seqlens).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(mine, torch.autograd.grad(loss(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def test_one_compiled_graph_serves_every_number_of_documents() -> None:
    """Once the number varies it is a symbol to Dynamo, on which the choice of the implementation must not depend."""
    q = torch.randn(24, 2, 16)
    compiled = torch.compile(lambda cu: attention(q, q, q, cu_seqlens=cu), fullgraph=True, backend="eager")
    for documents in (3, 5, 6, 4):
        cu = torch.arange(documents + 1, dtype=torch.int32) * (24 // documents)
        assert torch.equal(compiled(cu), attention(q, q, q, cu_seqlens=cu))


def test_a_tile_map_of_the_cache_outlives_it_where_a_graph_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    # with tensors of a GPU: a captured graph reads the tiles whenever it is replayed, another stream's kernels after eviction
    events: list[str] = []
    tiles = SimpleNamespace(data_ptr=lambda: 64, device="cuda:1", record_stream=events.append)
    monkeypatch.setattr(module, "_captured", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module._hold(tiles)
    assert events == ["stream of cuda:1"] and not module._captured
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module._hold(tiles)
    assert module._captured == {64: tiles} and len(events) == 1


def test_determinism_is_torch_s_setting_unless_the_call_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(interface, "_decide", lambda *arguments: asked.append(arguments[-2]) or "torch")
    for setting, given in ((False, None), (True, None), (True, False), (False, True)):
        torch.use_deterministic_algorithms(setting)
        try:
            attention(*inputs(4, (2, 1), (16, 16)), deterministic=given)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [False, True, False, True]
