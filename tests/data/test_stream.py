"""The packed stream: right tokens, targets and counts; the same global batches however the work is divided and interrupted."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatmill.config import ConfigError
from chatmill.data.mixture import Mixture
from chatmill.data.order import Order
from chatmill.data.stream import PackedBatch, PackedStream
from chatmill.data.synthetic import MemoryDataset

SOURCE = MemoryDataset.random(700, mean=40, longest=300, block=16)
LENGTH = 128
LAYOUTS = [  # world size, micro-batch, accumulation: 24 packs per step
    (1, 1, 24), (1, 24, 1), (2, 3, 4), (3, 2, 4), (3, 8, 1), (4, 1, 6), (8, 3, 1), (8, 1, 3),
]  # fmt: skip


Layout = tuple[int, int, int]


@pytest.fixture(scope="module", autouse=True)
def small_windows() -> Iterator[None]:
    """Several windows per epoch, as in data sets of a real size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chatmill.data.order.WINDOW_DIALOGUES", 130)
        patch.setattr("chatmill.data.order.WINDOW_PACKS", 1)
        assert Order.of(SOURCE, capacity=128, seed=0, shuffle=True).windows == 5
        yield


def stream(source: Any = SOURCE, **options: Any) -> PackedStream:
    return PackedStream(source, **{"sequence_length": LENGTH, "prefetch": 0, **options})


def rows_of(batch: PackedBatch, length: int = LENGTH) -> list[bytes]:
    """Each pack of a batch as bytes: tokens, targets, positions."""
    parts = [np.asarray(getattr(batch, name)).reshape(-1, length) for name in ("tokens", "targets", "positions")]
    return [b"".join(part[k].tobytes() for part in parts) for k in range(len(parts[0]))]


def as_arrays(batch: PackedBatch) -> PackedBatch:
    """The batch with arrays for its tensors: they come out of a worker in the batch's own pickle, ten times faster."""
    return batch._map(lambda tensor: tensor.numpy(), batch.plan)


def loaded(ranked: PackedStream, workers: int) -> Iterator[PackedBatch]:
    """The batches of a stream: iterated itself, or through a DataLoader with worker processes."""
    if not workers:
        return iter(ranked)
    shared = ranked.world_size == 1  # as in training: tensors in shared memory; other worlds differ in the rank alone
    return iter(
        torch.utils.data.DataLoader(ranked, batch_size=None, num_workers=workers, collate_fn=None if shared else as_arrays)
    )


def global_batches(
    source: Any, steps: int, layout: Layout, state: Any = None, workers: int = 0, **options: Any
) -> tuple[list[str], Any]:
    """Hash of every step's packs in global order, put together from all ranks, and the state after the last step."""
    world, micro, accumulation = layout
    per_step: list[dict[int, bytes]] = [{} for _ in range(steps)]
    promised: list[set[tuple[int, int]]] = [set() for _ in range(steps)]
    counted = np.zeros((steps, 2), int)
    states = []
    for rank in range(world):
        ranked = stream(source, micro_batch=micro, accumulation=accumulation, rank=rank, world_size=world, **options)
        if state is not None:
            ranked.load_state_dict(json.loads(json.dumps(state)))
        batch = None
        for at, batch in enumerate(islice(loaded(ranked, workers), steps * accumulation)):
            step, a = divmod(at, accumulation)
            for k, row in enumerate(rows_of(batch, ranked.sequence_length)):
                per_step[step][(a * world + rank) * micro + k] = row
            promised[step].add((batch.step_loss_tokens, batch.step_tokens))
            counted[step] += batch.loss_tokens, batch.n_tokens
        states.append(json.dumps(ranked.state_dict(batch), sort_keys=True))
        assert workers or ranked.state_dict() == ranked.state_dict(batch)
    assert len(set(states)) == 1, "the state differs between ranks"
    assert promised == [{tuple(pair)} for pair in counted.tolist()], "step counts differ between ranks or from their sum"
    hashes = [hashlib.sha256(b"".join(packs[k] for k in sorted(packs))).hexdigest() for packs in per_step]
    return hashes, json.loads(states[0])


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


def mixture() -> Mixture:
    """Two data sets, a third from step 20 on."""
    sources = {name: MemoryDataset.random(n, mean=40, longest=300, block=16, seed=n, name=name) for name, n in SIZES.items()}
    return Mixture(sources, {0: {"a": 3, "b": 1}, 20: {"a": 1, "b": 1, "c": 1}})


SIZES = {"a": 300, "b": 200, "c": 90}
MIXED: dict[str, Any] = {"exclude": {9: [f"a{i:07d}" for i in range(80)], 31: [f"b{i:07d}" for i in range(50)]}}


