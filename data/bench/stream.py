"""The packed stream against other loaders, on the same dialogues, in one run, on one core.

    chatmill bench data [--against webdataset,streaming,litdata] [--python OTHER/bin/python] [--data corpora/chitchat]
    python -m chatmill.data.bench.stream --dialogues 2000 --rounds 3          # the same

Each loader reads every dialogue once (ids and loss mask as numpy arrays), in process, files in the page cache; loaders take
turns and the median of their CPU times counts, so that a busy machine disturbs all alike. Chatmill does more in its time: it
also packs, builds targets, positions, segments and row indices, and makes tensors.

webdataset: one sample per dialogue (ids.npy, mask.npy), `.decode()`. streaming is mosaicml-streaming (MDS). What is not
importable here runs in the interpreter of --python, in the same turns. first batch, resume: wall time from opening; resume is
from half of the epoch (webdataset has no position and must replay). memory: growth of the resident set, per million dialogues,
between two data sets of short dialogues, from opening to the first item.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from chatmill.config import ConfigError

from ..conversation import TokenizedDialogue
from ..shards.dataset import TokenDataset
from ..shards.manifest import MANIFEST
from ..shards.memory import IndexedDataset, MemoryDataset
from ..shards.writer import ShardWriter
from ..stream import PackedStream
from . import other_loaders
from .other_loaders import OTHERS, Loader, Resumed, Turn, folder_bytes, memory_growth, take_turn

Dialogue = tuple[str, NDArray[Any], NDArray[np.bool_]]
AGAINST = tuple(OTHERS)


# ---------------------------------------------------------------- the same dialogues in every format


def write_token_shards(folder: Path, dialogues: list[Dialogue]) -> Path:
    """Chatmill's token shards."""
    writer = ShardWriter(folder, "train", vocab_size=65_536)
    for uid, ids, mask in dialogues:
        writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "bench", uid)
    splits = {"train": {"shards": writer.close()}}
    manifest = {"format": 1, "vocab_size": 65_536, "tokenizer_sha256": "-", "template_sha256": "-", "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def chatmill_loader(folder: Path, sequence_length: int) -> Loader:
    """Packed batches of 32768 tokens; prefetch off: its thread would be a second core."""

    def stream() -> PackedStream:
        dataset = TokenDataset.open(folder, "train")
        micro = max(1, 32_768 // sequence_length)
        return PackedStream(dataset, sequence_length=sequence_length, micro_batch=micro, epochs=1, prefetch=0)

    def count(source: PackedStream) -> Iterable[int]:
        return (batch.n_tokens for batch in source)

    def resume(half: int) -> Iterable[int]:
        first = stream()
        ends = [first.schedule.start, *(planned.end for planned in islice(first.schedule.steps(), half))]
        state = first.schedule.state(ends[-1])
        return Resumed(lambda: _load(stream(), state), count)

    packed = sum(len(planned.packs) for planned in stream().schedule.steps()) * sequence_length
    return Loader(f"chatmill {sequence_length}", lambda: count(stream()), resume, folder_bytes(folder), packed)


def _load(stream: PackedStream, state: dict[str, Any]) -> PackedStream:
    stream.load_state_dict(state)
    return stream


def write_dialogues(folder: Path, dialogues: list[Dialogue]) -> None:
    """dialogues.npz, from which the other loaders' formats are written."""
    lengths = [len(ids) for _, ids, _ in dialogues]
    ids, mask = (np.concatenate([dialogue[k] for dialogue in dialogues]) for k in (1, 2))
    np.savez(folder / "dialogues.npz", ids=ids, mask=mask, offsets=np.cumsum([0, *lengths]))


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Entrant:
    """A loader of this process or of another one. turn() is one pass over the data.

    memory: a command that, with a folder of dialogues as its last word, prints memory_growth.
    """

    name: str
    turn: Callable[[], Turn]
    bytes: int
    packed_tokens: int | None = None
    memory: Sequence[str] = ()


def here(loader: Loader, memory: Sequence[str] = ()) -> Entrant:
    """A loader of this process."""
    return Entrant(loader.name, partial(take_turn, loader), loader.bytes, loader.packed_tokens, memory)


def others(python: str, folder: Path, names: Sequence[str], stack: ExitStack) -> dict[str, Entrant]:
    """The loaders, by module, that an interpreter has the packages for, in a process that ends with the stack."""
    script = str(Path(other_loaders.__file__).resolve())
    # Not this environment's packages: that interpreter has its own.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        process = subprocess.Popen(
            [python, script, "serve", str(folder), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
    except OSError as error:
        raise ConfigError(f"bench data: --python {python} cannot be started: {error.strerror}.") from None
    stack.callback(process.wait)
    assert process.stdin is not None and process.stdout is not None
    stack.callback(process.stdin.close)
    found = _answer(process.stdout, python)
    sends, answers = process.stdin, process.stdout

    def turn(name: str) -> Turn:
        print(name, file=sends, flush=True)
        return Turn(**_answer(answers, python))

    return {
        name: Entrant(title, partial(turn, name), size, None, (python, script, "memory", name))
        for name, (title, size) in found.items()
    }


def _answer(lines: IO[str], python: str) -> dict[str, Any]:
    line = lines.readline()
    if not line:
        raise ConfigError(
            f"bench data: the process of --python {python} ended without an answer. It needs numpy and the loaders; see\n"
            f"{python} {other_loaders.__file__} serve FOLDER {' '.join(AGAINST)}"
        )
    answer: dict[str, Any] = json.loads(line)
    return answer


def measure(entrants: Sequence[Entrant], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Every loader `rounds` times, taking turns; medians."""
    turns: dict[str, list[Turn]] = {entrant.name: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant in entrants:
            turn = entrant.turn()
            if turn.tokens != tokens:
                raise ValueError(f"bench data: {entrant.name} gave {turn.tokens:,} tokens, expected {tokens:,}")
            turns[entrant.name].append(turn)
    return [_result(entrant, turns[entrant.name], tokens) for entrant in entrants]


def _result(entrant: Entrant, turns: list[Turn], tokens: int) -> dict[str, Any]:
    """mtokens_per_s: million tokens per second of CPU time of one core. fill: None where nothing is packed."""
    resumed = [turn.resume_s for turn in turns if turn.resume_s is not None]
    return {
        "loader": entrant.name,
        "mtokens_per_s": tokens / statistics.median(turn.cpu_s for turn in turns) / 1e6,
        "fill": tokens / entrant.packed_tokens if entrant.packed_tokens else None,
        "first_batch_ms": statistics.median(turn.first_s for turn in turns) * 1e3,
        "resume_ms": statistics.median(resumed) * 1e3 if resumed else None,
        "bytes_per_token": entrant.bytes / tokens,
    }


def memory_by_loader(entrants: Sequence[Entrant], root: Path, dialogues: int) -> dict[str, float]:
    """MiB per million dialogues of each loader that names a command: its growth from a quarter of the dialogues to all."""
    grown: dict[str, list[int]] = {entrant.name: [] for entrant in entrants if entrant.memory}
    for count in (dialogues // 4, dialogues):
        folder = root / f"memory-{count}"
        folder.mkdir()
        made = MemoryDataset.random(count, mean=12, spread=0.3, longest=64)
        items: list[Dialogue] = list(zip(made.uids, made.ids, made.masks, strict=True))
        write_dialogues(folder, items)
        write_token_shards(folder / "chatmill", items)
        del made, items
        for entrant in entrants:
            if entrant.memory:
                said = subprocess.run([*entrant.memory, str(folder)], capture_output=True, text=True, check=True).stdout
                grown[entrant.name].append(int(said.split()[-1]))
    return {name: (all_ - quarter) / (dialogues * 3 // 4) * 1e6 / 2**20 for name, (quarter, all_) in grown.items()}


def resume_at_scale(count: int) -> dict[str, float]:
    """Milliseconds from a saved position to the first batch, at the start and at the end of an epoch of `count` dialogues."""
    source = IndexedDataset(count)
    out = {}
    for name, where in (("start", 0.0), ("middle", 0.5), ("end", 0.999)):
        stream = PackedStream(source, sequence_length=8192, micro_batch=4, prefetch=0)
        state = stream.state_dict()
        state["sources"]["data"]["window"] = int(where * stream.schedule.orders[0].windows)
        began = time.perf_counter()
        stream = PackedStream(source, sequence_length=8192, micro_batch=4, prefetch=0)
        stream.load_state_dict(state)
        next(iter(stream))
        out[name] = (time.perf_counter() - began) * 1e3
    return out


def memory_per_million() -> dict[str, float]:
    """MiB per million dialogues: the index, and the peak on top of it while a window is planned and read."""
    tracemalloc.start()
    source = IndexedDataset(1_000_000)
    index = tracemalloc.get_traced_memory()[0]
    stream = PackedStream(source, sequence_length=8192, prefetch=0)
    tracemalloc.reset_peak()
    next(iter(stream))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"index_mib": index / 2**20, "window_mib": (peak - index) / 2**20}


def bench(
    *,
    dialogues: int = 20_000,
    mean: float = 500,
    data: str | None = None,
    rounds: int = 5,
    lengths: tuple[int, ...] = (2048, 8192, 32768),
    scale: int = 10_000_000,
    against: Sequence[str] = AGAINST,
    python: str | None = None,
    memory_dialogues: int = 0,
) -> dict[str, Any]:
    """Everything measured, as plain JSON values. python: another interpreter for the loaders that this one lacks."""
    unknown = sorted(set(against) - set(AGAINST))
    if unknown:
        raise ConfigError(f"bench data: no loader {unknown[0]!r} to compare with; there are {', '.join(AGAINST)}.")
    if data is None:
        made = MemoryDataset.random(dialogues, mean=mean, spread=1.0, longest=min(lengths))
        items: list[Dialogue] = list(zip(made.uids, made.ids, made.masks, strict=True))
    else:
        items = _read_all(data, min(lengths))
    tokens = sum(len(ids) for _, ids, _ in items)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_dialogues(root, items)
        shards = write_token_shards(root / "chatmill", items)
        ours = (sys.executable, "-m", "chatmill.data.bench.stream", "--memory-of")
        entrants = [here(chatmill_loader(shards, length), ours if not k else ()) for k, length in enumerate(lengths)]
        local = [name for name in against if importlib.util.find_spec(name) is not None]
        rest = [name for name in against if name not in local]
        found: dict[str, Entrant] = {}
        for interpreter, names in ((sys.executable, local), (python, rest)):
            if interpreter and names:
                found |= others(interpreter, root, names, stack)
        entrants += found.values()
        results = measure(entrants, tokens, rounds)
        memory = memory_by_loader(entrants, root, memory_dialogues) if memory_dialogues else {}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "dialogues": len(items),
        "tokens": tokens,
        "rounds": rounds,
        "loaders": [result | {"memory_mib": memory.get(result["loader"])} for result in results],
        "not_importable": [name for name in rest if name not in found],
        "resume_at_scale": {"dialogues": scale, "ms": resume_at_scale(scale)},
        "memory_per_million": memory_per_million(),
    }


def _read_all(path: str, longest: int) -> list[Dialogue]:
    """Dialogues of a data set that fit the shortest pack, so that every loader reads the same tokens."""
    dataset = TokenDataset.open(path, "train")
    items: list[Dialogue] = []
    for b in range(len(dataset.block_starts) - 1):
        block = dataset.read_block(b)
        for uid, start, stop in zip(block.uids, block.offsets[:-1], block.offsets[1:], strict=True):
            if stop - start <= longest:
                items.append((uid, block.ids[start:stop], block.loss_mask[start:stop]))
    return items


def table(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = [
        f"{results['dialogues']:,} dialogues, {results['tokens']:,} tokens; {results['machine']}",
        f"median of {results['rounds']} rounds, CPU time of one core; first batch and resume: wall time",
        f"{'loader':<20} {'Mtok/s':>8} {'x webdataset':>13} {'fill':>8} {'first batch':>12} {'resume':>11} {'B/token':>8} "
        f"{'MiB/million':>12}",
    ]
    base = next((r["mtokens_per_s"] for r in results["loaders"] if r["loader"] == "webdataset"), None)
    for r in results["loaders"]:
        fill = "-" if r["fill"] is None else f"{r['fill']:.2%}"
        resume = "none" if r["resume_ms"] is None else f"{r['resume_ms']:.1f} ms"
        times = "-" if base is None else f"{r['mtokens_per_s'] / base:.1f}"
        memory = "-" if r["memory_mib"] is None else f"{r['memory_mib']:.0f}"
        lines.append(
            f"{r['loader']:<20} {r['mtokens_per_s']:>8.1f} {times:>13} {fill:>8} "
            f"{r['first_batch_ms']:>9.1f} ms {resume:>11} {r['bytes_per_token']:>8.2f} {memory:>12}"
        )
    scale = results["resume_at_scale"]
    ten = ", ".join(f"{name} {ms:.0f} ms" for name, ms in scale["ms"].items())
    memory = results["memory_per_million"]
    lines.append(f"resume in {scale['dialogues']:,} dialogues, to the first batch: {ten}")
    lines.append(
        f"memory per 1,000,000 dialogues: index {memory['index_mib']:.1f} MiB; open window {memory['window_mib']:.1f} MiB"
    )
    if results["not_importable"]:
        lines.append(f"not importable here, so not compared (see --python): {', '.join(results['not_importable'])}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="The packed stream against other loaders.")
    parser.add_argument("--dialogues", type=int, default=20_000)
    parser.add_argument("--mean", type=float, default=500, help="mean length in tokens of the made-up dialogues")
    parser.add_argument("--data", help="a data set made by `chatmill data build`, instead of made-up dialogues")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", default=",".join(AGAINST), help=f"loaders to compare with (default {','.join(AGAINST)})")
    parser.add_argument("--python", help="another interpreter, for those loaders that this one cannot import")
    parser.add_argument(
        "--memory-dialogues",
        type=int,
        default=0,
        help="also measure memory, with this number of short dialogues",
    )
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if options.memory_of is not None:
        loader = Loader("chatmill", partial(_open_again, options.memory_of / "chatmill"), None, 0)
        print(memory_growth(loader))
        return 0
    results = bench(
        dialogues=options.dialogues,
        mean=options.mean,
        data=options.data,
        rounds=options.rounds,
        against=[name for name in options.against.split(",") if name],
        python=options.python,
        memory_dialogues=options.memory_dialogues,
    )
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _open_again(folder: Path) -> Iterator[int]:
    stream = PackedStream(TokenDataset.open(folder, "train"), sequence_length=2048, micro_batch=16, epochs=1, prefetch=0)
    return (batch.n_tokens for batch in stream)


if __name__ == "__main__":
    raise SystemExit(main())
