"""Which dialogue was used when: against the batches that a run really received, from real token shards."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chatmill.config import ConfigError
from chatmill.data.conversation import TokenizedDialogue
from chatmill.data.packing.mixture import Mixture
from chatmill.data.packing.options import StreamOptions
from chatmill.data.packing.schedule import Schedule
from chatmill.data.packing.usage import at, reached_step, table, uses_of, where
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.manifest import MANIFEST
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.shards.writer import ShardWriter
from chatmill.data.stream import PackedBatch, PackedStream

STEPS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PackedBatch]]:
    """A run folder as the trainer writes it, and the batches of its 30 steps of 6 packs."""
    folder = tmp_path_factory.mktemp("usage")
    memory = MemoryDataset.random(150, mean=60, longest=300, seed=4)
    writer = ShardWriter(folder / "corpus", "train", vocab_size=65_536, block_dialogues=16, shard_bytes=20_000)
    for k, (uid, ids, mask) in enumerate(zip(memory.uids, memory.ids, memory.masks, strict=True)):
        writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "chats", f"raw/chats.jsonl:{k + 1}")
    splits = {"train": {"shards": writer.close()}}
    manifest = {"format": 1, "vocab_size": 65_536, "tokenizer_sha256": "a", "template_sha256": "b", "splits": splits}
    (folder / "corpus" / MANIFEST).write_text(json.dumps(manifest))

    settings: dict[str, Any] = {"sequence_length": 128, "overlong": "split", "overlap": 8}
    stream = PackedStream(TokenDataset.open(folder / "corpus", "train"), **settings, micro_batch=3, accumulation=2, seed=5)
    path = folder / "run"
    batches = []
    for batch in islice(stream, 2 * STEPS):
        batches.append(batch)
        step = stream.state_dict()["step"]
        if len(batches) in (20, 40):
            (path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
            (path / f"checkpoints/step-{step:08d}/state.json").write_text(json.dumps({"stream": stream.state_dict()}))
    config = {"data": {"path": str(folder / "corpus"), **settings}, "train": {"seed": 5, "micro_batch": 1, "accumulation": 1}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps({"step": k + 1}) + "\n" for k in range(STEPS)))
    return path, batches


@pytest.mark.parametrize("step", [1, 9, 10, 11, 20, 21, 30])
def test_at_names_the_dialogues_tokens_and_raw_lines_of_a_step(run: tuple[Path, list[PackedBatch]], step: int) -> None:
    path, batches = run
    first, second = batches[2 * step - 2 : 2 * step]
    uses = at(path, step)
    assert tuple(use.uid for use in uses) == first.uids + second.uids
    assert (
        sum(use.tokens for use in uses) == first.step_tokens and sum(use.loss_tokens for use in uses) == first.step_loss_tokens
    )
    assert {use.pack for use in uses} == set(range(6))
    lines = table(uses).splitlines()
    assert len(lines) == len(uses) + 1 and all(
        use.uid in line and use.origin in line for use, line in zip(uses, lines[1:], strict=True)
    )
    assert all(use.origin == f"raw/chats.jsonl:{int(use.uid[1:]) + 1}" and use.source == "chats" for use in uses)


def test_processes_that_divide_a_batch_count_once_before_the_first_checkpoint(
    run: tuple[Path, list[PackedBatch]], tmp_path: Path
) -> None:
    path, _ = run
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"parallel": {"context": 2}, "train": {"seed": 5, "micro_batch": 3, "accumulation": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 4}))  # 2 batches of 3 packs
    assert at(tmp_path, 1) == at(path, 1)


def test_where_names_every_step_and_every_piece_of_a_dialogue(run: tuple[Path, list[PackedBatch]]) -> None:
    path, batches = run
    longest = max(set(batches[0].uids), key=lambda uid: sum(uid == other for batch in batches for other in batch.uids))
    for uid in {longest, batches[0].uids[0], batches[41].uids[-1]}:
        expected = [k // 2 + 1 for k, batch in enumerate(batches) for other in batch.uids if other == uid]
        uses = where(path, uid)
        assert [use.step for use in uses] == expected and all(use.uid == uid for use in uses)


def test_a_dialogue_that_is_not_there_and_a_folder_that_is_no_run_are_named(run: tuple[Path, list[PackedBatch]]) -> None:
    with pytest.raises(ConfigError, match="no dialogue 'nobody'"):
        where(run[0], "nobody")
    with pytest.raises(ConfigError, match="Expected a run folder"):
        at(run[0].parent, 1)
    with pytest.raises(ConfigError, match="count from 1"):
        at(run[0], 0)


def test_an_excluded_dialogue_is_used_before_its_step_only() -> None:
    source = MemoryDataset.random(60, mean=30, longest=100, block=8)
    uid = source.uids[7]

    def steps(**options: Any) -> list[int]:
        schedule = Schedule(Mixture.of(source), StreamOptions(sequence_length=128, global_batch=4, **options))
        return [use.step for use in uses_of(schedule, uid, 60)]

    assert len(steps()) > 8
    assert steps(exclude={20: [uid]}) == [step for step in steps() if step <= 20]


def test_a_step_that_the_run_has_not_reached_is_no_history(run: tuple[Path, list[PackedBatch]]) -> None:
    path, _ = run
    assert reached_step(path) == STEPS
    assert at(path, STEPS + 1)  # a run may have been killed in it: what it was to learn from
    with pytest.raises(ConfigError, match="has reached step 30, so nothing was learned there"):
        at(path, STEPS + 2)