# Worker processes are slow to start and to hand batches over: with them every world size meets every number of workers, in
# layouts of few batches. Prefetch threads (0 and 2 ahead) alternate.
COVERED: list[tuple[Layout, int, int]] = [
    *((layout, 0, 2 * (k % 2)) for k, layout in enumerate(LAYOUTS)),
    ((1, 24, 1), 1, 0), ((1, 8, 3), 2, 0), ((2, 12, 1), 1, 0), ((2, 6, 2), 2, 0), ((3, 8, 1), 1, 0), ((3, 4, 2), 2, 0),
    ((4, 6, 1), 1, 0), ((4, 3, 2), 2, 0), ((8, 3, 1), 1, 0), ((8, 3, 1), 2, 0),
]  # fmt: skip


def test_the_covering_meets_every_world_size_with_every_number_of_workers() -> None:
    assert {(layout[0], workers) for layout, workers, _ in COVERED} == {(w, n) for w in (1, 2, 3, 4, 8) for n in (0, 1, 2)}
    assert all(world * micro * accumulation == 24 for (world, micro, accumulation), _, _ in COVERED)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_200_global_batches_are_equal_for_every_division_of_the_work(mixed: bool) -> None:
    source, options = (mixture(), MIXED) if mixed else (SOURCE, {})
    expected, end = global_batches(source, 200, LAYOUTS[0], **options)
    assert len(set(expected)) == 200
    for layout, workers, prefetch in COVERED:
        if not workers or mixed:  # the harder stream is enough for the slow ones
            got = global_batches(source, 200, layout, workers=workers, prefetch=prefetch, **options)
            assert got == (expected, end), (layout, workers)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 3),
    mixed=st.booleans(),
    parts=st.lists(st.tuples(st.integers(1, 20), st.sampled_from(LAYOUTS), st.sampled_from([0, 2])), min_size=2, max_size=5),
    layout=st.sampled_from(LAYOUTS),
)
def test_kills_and_resumes_at_any_step_with_another_division_change_nothing(
    seed: int, mixed: bool, parts: list[tuple[int, Layout, int]], layout: Layout
) -> None:
    source, options = (mixture(), MIXED) if mixed else (SOURCE, {})
    expected, end = global_batches(source, sum(steps for steps, *_ in parts), layout, seed=seed, **options)
    got: list[str] = []
    state = None
    for steps, division, prefetch in parts:
        part, state = global_batches(source, steps, division, state, seed=seed, prefetch=prefetch, **options)
        got += part
    assert got == expected and state == end


@settings(max_examples=4, deadline=None)
@given(
    parts=st.lists(
        st.tuples(st.integers(1, 30), st.sampled_from([(1, 3, 8), (2, 12, 1), (3, 2, 4), (4, 3, 2)]), st.integers(0, 2)),
        min_size=2,
        max_size=3,
    )
)
def test_kills_and_resumes_may_change_the_number_of_loader_workers_too(parts: list[tuple[int, Layout, int]]) -> None:
    source = mixture()
    expected, end = global_batches(source, sum(steps for steps, *_ in parts), LAYOUTS[0], **MIXED)
    got: list[str] = []
    state = None
    for steps, division, workers in parts:
        part, state = global_batches(source, steps, division, state, workers, **MIXED)
        got += part
    assert got == expected and state == end


CONSUMER = """
import hashlib, json, os, sys
from pathlib import Path
from chatmill.data.mixture import Mixture
from chatmill.data.stream import PackedStream
from chatmill.data.synthetic import MemoryDataset
sources = {n: MemoryDataset.random(c, mean=40, longest=300, block=16, seed=c, name=n) for n, c in (("a", 300), ("b", 200))}
mixture = Mixture(sources, {0: {"a": 3, "b": 1}, 20: {"a": 1, "b": 1}})
exclude = {9: [f"a{i:07d}" for i in range(80)]}
world, micro, accumulation = map(int, sys.argv[2:5])
streams = [
    PackedStream(mixture, sequence_length=128, rank=rank, world_size=world, micro_batch=micro, accumulation=accumulation,
                 exclude=exclude, prefetch=2)
    for rank in range(world)
]
file = Path(sys.argv[1])
if file.exists():
    state = json.loads(file.read_text())
    for stream in streams:
        stream.load_state_dict(state)
ranks = [iter(stream) for stream in streams]
while True:
    rows = {}
    for a in range(accumulation):
        for rank, batches in enumerate(ranks):
            for k, row in enumerate(next(batches).tokens.reshape(micro, -1)):
                rows[(a * world + rank) * micro + k] = row.numpy().tobytes()
    state = streams[0].state_dict()
    print(state["step"], hashlib.sha256(b"".join(rows[k] for k in sorted(rows))).hexdigest(), flush=True)
    if state["step"] % 7 == 0:
        file.with_suffix(".new").write_text(json.dumps(state))
        os.replace(file.with_suffix(".new"), file)
"""


