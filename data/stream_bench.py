"""The packed stream against other loaders, on the same dialogues, in one run, on one core.

    python -m chatmill.data.stream_bench [--dialogues 20000] [--mean 500] [--data corpora/chitchat] [--json results.json]

Each loader reads every dialogue once (ids and loss mask as numpy arrays), in process, files in the page cache; loaders take
turns and the median of their CPU times counts, so that a busy machine disturbs all alike. Chatmill does more in its time: it
also packs, builds targets, positions, segments and row indices, and makes tensors.

webdataset: one sample per dialogue (ids.npy, mask.npy), `.decode()`. mosaicml-streaming (MDS) and litdata run where importable.
resume: from half of the epoch to the first batch; webdataset has no position and must replay.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset import TarWriter, WebDataset

from chatmill.data.conversation import TokenizedDialogue
from chatmill.data.shards import MANIFEST, ShardWriter, TokenDataset
from chatmill.data.stream import PackedStream
from chatmill.data.synthetic import IndexedDataset, MemoryDataset

Dialogue = tuple[str, NDArray[Any], NDArray[np.bool_]]
Clock = Callable[[], float]


@dataclass(frozen=True)
class LoaderResult:
    """One loader. mtokens_per_s: million tokens per second of CPU time of one core. fill: None where nothing is packed."""

    loader: str
    mtokens_per_s: float
    fill: float | None
    first_batch_ms: float
    resume_ms: float | None
    bytes_per_token: float


@dataclass(frozen=True)
class Loader:
    """open() gives an iterable of token counts, one per item; resume(item) does so from the middle of the epoch."""

    name: str
    open: Callable[[], Iterable[int]]
    resume: Callable[[int], Iterable[int]] | None
    bytes: int
    packed_tokens: int | None = None


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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


class Resumed:
    """Opens when iterated: what had to be done to find a position before the interruption is not timed."""

    def __init__(self, make: Callable[[], Any], count: Callable[[Any], Iterable[int]]) -> None:
        self._make, self._count = make, count

    def __iter__(self) -> Any:
        return iter(self._count(self._make()))


def webdataset_loader(folder: Path, dialogues: list[Dialogue]) -> Loader:
    """One sample per dialogue in plain tars."""
    folder.mkdir()
    for number, start in enumerate(range(0, len(dialogues), 10_000)):
        with TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for uid, ids, mask in dialogues[start : start + 10_000]:
                writer.write({"__key__": uid, "ids.npy": _npy(ids), "mask.npy": _npy(mask)})
    shards = sorted(str(file) for file in folder.glob("*.tar"))

    def read() -> Iterable[int]:
        samples = WebDataset(shards, shardshuffle=False, empty_check=False).decode()
        return (len(sample["ids.npy"]) for sample in samples if len(sample["mask.npy"]) == len(sample["ids.npy"]))

    return Loader("webdataset", read, lambda half: islice(read(), half, None), folder_bytes(folder))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def mosaicml_loader(folder: Path, dialogues: list[Dialogue]) -> Loader:
    """MDS shards read through StreamingDataset, shuffled as it would be for training."""
    streaming = importlib.import_module("streaming")
    clean_stale_shared_memory = importlib.import_module("streaming.base.util").clean_stale_shared_memory

    with streaming.MDSWriter(out=str(folder), columns={"ids": "ndarray:uint16", "mask": "ndarray:uint8"}) as writer:
        for _, ids, mask in dialogues:
            writer.write({"ids": ids.astype(np.uint16), "mask": mask.view(np.uint8)})

    def dataset() -> Any:
        clean_stale_shared_memory()
        return streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=1)

    def count(source: Any) -> Iterable[int]:
        return (len(sample["ids"]) for sample in source if len(sample["mask"]) == len(sample["ids"]))

    def resume(half: int) -> Iterable[int]:
        state = dataset().state_dict(half, from_beginning=True)

        def again() -> Any:
            fresh = dataset()
            fresh.load_state_dict(state)
            return fresh

        return Resumed(again, count)

    return Loader("mosaicml-streaming", lambda: count(dataset()), resume, folder_bytes(folder))


def litdata_loader(folder: Path, dialogues: list[Dialogue]) -> Loader:
    """litdata chunks read through its StreamingDataset, shuffled."""
    litdata = importlib.import_module("litdata")
    folder.mkdir()
    cache = importlib.import_module("litdata.streaming").Cache(str(folder), chunk_bytes="64MB")
    for k, (_, ids, mask) in enumerate(dialogues):
        cache[k] = {"ids": ids, "mask": mask}
    cache.done()
    cache.merge()

    def read() -> Iterable[int]:
        source = litdata.StreamingDataset(str(folder), shuffle=True)
        return (len(sample["ids"]) for sample in source if len(sample["mask"]) == len(sample["ids"]))

    return Loader("litdata", read, None, folder_bytes(folder))


OPTIONAL = {"streaming": mosaicml_loader, "litdata": litdata_loader}


# ---------------------------------------------------------------- measuring


def measure(loaders: list[Loader], tokens: int, rounds: int) -> list[LoaderResult]:
    """Every loader `rounds` times, taking turns; medians."""
    seconds: dict[str, list[float]] = {loader.name: [] for loader in loaders}
    first: dict[str, list[float]] = {loader.name: [] for loader in loaders}
    resumed: dict[str, list[float]] = {loader.name: [] for loader in loaders}
    for _ in range(rounds):
        for loader in loaders:
            began, count, total = time.process_time(), 0, 0
            for n in loader.open():
                if not count:
                    first[loader.name].append(time.process_time() - began)
                count, total = count + 1, total + n
            seconds[loader.name].append(time.process_time() - began)
            if total != tokens:
                raise ValueError(f"data.stream_bench: {loader.name} gave {total:,} tokens, expected {tokens:,}")
            if loader.resume is not None:
                rest = loader.resume(count // 2)
                began = time.process_time()
                next(iter(rest))
                resumed[loader.name].append(time.process_time() - began)
    return [
        LoaderResult(
            loader.name,
            tokens / statistics.median(seconds[loader.name]) / 1e6,
            tokens / loader.packed_tokens if loader.packed_tokens else None,
            statistics.median(first[loader.name]) * 1e3,
            statistics.median(resumed[loader.name]) * 1e3 if loader.resume is not None else None,
            loader.bytes / tokens,
        )
        for loader in loaders
    ]


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
) -> dict[str, Any]:
    """Everything measured, as plain JSON values."""
    logging.getLogger("streaming").setLevel(logging.ERROR)
    if data is None:
        made = MemoryDataset.random(dialogues, mean=mean, spread=1.0, longest=min(lengths))
        items: list[Dialogue] = list(zip(made.uids, made.ids, made.masks, strict=True))
    else:
        items = _read_all(data, min(lengths))
    tokens = sum(len(ids) for _, ids, _ in items)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        shards = write_token_shards(root / "chatmill", items)
        loaders = [chatmill_loader(shards, length) for length in lengths]
        loaders.append(webdataset_loader(root / "webdataset", items))
        missing = []
        for module, make in OPTIONAL.items():
            if importlib.util.find_spec(module) is None:
                missing.append(module)
            else:
                loaders.append(make(root / module, items))
        results = measure(loaders, tokens, rounds)
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "dialogues": len(items),
        "tokens": tokens,
        "rounds": rounds,
        "loaders": [asdict(result) for result in results],
        "not_importable": missing,
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
        f"median of {results['rounds']} rounds, CPU time of one core",
        f"{'loader':<20} {'Mtok/s':>8} {'x webdataset':>13} {'fill':>8} {'first batch':>12} {'resume':>10} {'B/token':>8}",
    ]
    base = next(r["mtokens_per_s"] for r in results["loaders"] if r["loader"] == "webdataset")
    for r in results["loaders"]:
        fill = "-" if r["fill"] is None else f"{r['fill']:.2%}"
        resume = "none" if r["resume_ms"] is None else f"{r['resume_ms']:.1f} ms"
        lines.append(
            f"{r['loader']:<20} {r['mtokens_per_s']:>8.1f} {r['mtokens_per_s'] / base:>13.1f} {fill:>8} "
            f"{r['first_batch_ms']:>9.1f} ms {resume:>10} {r['bytes_per_token']:>8.2f}"
        )
    scale = results["resume_at_scale"]
    ten = ", ".join(f"{name} {ms:.0f} ms" for name, ms in scale["ms"].items())
    memory = results["memory_per_million"]
    lines.append(f"resume in {scale['dialogues']:,} dialogues, to the first batch: {ten}")
    lines.append(
        f"memory per 1,000,000 dialogues: index {memory['index_mib']:.1f} MiB; open window {memory['window_mib']:.1f} MiB"
    )
    if results["not_importable"]:
        lines.append(f"not importable here, so not compared: {', '.join(results['not_importable'])}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="The packed stream against other loaders.")
    parser.add_argument("--dialogues", type=int, default=20_000)
    parser.add_argument("--mean", type=float, default=500, help="mean length in tokens of the made-up dialogues")
    parser.add_argument("--data", help="a data set made by `chatmill data build`, instead of made-up dialogues")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    results = bench(dialogues=options.dialogues, mean=options.mean, data=options.data, rounds=options.rounds)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
