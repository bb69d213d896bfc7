"""The packed stream: right tokens, targets and counts; order, length, errors; what a batch carries."""

from __future__ import annotations

import json
import threading
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.stream_cases import LENGTH, SOURCE, mixture, rows_of, small_windows, stream

from chatmill.config import ConfigError
from chatmill.data.shards.memory import MemoryDataset

__all__ = ["small_windows"]  # a fixture of this module


def slow_targets(ids: list[int], mask: list[bool]) -> list[int]:
    return [ids[i + 1] if mask[i + 1] else -100 for i in range(len(ids) - 1)] + [-100]


@pytest.mark.parametrize("micro", [1, 3])
def test_every_field_of_a_batch_is_what_a_slow_loop_over_its_dialogues_gives(micro: int) -> None:
    T = micro * LENGTH
    truth = {uid: (i.tolist(), m.tolist()) for uid, i, m in zip(SOURCE.uids, SOURCE.ids, SOURCE.masks, strict=True)}
    truncated = 0
    for batch in islice(stream(micro_batch=micro), 40):
        cu = batch.cu_seqlens.tolist()
        assert cu[0] == 0 and cu[-1] == T and all(a < b for a, b in pairwise(cu))
        assert [t.dtype for t in (batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, batch.rows)] == [
            torch.int32, torch.int64, torch.int32, torch.int32, torch.int32,
        ]  # fmt: skip
        assert batch.max_seqlen == max(b - a for a, b in pairwise(cu))
        uids = iter(batch.uids)
        n_tokens = loss = 0
        for a, b in pairwise(cu):
            assert batch.positions[a:b].tolist() == list(range(b - a))
            assert a // LENGTH == (b - 1) // LENGTH, "a segment crosses a pack"
            tokens, targets = batch.tokens[a:b].tolist(), batch.targets[a:b].tolist()
            if not any(tokens):  # ids are never 0 here
                assert b % LENGTH == 0 and set(targets) == {-100}
                continue
            ids, mask = truth[next(uids)]
            assert len(ids) == b - a or len(ids) > LENGTH
            truncated += len(ids) != b - a
            assert tokens == ids[: b - a] and targets == slow_targets(ids[: b - a], mask[: b - a])
            n_tokens, loss = n_tokens + b - a, loss + sum(t != -100 for t in targets)
        assert next(uids, None) is None
        assert (batch.n_tokens, batch.loss_tokens) == (n_tokens, loss)
        rows = batch.rows.tolist()
        valid = [t for t, target in enumerate(batch.targets.tolist()) if target != -100]
        assert (
            rows == valid + [-1] * (len(rows) - len(valid))
            and len(rows) % 128 == 0
            and len(rows) - len(valid) < 128 + 128 * (not valid)
        )
    assert truncated > 0


def test_the_first_token_of_a_dialogue_is_never_a_target() -> None:
    pair = [("a", [1, 2, 3], [False, True, True]), ("b", [4, 5, 6], [False, False, True])]
    (batch,) = stream(MemoryDataset(pair), sequence_length=8, shuffle=False, epochs=1)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert batch.targets.tolist() == [2, 3, -100, -100, 6, -100, -100, -100]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and batch.cu_seqlens.tolist() == [0, 3, 6, 8]
    assert batch.rows.tolist() == [0, 1, 4] + [-1] * 125
    assert (batch.loss_tokens, batch.n_tokens, batch.step_loss_tokens, batch.step_tokens) == (3, 6, 3, 6)


