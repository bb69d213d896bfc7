"""Checkpoints written by many ranks at once: every element once, any part readable alone, nothing half-written ever seen."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from chatmill.run_files import list_checkpoints
from chatmill.trainer.checkpoint import saver as checkpoint_saver
from chatmill.trainer.checkpoint.checkpoint import (
    CheckpointError,
    config_bytes,
    open_checkpoint,
    prune,
    publish,
    set_aside_after,
)
from chatmill.trainer.checkpoint.files import Share, hash_file, merge_parts, write_shares
from chatmill.trainer.checkpoint.random_state import random_state, restore_random_state
from chatmill.trainer.checkpoint.saver import CheckpointSaver, SaveResult, host_buffer
from chatmill.trainer.checkpoint.sharding import share_of, shares_of
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.distributed.world import World

CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1)
ALONE = World(0, 1, 0, 1, torch.device("cpu"), "none")


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "wide": torch.randn(7, 5),
        "tall": torch.randn(64, 3, 2),
        "norm": torch.randn(9),
        "step": torch.tensor(3.0),
        "codes": torch.arange(40, dtype=torch.uint8).reshape(8, 5),
    }


def write_from_ranks(folder: Path, world_size: int, flat: bool = False) -> None:
    """As the writer threads do: every rank its own files; `flat` cuts between elements of a row, as ZeRO does."""
    temporary = folder.with_name(".tmp")
    temporary.mkdir(parents=True)
    (temporary / "config.json").write_text(CONFIG.model_dump_json())
    parts = []
    for rank in range(world_size):
        if flat:
            shares = []
            for name, tensor in tensors().items():
                n = tensor.numel()
                low, high = n * rank // world_size, n * (rank + 1) // world_size
                if low < high:
                    shares.append(Share("model", name, tuple(tensor.shape), low, tensor.flatten()[low:high].clone()))
        else:
            found = (share_of("model", n, t, rank, world_size, split_bytes=64) for n, t in tensors().items())
            shares = [Share(s.group, s.name, s.shape, s.start, s.tensor.contiguous()) for s in found if s is not None]
        parts.append(write_shares(temporary, shares, f"rank{rank:04d}", 100))
    publish(temporary, folder, {"step": 1}, merge_parts(parts))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_what_many_ranks_wrote_reads_back_bit_for_bit_whole_and_in_parts(tmp_path: Path, world_size: int, flat: bool) -> None:
    write_from_ranks(tmp_path / "c", world_size, flat)
    checkpoint = open_checkpoint(tmp_path / "c")
    expected = tensors()
    assert set(checkpoint.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
        n = tensor.numel()
        for low, high in ((0, n), (0, 1), (n // 3, n // 3), (n // 3, 2 * n // 3 + 1), (n - 1, n)):
            assert torch.equal(checkpoint.read(name, low, high), tensor.flatten()[low:high]), (name, low, high)


def test_reading_some_rows_touches_no_other_ranks_file(tmp_path: Path) -> None:
    write_from_ranks(tmp_path / "c", 2)
    checkpoint = open_checkpoint(tmp_path / "c")
    (first, _, cut), (second, _, _) = checkpoint.index["tall"].pieces
    (tmp_path / "c" / second).unlink()
    assert first != second
    assert torch.equal(checkpoint.read("tall", 6, cut), tensors()["tall"].flatten()[6:cut])


def test_a_manifest_with_a_gap_is_never_written() -> None:
    part = {"files": {}, "tensors": {"w": {"group": "model", "dtype": "float32", "shape": [4], "pieces": [["a", 0, 2]]}}}
    with pytest.raises(CheckpointError, match="2 of 4 elements"):
        merge_parts([part])
    other = {"files": {}, "tensors": {"w": {**part["tensors"]["w"], "pieces": [["b", 3, 4]]}}}  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="gap or overlap at element 2"):
        merge_parts([json.loads(json.dumps(part)), other])


def test_each_element_of_a_replicated_tensor_has_exactly_one_writer() -> None:
    for world_size in (1, 2, 3, 5):
        seen = {name: torch.zeros(tensor.numel(), dtype=torch.int) for name, tensor in tensors().items()}
        for rank in range(world_size):
            for share in shares_of((("model", n, t) for n, t in tensors().items()), rank, world_size):
                seen[share.name][share.start : share.stop] += 1
        assert all(bool((count == 1).all()) for count in seen.values())


def files_of(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("damage", ["flip", "tear", "empty"])
def test_damage_in_any_file_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path, damage: str, capfd) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        write_from_ranks(run / "checkpoints" / f"step-{step:08d}", 2)
    newest = run / "checkpoints" / "step-00000002"
    names = files_of(newest)
    assert len(names) > 5
    for name in names:
        original = (newest / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 4
        contents = {"flip": bytes(damaged), "tear": original[:-1], "empty": b""}[damage]
        (newest / name).write_bytes(contents)
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(newest)
        assert open_checkpoint(run).path.name == "step-00000001"
        assert name in capfd.readouterr().err
        (newest / name).write_bytes(original)
    assert open_checkpoint(run).path == newest


def test_every_byte_of_the_manifest_is_covered_by_its_checksum(tmp_path: Path) -> None:
    write_from_ranks(tmp_path / "c", 1)
    file = tmp_path / "c" / "manifest.json"
    original = file.read_bytes()
    for place in range(len(original)):
        damaged = bytearray(original)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="manifest"):
            open_checkpoint(tmp_path / "c", verify=False)
    file.write_bytes(original)
    open_checkpoint(tmp_path / "c")


def test_a_checkpoint_of_the_first_format_still_loads(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIG.model_dump_json())
    held = tensors()
    save_file({k: v for k, v in held.items() if k != "step"}, folder / "model-00001.safetensors")
    save_file({"w.step": held["step"]}, folder / "optimizer-00001.safetensors")
    names = ("config.json", "model-00001.safetensors", "optimizer-00001.safetensors")
    files = {name: {"bytes": (folder / name).stat().st_size, "xxh3": hash_file(folder / name)} for name in names}
    places = {name: "model-00001.safetensors" for name in held if name != "step"} | {"w.step": names[2]}
    manifest = {"format": 1, "meta": {"step": 4}, "files": files, "tensors": places}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.names("optimizer") == ["w.step"]
    assert checkpoint.shape("tall") == (64, 3, 2)
    assert torch.equal(checkpoint.read("tall", 10, 100), held["tall"].flatten()[10:100])
    assert all(torch.equal(checkpoint.tensor(name), held[name]) for name in checkpoint.names())


# ---------------------------------------------------------------- the writer thread


def snapshot(step: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    return {"step": step, "best": None}, {"config.json": config_bytes(CONFIG), "state.json": b"{}"}


def test_training_may_change_the_weights_while_the_copy_is_written(tmp_path: Path, monkeypatch) -> None:
    go_on, real = threading.Event(), checkpoint_saver.write_shares

    def slow_disk(*arguments):
        assert go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(checkpoint_saver, "write_shares", slow_disk)
    done: list[SaveResult] = []
    saver = CheckpointSaver(ALONE, done.append)
    weight = torch.ones(4, 4)
    saver.save(tmp_path / "step-00000001", [Share("model", "w", (4, 4), 0, weight)], *snapshot(1))
    weight.zero_()
    assert not (tmp_path / "step-00000001").exists(), "nothing is published before the files are whole"
    go_on.set()
    assert saver.wait() == ""
    assert torch.equal(open_checkpoint(tmp_path / "step-00000001").tensor("w"), torch.ones(4, 4))
    saver.save(tmp_path / "step-00000002", [Share("model", "w", (4, 4), 0, weight)], *snapshot(2))
    saver.save(tmp_path / "step-00000003", [Share("model", "w", (4, 4), 0, weight + 3)], *snapshot(3))
    assert open_checkpoint(tmp_path / "step-00000002").meta["step"] == 2, "the next save waits for the one before it"
    assert saver.wait() == ""
    assert [result.meta["step"] for result in done] == [1, 2, 3]
    assert torch.equal(open_checkpoint(tmp_path / "step-00000003").tensor("w"), torch.full((4, 4), 3.0))


def test_a_disk_that_refuses_costs_one_checkpoint_and_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    done: list[SaveResult] = []
    saver = CheckpointSaver(ALONE, done.append)
    share = [Share("model", "w", (4,), 0, torch.ones(4))]
    saver.save(tmp_path / "step-00000001", share, *snapshot(1))
    assert saver.wait() == ""
    real = checkpoint_saver.write_shares

    def full(folder: Path, *rest):
        real(folder, *rest)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_saver, "write_shares", full)
    saver.save(tmp_path / "step-00000002", share, *snapshot(2))
    assert "No space left" in saver.wait()
    assert "rank 0" in done[-1].problem
    assert files_of(tmp_path) == ["step-00000001"]
    monkeypatch.setattr(checkpoint_saver, "write_shares", real)
    saver.save(tmp_path / "step-00000003", share, *snapshot(3))
    assert saver.wait() == ""


def test_an_error_of_the_writer_thread_reaches_the_training_thread(tmp_path: Path) -> None:
    def broken(result: SaveResult) -> None:
        raise RuntimeError("a bug in the thread")

    saver = CheckpointSaver(ALONE, broken)
    saver.save(tmp_path / "step-00000001", [Share("model", "w", (4,), 0, torch.ones(4))], *snapshot(1))
    with pytest.raises(RuntimeError, match="a bug in the thread"):
        saver.wait()


def test_pruning_keeps_every_nth_and_setting_aside_protects_the_good_one(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write_from_ranks(tmp_path / "checkpoints" / f"step-{step:08d}", 1)
    prune(tmp_path, keep=1, every_steps=4, protect=frozenset({"step-00000002"}))
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{s:08d}" for s in (2, 4, 8, 10)]
    set_aside_after(tmp_path, 4)  # 8 and 10 are damaged
    write_from_ranks(tmp_path / "checkpoints" / "step-00000006", 1)
    prune(tmp_path, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000006"]
    assert files_of(tmp_path / "checkpoints") == ["step-00000006"]


def test_every_random_generator_goes_on_where_it_was() -> None:
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.standard_normal()
    states = random_state(torch.device("cpu"))

    def draw() -> list[float]:
        return [torch.rand(()).item(), random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.rand()]

    expected = draw()
    draw()
    restore_random_state(states, torch.device("cpu"))
    assert draw() == expected


def test_a_machine_without_page_locked_memory_to_spare_saves_through_ordinary_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, pinned = torch.empty, []

    def refuse(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    on_gpu: Any = SimpleNamespace(shape=(3, 2), dtype=torch.bfloat16, device=torch.device("cuda", 0))
    buffer = host_buffer(on_gpu)
    assert (tuple(buffer.shape), buffer.dtype, pinned) == ((3, 2), torch.bfloat16, [True, False])
    assert host_buffer(torch.zeros(4)).shape == (4,) and pinned[2:] == [False]
