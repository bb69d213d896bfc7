"""Token shards: plain webdataset reads them, and damage is named rather than swallowed."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray

from chatmill.config import ConfigError
from chatmill.data.conversation import TokenizedDialogue
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.index import DamagedShardError, tar_member, walk_members
from chatmill.data.shards.manifest import MANIFEST, fingerprint
from chatmill.data.shards.writer import ShardWriter


def dialogues(n: int, vocab: int = 1000, seed: int = 0) -> list[TokenizedDialogue]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        length = int(rng.integers(2, 40))
        mask = rng.random(length) < 0.5
        mask[0], mask[-1] = False, True
        out.append(TokenizedDialogue(f"d{i:05d}", rng.integers(0, vocab, length).astype(np.uint32), mask))
    return out


def write(folder: Path, items: list[TokenizedDialogue], vocab: int = 1000, block: int = 7, shard_bytes: int = 30_000) -> Path:
    splits = {}
    for split, part in (("train", items), ("validation", items[:3])):
        writer = ShardWriter(folder, split, vocab_size=vocab, block_dialogues=block, shard_bytes=shard_bytes)
        for item in part:
            writer.add(item, "test", f"file:{item.uid}")
        splits[split] = {"shards": writer.close()}
    manifest = {"format": 1, "vocab_size": vocab, "tokenizer_sha256": "a", "template_sha256": "b", "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("vocab", [1000, 65_536, 65_537, 4_000_000_000])
def test_every_dialogue_comes_back_as_it_was_written(tmp_path: Path, vocab: int) -> None:
    items = dialogues(100, vocab)
    dataset = TokenDataset.open(write(tmp_path, items, vocab), "train")
    assert len(dataset.manifest["splits"]["train"]["shards"]) > 1
    position = 0
    for b in range(dataset.n_blocks):
        block = dataset.read_block(b)
        assert block.ids.dtype == (np.uint16 if vocab <= 65_536 else np.uint32)
        for j, uid in enumerate(block.uids):
            span = slice(block.offsets[j], block.offsets[j + 1])
            assert uid == items[position].uid
            np.testing.assert_array_equal(block.ids[span], items[position].ids)
            np.testing.assert_array_equal(block.loss_mask[span], items[position].loss_mask)
            assert block.sources[j] == ("test", f"file:{uid}")
            position += 1
    assert position == 100 == len(dataset)
    assert dataset.lengths.tolist() == [len(d.ids) for d in items]
    assert dataset.loss_tokens.tolist() == [int(d.loss_mask.sum()) for d in items]
    assert dataset.uid(50) == "d00050"


def test_plain_webdataset_reads_every_sample(tmp_path: Path) -> None:
    items = dialogues(100)
    folder = write(tmp_path, items)
    seen: list[NDArray[np.uint16]] = []
    for shard in sorted((folder / "train").glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False).decode():
            lengths, ids = sample["len.npy"], sample["ids.npy"]
            seen += np.split(ids, np.cumsum(lengths)[:-1])
            assert len(np.unpackbits(sample["mask.npy"], count=len(ids))) == len(ids)
    assert len(seen) == 100
    for got, item in zip(seen, items, strict=True):
        np.testing.assert_array_equal(got, item.ids)


def test_the_standard_library_reads_the_tar(tmp_path: Path) -> None:
    folder = write(tmp_path, dialogues(20))
    with tarfile.open(folder / "train" / "train-00000.tar") as tar:
        names = tar.getnames()
    assert names[0] == "__meta__/shard.json"
    assert names[1:6] == ["000000.ids.npy", "000000.len.npy", "000000.mask.npy", "000000.uid.npy", "000000.src.json"]


def test_the_same_dialogues_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, dialogues(60))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_flipped_bit_anywhere_in_a_block_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, dialogues(7))
    shard = folder / "train" / "train-00000.tar"
    clean = shard.read_bytes()
    assert TokenDataset.open(folder, "train").n_blocks == 1
    start = next(s for n, s, _ in walk_members(clean, "x") if n.endswith("ids.npy")) - 512
    for position in range(start, len(clean) - 1024, 97):
        damaged = bytearray(clean)
        damaged[position] ^= 4
        shard.write_bytes(damaged)
        dataset = TokenDataset.open(folder, "train")
        with pytest.raises(DamagedShardError, match="train-00000"):
            dataset.read_block(0)


@pytest.mark.parametrize("cut", [1, 512, 1024, 5000])
def test_a_truncated_shard_is_refused_at_opening(tmp_path: Path, cut: int) -> None:
    folder = write(tmp_path, dialogues(60))
    shard = folder / "train" / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(ConfigError, match=r"train-00000\.tar"):
        TokenDataset.open(folder, "train")


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        TokenDataset.open(tmp_path / "nowhere", "train")
    folder = write(tmp_path / "set", dialogues(60))
    with pytest.raises(ConfigError, match=r"no split 'test'; it has train, validation"):
        TokenDataset.open(folder, "test")
    (folder / "train" / "train-00000.index.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(ConfigError, match="not the index"):
        TokenDataset.open(folder, "train")
    (folder / "train" / "train-00000.index.npz").unlink()
    with pytest.raises(ConfigError, match=r"index\.npz is missing"):
        TokenDataset.open(folder, "train")
    (folder / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="has no manifest"):
        TokenDataset.open(folder, "train")


def test_samples_that_train_nothing_or_the_first_token_are_refused(tmp_path: Path) -> None:
    ids = np.arange(4, dtype=np.uint32)
    for mask, reason in (([0, 0, 0, 0], "no token carries loss"), ([1, 0, 0, 1], "token 0"), ([0, 1, 1], "expected equal")):
        writer = ShardWriter(tmp_path, "train", vocab_size=10)
        writer.add(TokenizedDialogue("x", ids, np.array(mask, dtype=bool)), "s", "o")
        with pytest.raises(ConfigError, match=reason):
            writer.close()
    with pytest.raises(ConfigError, match="vocabulary is 3"):
        ShardWriter(tmp_path, "train", vocab_size=3).add(TokenizedDialogue("x", ids, np.array([0, 0, 0, 1], bool)), "s", "o")


def test_an_unfinished_shard_never_appears_under_its_name(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocab_size=1000, block_dialogues=2)
    for item in dialogues(9):
        writer.add(item, "s", "o")
    assert not list((tmp_path / "train").glob("*.tar"))
    writer.abandon()
    assert not list((tmp_path / "train").iterdir())


def test_members_that_lead_outside_or_are_links_are_refused() -> None:
    for name in ("../../etc/passwd", "/etc/passwd", "a/../../b"):
        with pytest.raises(DamagedShardError, match="outside"):
            list(walk_members(tar_member(name, b"x"), "t"))
    link = tarfile.TarInfo("a.json")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(DamagedShardError, match="not a plain file"):
        list(walk_members(link.tobuf(), "t"))


def test_pickled_arrays_are_refused() -> None:
    from chatmill.data.shards.index import decode_block

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    names = ("ids.npy", "len.npy", "mask.npy", "uid.npy", "src.json")
    with pytest.raises(DamagedShardError, match="unreadable"):
        decode_block(b"".join(tar_member(f"0.{n}", buffer.getvalue()) for n in names), "t")


def test_the_fingerprint_follows_tokens_masks_tokenizer_and_template(tmp_path: Path) -> None:
    items = dialogues(20)
    base = TokenDataset.open(write(tmp_path / "a", items), "train")
    other = list(items)
    mask = other[3].loss_mask.copy()
    mask[1] = not mask[1]
    other[3] = TokenizedDialogue(other[3].uid, other[3].ids, mask)
    prints = {
        base.fingerprint,
        TokenDataset.open(write(tmp_path / "b", other), "train").fingerprint,
        TokenDataset.open(write(tmp_path / "c", items[::-1]), "train").fingerprint,
        fingerprint(base.manifest | {"tokenizer_sha256": "z"}, "train"),
        fingerprint(base.manifest | {"template_sha256": "z"}, "train"),
    }
    assert len(prints) == 5


def test_a_dataset_travels_to_another_process(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write(tmp_path, dialogues(20)), "train")
    dataset.read_block(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read_block(1).uids == dataset.read_block(1).uids
