"""The same global batches however the work is divided over ranks, micro-batches and workers, killed and resumed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.stream_cases import MIXED, SOURCE, mixture, rows_of, small_windows, stream

from chatmill.config import ConfigError
from chatmill.data.stream import PackedBatch, PackedStream

__all__ = ["small_windows"]  # a fixture of this module

LAYOUTS = [  # world size, micro-batch, accumulation: 24 packs per step
    (1, 1, 24), (1, 24, 1), (2, 3, 4), (3, 2, 4), (3, 8, 1), (4, 1, 6), (8, 3, 1), (8, 1, 3),
]  # fmt: skip


Layout = tuple[int, int, int]


def as_arrays(batch: PackedBatch) -> PackedBatch:
    """The batch with arrays for its tensors: they come out of a worker in the batch's own pickle, ten times faster."""
    return batch._map(lambda tensor: tensor.numpy(), batch.tile_maps)


def loaded(ranked: PackedStream, workers: int) -> Iterator[PackedBatch]:
    """The batches of a stream: iterated itself, or through a DataLoader with worker processes."""
    if not workers:
        return iter(ranked)
    shared = ranked.options.world_size == 1  # as in training: tensors in shared memory; other worlds differ in the rank alone
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
            for k, row in enumerate(rows_of(batch, ranked.options.sequence_length)):
                per_step[step][(a * world + rank) * micro + k] = row
            promised[step].add((batch.step_loss_tokens, batch.step_tokens))
            counted[step] += batch.loss_tokens, batch.n_tokens
        states.append(json.dumps(ranked.state_dict(batch), sort_keys=True))
        assert workers or ranked.state_dict() == ranked.state_dict(batch)
    assert len(set(states)) == 1, "the state differs between ranks"
    assert promised == [{tuple(pair)} for pair in counted.tolist()], "step counts differ between ranks or from their sum"
    hashes = [hashlib.sha256(b"".join(packs[k] for k in sorted(packs))).hexdigest() for packs in per_step]
    return hashes, json.loads(states[0])


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
    part, state = global_batches(source, 35, LAYOUTS[0], **options)
    assert part == expected[:35]
    for layout, workers, prefetch in COVERED:
        if not workers:
            assert global_batches(source, 200, layout, prefetch=prefetch, **options) == (expected, end), layout
        elif mixed:  # the harder stream is enough for the slow ones, and so is its beginning
            assert global_batches(source, 35, layout, workers=workers, **options) == (part, state), (layout, workers)


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
from chatmill.data.packing.mixture import Mixture
from chatmill.data.stream import PackedStream
from chatmill.data.shards.memory import MemoryDataset
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
