"""Damaged blocks: restored from the dialogues, or left out by every rank in the same way, before and after a resume."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.check.verify import quarantine_dataset, verify_dataset
from chatmill.data.conversation import TokenizedDialogue
from chatmill.data.packing.mixture import Mixture
from chatmill.data.packing.options import StreamOptions
from chatmill.data.packing.schedule import Schedule
from chatmill.data.packing.usage import uses_at
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.remote.blocks import RemoteDataset
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.index import DamagedShardError
from chatmill.data.shards.manifest import MANIFEST
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.shards.quarantine import QUARANTINE
from chatmill.data.shards.writer import ShardWriter
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.launcher.__main__ import main

SETTINGS: dict[str, Any] = {"sequence_length": 256, "seed": 5}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """400 short dialogues in 25 blocks over several shards."""
    memory = MemoryDataset.random(400, mean=60, longest=250, seed=4)
    folder = tmp_path / "corpus"
    splits = {}
    for split, count in (("train", 400), ("validation", 32)):
        writer = ShardWriter(folder, split, vocab_size=65_536, block_dialogues=16, shard_bytes=30_000)
        for uid, ids, mask in list(zip(memory.uids, memory.ids, memory.masks, strict=True))[:count]:
            writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "chats", f"raw.jsonl:{uid}")
        records = writer.close()
        splits[split] = {"shards": records, "dialogues": count}
    manifest = {"format": 1, "vocab_size": 65_536, "tokenizer_sha256": "a", "template_sha256": "b", "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def place(dataset: TokenDataset, block: int) -> tuple[Path, int, int]:
    """File, first byte and size of a block."""
    return dataset._shards[dataset._block_shard[block]], int(dataset._offset[block]), int(dataset._size[block])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def damage(folder: Path, *blocks: int) -> set[str]:
    """Flip a bit in the middle of each block; returns the uids of their dialogues."""
    dataset = TokenDataset.open(folder, "train")
    uids = {uid for block in blocks for uid in dataset.read_block(block).uids}
    for block in blocks:
        path, first, size = place(dataset, block)
        flip(path, first + size // 2)
    dataset.close()
    return uids


def digest(batches: list[PackedBatch]) -> list[tuple[Any, ...]]:
    return [(b.tokens.numpy().tobytes(), b.targets.numpy().tobytes(), b.uids, b.step_loss_tokens) for b in batches]


def test_damage_met_while_training_stops_with_its_name_and_the_command(corpus: Path) -> None:
    damage(corpus, 7)
    with pytest.raises(DamagedShardError, match=r"train-0000\d\.tar, block 7: bytes differ.*\n.*--repair\n.*--quarantine"):
        list(PackedStream(TokenDataset.open(corpus, "train"), **SETTINGS, epochs=1))


def test_a_quarantine_needs_consent_and_the_refusal_says_what_it_holds(corpus: Path) -> None:
    damage(corpus, 7, 9)
    assert len(quarantine_dataset(corpus, 0.1)) == 2
    with pytest.raises(ConfigError, match=r"2 of \d+ blocks of train .* a share of 0 is allowed.*\n.*data\.damaged_blocks="):
        TokenDataset.open(corpus, "train")
    with pytest.raises(ConfigError, match=r"a share of 0\.01 is allowed"):
        TokenDataset.open(corpus, "train", damaged_blocks=0.01)
    assert TokenDataset.open(corpus, "train", damaged_blocks=0.1).quarantined == {7, 9}
    assert not TokenDataset.open(corpus, "validation").quarantined


def test_more_damage_than_the_budget_writes_no_quarantine(corpus: Path) -> None:
    damage(corpus, 1, 7, 9)
    with pytest.raises(ConfigError, match=r"train: 3 of \d+ blocks .* are damaged, the budget is 5\.000%"):
        quarantine_dataset(corpus, 0.05)
    assert not (corpus / QUARANTINE).exists()


@pytest.mark.parametrize("how", ["flipped", "truncated", "shard gone"])
def test_one_epoch_holds_every_dialogue_but_those_in_quarantine(corpus: Path, how: str) -> None:
    whole = TokenDataset.open(corpus, "train")
    everybody = [whole.uid(i) for i in range(len(whole))]
    path, first, size = place(whole, 8)
    lost = {8} if how == "flipped" else {b for b in range(whole.n_blocks) if place(whole, b)[0] == path}
    if how == "flipped":
        flip(path, first + size // 2)
    elif how == "truncated":
        lost = {b for b in lost if sum(place(whole, b)[1:]) > first + 700}
        os.truncate(path, first + 700)
    else:
        path.unlink()
    gone = {uid for b in lost for uid in everybody[whole.block_starts[b] : whole.block_starts[b + 1]]}
    whole.close()
    quarantine_dataset(corpus, 0.5)
    dataset = TokenDataset.open(corpus, "train", damaged_blocks=0.5)
    assert dataset.quarantined == lost
    seen = [uid for batch in PackedStream(dataset, **SETTINGS, epochs=1) for uid in batch.uids]
    assert sorted(seen) == sorted(set(everybody) - gone)
    with pytest.raises(DamagedShardError, match="in the quarantine"):
        dataset.read_block(8)


def test_every_division_of_the_work_skips_the_same(corpus: Path) -> None:
    damage(corpus, 3, 11)
    quarantine_dataset(corpus, 0.2)

    def packs(world: int, micro: int) -> list[tuple[bytes, ...]]:
        """The packs of 12 global steps in order."""
        out: list[list[bytes]] = [[] for _ in range(12)]
        for rank in range(world):
            data = TokenDataset.open(corpus, "train", damaged_blocks=0.2)
            stream = PackedStream(data, **SETTINGS, micro_batch=micro, rank=rank, world_size=world)
            for step, batch in enumerate(islice(stream, 12)):
                out[step] += [row.tobytes() for row in batch.tokens.numpy().reshape(micro, -1)]
        return [tuple(step) for step in out]

    assert packs(1, 4) == packs(2, 2) == packs(4, 1)


def test_a_run_that_meets_a_quarantine_continues_without_repeating_or_changing_its_past(corpus: Path) -> None:
    clean = PackedStream(TokenDataset.open(corpus, "train"), **SETTINGS, micro_batch=2, epochs=1)
    before = list(islice(clean, 10))
    state = json.loads(json.dumps(clean.state_dict()))
    gone = damage(corpus, 5, 12, 20)
    quarantine_dataset(corpus, 0.2)

    def resume(world: int = 1, saved: dict[str, Any] = state) -> list[PackedStream]:
        streams = []
        for rank in range(world):
            data = TokenDataset.open(corpus, "train", damaged_blocks=0.2)
            stream = PackedStream(data, **SETTINGS, micro_batch=2 // world, epochs=1, rank=rank, world_size=world, prefetch=0)
            stream.load_state_dict(saved)
            streams.append(stream)
        return streams

    after = list(resume()[0])
    used, later = [u for b in before for u in b.uids], [u for b in after for u in b.uids]
    everybody = {
        u for b in PackedStream(MemoryDataset.random(400, mean=60, longest=250, seed=4), **SETTINGS, epochs=1) for u in b.uids
    }
    assert sorted(used + later) == sorted(everybody - (gone - set(used)))
    assert not gone & set(later) and gone & set(used)  # some were used before they were damaged
    # Stopped and continued again, and by two ranks, it is the same.
    second = resume()[0]
    head = list(islice(second, 4))
    again = json.loads(json.dumps(second.state_dict()))
    assert again["sources"]["data"]["quarantine"] == [[10, [5, 12, 20]]]
    assert digest(head + list(resume(saved=again)[0])) == digest(after)
    left, right = resume(2)
    for one, two, both in zip(left, right, after, strict=True):
        assert one.uids + two.uids == both.uids and one.step_loss_tokens == both.step_loss_tokens
    # The past can still be planned: what a step before the damage used is known but for the names that were lost.
    schedule = Schedule(
        Mixture.of(TokenDataset.open(corpus, "train", damaged_blocks=1)), StreamOptions(**SETTINGS, global_batch=2, epochs=1)
    )
    schedule.position(again)
    for step in range(1, 15):
        batch = (before + after)[step - 1]
        named = [use.uid for use in uses_at(schedule, step)]
        assert named == ["?" if uid in gone else uid for uid in batch.uids]


def test_a_block_that_is_whole_again_stays_out_of_a_run_that_left_it_out(corpus: Path) -> None:
    whole = corpus.with_name("whole")
    shutil.copytree(corpus, whole)
    damage(corpus, 5, 12)
    quarantine_dataset(corpus, 0.2)
    stream = PackedStream(TokenDataset.open(corpus, "train", damaged_blocks=0.2), **SETTINGS, epochs=1)
    head, state = list(islice(stream, 9)), stream.state_dict()
    rest = list(stream)
    restored = PackedStream(TokenDataset.open(whole, "train"), **SETTINGS, epochs=1)
    restored.load_state_dict(state)
    assert digest(list(restored)) == digest(rest)
    assert len(head) == 9


def test_a_quarantine_that_was_edited_or_is_another_data_set_s_is_refused(corpus: Path) -> None:
    damage(corpus, 7)
    quarantine_dataset(corpus, 0.1)
    listed = (corpus / QUARANTINE).read_text()
    forged = json.loads(listed)
    forged["splits"]["train"]["blocks"][0]["block"] += 1
    (corpus / QUARANTINE).write_text(json.dumps(forged))
    with pytest.raises(DamagedShardError, match="sha256 is not that of its content"):
        TokenDataset.open(corpus, "train", damaged_blocks=0.5)
    (corpus / QUARANTINE).write_text(listed)
    manifest = json.loads((corpus / MANIFEST).read_text())
    (corpus / MANIFEST).write_text(json.dumps(manifest | {"template_sha256": "other"}))
    with pytest.raises(DamagedShardError, match="belongs to another build"):
        TokenDataset.open(corpus, "train", damaged_blocks=0.5)


def test_a_remote_reader_honours_the_same_list(corpus: Path, tmp_path: Path) -> None:
    damage(corpus, 3)
    quarantine_dataset(corpus, 0.1)
    with pytest.raises(ConfigError, match="a share of 0 is allowed"):
        RemoteDataset.open(f"file://{corpus}", "train", cache=tmp_path / "cache")
    remote = RemoteDataset.open(f"file://{corpus}", "train", cache=tmp_path / "cache", damaged_blocks=0.1)
    local = TokenDataset.open(corpus, "train", damaged_blocks=0.1)
    assert remote.identity == local.identity != TokenDataset.open(corpus, "validation").identity
    assert digest(list(PackedStream(remote, **SETTINGS, epochs=1))) == digest(list(PackedStream(local, **SETTINGS, epochs=1)))
    remote.close()


# ---------------------------------------------------------------- the command


def small_recipe(folder: Path) -> DataRecipe:
    recipe = {
        "name": "small",
        "sources": [{"path": str(folder / "raw.jsonl")}],
        "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2},
        "shards": {"block_dialogues": 16, "shard_mb": 0.03},
        "workers": 1,
    }
    return DataRecipe.model_validate(recipe)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set built from raw chats, in several shards."""
    folder = tmp_path_factory.mktemp("built")
    rng = np.random.default_rng(0)
    words = "tea rain bus song moon cake road film cat book sea train star game milk tree snow lamp chair bread".split()  # noqa: SIM905
    with (folder / "raw.jsonl").open("w") as file:
        for i in range(300):
            said = [" ".join(rng.choice(words, 6)) + f" {i}" for _ in range(2 * int(rng.integers(1, 4)))]
            messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
            file.write(json.dumps({"messages": messages}) + "\n")
    build_dataset(small_recipe(folder), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_verify_repairs_token_shards_bit_for_bit(built: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted((copy / "train").glob("*.tar"))
    assert len(shards) >= 4
    flip(shards[0], 5000)
    os.truncate(shards[2], 4000)
    shards[3].unlink()
    flip(next((copy / "validation").glob("*.npz")), 300)
    assert main(["data", "verify", str(copy)]) == 1
    assert main(["data", "verify", str(copy), "--repair"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("restored from the dialogue shards, sha256 as in the manifest") == 4
    for file in built.rglob("*"):
        if file.is_file():
            assert (copy / file.relative_to(built)).read_bytes() == file.read_bytes(), file
    assert {p.relative_to(copy) for p in copy.rglob("*")} == {p.relative_to(built) for p in built.rglob("*")}


def test_what_cannot_be_repaired_is_quarantined_and_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(sorted((copy / "train").glob("*.tar"))[1], 3000)
    os.truncate(copy / "dialogues" / "train-00000.tar", 5120)
    assert main(["data", "verify", str(copy), "--repair", "--quarantine", "0.2"]) == 1
    printed = capsys.readouterr().out
    assert "the dialogue shards are damaged too" in printed and "not restored" in printed
    assert "train/train-00001.tar, block" in printed and "in quarantine, 16 dialogues" in printed
    assert "dialogues/train-00000.tar: sha256 is not the manifest's" in printed  # the other tier is still damaged
    assert "train/train-00001.tar: sha256" not in printed
    assert len(TokenDataset.open(copy, "train", damaged_blocks=0.2).quarantined) == 1


def test_a_damaged_dialogue_shard_is_named_with_the_way_to_have_it_back(
    built: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "dialogues/validation-00000.tar"
    flip(copy / name, 5000)
    assert main(["data", "verify", str(copy), "--repair"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("nothing in this folder holds its texts") == 1 and f"copy {name} from there" in printed
    again = tmp_path / "again"
    build_dataset(small_recipe(built.parent), again)  # as the line says: the same raw files, another folder
    shutil.copy(again / name, copy / name)
    assert main(["data", "verify", str(copy), "--repair"]) == 0
    assert "holds its texts" not in capsys.readouterr().out


def test_a_data_set_whose_damage_is_all_in_quarantine_verifies(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted((copy / "train").glob("*.tar"))
    flip(shards[1], 3000)
    shards[2].unlink()
    assert main(["data", "verify", str(copy), "--quarantine", "0.5"]) == 0
    assert "in quarantine" in capsys.readouterr().out
    assert main(["data", "verify", str(copy)]) == 0
    assert main(["data", "inspect", str(copy), "--samples", "9"]) == 0
    assert "in quarantine" in capsys.readouterr().out
    flip(shards[0], 3000)  # fresh damage is not covered by the old list
    assert main(["data", "verify", str(copy)]) == 1
    assert verify_dataset(copy) == ["train/train-00000.tar: sha256 is not the manifest's",
                                    "train/train-00000.tar, block 0: xxh3 is not the index's"]  # fmt: skip
    assert main(["data", "verify", str(copy), "--repair"]) == 0
    assert not (copy / QUARANTINE).exists()