def test_a_consumer_killed_outright_continues_from_its_last_saved_state_in_another_world(tmp_path: Path) -> None:
    def consume(layout: Layout, lines: int) -> list[tuple[int, str]]:
        """(step, hash) of the first lines that a consumer process prints before it is killed with SIGKILL."""
        command = [sys.executable, "-c", CONSUMER, str(tmp_path / "state.json"), *map(str, layout)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            got = [process.stdout.readline().split() for _ in range(lines)]
            process.kill()
        assert process.returncode == -signal.SIGKILL
        return [(int(step), digest) for step, digest in got]

    first = consume((2, 3, 1), 40)
    saved = json.loads((tmp_path / "state.json").read_text())["step"]
    assert [step for step, _ in first] == list(range(1, 41)) and saved % 7 == 0 and saved >= 35
    second = consume((3, 1, 2), 25)
    assert [step for step, _ in second] == list(range(saved + 1, saved + 26))
    (tmp_path / "state.json").unlink()
    whole = dict(consume((1, 6, 1), saved + 25))
    assert {**dict(first), **dict(second)}.items() <= whole.items() and len(set(whole.values())) == len(whole)


def test_a_world_that_does_not_divide_the_global_batch_continues_it_with_masked_packs() -> None:
    expected, _ = global_batches(SOURCE, 10, (1, 8, 1))
    ranks = [stream(micro_batch=3, rank=r, world_size=3, global_batch=8) for r in range(3)]
    for step, batches in enumerate(islice(zip(*ranks, strict=True), 10)):
        rows = [row for batch in batches for row in rows_of(batch)]
        assert hashlib.sha256(b"".join(rows[:8])).hexdigest() == expected[step]
        assert set(batches[2].targets.reshape(3, -1)[2].tolist()) == {-100}


def test_the_state_inside_a_step_continues_with_the_next_micro_batch() -> None:
    whole = [rows_of(b) for b in islice(stream(accumulation=4), 12)]
    first = stream(accumulation=4)
    list(islice(first, 6))
    again = stream(accumulation=4)
    again.load_state_dict(first.state_dict())
    assert [rows_of(b) for b in islice(again, 6)] == whole[6:]
    other = stream(accumulation=2, micro_batch=2)
    with pytest.raises(ConfigError, match="inside a step with another layout"):
        other.load_state_dict(first.state_dict())


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


def test_annotate_sees_the_segments_and_its_plan_travels_with_the_batch() -> None:
    class Plan:
        def __init__(self, cu: np.ndarray, T: int) -> None:
            self.cu, self.T, self.device = cu.copy(), T, "host"

        def to(self, device: Any, non_blocking: bool) -> Plan:
            self.device = str(device)
            return self

    batch = next(iter(stream(annotate=Plan, micro_batch=2)))
    assert batch.plan.T == 2 * LENGTH and batch.plan.cu.tolist() == batch.cu_seqlens.tolist()
    moved = batch.to("cpu")
    assert moved.plan.device == "cpu" and torch.equal(moved.tokens, batch.tokens) and moved.uids == batch.uids


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


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_workers_give_the_same_batches_in_the_same_order(workers: int) -> None:
    options: dict[str, Any] = MIXED | {"accumulation": 3, "micro_batch": 2, "rank": 1, "world_size": 2}
    expected = [rows_of(batch) for batch in islice(stream(mixture(), **options), 20)]
    loader = torch.utils.data.DataLoader(stream(mixture(), **options), batch_size=None, num_workers=workers)
    assert [rows_of(batch) for batch in islice(loader, 20)] == expected


def test_a_stateful_loader_resumes_its_workers_without_losing_or_repeating_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdata's StatefulDataLoader keeps one state per worker and goes on with the worker whose turn it is."""
    expected = [rows_of(batch) for batch in islice(stream(accumulation=3), 40)]

    def as_worker(number: int, count: int) -> None:
        monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=number, num_workers=count))

    for workers in (1, 2, 3):
        for cut in (1, 4, 6, 7, 11):
            streams = [stream(accumulation=3) for _ in range(workers)]
            got, states, iterators = [], [], []
            for number, one in enumerate(streams):
                as_worker(number, workers)
                iterators.append(iter(one))
                part = [rows_of(batch) for batch in islice(iterators[-1], len(range(number, cut, workers)))]
                got += list(zip(range(number, cut, workers), part, strict=True))
                states.append(json.loads(json.dumps(one.state_dict())))
            for number, state in enumerate(states):
                as_worker(number, workers)
                again = stream(accumulation=3)
                again.load_state_dict(state)
                later = [k for k in range(number, 40, workers) if k >= cut]
                got += list(zip(later, [rows_of(batch) for batch in islice(again, len(later))], strict=True))
            assert [row for _, row in sorted(got)] == expected, (workers, cut)


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
