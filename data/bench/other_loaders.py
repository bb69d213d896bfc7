"""Other loaders over the same dialogues, for the comparison in stream.py: webdataset, mosaicml-streaming, litdata.

    python other_loaders.py serve FOLDER NAME ...     # answers every line, a loader's name, with its turn as JSON
    python other_loaders.py memory NAME FOLDER        # bytes of memory that the opened loader adds

Needs only numpy and the loaders, so that any interpreter can run this file: they rarely agree with each other on versions.
FOLDER holds dialogues.npz (ids UInt16, mask Bool, offsets Int64["n+1"]); each loader's own format is written beside it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import io
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = tuple[NDArray[Any], NDArray[np.bool_]]


@dataclass(frozen=True)
class Loader:
    """open() gives an iterable of token counts, one per item; resume(item) does so from the middle of the epoch.

    bytes: on the disk. packed_tokens: what its packs hold with padding; None where it does not pack.
    """

    name: str
    open: Callable[[], Iterable[int]]
    resume: Callable[[int], Iterable[int]] | None
    bytes: int
    packed_tokens: int | None = None


@dataclass(frozen=True)
class Turn:
    """One pass over the data. cpu_s: CPU time of the pass; first_s, resume_s: wall time until an item is there."""

    tokens: int
    cpu_s: float
    first_s: float
    resume_s: float | None


class Resumed:
    """Opens when iterated: what had to be done to find a position before the interruption is not timed."""

    def __init__(self, make: Callable[[], Any], count: Callable[[Any], Iterable[int]]) -> None:
        self._make, self._count = make, count

    def __iter__(self) -> Iterator[int]:
        return iter(self._count(self._make()))


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# ---------------------------------------------------------------- the same dialogues in every format


def read_dialogues(folder: Path) -> Iterator[Arrays]:
    """ids and loss mask of each dialogue in dialogues.npz."""
    with np.load(folder / "dialogues.npz") as arrays:
        ids, mask, offsets = arrays["ids"], arrays["mask"], arrays["offsets"].tolist()
    for start, stop in pairwise(offsets):
        yield ids[start:stop], mask[start:stop]


def _both(ids: NDArray[Any], mask: NDArray[Any]) -> int:
    if len(ids) != len(mask):
        raise ValueError(f"{len(ids)} ids and {len(mask)} mask entries")
    return len(ids)


def webdataset_loader(folder: Path, dialogues: Iterable[Arrays]) -> Loader:
    """One sample per dialogue in plain tars; no position: resuming replays."""
    webdataset = importlib.import_module("webdataset")
    if not folder.exists():
        folder.mkdir()
        rest, number = iter(enumerate(dialogues)), 0
        while part := list(islice(rest, 10_000)):
            with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
                for k, (ids, mask) in part:
                    writer.write({"__key__": f"{k:09d}", "ids.npy": _npy(ids), "mask.npy": _npy(mask)})
            number += 1
    shards = sorted(str(file) for file in folder.glob("*.tar"))

    def read() -> Iterable[int]:
        samples = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode()
        return (_both(sample["ids.npy"], sample["mask.npy"]) for sample in samples)

    return Loader("webdataset", read, lambda half: islice(read(), half, None), folder_bytes(folder))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def mosaicml_loader(folder: Path, dialogues: Iterable[Arrays]) -> Loader:
    """MDS shards read through StreamingDataset, shuffled as it would be for training."""
    streaming = importlib.import_module("streaming")
    clean_stale_shared_memory = importlib.import_module("streaming.base.util").clean_stale_shared_memory
    logging.getLogger("streaming").setLevel(logging.ERROR)
    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"ids": "ndarray:uint16", "mask": "ndarray:uint8"}) as writer:
            for ids, mask in dialogues:
                writer.write({"ids": ids.astype(np.uint16), "mask": mask.view(np.uint8)})

    def dataset() -> Any:
        gc.collect()  # its shared memory has a fixed name
        clean_stale_shared_memory()
        return streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=1)

    def state(half: int) -> Any:
        first = dataset()
        items = iter(first)
        next(items)  # a data set that has not begun says epoch -1, and its position is ignored
        found = first.state_dict(half, from_beginning=True)
        items.close()
        return found

    return _stateful("mosaicml-streaming", folder, dataset, state)


def litdata_loader(folder: Path, dialogues: Iterable[Arrays]) -> Loader:
    """litdata chunks read through its StreamingDataset, shuffled."""
    litdata = importlib.import_module("litdata")
    if not folder.exists():
        folder.mkdir()
        cache = importlib.import_module("litdata.streaming").Cache(str(folder), chunk_bytes="64MB")
        for k, (ids, mask) in enumerate(dialogues):
            cache[k] = {"ids": ids, "mask": mask}
        cache.done()
        cache.merge()

    def dataset() -> Any:
        return litdata.StreamingDataset(str(folder), shuffle=True)

    def state(half: int) -> Any:
        first = dataset()
        next(iter(first))
        return first.state_dict(half, 0, 1)

    return _stateful("litdata", folder, dataset, state)


def _stateful(name: str, folder: Path, dataset: Callable[[], Any], state: Callable[[int], Any]) -> Loader:
    """A loader with a position. state(half): what is saved after `half` items."""

    def count(source: Any) -> Iterable[int]:
        return (_both(sample["ids"], sample["mask"]) for sample in source)

    def resume(half: int) -> Iterable[int]:
        saved = state(half)

        def again() -> Any:
            fresh = dataset()
            fresh.load_state_dict(saved)
            return fresh

        return Resumed(again, count)

    return Loader(name, lambda: count(dataset()), resume, folder_bytes(folder))


OTHERS: dict[str, Callable[[Path, Iterable[Arrays]], Loader]] = {
    "webdataset": webdataset_loader,
    "streaming": mosaicml_loader,
    "litdata": litdata_loader,
}


# ---------------------------------------------------------------- measuring


def take_turn(loader: Loader) -> Turn:
    """One pass, and one resumption from its middle."""
    began, cpu, first, count, total = time.perf_counter(), time.process_time(), 0.0, 0, 0
    for n in loader.open():
        if not count:
            first = time.perf_counter() - began
        count, total = count + 1, total + n
    cpu = time.process_time() - cpu
    resumed = None
    if loader.resume is not None:
        rest = loader.resume(count // 2)
        began = time.perf_counter()
        next(iter(rest))
        resumed = time.perf_counter() - began
    return Turn(total, cpu, first, resumed)


def memory_growth(loader: Loader) -> int:
    """Bytes of resident memory that the loader adds from being opened until its first item is there."""
    gc.collect()
    before = _resident_bytes()
    items = iter(loader.open())
    next(items)
    gc.collect()
    return _resident_bytes() - before


def _resident_bytes() -> int:
    """Resident set, shared memory included (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(folder: Path, names: list[str]) -> None:
    """Write every format that this interpreter has the package for, then answer lines until stdin ends."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the loaders print must not get between the answers
    loaders: dict[str, Loader] = {}
    for name in names:
        if importlib.util.find_spec(name) is not None:
            loaders[name] = OTHERS[name](folder / name, read_dialogues(folder))
    print(json.dumps({key: [loader.name, loader.bytes] for key, loader in loaders.items()}), file=say)
    for line in sys.stdin:
        print(json.dumps(asdict(take_turn(loaders[line.strip()]))), file=say)


def main(words: list[str]) -> int:
    """Command line."""
    if words[0] == "serve":
        serve(Path(words[1]), words[2:])
        return 0
    name, folder = words[1], Path(words[2])
    child = os.fork()  # writing leaves memory behind: another process does it
    if not child:
        OTHERS[name](folder / name, read_dialogues(folder))
        os._exit(0)
    os.waitpid(child, 0)
    print(memory_growth(OTHERS[name](folder / name, ())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
