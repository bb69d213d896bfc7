"""flash-attn 2, 3 and 4 as stand-ins: which one is taken, what a broken one costs, and rows that a library leaves unwritten."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from chatmill.kernels import dispatch
from chatmill.kernels.attention import attention, attention_reference, flash, interface, libraries

CUDA = torch.device("cuda", 0)
WORKING = """
import torch
calls = []
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                           window_size=(-1, -1), softcap=0.0, deterministic=False):
    from chatmill.kernels.attention import attention_reference
    calls.append({"deterministic": deterministic, "window": window_size, "softcap": softcap, "longest": max_seqlen_q})
    end = int(cu_seqlens_q[-1])
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    out, lse = attention_reference(q[:end], k[:end], v[:end], cu_seqlens=cu_seqlens_q, causal=causal, window=window,
                                   softcap=softcap or None, scale=softmax_scale)
    rest = out.new_full((len(q) - end, *out.shape[1:]), float("nan"))
    return torch.cat([out, rest + 0 * q[end:].mean()]), lse
"""
BROKEN = {
    "a missing dependency": "import quack_kernels_that_nobody_has",
    "an undefined symbol": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')",
    "another failure of a wheel": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "no such function": "x = 1",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path for stand-in packages, seen by a fresh look at a GPU of capability 90."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(flash, "capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(interface, "why_not_triton", lambda *_: None)
    _forget()
    yield tmp_path
    _forget()


def _forget() -> None:
    dispatch._import_problem.cache_clear()
    dispatch._log_once.cache_clear()
    flash._keywords.cache_clear()
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface", "flash_attn_3")]:
        del sys.modules[name]


def install(site: Path, module: str, text: str) -> None:
    folder = site
    *parents, last = module.split(".")
    for parent in parents:
        folder = folder / parent
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{last}.py").write_text(text)
    importlib.invalidate_caches()


def decided(impl: str = "auto", dtype: str = "bfloat16", dim: int = 64, *, softcap: bool = False, exact: bool = False) -> str:
    return interface._decide(impl, "cuda:0", dtype, dim, dim, softcap, False, exact, True)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_flash_attn_that_cannot_be_imported_falls_through_with_one_warning(
    site: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    install(site, "flash_attn_interface", BROKEN[fault])
    with caplog.at_level(logging.WARNING, logger="chatmill.kernels"):
        assert [decided() for _ in range(3)] == ["triton"] * 3
    (warning,) = caplog.records
    assert "flash_attn_interface is installed but cannot be used" in warning.message
    with pytest.raises(ValueError, match="impl='flash3' cannot do this: flash_attn_interface is installed but cannot be used"):
        decided("flash3")


def test_a_flash_attn_that_is_not_installed_is_passed_over_in_silence(site: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="chatmill.kernels"):
        assert decided() == "triton"
    assert not caplog.records
    with pytest.raises(ValueError, match=r"flash-attn-3 is not installed; flash-attn-4 is not installed; flash-attn is not"):
        decided("flash")


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"])
def test_flash_3_is_found_in_both_places_where_its_releases_put_it(site: Path, module: str) -> None:
    install(site, module, WORKING)
    assert decided() == decided("flash") == decided("flash3") == "flash3"


def test_flash_attn_2_carries_a_version_4_that_cannot_be_imported(site: Path) -> None:
    install(site, "flash_attn.cute", "import cutlass_that_is_missing")
    (site / "flash_attn" / "__init__.py").write_text(WORKING)
    assert decided("flash") == decided("flash2") == "flash2"
    with pytest.raises(ValueError, match=r"flash_attn\.cute is installed but cannot be used: ModuleNotFoundError"):
        decided("flash4")


def why(
    name: str, number: int, dim: int = 64, *, dtype: torch.dtype = torch.bfloat16, softcap: bool = False, exact: bool = False
) -> str:
    return str(flash.why_not_flash(name, CUDA, dtype, dim, dim, softcap=softcap, deterministic=exact))


def test_each_version_says_what_it_cannot_do(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn_interface", "flash_attn.cute"):
        install(site, module, WORKING)
    (site / "flash_attn" / "__init__.py").write_text(WORKING)
    number = 90
    monkeypatch.setattr(flash, "capability", lambda device: number)
    fits = "None"
    assert why("flash2", 90) == why("flash3", 90) == why("flash4", 90) == fits
    assert (
        "steps of 8" in why("flash2", 90, 60)
        and "up to 256" in why("flash3", 90, 264)
        and "not torch.float32" in why("flash4", 90, dtype=torch.float32)
    )
    assert why("flash3", 90, 256) == fits and "no deterministic backward" in why("flash3", 90, 256, exact=True)
    number = 80
    assert why("flash2", 80) == fits and "capability 90 to 99" in why("flash3", 80) and "capability 90" in why("flash4", 80)
    number = 100
    assert why("flash4", 100, 128) == why("flash4", 100, 256) == fits and "not 192" in why("flash4", 100, 192)
    assert "no soft-cap for 256" in why("flash4", 100, 256, softcap=True) and "90 to 99" in why("flash3", 100)
    number = 120
    assert "no deterministic" in why("flash4", 120, exact=True) and "soft-cap" in why("flash4", 120, softcap=True)


def inputs(T: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(T, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2))


def test_rows_past_the_last_document_are_zero_and_so_are_their_gradients(site: Path) -> None:
    install(site, "flash_attn_interface", WORKING)
    leaves, bounds = inputs(40), torch.tensor([0, 7, 30], dtype=torch.int32)
    rules = interface.Rules(True, 5, 0.0, 0.25)
    options = {"deterministic": True, "complete": False}
    out = libraries.library_attention("flash3", *leaves, bounds, 23, rules, **options)
    expected, _ = attention_reference(*leaves, cu_seqlens=bounds, window=5, scale=0.25)
    torch.testing.assert_close(out, expected)
    assert not out[30:].any()
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((expected * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
        assert not a[30:].any()
    calls = sys.modules["flash_attn_interface"].calls
    assert calls == [{"deterministic": True, "window": (4, 0), "softcap": 0.0, "longest": 23}]


def test_complete_packs_are_handed_on_as_they_are(site: Path) -> None:
    install(site, "flash_attn_interface", WORKING)
    leaves, bounds = inputs(30), torch.tensor([0, 7, 30], dtype=torch.int32)
    rules = interface.Rules(True, 0, 2.0, 0.25)
    out = libraries.library_attention("flash3", *leaves, bounds, None, rules, deterministic=False, complete=True)
    torch.testing.assert_close(out, attention_reference(*leaves, cu_seqlens=bounds, softcap=2.0, scale=0.25)[0])


def test_sdpa_also_leaves_zeros_past_the_last_document() -> None:
    leaves, bounds = inputs(40), torch.tensor([0, 7, 30], dtype=torch.int32)
    out = attention(*leaves, cu_seqlens=bounds, impl="sdpa")
    torch.testing.assert_close(out, attention_reference(*leaves, cu_seqlens=bounds)[0])
    assert not out[30:].any()


def test_an_old_release_without_an_option_is_refused_by_its_name(site: Path) -> None:
    install(site, "flash_attn_interface", WORKING.replace(", softcap=0.0, deterministic=False", ""))
    with pytest.raises(ValueError, match="the installed flash-attn-3 does not take deterministic, softcap"):
        flash.flash_attention(
            "flash3", *inputs(8), torch.tensor([0, 8]), 8, interface.Rules(True, 0, 2.0, 1.0), deterministic=True
        )
