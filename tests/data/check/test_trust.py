"""What is planted is caught: leaks, private data, damage, strangers' names; each through `chatmill data verify` itself."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset

from chatmill.config import ConfigError
from chatmill.data.check.verify import _private
from chatmill.data.cleaning.privacy import _SURROGATES, Privacy
from chatmill.data.conversation import Conversation, Turn, dump_line, load_line
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe, PrivacySection
from chatmill.data.remote.blocks import RemoteDataset
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.dialogues import DialogueWriter, read_dialogues
from chatmill.data.shards.index import TAR_END, DamagedShardError, ShardIndex, block_hash, tar_member, walk_members
from chatmill.data.shards.manifest import MANIFEST, read_manifest
from chatmill.data.shards.writer import ShardWriter
from chatmill.data.tokenizer.tokenizer import ChatTokenizer
from chatmill.launcher.__main__ import main

WORDS = "tea rain bus song moon cake road film cat book sea train star game milk tree snow lamp chair bread".split()  # noqa: SIM905
SECRETS = "mail jane.doe@corp.example or ring +44 20 7946 0958, card 4012 8888 8888 1881, from 203.0.113.77"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose recipe replaces private data and looks for near duplicates, in several shards per tier."""
    folder = tmp_path_factory.mktemp("trust")
    rng = np.random.default_rng(0)
    with (folder / "raw.jsonl").open("w") as file:
        for i in range(120):
            said = [" ".join(rng.choice(WORDS, 8)) + f" {i}" for _ in range(2 * int(rng.integers(1, 4)))]
            if i % 7 == 0:
                said[0] += " " + SECRETS
            messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]
            file.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "name": "small",
        "sources": [{"path": str(folder / "raw.jsonl")}],
        "clean": {"privacy": {"mode": "surrogate"}},
        "dedup": {"near": {"threshold": 0.8}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2},
        "shards": {"block_dialogues": 8, "shard_mb": 0.015},
        "workers": 1,
    }
    build_dataset(DataRecipe.model_validate(recipe), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output of the command."""
    capsys.readouterr()
    code = main(["data", "verify", str(folder)])
    return code, capsys.readouterr().out


def rewrite(folder: Path, split: str, change: Callable[[list[Conversation]], list[Conversation]]) -> None:
    """Change the dialogues of a split and make tokens, shards and every hash anew: only what the texts say is wrong now."""
    manifest = read_manifest(folder)
    conversations = change(list(read_dialogues(folder, manifest["dialogues"][split])))
    for file in [*(folder / "dialogues").glob(f"{split}-*"), *(folder / split).iterdir()]:
        file.unlink()
    sizes = manifest["recipe"]["shards"]
    meta = {name: manifest[name] for name in ("tokenizer_sha256", "template_sha256", "recipe_sha256", "vocab_size")}
    size = int(sizes["shard_mb"] * (1 << 20))
    tokens = ShardWriter(folder, split, vocab_size=manifest["vocab_size"], meta=meta, block_dialogues=8, shard_bytes=size)
    texts, tokenizer = DialogueWriter(folder, split, size), ChatTokenizer.load(folder / "tokenizer")
    for conversation in conversations:
        tokens.add(tokenizer.encode_dialogue(conversation), conversation.source, conversation.origin)
        texts.add(conversation.uid, dump_line(conversation).encode())
    records = tokens.close()
    keys = ("dialogues", "tokens", "loss_tokens", "blocks")
    manifest["splits"][split] = {"shards": records} | {key: sum(record[key] for record in records) for key in keys}
    manifest["dialogues"][split] = texts.close()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def reseal(folder: Path, name: str) -> None:
    """Give a file's present size and sha256 to the manifest, as a forger would."""
    manifest, raw = read_manifest(folder), (folder / name).read_bytes()
    records = [(split, r) for split, part in manifest["splits"].items() for r in part["shards"]]
    records += [("dialogues", r) for part in manifest["dialogues"].values() for r in part]
    for place, record in records:
        if f"{place}/{record['name']}" == name:
            record["bytes"], record["sha256"] = len(raw), sha256(raw).hexdigest()
            if "index" in record:
                record["index_sha256"] = sha256((folder / place / record["index"]).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_the_data_set_of_these_tests_verifies_and_so_does_one_written_again(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(copy, capsys) == (0, f"{copy}: files whole, masks and split proven\n")
    rewrite(copy, "train", lambda found: found)
    assert verify(copy, capsys)[0] == 0
    assert "+1-202-555-01" in (copy / "dialogues/train-00000.tar").read_bytes().decode("utf-8", "replace")


def with_text(conversation: Conversation, k: int, text: str, uid: str = "", thread: str = "") -> Conversation:
    """The conversation with another text in turn k, perhaps under another name."""
    turns = list(conversation.turns)
    turns[k] = Turn(turns[k].role, text)
    meta = {**conversation.meta, "thread": thread or conversation.meta["thread"]}
    return Conversation(uid or conversation.uid, tuple(turns), conversation.source, conversation.origin, meta)


LEAKS: dict[str, tuple[Callable[[Conversation], Conversation], str]] = {
    "the dialogue itself": (lambda c: c, r"share .*\d+ samples.*exact texts"),
    "its text under another name": (
        lambda c: Conversation("f" * 32, c.turns, c.source, c.origin, {"thread": "other"}),
        r"share 1 exact texts, 1 near duplicates",
    ),
    "nearly its text": (
        lambda c: with_text(c, 0, c.turns[0].content + " indeed", "e" * 32, "other"), r"share 1 near duplicates"
    ),
    "another piece of its conversation": (
        lambda c: Conversation("d" * 32, (Turn("user", "and the boat"), Turn("assistant", "sunk")), c.source, c.origin, c.meta),
        r"share 1 conversations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_a_planted_leak_is_caught(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    leak, expected = LEAKS[name]
    held_out = max(
        read_dialogues(copy, read_manifest(copy)["dialogues"]["validation"]), key=lambda c: sum(len(t.content) for t in c.turns)
    )
    rewrite(copy, "train", lambda found: [*found[:50], leak(held_out), *found[50:]])
    code, printed = verify(copy, capsys)
    assert code == 1 and re.search(f"split: train and validation {expected}", printed), printed
    assert printed.count("\n") == 2  # the leak and the sum: everything else was made to fit


PRIVATE = {
    "email": "write to jane.doe@corp.example please",
    "phone": "ring +44 20 7946 0958 tonight",
    "ip": "the server is 203.0.113.77 now",
    "card": "my card is 4012 8888 8888 1881 as ever",
    "iban": "send it to DE89 3704 0044 0532 0130 00 then",
    "credentials": "clone https://bob:hunter2secret@git.example.com/x.git",
    "key": "use sk-abcdefghijklmnopqrstuvwxyz123456 for it",
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_planted_private_data_is_caught_and_not_quoted(copy: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, "train", lambda found: [with_text(found[0], 1, PRIVATE[kind]), *found[1:]])
    code, printed = verify(copy, capsys)
    assert code == 1 and re.search(rf"train, dialogue 0 \(.*raw\.jsonl:\d+\): private data .* removed: {kind}\n", printed), (
        printed
    )
    printed = re.sub(r"[0-9a-f]{32}", "", printed)  # a uid may hold the digits of a number
    assert not any(word in printed for word in PRIVATE[kind].split() if any(c.isdigit() or c == "@" for c in word))


def test_stand_ins_are_nobody_s_and_their_neighbours_somebody_s() -> None:
    privacy = Privacy(PrivacySection(mode="surrogate"))
    for kind, make in _SURROGATES.items():
        assert not privacy.leftovers(f"say {make(1)} and {make(250)}"), kind
    found = privacy.leftovers("person1@example.org, person1@example.com, 192.0.2.7, 192.0.3.7")
    assert [finding.kind for finding in found] == ["email", "ip"]


def test_what_a_replacement_uncovers_is_replaced_too() -> None:
    privacy = Privacy(PrivacySection(mode="surrogate"))
    text = "5555555555554444 020 7946 0958 0999 10.1.1.300.4.4.4.4 DE89370400440532013000 4012888888881881-1234"
    cleaned = privacy.apply([Turn("user", text)], lambda kind: None)
    assert not privacy.leftovers(cleaned[0].content)


def test_private_data_in_a_thought_beside_a_reply_is_found() -> None:
    privacy = Privacy(PrivacySection(mode="redact"))
    turns = (Turn("user", "hi"), Turn("assistant", "hello", reasoning="ask ann@example.org"))
    (found,) = _private("train", Conversation("u", turns, "s", "o"), privacy, 0)
    assert found.endswith("removed: email") and "ann" not in found


# ---------------------------------------------------------------- damaged and hostile files


def traverse(folder: Path) -> None:
    shard = folder / "dialogues/train-00000.tar"
    data = shard.read_bytes()
    line = data[512:].split(b"\0")[0]
    shard.write_bytes(tar_member("../../.ssh/authorized_keys", line) + data[512 + -(-len(line) // 512) * 512 :])
    reseal(folder, "dialogues/train-00000.tar")


def pickled(folder: Path) -> None:
    """An array of objects in the place of the first block's uids, with the block's and every other hash made to fit."""
    shard, index_file = folder / "train/train-00000.tar", folder / "train/train-00000.index.npz"
    data, buffer = shard.read_bytes(), io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    start, size = next((s, n) for name, s, n in walk_members(data, "x") if name == "000000.uid.npy")
    fresh = tar_member("000000.uid.npy", buffer.getvalue())
    forged = data[: start - 512] + fresh + data[start + size + -size % 512 :]
    index = ShardIndex.from_bytes(index_file.read_bytes(), "x")
    moved = len(forged) - len(data)
    sizes, offsets, hashes = index.size.copy(), index.offset.copy(), index.xxh3.copy()
    sizes[0] += moved
    offsets[1:] += moved
    hashes[0] = block_hash(forged[offsets[0] : offsets[0] + sizes[0]])
    shard.write_bytes(forged)
    index_file.write_bytes(replace(index, size=sizes, offset=offsets, xxh3=hashes).to_bytes())
    reseal(folder, "train/train-00000.tar")


def swapped(folder: Path) -> None:
    a, b, c = (folder / "train" / name for name in ("train-00000.tar", "train-00001.tar", "x"))
    for old, new in ((a, c), (b, a), (c, b)):
        old.rename(new)


def rename_in_manifest(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["splits"]["train"]["shards"][0]["name"] = name
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


def flip(name: str, position: int) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return change


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped tokens": (flip("train/train-00001.tar", 4000), r"train/train-00001\.tar: sha256"),
    "flipped text": (flip("dialogues/train-00001.tar", 700), r"dialogues/train-00001\.tar: sha256"),
    "truncated tokens": (lambda f: os.truncate(f / "train/train-00001.tar", 9000), r"train/train-00001\.tar: .*cut short"),
    "truncated at a header": (lambda f: os.truncate(f / "train/train-00001.tar", 512), r"train-00001\.tar: .*cut short"),
    "truncated texts": (lambda f: os.truncate(f / "dialogues/train-00001.tar", 5120), r"train-00001\.tar: the end marker"),
    "renamed": (lambda f: (f / "train/train-00001.tar").rename(f / "train/x.tar"), r"train/train-00001\.tar: missing"),
    "swapped": (swapped, r"train/train-00000\.tar: sha256"),
    "path traversal": (traverse, r"member '\.\./\.\./\.ssh/authorized_keys' leads outside its folder"),
    "pickled array": (pickled, r"train/train-00000\.tar, block 0: unreadable block \(Object arrays"),
    "pipe in the manifest": (rename_in_manifest("pipe:touch /tmp/owned"), r"names a file outside the folder: 'pipe:touch"),
    "path in the manifest": (rename_in_manifest("../../x.tar"), r"names a file outside the folder: '\.\./\.\./x\.tar'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_file_is_caught(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = HOSTILE[name]
    change(copy)
    code, printed = verify(copy, capsys)
    assert code == 1 and re.search(expected, printed), printed
    assert printed.count("\n") <= 5, printed  # the cause, not a line for each of its consequences


@pytest.mark.parametrize("name", ["pipe:touch owned", "/etc/passwd", "../train-00000.tar", "s3://x/y.tar", ".hidden.tar", ""])
def test_no_reader_opens_what_a_manifest_should_not_name(copy: Path, tmp_path: Path, name: str) -> None:
    rename_in_manifest(name)(copy)
    with pytest.raises(DamagedShardError, match="names a file outside the folder"):
        TokenDataset.open(copy, "train")
    with pytest.raises(DamagedShardError, match="names a file outside the folder"):
        RemoteDataset.open(f"file://{copy}", "train", cache=tmp_path / "cache")


@pytest.mark.parametrize("path", ["pipe:touch owned", "pipe://touch owned"])
def test_a_pipe_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        TokenDataset.open(path, "train")
    with pytest.raises(ConfigError):
        RemoteDataset.open(path, "train", cache=tmp_path / "cache", attempts=1)
    assert not (tmp_path / "owned").exists()


def test_plain_webdataset_loses_half_a_shard_without_a_word_and_we_do_not(copy: Path) -> None:
    shard = copy / "dialogues/train-00000.tar"
    record = read_manifest(copy)["dialogues"]["train"][0]
    with tarfile.open(shard) as tar:
        half = tar.getmembers()[record["samples"] // 2].offset
    cut = shard.read_bytes()[:half]
    flipped = bytearray(shard.read_bytes())
    flipped[half + 150] ^= 8  # in the checksum of that header
    for data in (cut, bytes(flipped)):
        shard.write_bytes(data)
        seen = list(webdataset.WebDataset(str(shard), shardshuffle=False))
        assert len(seen) == record["samples"] // 2
        with pytest.raises(DamagedShardError, match=r"dialogues/train-00000\.tar"):
            list(read_dialogues(copy, [record]))
    tokens = copy / "train/train-00000.tar"
    blocks = TokenDataset.open(copy, "train").manifest["splits"]["train"]["shards"][0]["blocks"]
    with tarfile.open(tokens) as tar:
        last = next(m.offset for m in tar.getmembers() if m.name == f"{blocks - 1:06d}.ids.npy")
    os.truncate(tokens, last)
    assert len(list(webdataset.WebDataset(str(tokens), shardshuffle=False))) == blocks - 1
    with pytest.raises(DamagedShardError, match=r"train/train-00000\.tar: \d+ bytes, the manifest says"):
        TokenDataset.open(copy, "train")


# ---------------------------------------------------------------- plain webdataset


def test_the_script_in_the_docs_reads_every_sample_of_both_tiers_without_chatmill(built: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    script = next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "import webdataset" in code)
    assert "chatmill" not in script
    (tmp_path / "bare.py").write_text(script + "import sys\nassert not [m for m in sys.modules if m.startswith('chatmill')]\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "bare.py", str(built)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    manifest = read_manifest(built)
    expected = {}
    for split, part in manifest["splits"].items():
        expected[split] = [
            sum(record["samples"] for record in manifest["dialogues"][split]),
            part["blocks"],
            part["dialogues"],
            part["tokens"],
            part["loss_tokens"],
        ]
    assert json.loads(run.stdout) == expected
    assert all(row[0] == row[2] > 0 for row in expected.values())


def test_every_line_of_a_dialogue_shard_is_one_conversation(built: Path) -> None:
    sample = next(iter(webdataset.WebDataset(str(built / "dialogues/train-00000.tar"), shardshuffle=False)))
    assert load_line(sample["json"]).uid == sample["__key__"]
    assert (built / "dialogues/train-00000.tar").read_bytes().endswith(TAR_END)
