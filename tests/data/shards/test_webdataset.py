"""Both tiers are ordinary WebDataset tars: read by `webdataset.WebDataset`, and written byte for byte as its writer does."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import webdataset

from chatmill.data.conversation import Conversation, TokenizedDialogue, Turn, dump_line, load_line
from chatmill.data.shards.dialogues import DialogueWriter
from chatmill.data.shards.index import decode_sample, tar_member
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.shards.writer import ShardWriter


def test_a_member_is_the_bytes_that_webdataset_writes() -> None:
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="", mode=0o644) as writer:
        writer.write({"__key__": "abc", "json": b"{}" * 300})
    assert file.getvalue().startswith(tar_member("abc.json", b"{}" * 300))


def test_webdataset_reads_both_tiers(tmp_path: Path) -> None:
    memory = MemoryDataset.random(60, mean=40)
    writer = ShardWriter(tmp_path, "train", vocab_size=65_536, block_dialogues=16)
    for uid, ids, mask in zip(memory.uids, memory.ids, memory.masks, strict=True):
        writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "test", uid)
    (record,) = writer.close()
    shard = str(tmp_path / "train" / record["name"])
    blocks = [decode_sample(sample) for sample in webdataset.WebDataset(shard, shardshuffle=False)]
    assert [uid for block in blocks for uid in block.uids] == memory.uids
    assert np.array_equal(np.concatenate([block.ids for block in blocks]), np.concatenate(memory.ids))
    assert np.array_equal(np.concatenate([block.loss_mask for block in blocks]), np.concatenate(memory.masks))

    texts = DialogueWriter(tmp_path, "train")
    said = [Conversation(f"u{k}", (Turn("user", "hé"), Turn("assistant", f"{k}")), "s", f"o:{k}") for k in range(5)]
    for conversation in said:
        texts.add(conversation.uid, dump_line(conversation).encode())
    (record,) = texts.close()
    tar = str(tmp_path / "dialogues" / record["name"])
    assert [load_line(sample["json"]) for sample in webdataset.WebDataset(tar, shardshuffle=False)] == said
