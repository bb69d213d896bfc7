"""Checkpoints: whole or absent, every damage named, the newest good one taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from chatmill.run_files import list_checkpoints
from chatmill.trainer.checkpoint.checkpoint import CheckpointError, CheckpointWriter, open_checkpoint, prune
from chatmill.trainer.config import ModelConfig

CONFIG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, layers=1, heads=2, kv_heads=1)


def write(folder: Path, seed: int = 0, shard_bytes: int = 2 << 30) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    with CheckpointWriter(folder, CONFIG, {"step": seed}, shard_bytes) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter)
        writer.add_file("tokenizer.json", b"{}")
    return model


def test_a_checkpoint_loads_back_bit_for_bit_whatever_the_shard_size(tmp_path: Path) -> None:
    for shard_bytes in (1, 100, 2 << 30):
        model = write(tmp_path / "c", shard_bytes=shard_bytes)
        checkpoint = open_checkpoint(tmp_path / "c")
        other = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
        checkpoint.load_into(other)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
        assert checkpoint.config == CONFIG
        assert "tokenizer.json" in checkpoint.files()


def test_an_error_while_writing_leaves_nothing_and_keeps_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "c", seed=1)
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "c", CONFIG, {"step": 2}) as writer:
        writer.add("0.weight", torch.zeros(4))
        raise RuntimeError("disk full")
    assert open_checkpoint(tmp_path / "c").meta["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_and_the_older_good_checkpoint_is_taken(tmp_path: Path, damage: str, capfd) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        write(run / "checkpoints" / f"step-{step:08d}", seed=step)
    victim = run / "checkpoints" / "step-00000002" / "model-00001.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-10])
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match="model-00001"):
        open_checkpoint(victim.parent)
    assert open_checkpoint(run).meta["step"] == 1
    assert "model-00001" in capfd.readouterr().err


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "run" / "checkpoints" / "step-00000001")
    (tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    assert list_checkpoints(tmp_path / "run") == []
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        open_checkpoint(tmp_path / "run")


def test_a_model_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "c")
    checkpoint = open_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"0\.weight has shape \(32, 16\)"):
        checkpoint.load_into(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)))
    with pytest.raises(CheckpointError, match=r"missing: 2\.bias"):
        checkpoint.load_into(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 8)))


def test_pruning_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path / "checkpoints" / f"step-{step:08d}")
    prune(tmp_path, keep=2, protect=frozenset({"step-00000001"}))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="other than a checkpoint"):
        write(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    write(tmp_path / "c")
    modes = {p.stat().st_mode & 0o777 for p in (tmp_path / "c").iterdir()}
    assert len(modes) == 1
