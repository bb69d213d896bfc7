"""What comes later follows what is there: sides, uids and reasons of a set never change, and nothing new crosses its split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.recipe import DedupSection, SplitSection
from chatmill.data.samples.dedup import EXACT, JOINS, NEAR, SUPERSEDED
from chatmill.data.samples.identity import resolve
from chatmill.data.samples.near_duplicates import signatures
from chatmill.data.samples.placing import place
from chatmill.data.samples.table import SampleTable

HALF = SplitSection(validation=0.5)
AUTHORS = SplitSection(validation=0.5, by_author=True)


def table(*rows: tuple[Any, ...]) -> SampleTable:
    """Rows (uid, thread, exact, authors, text, size): size 0 has no time."""
    names, threads, exact, authors, texts, sizes = zip(*rows, strict=True)
    arrays = {
        "uid": np.array(names, "S32"), "size": np.array(sizes), "time": np.where(np.array(sizes) > 0, 1.0, np.inf),
        "exact": np.array(exact, np.uint64), "thread": np.array(threads, np.uint64),
        "author_counts": np.array([len(a) for a in authors]), "authors": np.array([x for a in authors for x in a], np.uint64),
        "contaminated": np.zeros(len(rows), bool), "signature": signatures(texts),
    }  # fmt: skip
    return SampleTable.of([arrays], near=True)


def text(k: int) -> str:
    return " ".join(f"w{k * 1000 + i}" for i in range(30))


def row(
    k: int, *, thread: int = 0, authors: tuple[int, ...] = (), words: str = "", size: int = 0, uid: str = ""
) -> tuple[Any, ...]:
    return uid or f"u{k}", thread or 100 + k, 10_000 + k, authors, words or text(k), size


def old(split: SplitSection = HALF, dedup: DedupSection | None = None) -> tuple[SampleTable, list[int], list[int]]:
    """Twelve dialogues of twelve authors, placed; those of train, those of validation."""
    made = table(*(row(k, authors=(k,), size=100) for k in range(12)))
    place(made, dedup or DedupSection(), split)
    return made, np.flatnonzero(made.side == 0).tolist(), np.flatnonzero(made.side == 1).tolist()


def test_new_dialogues_go_where_what_they_belong_with_is() -> None:
    base, train, validation = old(AUTHORS)
    a, b = train[0], validation[0]
    both = base.followed_by(
        table(
            row(20, thread=100 + a),  # a thread of train
            row(21, authors=(b,)),  # an author of validation
            row(22, words=text(b) + " more"),  # a near duplicate
            row(23, authors=(77,), words=text(a) + " end"),  # its author's other chat goes with it
            row(24, authors=(77,)),
            row(25, authors=(a, b)),  # of both sides
            row(26, thread=126, words=text(a) + " x"),  # a thread whose two samples are near one side each
            row(27, thread=126, words=text(b) + " x"),
            row(28, authors=(a, 77)),  # of one side, twice
        )
    )
    replaced = place(both, DedupSection.model_validate({"near": {"drop": False}}), AUTHORS, known=12)
    assert not replaced and (both.reason[:12] == 0).all() and both.side[:12].tolist() == base.side.tolist()
    assert both.side[12:].tolist() == [0, 1, 1, 0, 0, 2, 2, 2, 0]
    assert both.reason[12:].tolist() == [0, 0, 0, 0, 0, JOINS, JOINS, JOINS, 0]


def test_what_is_there_already_is_dropped_and_a_longer_export_replaces_it() -> None:
    base, train, _ = old(dedup=DedupSection.model_validate({"near": {}}))
    a, b, c = train[:3]
    again = row(a, authors=(a,), size=100)
    longer = row(30, thread=100 + b, uid=f"u{b}", words=text(b) + " " + text(31), size=200)
    shorter = row(32, thread=100 + c, uid=f"u{c}", words=text(33), size=50)
    both = base.followed_by(table(again, longer, shorter, row(34, words=text(a) + " more")))
    assert place(both, DedupSection.model_validate({"near": {}}), HALF, known=12) == {b: 13}
    assert both.reason[12:].tolist() == [EXACT, 0, SUPERSEDED, NEAR]
    assert both.reason[b] == SUPERSEDED and both.side[13] == both.side[b] == 0 and both.copy[13] == both.copy[b]


def test_what_cannot_replace_leaves_what_is_there() -> None:
    base, train, validation = old()
    a, b = train[0], validation[0]
    longer = row(30, thread=100 + a, uid=f"u{a}", words=text(b) + " z", size=500)  # it goes on with words of validation
    both = base.followed_by(table(longer))
    assert place(both, DedupSection(), HALF, known=12) == {}
    assert both.reason[a] == 0 and both.reason[12] == JOINS


def test_copies_keep_their_numbers_and_new_ones_take_the_next() -> None:
    uids, keep = np.array(["a", "a", "a", "a", "b", "b"], "S32"), np.ones(6, bool)
    sizes = np.array([0, 0, 0, 0, 9, 12])
    stays, copy = resolve(uids, sizes, keep, np.array([1, 0]))
    assert stays.tolist() == [True] * 4 + [False, True] and copy.tolist() == [1, 0, 2, 3, 0, 0]
    stays, copy = resolve(np.array(["a"] * 3, "S32"), np.array([5, 0, 9]), np.ones(3, bool), np.array([0, 1]))
    assert stays.tolist() == [False, True, True] and copy.tolist() == [0, 1, 0]  # the uid of the one that it replaces


def test_near_duplicates_of_the_set_that_turn_out_to_leak_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, train, validation = old()
    pair = np.array([[min(train[0], validation[0]), max(train[0], validation[0])]])
    monkeypatch.setattr("chatmill.data.samples.placing.crossing", lambda *_: pair)
    with pytest.raises(ConfigError, match="data build"):
        place(base.followed_by(table(row(40))), DedupSection(), HALF, known=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 5)), min_size=8, max_size=30), st.integers(1, 7))
def test_in_any_two_parts_nothing_crosses_and_nothing_old_moves(parts: list[tuple[int, int, int]], cut: int) -> None:
    rows = [
        row(
            k, thread=500 + thread, authors=(author,), words=f"{text(words)} v{k}", size=k % 3 * 40, uid=f"t{thread}{k % 3 > 0}"
        )
        for k, (words, thread, author) in enumerate(parts)
    ]
    base = table(*rows[:cut])
    place(base, DedupSection(), AUTHORS)
    both = base.followed_by(table(*rows[cut:]))
    replaced = place(both, DedupSection(), AUTHORS, known=cut)
    assert both.side[:cut].tolist() == base.side.tolist() and both.copy[:cut].tolist() == base.copy.tolist()
    assert {i for i in range(cut) if both.reason[i] != base.reason[i]} == set(replaced)
    kept = both.reason == 0
    for name in (both.thread, both.exact):
        assert not set(name[kept & (both.side == 0)].tolist()) & set(name[kept & (both.side == 1)].tolist())
    sides = [{a for i, names in enumerate(both.author_lists()) if kept[i] and both.side[i] == s for a in names} for s in (0, 1)]
    assert not sides[0] & sides[1]
    final = [(bytes(both.uid[i]), int(both.copy[i])) for i in np.flatnonzero(kept)]
    assert len(set(final)) == len(final)
