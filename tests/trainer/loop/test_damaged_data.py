"""A run over damaged data stops with the block's name; with a quarantine and consent it goes on without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.data.packing.mixture import Mixture
from chatmill.data.shards.dataset import TokenDataset
from chatmill.launcher.__main__ import main as chatmill
from chatmill.run_files import read_jsonl
from chatmill.trainer.loop.starting import check_same_data
from chatmill.trainer.train import main


def test_damage_stops_a_run_and_a_quarantine_with_consent_lets_it_go_on(
    write_recipe, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    dataset = TokenDataset.open(data, "train")
    assert dataset.n_blocks == 2
    shard, middle = dataset._shards[0], int(dataset._offset[1]) + int(dataset._size[1]) // 2
    damaged = bytearray(shard.read_bytes())
    damaged[middle] ^= 1
    shard.write_bytes(damaged)
    recipe = str(write_recipe("damaged", data={"path": str(data)}, train={"steps": 4}))
    assert main([recipe]) == 2
    assert "block 1: bytes differ from those written" in capsys.readouterr().err
    assert chatmill(["data", "verify", str(data), "--quarantine", "0.5"]) == 0
    assert main([recipe]) == 2
    assert "a share of 0 is allowed" in capsys.readouterr().err
    assert main([recipe, "data.damaged_blocks=0.5"]) == 0
    run = tmp_path / "runs" / "damaged"
    (event,) = [line for line in read_jsonl(run / "events.jsonl") if line["event"] == "quarantine"]
    assert "train/train-00000.tar, block 1: in quarantine" in event["block"]
    assert len([line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]) == 4


def test_ranks_whose_copies_differ_do_not_train(tiny_data: Path) -> None:
    dataset = TokenDataset.open(tiny_data, "train")
    mine, other = Mixture.of(dataset), Mixture.of(TokenDataset.open(tiny_data, "train"))
    next(iter(other.sources.values())).quarantined = frozenset({1})  # type: ignore[misc]

    class TwoRanks:
        world_size = 2

        def __init__(self, second: Mixture) -> None:
            self.second = second

        def sum(self, values: list[float]) -> list[float]:
            return [values[0] + float(int(self.second.identity[:10], 16))]

    check_same_data(mine, TwoRanks(mine))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the ranks read different data or quarantines"):
        check_same_data(mine, TwoRanks(other))  # type: ignore[arg-type]
