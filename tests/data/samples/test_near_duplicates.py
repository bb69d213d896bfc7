"""Near duplicates are found, once, and never across the split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from chatmill.data.check.verify import verify_dataset
from chatmill.data.importers.datasets.openai_messages import read
from chatmill.data.ledger import Ledger
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.raw.files import RawFile
from chatmill.data.recipe import DataRecipe, SourceSection
from chatmill.data.samples.dedup import EXACT, NEAR, UnionFind, deduplicate, text_hash
from chatmill.data.samples.near_duplicates import near_pairs, shingles, signatures
from chatmill.data.samples.split import crossing, join
from chatmill.data.shards.dialogues import read_dialogues
from chatmill.data.shards.manifest import read_manifest

RNG = np.random.default_rng(0)
WORDS = [
    f"{a}{b}"
    for a in ("ka", "lo", "mi", "nu", "pe", "ri", "sa", "to")
    for b in ("ban", "der", "fil", "gor", "hum", "jin", "kel", "lam")
]


def text(words: int) -> list[str]:
    return RNG.choice(WORDS, words).tolist()


def altered(words: list[str], n: int) -> list[str]:
    out = list(words)
    for i in RNG.choice(len(out), n, replace=False).tolist():
        out[i] = "changed"
    return out


def jaccard(a: str, b: str) -> float:
    left, right = shingles(a), shingles(b)
    return len(left & right) / len(left | right)


def test_planted_near_duplicates_are_found_and_others_are_not() -> None:
    originals = [text(120) for _ in range(400)]
    texts = [" ".join(words) for words in originals] + [
        " ".join(altered(words, 1 + i % 12)) for i, words in enumerate(originals)
    ]
    found = {tuple(pair) for pair in near_pairs(signatures(texts), 0.8).tolist()}
    truth = {(i, i + 400): jaccard(texts[i], texts[i + 400]) for i in range(400)}
    clear = [pair for pair, j in truth.items() if j >= 0.88]
    assert len(clear) > 50 and sum(pair in found for pair in clear) / len(clear) > 0.98
    assert not [pair for pair in found if truth.get(pair, 0.0) < 0.65]  # type: ignore[call-overload]


def test_of_a_cluster_the_first_stays_and_the_reason_is_named() -> None:
    exact = np.array([5, 6, 5, 7, 8], dtype=np.uint64)
    reason, cluster = deduplicate(exact, True, np.array([[2, 3]]))
    assert reason.tolist() == [0, 0, EXACT, NEAR, 0]
    assert cluster.tolist() == [0, 1, 0, 0, 4]
    reason, cluster = deduplicate(exact, False, None)
    assert reason.tolist() == [0] * 5 and cluster.tolist() == [0, 1, 0, 3, 4]


def test_union_find_agrees_with_a_flood_fill() -> None:
    pairs = RNG.integers(0, 200, (150, 2))
    sets = UnionFind(200)
    for i, j in pairs.tolist():
        sets.union(i, j)
    label = list(range(200))
    for _ in range(200):
        for i, j in pairs.tolist():
            label[i] = label[j] = min(label[i], label[j])
    assert sets.roots().tolist() == label


def test_exact_means_up_to_case_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "%s"}]}\n'
    path.write_text(
        line % ("Hello  there", "Fine")
        + line % ("hello THERE ", "fine")
        + line % ("hello", "there fine")
        + line % ("fine", "hello there")
    )
    conversations = list(read(RawFile(path), SourceSection(path="x"), "s", Ledger()))
    hashes = [text_hash(c) for c in conversations]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_near_duplicates_leave_and_a_planted_leak_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for i in range(150):
        words = text(80)
        for variant in [words, altered(words, 2)] if i % 2 else [words]:
            messages = [
                {"role": "user", "content": " ".join(variant[:40])},
                {"role": "assistant", "content": " ".join(variant[40:])},
            ]
            lines.append(json.dumps({"messages": messages}))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    base = {"name": "near", "sources": [{"path": str(tmp_path / "x.jsonl")}], "tokenizer": {"train": {"vocab_size": 300}}}
    recipe = DataRecipe.model_validate(
        {**base, "dedup": {"near": {"threshold": 0.75}}, "split": {"validation": 0.3}, "workers": 1}
    )
    report = build_dataset(recipe, tmp_path / "out")
    dropped = {stage["name"]: stage["dropped"] for stage in report["stages"]}["dedup"]
    assert dropped["near duplicate"] >= 70
    assert report["certificate"]["shared"]["near_duplicates"] == 0 and verify_dataset(tmp_path / "out") == []
    manifest = read_manifest(tmp_path / "out")
    assert (
        sum(1 for split in ("train", "validation") for _ in read_dialogues(tmp_path / "out", manifest["dialogues"][split]))
        <= 155
    )

    # A program that neither drops nor groups near duplicates, and believes in itself.
    blind = recipe.model_copy(update={"name": "blind"})
    monkeypatch.setattr(
        "chatmill.data.samples.placing.near_pairs", lambda signature, threshold: np.zeros((0, 2), dtype=np.int64)
    )
    monkeypatch.setattr("chatmill.data.samples.split.near_pairs", lambda signature, threshold: np.zeros((0, 2), dtype=np.int64))
    build_dataset(blind, tmp_path / "blind")
    monkeypatch.undo()
    assert any("near duplicates" in line for line in verify_dataset(tmp_path / "blind"))


def test_the_pairs_found_do_not_depend_on_the_order_of_the_texts() -> None:
    """Else a certificate, which reads one side after the other, would see what the split did not."""
    texts = [" ".join(RNG.choice(WORDS, 40)) for _ in range(30)]
    for base in texts[:10]:  # clusters in which some are near each other, and not to the first
        for k in range(12):
            words = base.split()
            words[3 * k : 3 * k + 3] = [f"other{k}", "here"]
            texts.append(" ".join(words))
    texts += texts[::7]
    rows = signatures(texts)

    def clusters(order: np.ndarray) -> set[frozenset[int]]:
        sets = UnionFind(len(order))
        for i, j in near_pairs(rows[order], 0.7).tolist():
            sets.union(int(order[i]), int(order[j]))
        roots = sets.roots()
        return {frozenset(np.flatnonzero(roots == root).tolist()) for root in set(roots.tolist())}

    expected = clusters(np.arange(len(texts)))
    assert len(expected) < len(texts) - 40
    for _ in range(5):
        assert clusters(RNG.permutation(len(texts))) == expected


def test_what_near_duplicates_have_between_them_is_joined_on_one_side() -> None:
    side = np.array([0, 1, 2, 1], dtype=np.uint8)
    rows = signatures([LONG := " ".join(WORDS), f"{LONG} more", LONG, "something else entirely than that"])
    pairs = crossing(rows, side, 0.8)
    assert pairs.tolist() == [[0, 1]]
    assert join(np.array([0, 1, 2, 3]), pairs).tolist() == [0, 0, 2, 3]
