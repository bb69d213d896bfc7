"""Engines side by side on gloo: optimizers, averages, offload, HSDP, collectives and compilation equal the single process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..ranks import run_in_ranks
from . import engine_worker

ROOT = Path(__file__).resolve().parents[3]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
TORCHAO = importlib.util.find_spec("torchao") is not None


def run_checks(folder: Path, data: Path, processes: int, *checks: str) -> None:
    """Run checks of engine_worker.py in so many processes. Fails with the first traceback."""
    text = run_in_ranks(engine_worker.run, processes, (str(data), checks), folder)
    assert all(f"passed {name}" in text for name in checks), text


def run_interpreted(folder: Path, data: Path, processes: int, *checks: str, timeout_s: float = 600) -> None:
    """The same in new processes: Triton must not be imported before it is told to interpret."""
    hidden = ("MASTER_ADDR", "MASTER_PORT")
    common = {k: v for k, v in os.environ.items() if k not in hidden}
    common |= {"PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    logs = [folder / f"rank-{rank}.log" for rank in range(processes)]
    group = []
    for rank, log in enumerate(logs):
        with log.open("w") as handle:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, engine_worker.__file__, str(folder / "store"), str(data), *checks]
            group.append(subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=common | place))
    deadline = time.monotonic() + timeout_s
    try:
        while any(p.poll() is None for p in group) and not any(p.poll() for p in group) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for process in group:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(group) if process.returncode]
    assert not failed, "\n".join(f"--- rank {rank}\n{logs[rank].read_text()[-6000:]}" for rank in failed)
    text = logs[0].read_text()
    assert all(f"passed {name}" in text for name in checks), text


@pytest.mark.slow
def test_two_processes_equal_one_with_every_optimizer_and_option(tiny_data: Path, tmp_path: Path) -> None:
    checks = [
        "options_of_families_equal_one_process",
        "muon_equals_one_process",
        "reshard_and_offload_equal_one_process",
        "the_average_equals_one_process_and_is_restored_exactly",
        "accumulation_communicates_once",
        "compiled_layers_and_recomputation_equal_one_process",
        "a_missing_gradient_is_refused",
        "a_step_left_out_leaves_no_trace",
        "new_rows_are_the_same_in_every_engine",
    ]
    if TORCHAO:
        checks.append("eight_bit_moments_do_not_depend_on_the_world_size")
    run_checks(tmp_path, tiny_data, 2, *checks)


@pytest.mark.slow
def test_four_processes_in_two_replicas_equal_one(tiny_data: Path, tmp_path: Path) -> None:
    run_checks(tmp_path, tiny_data, 4, "hsdp_equals_one_process")


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed (make .venv/.deepspeed)")
def test_zero_offloads_and_averages_as_one_process_does(tiny_data: Path, tmp_path: Path) -> None:
    run_checks(
        tmp_path,
        tiny_data,
        2,
        "the_average_works_under_zero",
        "a_step_left_out_leaves_no_trace_under_zero",
        "zero_offload_equals_one_process",
        "new_rows_are_the_same_under_zero",
    )


def compiled_async_io() -> Path:
    """Where torch keeps the op that DeepSpeed compiled at its first use."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}_cpu"
    return (Path(root) if root else Path(cpp_extension.get_default_build_root()) / version) / "async_io" / "async_io.so"


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed (make .venv/.deepspeed)")
def test_zero3_trains_from_a_disk_as_one_process_does(tiny_data: Path, tmp_path: Path) -> None:
    if not compiled_async_io().is_file():
        pytest.skip("DeepSpeed's async_io is not compiled here: five minutes on two cores (docs/engines.md says how)")
    run_checks(tmp_path, tiny_data, 2, "nvme_offload_equals_one_process")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_see_gathered_weights(tiny_data: Path, tmp_path: Path) -> None:
    run_interpreted(tmp_path, tiny_data, 2, "triton_kernels_work_on_gathered_weights")


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed (make .venv/.deepspeed)")
def test_muon_under_zero_is_muon_of_one_process(tiny_data: Path, tmp_path: Path) -> None:
    run_checks(tmp_path, tiny_data, 2, "muon_under_zero_equals_one_process", "muon_under_zero_offloads_and_computes_in_bf16")
