"""Mixing by weight, curriculum, exclusion and token budgets: deterministic, resumable, and what they say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.packing.mixture import Mixture, largest_deficit
from chatmill.data.packing.options import StreamOptions
from chatmill.data.packing.order import Order
from chatmill.data.packing.schedule import Position, Schedule, StepPlan
from chatmill.data.shards.memory import MemoryDataset

LONG = MemoryDataset.random(400, mean=60, longest=300, block=16, seed=1, name="long")
SHORT = MemoryDataset.random(300, mean=25, longest=200, block=8, seed=2, name="short")
RARE = MemoryDataset.random(40, mean=40, block=8, seed=3, name="rare")
ALL = {"long": LONG, "short": SHORT, "rare": RARE}


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Several windows per epoch, as in data sets of a real size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatmill.data.packing.order.WINDOW_DIALOGUES", 130)
        patch.setattr("chatmill.data.packing.order.WINDOW_PACKS", 1)
        assert Order.of(LONG, capacity=128, seed=0, shuffle=True).windows == 3
        yield


def schedule(weights: Any, sources: Any = None, **options: Any) -> Schedule:
    mixture = Mixture(sources or ALL, weights)
    return Schedule(mixture, StreamOptions(**{"sequence_length": 128, "global_batch": 8, **options}))


def uids_of(planned: StepPlan) -> list[list[str]]:
    """The dialogues of each pack of a step."""
    packs = []
    for pack in planned.packs:
        plan, source = pack.window.plan, pack.window.source
        packs.append([source.uid(int(plan.dialogue[i])) for i in pack.indices()])
    return packs


def take(plan: Schedule, steps: int, start: Position | None = None) -> tuple[list[list[list[str]]], Position]:
    """Dialogues of the packs of each of some steps, and the position after them."""
    out, end = [], start or plan.start
    iterator = plan.steps(start)
    for _ in range(steps):
        planned = next(iterator)
        out.append(uids_of(planned))
        end = planned.end
    return out, end


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(1, 400))
def test_every_source_keeps_within_two_packs_of_its_share(shares: list[int], packs: int) -> None:
    taken = [0] * len(shares)
    for count in range(1, packs + 1):
        chosen = largest_deficit(shares, taken, [True] * len(shares))
        assert chosen is not None
        taken[chosen] += 1
        assert all(abs(share * count / sum(shares) - used) < 2 for share, used in zip(shares, taken, strict=True))


def test_the_weights_are_shares_of_packs_and_of_tokens() -> None:
    packs, tokens = Counter[int](), Counter[int]()
    iterator = schedule({"long": 3, "short": 1}).steps()
    for _ in range(50):
        for pack in next(iterator).packs:
            packs[pack.source] += 1
            tokens[pack.source] += pack.tokens
    assert packs == {0: 300, 1: 100}
    assert tokens[0] / sum(tokens.values()) == pytest.approx(0.75, abs=0.01)


def test_a_curriculum_changes_the_shares_exactly_at_its_step() -> None:
    iterator = schedule({0: {"long": 1}, 5: {"short": 1, "long": 1}, 9: {"rare": 1}}).steps()
    shares = [Counter(pack.source for pack in next(iterator).packs) for _ in range(12)]
    assert shares == [{0: 8}] * 5 + [{0: 4, 1: 4}] * 4 + [{2: 8}] * 3


def test_a_source_that_has_been_used_up_leaves_its_share_to_the_others() -> None:
    steps = list(schedule({"long": 3, "short": 1, "rare": 2}, epochs=1).steps())
    seen = Counter(uid for planned in steps for pack in uids_of(planned) for uid in pack)
    assert set(seen.values()) == {1}
    lengths = {uid: int(n) for source in ALL.values() for uid, n in zip(source.uids, source.lengths, strict=True)}
    assert all(length > 128 for uid, length in lengths.items() if uid not in seen)
    shares = [Counter(pack.source for pack in planned.packs) for planned in steps]
    last_rare = max(i for i, share in enumerate(shares) if share[2])
    assert 0 < last_rare < len(steps) - 6
    assert shares[last_rare + 1 : last_rare + 5] == [{0: 6, 1: 2}] * 4


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 5), epochs=st.sampled_from([None, 3]))
def test_mixing_curriculum_and_exclusion_resume_at_any_step(cuts: list[int], seed: int, epochs: int | None) -> None:
    options: dict[str, Any] = {
        "weights": {0: {"long": 2, "short": 1}, 7: {"long": 1, "short": 1, "rare": 1}},
        "exclude": {4: LONG.uids[:30], 13: SHORT.uids[5:50] + RARE.uids[:3]},
        "seed": seed,
        "epochs": epochs,
    }
    expected, end = take(schedule(**options), sum(cuts))
    got: list[Any] = []
    position = None
    for count in cuts:
        fresh = schedule(**options)
        if position is not None:
            position = fresh.position(json.loads(json.dumps(schedule(**options).state(position))))
        part, position = take(fresh, count, position)
        got += part
    assert got == expected and position == end


def test_excluded_dialogues_are_gone_from_their_step_on_and_only_they() -> None:
    gone = set(LONG.uids[:40])
    plain, _ = take(schedule({"long": 1}), 30)
    without, _ = take(schedule({"long": 1}, exclude={3: gone}), 30)
    assert plain[:3] == without[:3] and gone & {uid for step in without[:3] for pack in step for uid in pack}
    assert not gone & {uid for step in without[3:] for pack in step for uid in pack}
    # The window that is open at step 3 keeps its packs, with holes; later ones are packed anew without the excluded.
    ends = [planned.end.cursors[0].window for planned, _ in zip(schedule({"long": 1}).steps(), range(30), strict=False)]
    same = next(step for step in range(3, 30) if ends[step] != ends[2])
    assert same > 3
    for with_all, with_holes in zip(plain[3:same], without[3:same], strict=True):
        assert [[uid for uid in pack if uid not in gone] for pack in with_all] == with_holes
    assert all(pack for step in without[same + 1 :] for pack in step)


def test_counts_of_a_step_with_holes_are_those_of_what_is_left() -> None:
    gone = set(LONG.uids[::7])
    lengths = dict(zip(LONG.uids, LONG.lengths.tolist(), strict=True))
    losses = dict(zip(LONG.uids, LONG.loss_tokens.tolist(), strict=True))
    plan = schedule({"long": 1}, {"long": LONG}, exclude={2: gone}, overlong="drop")
    holes = 0
    for planned, _ in zip(plan.steps(), range(12), strict=False):
        used = [uid for pack in uids_of(planned) for uid in pack]
        holes += sum(pack.hole is not None for pack in planned.packs)
        assert planned.tokens == sum(lengths[uid] for uid in used)
        assert planned.loss_tokens == sum(losses[uid] for uid in used)
    assert holes


def test_a_token_budget_ends_the_run_with_the_step_that_reaches_it() -> None:
    steps = list(schedule({"long": 1}, max_tokens=10_000).steps())
    assert steps[-1].start.tokens < 10_000 <= steps[-1].end.tokens
    assert sum(planned.tokens for planned in steps) == steps[-1].end.tokens
    resumed = schedule({"long": 1}, max_tokens=20_000)
    assert next(resumed.steps(steps[-1].end)).step == len(steps)


def test_the_past_of_weights_and_exclusions_cannot_change_but_the_future_can() -> None:
    old = schedule({"long": 1, "short": 1}, exclude={3: ["long0000001"]})
    _, position = take(old, 10)
    state = old.state(position)
    schedule({0: {"long": 1, "short": 1}, 10: {"rare": 1}}, exclude={3: ["long0000001"], 10: ["x"]}).position(state)
    for weights, exclude, field in (
        ({"long": 2, "short": 1}, {3: ["long0000001"]}, "weights before step 10"),
        ({0: {"long": 1, "short": 1}, 9: {"rare": 1}}, {3: ["long0000001"]}, "weights before step 10"),
        ({"long": 1, "short": 1}, {3: ["long0000002"]}, "excluded before step 10"),
        ({"long": 1, "short": 1}, {3: ["long0000001"], 9: ["x"]}, "excluded before step 10"),
    ):
        with pytest.raises(ConfigError, match=f"cannot resume: {field} was"):
            schedule(weights, exclude=exclude).position(state)


def test_a_data_set_may_join_later_but_not_vanish_or_change() -> None:
    two = {"long": LONG, "short": SHORT}
    old = schedule({"long": 1, "short": 1}, two)
    _, position = take(old, 4)
    grown = schedule({0: {"long": 1, "short": 1}, 6: {"rare": 1}}).position(old.state(position))
    assert grown.cursors[:2] == position.cursors and grown == replace(position, cursors=grown.cursors, taken=grown.taken)
    with pytest.raises(ConfigError, match="'short' is missing"):
        schedule({"long": 1}, {"long": LONG}).position(old.state(position))
    with pytest.raises(ConfigError, match="fingerprint of data set 'short' was"):
        other = MemoryDataset.random(300, mean=25, longest=200, block=8, seed=9, name="short")
        schedule({"long": 1, "short": 1}, {"long": LONG, "short": other}).position(old.state(position))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"other": 1}, "unknown data set 'other'"),
        ({"long": -1, "short": 2}, "not negative"),
        ({"long": 0}, "not all 0"),
        ({"long": float("nan")}, "finite"),
        ({"long": 1, "short": 1e-9}, "under one part"),
        ({3: {"long": 1}}, "from step 0 on"),
        ({}, "from step 0 on"),
    ],
)
def test_impossible_weights_are_refused_in_words(weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(ALL, weights)


def test_data_sets_of_different_vocabularies_cannot_be_mixed() -> None:
    other = MemoryDataset([("a", [1, 2], [False, True])], vocab_size=100)
    with pytest.raises(ConfigError, match="different vocabularies"):
        Mixture({"long": LONG, "other": other}, {"long": 1, "other": 1})