def test_each_epoch_uses_each_dialogue_once_and_in_another_order() -> None:
    run = stream(epochs=2)
    uids = [uid for batch in run for uid in batch.uids]
    kept = len(SOURCE) - run.counts["dropped"] // 2
    assert len(uids) == 2 * kept and set(Counter(uids[:kept]).values()) == {1}
    assert sorted(uids[:kept]) == sorted(uids[kept:]) and uids[:kept] != uids[kept:]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_sees_each_dialogue_once_in_equally_many_steps_on_every_rank(world: int) -> None:
    ranks = [list(stream(shuffle=False, epochs=1, rank=r, world_size=world, micro_batch=2)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    uids = Counter(uid for batches in ranks for batch in batches for uid in batch.uids)
    single = stream(shuffle=False, epochs=1)
    assert uids == Counter(uid for batch in single for uid in batch.uids)
    assert set(uids.values()) == {1} and len(uids) == len(SOURCE) - single.counts["dropped"]
    for batches in zip(*ranks, strict=True):
        assert {b.step_loss_tokens for b in batches} == {sum(b.loss_tokens for b in batches)}
        assert {b.step_tokens for b in batches} == {sum(b.n_tokens for b in batches)}


def test_a_second_pass_over_an_ended_stream_starts_again() -> None:
    run = stream(shuffle=False, epochs=1, prefetch=2)
    first, second = ([rows_of(batch) for batch in run] for _ in range(2))
    assert first == second and first
    done = stream(shuffle=False, epochs=1)
    done.load_state_dict(run.state_dict())
    assert list(done) == []


def test_max_dialogues_takes_the_first_of_the_data_set() -> None:
    run = stream(shuffle=False, epochs=1, max_dialogues=50, sequence_length=400)
    assert sorted(uid for batch in run for uid in batch.uids) == SOURCE.uids[:50]


@pytest.mark.parametrize(("overlong", "overlap"), [("truncate", 0), ("split", 8), ("split", 0), ("drop", 0)])
def test_overlong_dialogues_are_counted_and_their_loss_is_in_the_step_count(overlong: str, overlap: int) -> None:
    run = stream(overlong=overlong, overlap=overlap, epochs=1)
    batches = list(run)  # a wrong count of supervised tokens raises here
    long = int((SOURCE.lengths > LENGTH).sum())
    counts = run.counts
    assert counts["overlong"] == long == counts["truncated"] + counts["split"] + counts["dropped"]
    total = sum(b.loss_tokens for b in batches)
    everything, short = int(SOURCE.loss_tokens.sum()), int(SOURCE.loss_tokens[SOURCE.lengths <= LENGTH].sum())
    if overlong == "split":
        assert counts["split"] > 0 and (total == everything if overlap else short < total <= everything)
    elif overlong == "drop":
        assert total == short and counts["dropped"] == long
    else:
        assert short < total < everything and counts["truncated"] > 0


def test_a_piece_that_starts_inside_a_turn_does_not_supervise_its_first_token() -> None:
    source = MemoryDataset([("a", [1, 2, 3, 4, 5, 6, 7, 8], [False, False] + [True] * 6)])
    (batch,) = stream(source, sequence_length=4, micro_batch=2, overlong="split", shuffle=False, epochs=1)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8] and batch.uids == ("a", "a")
    assert batch.targets.tolist() == [-100, 3, 4, -100, 6, 7, 8, -100] and batch.step_loss_tokens == 5


def altered(**change: Any) -> MemoryDataset:
    other = MemoryDataset.random(700, mean=40, longest=300, block=16)
    other.manifest = other.manifest | change
    return other


@pytest.mark.parametrize(
    ("field", "source", "options"),
    [
        ("seed", SOURCE, {"seed": 1}),
        ("sequence_length", SOURCE, {"sequence_length": 256}),
        ("global_batch", SOURCE, {"micro_batch": 2}),
        ("shuffle", SOURCE, {"shuffle": False}),
        ("overlong", SOURCE, {"overlong": "drop"}),
        ("dialogues", SOURCE, {"max_dialogues": 10}),
        ("fingerprint", MemoryDataset.random(700, mean=40, longest=300, block=16, seed=9), {}),
        ("tokenizer_sha256", altered(tokenizer_sha256="other"), {}),
        ("template_sha256", altered(template_sha256="other"), {}),
    ],
)
def test_a_position_of_another_stream_is_refused_and_the_field_named(field: str, source: Any, options: dict[str, Any]) -> None:
    run = stream()
    list(islice(run, 3))
    with pytest.raises(ConfigError, match=f"cannot resume: {field} was"):
        stream(source, **options).load_state_dict(run.state_dict())


def test_the_state_is_a_few_plain_values() -> None:
    run = stream()
    list(islice(run, 3))
    text = json.dumps(run.state_dict())
    assert len(text) < 600 and run.state_dict()["step"] == 3


def test_shards_that_disagree_with_their_index_are_refused() -> None:
    source = MemoryDataset.random(20, block=8)
    source.loss_tokens = source.loss_tokens + 1
    with pytest.raises(ConfigError, match="supervised tokens"):
        next(iter(stream(source, sequence_length=100_000)))
    source, read_block = MemoryDataset.random(20, block=8), source.read_block
    source.read_block = lambda block: read_block(1 - block)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="lengths"):
        next(iter(stream(source, sequence_length=100_000)))


