"""The benchmark's contenders compute one and the same thing, on small shapes on this machine; no time is taken."""

import importlib
import os
import sys

import pytest
import torch

from chatmill.kernels.bench import cross_entropy as bench_cross_entropy
from chatmill.kernels.bench import decode as bench_decode
from chatmill.kernels.bench import harness as bench
from chatmill.kernels.bench import layer as bench_layer

CPU = torch.device("cpu")
HERE = ["triton", "torch chunked", "torch eager"]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself runs them")


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_every_contender_computes_the_same_loss_and_gradients(share: float) -> None:
    results = []
    for name in HERE:
        torch.manual_seed(0)
        phases = bench_cross_entropy._prepare(bench_cross_entropy.CONTENDERS[name], 40, 32, 101, share)(CPU)
        results.append((phases["forward"](), *phases["both"]()))
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-4)


def test_cases_cover_the_vocabularies_and_loss_shares_of_the_targets() -> None:
    names = [case.name for case in bench_cross_entropy.bench_cases() if case.kernel == "linear_cross_entropy"]
    for vocabulary in (32000, 49152, 128256, 256000):
        for share in ("100%", "50%", "20%"):
            assert any(f"V{vocabulary} loss {share}" in name for name in names)
    half = next(c for c in bench_cross_entropy.bench_cases() if c.name == "N8192 H2048 V128256 loss 50% bf16")
    assert half.flops["both"] == 6 * 4096 * 2048 * 128256, "only rows with loss are required work"


def test_contenders_of_the_plain_form_compute_the_same_loss_and_gradient() -> None:
    results = []
    for name in ("triton", "triton in place", "torch chunked", "torch eager"):
        torch.manual_seed(0)
        phases = bench_cross_entropy._prepare_plain(bench_cross_entropy.PLAIN[name], 20, 301)(CPU)
        results.append((phases["forward"](), *phases["both"]()))
    for found in results[1:]:
        for a, b in zip(results[0], found, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-4)


def test_contenders_of_the_decoding_form_compute_the_same_output() -> None:
    outs = []
    for name in ("triton", "torch", "sdpa"):
        torch.manual_seed(0)
        outs.append(bench_decode._prepare(bench_decode.CONTENDERS[name], 2, 70, 4, 2, 32)(CPU)["forward"]())
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kernel", bench.REGISTRY)
def test_every_registered_kernel_has_cases_to_time_and_builds_to_compile(kernel: str) -> None:
    cases, builds = (importlib.import_module(name) for name in bench.REGISTRY[kernel])
    assert any(case.kernel == kernel for case in cases.bench_cases())
    assert hasattr(builds, "shipped_cases")


def test_layer_contenders_run_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    shapes = {"rms_norm": [(9, 64), (64,)], "swiglu": [(9, 64), (9, 64)], "rope": [(9, 4, 16), (9, 2, 16), (16,), (16,)]}
    small = bench_layer._contenders
    seen = []

    def shrunk(runs, given):  # type: ignore[no-untyped-def]
        kernel = "rope" if len(given[0]) == 3 else "rms_norm" if len(given[-1]) == 1 else "swiglu"
        like = shapes[kernel] if kernel != "rms_norm" or len(given) == 2 else [(9, 64), (9, 64), (64,)]
        plain = {n: r for n, r in runs.items() if n in ("triton", "torch")}
        if len(like) > len(given):
            like = like[: len(given)]
        for name, prepare in small(plain, like).items():
            torch.manual_seed(0)
            phases = prepare(CPU)
            seen.append((kernel, name, [g.shape for g in phases["backward"]()]))
        return {}

    monkeypatch.setattr(bench_layer, "_contenders", shrunk)
    assert len(list(bench_layer.bench_cases())) == 13
    assert {(kernel, name) for kernel, name, _ in seen} == {(k, n) for k in shapes for n in ("triton", "torch")}


def test_a_library_that_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    phases = bench_cross_entropy._prepare(bench_cross_entropy.CONTENDERS["liger"], 8, 8, 11, 1.0)(CPU)
    with pytest.raises(ModuleNotFoundError, match="liger_kernel"):
        phases["forward"]()
