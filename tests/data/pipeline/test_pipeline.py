"""The whole way from raw chats to shards: counted, repeatable, certified, and never half there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.build_cases import WORDS, chats, recipe, tree, write_jsonl

from chatmill.config import ConfigError
from chatmill.data.check.inspection import inspect_dataset
from chatmill.data.check.verify import verify_dataset
from chatmill.data.conversation import TokenizedDialogue, Turn, from_record, to_record
from chatmill.data.pipeline.pipeline import STAGES, build_dataset
from chatmill.data.recipe import RECIPES, load_data_recipe
from chatmill.data.samples import split as split_module
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.dialogues import read_dialogues
from chatmill.data.shards.manifest import read_manifest
from chatmill.data.tokenizer.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    build_dataset(recipe(write_jsonl(folder / "raw.jsonl", chats(300))), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_stage_says_what_it_kept_and_dropped_and_why(tmp_path: Path) -> None:
    report = build_dataset(recipe(write_jsonl(tmp_path / "raw.jsonl", chats(300))), tmp_path / "out")
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert tuple(stages) == STAGES
    assert stages["import"]["kept"] == 300
    no_reply = stages["pair"]["dropped"]["no user turn followed by an assistant turn"]
    duplicates = stages["dedup"]["dropped"]["exact duplicate"]
    unique = {json.dumps(record) for record in chats(300) if len(record["messages"]) > 1}
    assert stages["dedup"]["kept"] == len(unique) == 300 - no_reply - duplicates
    assert stages["dedup"]["examples"]["exact duplicate"][0].startswith("raw.jsonl:")
    assert stages["shard"]["kept"] == sum(part["dialogues"] for part in report["splits"].values())
    previous = None
    for name in ("clean", "pair", "dedup", "tokenize"):
        stage = stages[name]
        if previous is not None:
            assert stage["kept"] + sum(stage["dropped"].values()) == previous
        previous = stage["kept"]


def test_a_fresh_build_verifies_and_its_dialogues_are_its_tokens(built: Path) -> None:
    assert verify_dataset(built) == []
    tokenizer = ChatTokenizer.load(built / "tokenizer")
    manifest = read_manifest(built)
    for split in ("train", "validation"):
        dataset = TokenDataset.open(built, split)
        conversations = list(read_dialogues(built, manifest["dialogues"][split]))
        assert len(conversations) == len(dataset) > 0
        block = dataset.read_block(0)
        first = tokenizer.encode_dialogue(conversations[0])
        assert block.ids[: len(first.ids)].tolist() == first.ids.tolist()
        assert block.loss_mask[: len(first.ids)].tolist() == first.loss_mask.tolist()
        said = "".join(turn.content + "<|im_end|>" for turn in conversations[0].turns if turn.role == "assistant")
        assert tokenizer.decode(first.ids[first.loss_mask].tolist()) == said


def test_lineage_leads_from_a_block_to_the_raw_line(built: Path) -> None:
    raw = (built.parent / "raw.jsonl").read_text().split("\n")
    dataset = TokenDataset.open(built, "train")
    block = dataset.read_block(1)
    tokenizer = ChatTokenizer.load(built / "tokenizer")
    for j in range(len(block.uids)):
        name, line = block.sources[j][1].split(":")
        assert name == "raw.jsonl"
        text = tokenizer.decode(block.ids[block.offsets[j] : block.offsets[j + 1]].tolist())
        assert all(message["content"] in text for message in json.loads(raw[int(line) - 1])["messages"])


def test_a_second_build_does_nothing_and_another_recipe_replaces_it(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(200))
    assert build_dataset(recipe(raw), tmp_path / "out")["built"]
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert not build_dataset(recipe(raw), tmp_path / "out")["built"]
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert build_dataset(recipe(raw, pair={"mode": "pairs"}), tmp_path / "out")["built"]
    assert read_manifest(tmp_path / "out")["recipe"]["pair"]["mode"] == "pairs"
    assert verify_dataset(tmp_path / "out") == []
    write_jsonl(raw, chats(200, seed=1))
    assert build_dataset(recipe(raw), tmp_path / "out")["built"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out", "raw.jsonl"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatmill.data.pipeline import stages

    monkeypatch.setattr(stages, "CHUNK_BYTES", 4000)
    for part in range(3):
        write_jsonl(tmp_path / f"raw{part}.jsonl", chats(150, seed=part))
    for workers in (1, 3):
        build_dataset(recipe(tmp_path / "raw*.jsonl", workers=workers), tmp_path / str(workers))
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_a_large_file_read_in_spans_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatmill.data.importers import registry

    raw = write_jsonl(tmp_path / "raw.jsonl", chats(400))
    raw.write_text("\ufeff" + raw.read_text().rstrip("\n") + "\n\nnot json\n")
    build_dataset(recipe(raw), tmp_path / "whole")
    for size in (5_000, 33_333):
        monkeypatch.setattr(registry, "SPAN_BYTES", size)
        files = registry.spans(registry.find_files(str(raw))[0], "openai", recipe(raw).sources[0])
        assert len(files) >= 3
        build_dataset(recipe(raw, workers=2), tmp_path / f"spans{size}")
        assert tree(tmp_path / f"spans{size}") == tree(tmp_path / "whole")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped token shard": (lambda f: flip(f / "train/train-00000.tar", 4000), r"train/train-00000\.tar: sha256"),
    "truncated token shard": (
        lambda f: os.truncate(f / "train/train-00000.tar", 9000), r"train/train-00000\.tar: .*(cut short|stray|end marker)"
    ),
    "flipped dialogue shard": (lambda f: flip(f / "dialogues/train-00000.tar", 700), r"dialogues/train-00000\.tar: sha256"),
    "truncated dialogue shard": (lambda f: os.truncate(f / "dialogues/train-00000.tar", 5120), "dialogues/train-00000"),
    "renamed shard": (lambda f: (f / "train/train-00000.tar").rename(f / "train/x.tar"), r"train/train-00000\.tar: missing"),
    "stranger": (lambda f: (f / "train/extra.tar").write_bytes(b""), r"extra\.tar: not in the manifest"),
    "other tokenizer": (lambda f: flip(f / "tokenizer/chat_template.jinja", 5), "template_sha256 is not|sha256 is not"),
    "other index": (lambda f: flip(f / "validation/validation-00000.index.npz", 300), "index"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_names_what_is_damaged(copy: Path, name: str) -> None:
    damage, expected = DAMAGE[name]
    damage(copy)
    problems = "\n".join(verify_dataset(copy))
    assert re.search(expected, problems), problems


def test_verify_sees_a_leak_that_the_hashes_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "raw.jsonl", chats(300))

    # A split that looks at single samples, with the duplicates left in: twins land on both sides.
    def blind(keys: Any, config: Any) -> Any:
        return np.arange(len(keys)) % 5 == 0

    monkeypatch.setattr("chatmill.data.samples.placing.assign", blind)
    monkeypatch.setattr("chatmill.data.pipeline.publication.certificate", lambda *a: {"shared": {}, "asked": [], "valid": True})
    build_dataset(recipe(tmp_path / "raw.jsonl", dedup={"exact": False}), tmp_path / "out")
    monkeypatch.undo()
    problems = verify_dataset(tmp_path / "out")
    assert any("train and validation share" in line and "exact texts" in line for line in problems), problems


def test_the_build_itself_refuses_a_split_that_leaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "raw.jsonl", chats(300))
    monkeypatch.setattr("chatmill.data.samples.placing.assign", lambda keys, config: np.arange(len(keys)) % 5 == 0)
    with pytest.raises(ConfigError, match="the split leaks"):
        build_dataset(recipe(tmp_path / "raw.jsonl", dedup={"exact": False}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_sees_a_mask_that_is_off_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "raw.jsonl", chats(100))
    right = ChatTokenizer.encode_dialogues

    def shifted(self: ChatTokenizer, conversations: Any) -> Any:
        for dialogue in right(self, conversations):
            assert isinstance(dialogue, TokenizedDialogue)
            mask = np.roll(dialogue.loss_mask, -1)
            mask[0] = False
            yield TokenizedDialogue(dialogue.uid, dialogue.ids, mask)

    monkeypatch.setattr(ChatTokenizer, "encode_dialogues", shifted)
    build_dataset(recipe(tmp_path / "raw.jsonl"), tmp_path / "out")
    monkeypatch.undo()
    assert any("the loss mask is not that of its turns" in line for line in verify_dataset(tmp_path / "out"))


def test_split_keeps_a_conversation_and_its_twins_on_one_side(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(300))
    build_dataset(recipe(raw, dedup={"exact": False}, pair={"mode": "pairs"}), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    sides: dict[str, dict[str, set[str]]] = {"thread": {}, "text": {}}
    for split in ("train", "validation"):
        for conversation in read_dialogues(tmp_path / "out", manifest["dialogues"][split]):
            sides["thread"].setdefault(conversation.meta["thread"], set()).add(split)
            text = json.dumps([turn.content for turn in conversation.turns])
            sides["text"].setdefault(text, set()).add(split)
    assert all(len(s) == 1 for group in sides.values() for s in group.values())
    assert manifest["certificate"]["valid"] and verify_dataset(tmp_path / "out") == []


def test_threads_that_share_one_sample_stay_together_with_all_their_samples() -> None:
    # Samples 0, 1 of one conversation and 2, 3 of another; 2 says what 0 says. 4 stands alone.
    cluster, threads = np.array([0, 1, 0, 3, 4]), np.array([90, 90, 7, 7, 5], dtype=np.uint64)
    assert split_module.group(cluster, threads, None).tolist() == [0, 0, 0, 0, 4]
    alone, twins = np.arange(5), np.array([1, 2, 3, 4, 5], dtype=np.uint64)
    assert split_module.group(alone, twins, None).tolist() == [0, 1, 2, 3, 4]
    assert split_module.group(alone, twins, [[8], [9], [9], [], [8]]).tolist() == [0, 1, 1, 3, 0]


def test_the_side_of_a_dialogue_does_not_depend_on_the_others(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    config = split_module.SplitSection(validation=0.1)
    side = split_module.assign(keys, config)
    assert 0.08 < side.mean() < 0.12
    np.testing.assert_array_equal(split_module.assign(keys[::-7], config), side[::-7])
    assert (split_module.assign(keys, split_module.SplitSection(validation=0.1, seed=1)) != side).any()


def test_authors_stay_on_one_side_where_asked(tmp_path: Path) -> None:
    records = {
        f"chat{i}": {
            "messages": [
                [{"text": f"{WORDS[i % 20]} {i} hello there", "sender": f"ann{i // 3}"}],
                [{"text": f"{WORDS[i % 7]} {i} and to you", "sender": f"bob{i // 3}"}],
            ]
        }
        for i in range(300)
    }
    raw = tmp_path / "dataset.json"
    raw.write_text(json.dumps(records))
    build = recipe(raw, split={"validation": 0.2, "by_author": True})
    report = build_dataset(build, tmp_path / "out")
    assert "authors" in report["certificate"]["asked"] and report["certificate"]["shared"]["authors"] == 0
    assert verify_dataset(tmp_path / "out") == []
    build_dataset(recipe(raw), tmp_path / "mixed")
    assert read_manifest(tmp_path / "mixed")["certificate"]["shared"]["authors"] > 0


@pytest.mark.parametrize(
    ("records", "over", "reason"),
    [
        ([], {}, "the file is empty"),
        ([{"messages": [{"role": "user", "content": "nobody answers this question"}]}] * 5, {}, "`pair` left nothing"),
        ([{"messages": [{"role": "user", "content": ""}]}], {}, "`clean` left nothing"),
        (chats(2), {}, "the split left"),
        (chats(50), {"tokenizer": {"path": "nowhere"}}, r"no tokenizer\.json"),
        (chats(50), {"tokenizer": {"train": {"vocab_size": 300}, "template": "nope"}}, "neither a file nor one of"),
        (chats(50), {"sources": [{"path": "/nonexistent/*.jsonl"}]}, "no such file"),
        (chats(50), {"clean": {"drop_patterns": ["("]}}, "not a regular expression"),
    ],
)
def test_what_cannot_be_built_says_why_and_leaves_nothing(
    tmp_path: Path, records: list[dict[str, Any]], over: dict[str, Any], reason: str
) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", records)
    with pytest.raises(ConfigError, match=reason):
        build_dataset(recipe(raw, **over), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_that_quote_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    records = chats(60)
    quote = "Which of the seven lamps on the long northern road was lit before the snow came down that year"
    said = [
        {"role": "user", "content": "I read: " + quote.upper() + "!"},
        {"role": "assistant", "content": "a fine sentence, that"},
    ]
    raw = write_jsonl(tmp_path / "raw.jsonl", [*records, {"messages": said}])
    question = [{"role": "user", "content": quote.replace(" ", "  ") + "?"}, {"role": "assistant", "content": "tea"}]
    write_jsonl(tmp_path / "eval.jsonl", [{"messages": question}])
    built = recipe(raw, dedup={"decontaminate": [str(tmp_path / "eval.jsonl")], "overlap_words": 10})
    stages = {stage["name"]: stage for stage in build_dataset(built, tmp_path / "out")["stages"]}
    assert stages["dedup"]["dropped"]["shares text with an evaluation set"] == 1
    assert "raw.jsonl:61" in stages["dedup"]["examples"]["shares text with an evaluation set"][0]
    assert verify_dataset(tmp_path / "out") == []


def test_single_stages_stop_where_they_are_told(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(200))
    for k, stage in enumerate(STAGES[:-1]):
        report = build_dataset(recipe(raw), tmp_path / "out", until=stage)
        assert [s["name"] for s in report["stages"]] == list(STAGES[: k + 1])
        assert not (tmp_path / "out").exists()
    build_dataset(recipe(raw), tmp_path / "out")
    build_dataset(recipe(raw), tmp_path / "direct")
    assert tree(tmp_path / "out") == tree(tmp_path / "direct")


def test_inspect_prints_counts_and_fill(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect_dataset(built)
    dataset = TokenDataset.open(built, "train")
    assert facts["train"]["tokens"] == int(dataset.lengths.sum())
    assert 0 < facts["train"]["loss_share"] < 1 and 0.5 < facts["train"]["fill"][512] <= 1
    printed = capsys.readouterr().out
    assert "tokens with loss" in printed and "<|im_start|>" in printed


def test_the_page_of_a_data_set_shows_its_data_and_runs_none_of_it(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    records = [{"messages": [{"role": r, "content": f"{attack} {i} {r}"} for r in ("user", "assistant")]} for i in range(40)]
    build_dataset(recipe(write_jsonl(tmp_path / "raw.jsonl", records)), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in re.sub("</?[bi]>", "", page)
    assert "<b>" in page and "Split certificate: <strong>valid" in page and "raw.jsonl:" in page
    inspect_dataset(tmp_path / "out", html=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_shipped_recipe_loads(name: str) -> None:
    loaded = load_data_recipe(name, ["split.validation=0.1"])
    assert loaded.name == name and loaded.split.validation == 0.1


def test_records_survive_their_json_form() -> None:
    from chatmill.data.conversation import Conversation

    turns = (Turn("user", "a", "Ann", 1.5), Turn("assistant", "b\u2028🙂", loss=False))
    conversation = Conversation("u", turns, "s", "o", {"k": 1})
    assert from_record(json.loads(json.dumps(to_record(conversation)))) == conversation


def test_a_template_that_drops_earlier_thoughts_gets_one_sample_per_reply(tmp_path: Path) -> None:
    """Each learned with its thought, behind the prompt that inference sends, on the side of its conversation."""
    thinks = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "thinks.jinja").write_text(thinks)
    records = chats(80)
    for record in records:
        for message in record["messages"][1::2]:
            message["content"] = f"<think>well</think>{message['content']}"
    source = write_jsonl(tmp_path / "raw.jsonl", records)
    tokenizer = {"train": {"vocab_size": 300}, "template": str(tmp_path / "thinks.jinja")}
    report = build_dataset(recipe(source, tokenizer=tokenizer), tmp_path / "out")
    changed = next(stage for stage in report["stages"] if stage["name"] == "pair")["changed"]
    assert changed["cut into one sample per reply, as the chat template asks"] > 20
    assert verify_dataset(tmp_path / "out", proven=1000) == []
    loaded, sides = ChatTokenizer.load(tmp_path / "out" / "tokenizer"), dict[str, str]()
    for split in ("train", "validation"):
        texts = read_dialogues(tmp_path / "out", read_manifest(tmp_path / "out")["dialogues"][split])
        for conversation in texts:
            assert (
                sum(turn.loss for turn in conversation.turns if turn.role == "assistant") == 1 and conversation.turns[-1].loss
            )
            dialogue = loaded.encode_dialogue(conversation)
            assert loaded.decode(dialogue.ids[dialogue.loss_mask].tolist()) == conversation.turns[-1].content + "<|im_end|>"
            assert sides.setdefault(conversation.meta["thread"], split) == split
