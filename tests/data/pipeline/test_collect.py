"""Collecting that goes on: later exports come after what is there, and nothing that was there changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.build_cases import chats, recipe, tree, write_jsonl
from tests.data.samples.test_identity import log

from chatmill.config import ConfigError
from chatmill.data.check.repair import repair_dataset
from chatmill.data.check.verify import verify_dataset
from chatmill.data.packing.config import SourcesSection
from chatmill.data.packing.sources import begun_with, open_mixture
from chatmill.data.packing.usage import at
from chatmill.data.pipeline.collect import collect
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import RECIPES, DataRecipe
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.dialogues import present_dialogues
from chatmill.data.shards.manifest import fingerprint, generation, read_manifest
from chatmill.data.stream import PackedStream

SPLITS = ("train", "validation")


def write(folder: Path, **files: list[str]) -> None:
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def chat_recipe(folder: Path, **over: Any) -> DataRecipe:
    sources = [{"path": str(folder), "assistant": "丽丽"}]
    return recipe(folder, **{"split": {"validation": 0.3}, "sources": sources} | over)


def dialogues(folder: Path) -> dict[str, tuple[str, str, str]]:
    """{first words: (split, uid, last words)}"""
    manifest = read_manifest(folder)
    return {
        c.turns[0].content: (split, c.uid, c.turns[-1].content)
        for split in SPLITS
        for c in present_dialogues(folder, manifest, split)
    }


GOES_ON = "2023/3/4 09:13 - 丽丽: 不客气，明天见"


def later_exports(folder: Path) -> None:
    """The chat under a new name, longer; one that lost its oldest lines; another chat; a copy; a picture."""
    write(
        folder,
        renamed=[*log(range(60)), GOES_ON, *log(range(60, 70))],
        shortened=log(range(60))[31:],
        other=log(range(100, 130), "老王"),
    )
    shutil.copy(folder / "_chat.txt", folder / "copy.txt")
    (folder / "photo.jpg").write_bytes(bytes(range(256)) * 40)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, `old` (before later exports), `set` (collected), and `report.json` of the collecting."""
    place = tmp_path_factory.mktemp("grown")
    raw = place / "raw"
    raw.mkdir()
    write(raw, _chat=log(range(60)))
    build_dataset(chat_recipe(raw), place / "set")
    shutil.copytree(place / "set", place / "old")
    later_exports(raw)
    report = collect(chat_recipe(raw), place / "set")
    (place / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return place


def test_a_collected_set_is_what_one_build_of_all_exports_gives(grown: Path, tmp_path: Path) -> None:
    build_dataset(chat_recipe(grown / "raw"), tmp_path / "once")
    old, found = dialogues(grown / "old"), dialogues(grown / "set")
    assert found == dialogues(tmp_path / "once") and len(found) == 100
    assert {text: entry[:2] for text, entry in found.items() if text in old} == {text: e[:2] for text, e in old.items()}
    assert sum(found[text] != old[text] for text in old) == 1  # the one that went on, under its uid
    assert verify_dataset(grown / "set") == []


def test_the_report_says_what_came_and_what_was_there(grown: Path) -> None:
    report = json.loads((grown / "report.json").read_text(encoding="utf-8"))
    assert report["known"] == 2 and report["gone"] == [] and report["files"]["left_out"] == ["photo.jpg"]
    added = report["added"]
    assert sorted(added["files"]) == ["other.txt", "renamed.txt", "shortened.txt"]
    assert added["train"] + added["validation"] == 41 and added["replaced"] == 1
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["import"]["kept"] == 150 and stages["dedup"]["kept"] == 41  # of 70 + 50 + 30
    assert sum(stages["dedup"]["dropped"].values()) == 108
    stored = json.loads((grown / "set" / "report.json").read_text(encoding="utf-8"))
    total = {stage["name"]: stage for stage in stored["stages"]}
    assert total["import"]["kept"] == 210 and total["shard"]["kept"] == 100
    assert sum(part["dialogues"] for part in stored["splits"].values()) == 100
    assert sum(sum(part["turns"].values()) for part in stored["texts"].values()) == 100
    manifest = read_manifest(grown / "set")
    assert {split: manifest["splits"][split]["dialogues"] for split in SPLITS} == {
        split: len(TokenDataset.open(grown / "set", split)) for split in SPLITS
    }


def test_what_was_there_can_still_be_read_as_it_was(grown: Path) -> None:
    manifest, before = read_manifest(grown / "set"), read_manifest(grown / "old")
    assert len(manifest["generations"]) == 2
    for split in SPLITS:
        name = fingerprint(before, split)
        assert fingerprint(generation(manifest, 0), split) == name != fingerprint(manifest, split)
        old, view = TokenDataset.open(grown / "old", split), TokenDataset.open(grown / "set", split, fingerprint=name)
        assert view.fingerprint == old.fingerprint and view.block_starts.tolist() == old.block_starts.tolist()
        for b in range(old.n_blocks):
            assert view.read_block(b).uids == old.read_block(b).uids
            assert np.array_equal(view.read_block(b).ids, old.read_block(b).ids)
        whole = TokenDataset.open(grown / "set", split)
        assert [u for b in range(whole.n_blocks) for u in whole.read_block(b).uids] == [
            c.uid for c in present_dialogues(grown / "set", manifest, split)
        ]
    shards = [p.relative_to(grown / "old") for p in (grown / "old").rglob("*.tar")]
    assert all((grown / "old" / p).read_bytes() == (grown / "set" / p).read_bytes() for p in shards)


def test_nothing_is_read_twice_and_nothing_new_changes_nothing(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(grown / "set", tmp_path / "set")
    before = tree(tmp_path / "set")
    for file in (grown / "raw").iterdir():  # long ago: not within the last two seconds
        os.utime(file, (1_700_000_000, 1_700_000_000))
    monkeypatch.setattr("chatmill.data.pipeline.seen.SETTLED_NS", 0)  # the time of change of state is now
    report = collect(chat_recipe(grown / "raw"), tmp_path / "set")
    assert not report["built"] and report["known"] == 5 and tree(tmp_path / "set") == before
    monkeypatch.setattr("chatmill.data.pipeline.seen.sha256_file", lambda path: pytest.fail(f"{path} was read again"))
    assert not collect(chat_recipe(grown / "raw"), tmp_path / "set")["built"]
    monkeypatch.undo()
    assert not build_dataset(chat_recipe(grown / "raw"), tmp_path / "set")["built"]  # it is what a build would give
    (tmp_path / "raw").mkdir()
    shutil.copy(grown / "raw" / "renamed.txt", tmp_path / "raw" / "a.txt")
    write(tmp_path / "raw", new=log(range(200, 205)))
    report = collect(chat_recipe(tmp_path / "raw"), tmp_path / "set")
    assert report["added"]["files"] == ["new.txt"] and set(report["gone"]) >= {"_chat.txt", "other.txt"}
    assert len(dialogues(tmp_path / "set")) == 105 and verify_dataset(tmp_path / "set") == []
    assert len(read_manifest(tmp_path / "set")["generations"]) == 3


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "cleaning": ({"clean": {"privacy": {"mode": "redact"}, "min_turn_chars": 2}}, r"clean\.privacy\.mode: was off, is redact"),
    "split": ({"split": {"validation": 0.1}}, r"split\.validation: was 0\.3, is 0\.1"),
    "tokenizer": ({"tokenizer": {"train": {"vocab_size": 400}}}, r"tokenizer\.train\.vocab_size: was 300, is 400"),
    "source": ({"sources": [{"path": "RAW", "assistant": "小明"}]}, r"source 1: assistant: was 丽丽, is 小明"),
    "no source": ({"sources": []}, r"sources: 1 in the set, 0 in the recipe"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_recipe_with_other_rules_is_refused_in_words(what: str, grown: Path) -> None:
    over, words = CHANGED[what]
    made = chat_recipe(grown / "raw")
    for source in over.get("sources", ()):
        source["path"] = str(grown / "raw")
    changed = made.model_copy(
        update={k: getattr(DataRecipe.model_validate(made.model_dump() | {k: v}), k) for k, v in over.items() if v}
    )
    if what == "no source":
        changed = made.model_copy(update={"sources": []})
    with pytest.raises(ConfigError, match=words):
        collect(changed, grown / "set")


def test_a_new_source_of_another_kind_is_added(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown / "set", tmp_path / "set")
    write_jsonl(tmp_path / "raw.jsonl", chats(40))
    sources = [{"path": str(tmp_path / "raw.jsonl"), "name": "extra"}, {"path": str(grown / "raw"), "assistant": "丽丽"}]
    report = collect(chat_recipe(grown / "raw", sources=sources), tmp_path / "set")
    assert report["known"] == 5 and report["added"]["files"] == ["raw.jsonl"]
    manifest = read_manifest(tmp_path / "set")
    assert {i["file"]: i["source"] for i in manifest["inputs"]}["raw.jsonl"] == 0
    assert verify_dataset(tmp_path / "set") == []
    with pytest.raises(ConfigError, match="2 in the set, 1 in the recipe"):
        collect(chat_recipe(grown / "raw"), tmp_path / "set")


def test_a_chat_that_makes_somebody_else_the_assistant_is_refused_as_a_build_would(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw", a=log(range(30)))
    made = recipe(tmp_path / "raw", split={"validation": 0.3})
    collect(made, tmp_path / "set")
    write(
        tmp_path / "raw",
        b=[line.replace("小明", "X").replace("丽丽", "小明").replace("X", "丽丽") for line in log(range(40, 44))],
    )
    with pytest.raises(ConfigError, match=r"小明 64, 丽丽 38\.\n.*2 of them would be the assistant"):
        collect(made, tmp_path / "set")
    assert verify_dataset(tmp_path / "set") == [] and len(dialogues(tmp_path / "set")) == 30


def test_a_set_of_an_earlier_version_and_a_url_are_refused(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown / "old", tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    del manifest["given"]
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match="once"):
        collect(chat_recipe(grown / "raw"), tmp_path / "set")
    with pytest.raises(ConfigError, match="not to a URL"):
        collect(chat_recipe(grown / "raw"), "s3://bucket/sets/chats")


def test_where_no_set_is_there_collecting_builds_one(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(80))
    assert collect(recipe(raw), tmp_path / "set")["built"]
    assert not collect(recipe(raw), tmp_path / "set")["built"]


def test_damaged_shards_of_any_generation_are_rebuilt_bit_for_bit(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown / "set", tmp_path / "set")
    before = tree(tmp_path / "set")
    for shard in (tmp_path / "set" / "train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:-3000])
    assert verify_dataset(tmp_path / "set") != []
    repair_dataset(tmp_path / "set")
    assert tree(tmp_path / "set") == before and verify_dataset(tmp_path / "set") == []


# Collects in a child that is killed at its 8th, 18th, 28th … fsync, until one comes to its end; what stands there after each.
KILLS = """
import os, signal, sys
from pathlib import Path
from tests.data.build_cases import tree
from chatmill.data.pipeline.collect import collect
from chatmill.data.recipe import DataRecipe

made, folder, real, done = DataRecipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]), os.fsync, 0
states = {hash(tuple(sorted(tree(folder).items()))): "old"}

def fsync(descriptor):
    global done
    real(descriptor)
    done += 1
    if done == moment:
        os.kill(os.getpid(), signal.SIGKILL)

for moment in range(8, 600, 10):
    child = os.fork()
    if child == 0:
        os.fsync = fsync
        collect(made, folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(states.setdefault(hash(tuple(sorted(tree(folder).items()))), "new"), flush=True)
    assert len(states) < 3
    if status == 0:
        break
"""


def test_a_collecting_killed_at_any_moment_leaves_the_old_set_or_the_new_one(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown / "old", tmp_path / "set")
    words = [sys.executable, "-c", KILLS, chat_recipe(grown / "raw").model_dump_json(), str(tmp_path / "set")]
    paths = f"{RECIPES.parents[1] / 'src'}{os.pathsep}{RECIPES.parents[1]}"
    run = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    states = run.stdout.split()
    assert states[:3] == ["old"] * 3 and states[-1] == "new" and len(states) < 50
    assert tree(tmp_path / "set") == tree(grown / "set")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.lock", "set"]


def test_a_collecting_that_was_killed_reads_nothing_again_and_clears_up(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(grown / "old", tmp_path / "set")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as before:
        before.setattr("chatmill.data.pipeline.publication.publish_folder", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(chat_recipe(grown / "raw"), tmp_path / "set")
    monkeypatch.setattr("chatmill.data.pipeline.stages.read_file", lambda *_: pytest.fail("imported again"))
    with monkeypatch.context() as after:
        after.setattr("chatmill.data.pipeline.collect.remove_work", killed)  # it has published
        with pytest.raises(KeyboardInterrupt):
            collect(chat_recipe(grown / "raw"), tmp_path / "set")
    assert tree(tmp_path / "set") == tree(grown / "set")
    assert not collect(chat_recipe(grown / "raw"), tmp_path / "set")["built"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.lock", "set"]


def test_a_run_that_began_before_goes_on_with_what_it_began_with(grown: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sequence_length": 96, "micro_batch": 2, "seed": 5}
    batches = list(islice(PackedStream(TokenDataset.open(grown / "old", "train"), **settings), 24))  # several epochs
    begun = PackedStream(TokenDataset.open(grown / "old", "train"), **settings)
    _ = list(islice(begun, 9))
    state = begun.state_dict()
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000009").mkdir(parents=True)
    (run / "checkpoints" / "step-00000009" / "state.json").write_text(json.dumps({"stream": state}))
    config = {
        "data": {"path": str(grown / "set"), "sequence_length": 96},
        "train": {"seed": 5, "micro_batch": 2, "accumulation": 1},
    }
    (run / "config.yaml").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": k + 1}) + "\n" for k in range(24)))
    sources = SourcesSection(path=str(grown / "set"))
    mark = begun_with(run)
    assert mark == {"data": TokenDataset.open(grown / "old", "train").fingerprint}
    stream = PackedStream(open_mixture(sources, begun=mark), **settings)
    stream.load_state_dict(state)
    for batch, expected in zip(islice(stream, 15), batches[9:], strict=True):
        assert batch.uids == expected.uids and batch.tokens.equal(expected.tokens) and batch.targets.equal(expected.targets)
    for step in (3, 20):  # the ledger of the run is still true
        assert sorted({use.uid for use in at(run, step)}) == sorted(set(batches[step - 1].uids))
    now = TokenDataset.open(grown / "set", "train", fingerprint=mark["data"])
    assert now.grown_to == len(TokenDataset.open(grown / "set", "train")) > len(now)
    (run / "environment.json").write_text(json.dumps({"data": {"train": {"data": "x"}, "validation": {"data": "y"}}}))
    assert begun_with(run) == {"data": "x"} and begun_with(run, "validation") == {"data": "y"}
    with pytest.raises(ConfigError, match=r"cannot resume: dialogues was \d+, is \d+"):  # never in silence
        PackedStream(open_mixture(sources), **settings).load_state_dict(state)
