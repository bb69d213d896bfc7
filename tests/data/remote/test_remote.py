"""Remote shards through the local cache: whole or not at all, within the limit, and the same batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatmill.config import ConfigError
from chatmill.data.conversation import TokenizedDialogue
from chatmill.data.remote.blocks import RemoteDataset
from chatmill.data.remote.cache import PieceCache, RemoteReadError, with_retries
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.manifest import MANIFEST
from chatmill.data.shards.memory import MemoryDataset
from chatmill.data.shards.writer import ShardWriter
from chatmill.data.stream import PackedStream


def piece(key: str, size: int = 1000) -> bytes:
    return (sha256(key.encode()).digest() * (size // 32 + 1))[:size]


def test_a_piece_is_fetched_once_and_then_read_from_the_disk(tmp_path: Path) -> None:
    calls = []
    for _ in range(3):
        cache = PieceCache(tmp_path, 10_000)  # as another process would open it
        data = cache.get("a", lambda: calls.append(1) or piece("a"), lambda data: data == piece("a"))
        assert data == piece("a")
    assert calls == [1] and cache.size() == 1000


@pytest.mark.parametrize("damage", [b"", piece("a")[:500], piece("b")])
def test_a_damaged_piece_on_the_disk_is_fetched_anew(tmp_path: Path, damage: bytes) -> None:
    cache = PieceCache(tmp_path, 10_000)
    cache.get("a", lambda: piece("a"), lambda data: data == piece("a"))
    (file,) = (path for path in cache.pieces.glob("*/*"))
    file.write_bytes(damage)
    assert cache.get("a", lambda: piece("a"), lambda data: data == piece("a")) == piece("a")
    assert file.read_bytes() == piece("a")


def test_the_limit_holds_and_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 10_000)
    fetched: list[str] = []

    def get(key: str, size: int = 1000) -> None:
        cache.get(key, lambda: fetched.append(key) or piece(key, size), lambda data: data == piece(key, size))
        for clock, path in enumerate(sorted(cache.pieces.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, ns=(clock, clock))  # coarse clocks of some file systems: keep the order apart
        assert cache.size() <= 10_000

    for k in range(10):
        get(f"k{k}")
    get("k0")
    get("new")
    get("k0")
    assert fetched == [f"k{k}" for k in range(10)] + ["new"]
    get("k1")
    assert fetched[-1] == "k1"
    get("larger than the limit", 20_000)
    assert cache.size() <= 10_000


def test_retries_wait_longer_each_time_and_give_up_in_words() -> None:
    answers: list[Any] = [OSError("reset"), b"half", b"whole"]
    waits: list[float] = []

    def fetch() -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    assert with_retries(fetch, lambda data: data == b"whole", "x", sleep=waits.append) == b"whole"
    assert len(waits) == 2 and 0.25 <= waits[0] <= 0.5 <= waits[1] <= 1.0
    with pytest.raises(RemoteReadError, match=r"shard 7: 3 attempts failed; the last: it came incomplete"):
        with_retries(lambda: b"half", lambda data: False, "shard 7", attempts=3, sleep=waits.append)
    missing = FileNotFoundError("gone")
    with pytest.raises(FileNotFoundError):
        with_retries(lambda: (_ for _ in ()).throw(missing), lambda data: True, "x", sleep=lambda _: pytest.fail("waited"))


def _reader(folder: Path, limit: int, seed: int, log: Path) -> None:
    rng = random.Random(seed)
    cache = PieceCache(folder, limit)
    for _ in range(150):
        key = f"k{rng.randrange(40)}"

        def fetch(key: str = key) -> bytes:
            with log.open("a") as file:
                file.write(key + "\n")
            return piece(key)

        if cache.get(key, fetch, lambda data, key=key: data == piece(key)) != piece(key):  # type: ignore[misc]
            os._exit(3)
        if int((folder / "size").read_text() or 0) > limit:
            os._exit(4)


@pytest.mark.parametrize("limit", [100_000, 12_000])
def test_four_processes_share_a_cache_and_never_see_a_half_piece(tmp_path: Path, limit: int) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_reader, args=(tmp_path / "cache", limit, k, tmp_path / "log")) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    fetched = (tmp_path / "log").read_text().split()
    if limit == 100_000:  # room for all: one fetch each, whoever came first
        assert sorted(fetched) == sorted(set(fetched))
    assert PieceCache(tmp_path / "cache", limit).size() <= limit


# ---------------------------------------------------------------- a data set behind an unreliable web server


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    memory = MemoryDataset.random(300, mean=60, seed=4)
    writer = ShardWriter(folder, "train", vocab_size=65_536, block_dialogues=16, shard_bytes=30_000)
    for uid, ids, mask in zip(memory.uids, memory.ids, memory.masks, strict=True):
        writer.add(TokenizedDialogue(uid, ids.astype(np.uint32), mask), "test", uid)
    splits = {"train": {"shards": writer.close()}}
    manifest = {"format": 1, "vocab_size": 65_536, "tokenizer_sha256": "a", "template_sha256": "b", "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


class Flaky(BaseHTTPRequestHandler):
    """Serves ranges; every third answer is an error, cut off, or damaged."""

    root: Path
    requests = 0

    def do_GET(self) -> None:
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = self.headers.get("Range")
        if asked:
            start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            data = data[start : stop + 1]
        Flaky.requests += 1
        fault = Flaky.requests % 9
        if fault == 3:
            self.send_error(503)
            return
        body = data[: len(data) // 2] if fault == 6 else bytes(len(data)) if fault == 0 else data
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def server(corpus: Path) -> Iterator[str]:
    Flaky.root, Flaky.requests = corpus, 0
    http = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def packed(dataset: Any, count: int = 40) -> list[bytes]:
    stream = PackedStream(dataset, sequence_length=256, seed=1)
    return [batch.tokens.numpy().tobytes() + batch.targets.numpy().tobytes() for batch in islice(stream, count)]


def test_batches_from_an_unreliable_server_are_those_from_the_disk(corpus: Path, server: str, tmp_path: Path) -> None:
    remote = RemoteDataset.open(server, "train", cache=tmp_path, attempts=8)
    remote._cache.first_wait_s = 0.001
    local = TokenDataset.open(corpus, "train")
    assert remote.fingerprint == local.fingerprint and len(remote) == len(local) == 300
    expected = packed(local)
    assert packed(remote) == expected
    first = Flaky.requests
    assert first > remote.n_blocks  # it did fail
    again = RemoteDataset.open(server, "train", cache=tmp_path, attempts=8)
    assert packed(again) == expected
    assert Flaky.requests - first <= 3  # the manifest alone
    remote.close()
    again.close()


def test_a_cache_smaller_than_the_data_still_gives_the_same_batches(corpus: Path, tmp_path: Path) -> None:
    remote = RemoteDataset.open(f"file://{corpus}", "train", cache=tmp_path, limit_bytes=30_000)
    assert packed(remote, 80) == packed(TokenDataset.open(corpus, "train"), 80)
    assert remote._cache.size() <= 30_000
    remote.close()


def test_what_is_not_there_is_said_at_once(server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json cannot be read .*404"):
        RemoteDataset.open(f"{server}/nowhere", "train", cache=tmp_path)
    with pytest.raises(ConfigError, match="no split 'test'"):
        RemoteDataset.open(server, "test", cache=tmp_path)
    with pytest.raises(ConfigError, match="cannot read this kind of URL"):
        RemoteDataset.open("nosuch://bucket/x", "train", cache=tmp_path)