def test_a_data_set_without_anything_to_learn_ends_in_an_error_and_not_in_a_loop() -> None:
    source = MemoryDataset([("a", list(range(1, 40)), [False] * 39)])
    with pytest.raises(ConfigError, match="no dialogue of the data set can be used"):
        next(iter(stream(source, sequence_length=8)))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "world_size": 2},
        {"sequence_length": 1},
        {"overlap": 128},
        {"global_batch": 9},
        {"epochs": 0},
        {"overlong": "x"},
    ],
)
def test_impossible_options_are_refused_in_words(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.stream: .*="):
        stream(**options)


def test_annotate_sees_the_segments_and_its_answer_travels_with_the_batch() -> None:
    class Maps:
        def __init__(self, cu: np.ndarray, T: int) -> None:
            self.cu, self.T, self.device = cu.copy(), T, "host"

        def to(self, device: Any, non_blocking: bool) -> Maps:
            self.device = str(device)
            return self

    batch = next(iter(stream(annotate=Maps, micro_batch=2)))
    assert batch.tile_maps.T == 2 * LENGTH and batch.tile_maps.cu.tolist() == batch.cu_seqlens.tolist()
    moved = batch.to("cpu")
    assert moved.tile_maps.device == "cpu" and torch.equal(moved.tokens, batch.tokens) and moved.uids == batch.uids


def prefetch_threads() -> int:
    return sum(thread.name == "chatmill-prefetch" for thread in threading.enumerate())


def test_the_prefetch_thread_gives_the_same_batches_and_ends_with_the_loop() -> None:
    expected = [rows_of(batch) for batch in islice(stream(), 30)]
    before = prefetch_threads()
    iterator = iter(stream(prefetch=3))
    assert [rows_of(batch) for batch in islice(iterator, 30)] == expected
    assert prefetch_threads() == before + 1
    iterator.close()
    assert prefetch_threads() == before
    for _ in stream(prefetch=3):
        break
    assert prefetch_threads() == before


def test_the_state_counts_batches_handed_out_and_not_those_built_ahead() -> None:
    run = stream(prefetch=4)
    iterator = iter(run)
    for _ in range(5):
        next(iterator)
    assert run.state_dict()["step"] == 5
    iterator.close()


def test_an_error_of_the_prefetch_thread_reaches_the_loop_after_the_good_batches() -> None:
    calls = []

    def fail_third(cu: np.ndarray, T: int) -> None:
        calls.append(T)
        if len(calls) == 3:
            raise RuntimeError("third")

    iterator = iter(stream(prefetch=4, annotate=fail_third))
    assert next(iterator) and next(iterator)
    with pytest.raises(RuntimeError, match="third"):
        next(iterator)


def test_what_came_after_a_saved_state_can_be_named_and_left_out() -> None:
    run = stream(mixture(), micro_batch=4)
    states, used = [run.state_dict()], []
    for batch in islice(run, 40):
        used.append(list(batch.uids))
        states.append(run.state_dict())
    assert run.uids_between(states[20], 25, 27) == used[24] + used[25] + used[26]
    with pytest.raises(ConfigError, match="40 steps are done"):
        run.exclude(20, used[24])
    run.load_state_dict(states[20])
    run.exclude(20, used[24])
    again = [list(batch.uids) for batch in islice(run, 20)]
    assert not {uid for uids in again for uid in uids} & set(used[24])
    assert again != used[20:]
    fresh = stream(mixture(), micro_batch=4, exclude={20: used[24]})
    assert [list(batch.uids) for batch in islice(fresh, 40)] == used[:20] + again
    assert run.state_dict() == fresh.state_dict()
