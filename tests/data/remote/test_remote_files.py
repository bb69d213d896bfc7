"""Raw files and data sets on an S3 server: the same bytes as on a disk, and whole or not there."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.build_cases import chats, recipe, tree, write_jsonl

from chatmill.config import ConfigError
from chatmill.data.check.inspection import inspect_dataset
from chatmill.data.check.verify import verify_dataset
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.raw.finding import find_files
from chatmill.data.remote import files as remote_files
from chatmill.data.remote.blocks import RemoteDataset
from chatmill.data.remote.files import RemotePath, filesystem, find_remote, publish_remotely, staging_folder
from chatmill.data.shards.dataset import TokenDataset
from chatmill.data.shards.manifest import MANIFEST
from chatmill.launcher.__main__ import main

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty bucket `chat`, found as a user would: by AWS_* variables."""
    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "testing"),
        ("AWS_SECRET_ACCESS_KEY", "testing"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("NO_PROXY", "127.0.0.1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)  # corpora/.remote
    s3fs.S3FileSystem.clear_instance_cache()
    files, _ = filesystem("s3://chat")
    files.mkdir("chat")
    yield files
    files.rm("chat", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def remote_tree(files: Any, root: str) -> dict[str, bytes]:
    files.invalidate_cache()
    names = {path: path.removeprefix(root + "/") for path in files.find(root)}
    return {name: files.cat_file(path) for path, name in names.items() if name not in ("timings.json", "seen.json")}


def test_raw_files_of_a_bucket_give_the_bytes_of_local_ones(bucket: Any, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for part in range(2):
        text = write_jsonl(tmp_path / "text.jsonl", chats(60, seed=part)).read_bytes()
        (tmp_path / f"raw/{part}.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    with zipfile.ZipFile(tmp_path / "raw/more.zip", "w") as archive:
        archive.writestr("in/2.jsonl", write_jsonl(tmp_path / "text.jsonl", chats(60, seed=2)).read_text())
    bucket.put(str(tmp_path / "raw") + "/", "chat/raw/", recursive=True)
    for number, pattern in enumerate(("raw/*", "raw/*.jsonl.gz")):
        for name, place in (("here", str(tmp_path)), ("there", "s3://chat")):
            # Two workers: they open the bucket by themselves.
            build_dataset(recipe(tmp_path, sources=[{"path": f"{place}/{pattern}"}], workers=2), tmp_path / f"{name}{number}")
        assert tree(tmp_path / f"there{number}") == tree(tmp_path / f"here{number}")
    assert [file.label for file in find_files("s3://chat/raw")] == ["0.jsonl.gz", "1.jsonl.gz", "more.zip!in/2.jsonl"]
    with pytest.raises(ConfigError, match="no such file"):
        find_files("s3://chat/nothing/*.jsonl")


def test_a_data_set_goes_to_a_bucket_and_is_inspected_verified_and_read_there(
    bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, url = write_jsonl(tmp_path / "raw.jsonl", chats(200)), "s3://chat/sets/small"
    build_dataset(recipe(raw), tmp_path / "here")
    fields = recipe(raw, out=url).model_dump(mode="json")
    (tmp_path / "small.yaml").write_text(json.dumps(fields))
    assert main(["data", "build", "small.yaml"]) == 0
    assert remote_tree(bucket, "chat/sets/small") == tree(tmp_path / "here")
    assert not staging_folder(url).exists()
    assert main(["data", "build", "small.yaml"]) == 0
    assert "already built" in capsys.readouterr().out
    assert main(["data", "verify", url]) == 0
    assert inspect_dataset(url) == inspect_dataset(tmp_path / "here")
    local = TokenDataset.open(tmp_path / "here", "train")
    remote = RemoteDataset.open(url, "train", cache=tmp_path / "cache")
    remote.will_read(range(remote.n_blocks))
    for b in range(local.n_blocks):
        ours, theirs = local.read_block(b), remote.read_block(b)
        assert ours.uids == theirs.uids and np.array_equal(ours.ids, theirs.ids)
    remote.close()
    # A flipped byte in the bucket is found there, and a rebuild of something else replaces all of it.
    shard = "chat/sets/small/train/train-00000.tar"
    data = bytearray(bucket.cat_file(shard))
    data[4000] ^= 1
    bucket.pipe_file(shard, bytes(data))
    assert any(line.startswith("train/train-00000.tar: sha256") for line in verify_dataset(url))
    other = recipe(raw, out=url, shards={"block_dialogues": 64})
    assert build_dataset(other)["built"] and verify_dataset(url) == []


def test_a_reader_never_sees_an_old_manifest_beside_new_shards_and_a_killed_copy_goes_on(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "s3://chat/set"
    for number in (1, 2):
        build_dataset(recipe(write_jsonl(tmp_path / "raw.jsonl", chats(100, seed=number))), tmp_path / str(number))
    publish_remotely(tmp_path / "1", url)
    put, sent = bucket.put_file, list[str]()  # of the one instance that all users of these credentials share

    def stops_at_third(path: str, target: str) -> None:
        assert not bucket.exists(f"chat/set/{MANIFEST}")
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(target)
        put(path, target)

    monkeypatch.setattr(bucket, "put_file", stops_at_third)
    with pytest.raises(KeyboardInterrupt):
        publish_remotely(tmp_path / "2", url)
    with pytest.raises(ConfigError, match="cannot be read"):
        RemoteDataset.open(url, "train", cache=tmp_path / "cache", attempts=1)
    first, sent[:] = list(sent), []

    def counts(path: str, target: str) -> None:
        sent.append(target)
        put(path, target)

    monkeypatch.setattr(bucket, "put_file", counts)
    publish_remotely(tmp_path / "2", url)
    assert sent and not set(sent) & set(first)
    assert remote_tree(bucket, "chat/set") == tree(tmp_path / "2")


def test_a_build_killed_while_it_copied_only_goes_on_copying(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = recipe(write_jsonl(tmp_path / "raw.jsonl", chats(100)), out="s3://chat/set")
    with monkeypatch.context() as patch:
        patch.setattr(
            "chatmill.data.pipeline.destination.publish_remotely", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            build_dataset(build)
    monkeypatch.setattr("chatmill.data.pipeline.pipeline.Build.run", lambda *a: pytest.fail("built twice"))
    assert build_dataset(build)["built"] and verify_dataset("s3://chat/set") == []


def test_what_cannot_be_reached_is_said_in_words(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"cannot be listed|no such file"):
        find_files("s3://no-such-bucket/raw/*.jsonl")
    with pytest.raises(ConfigError, match="nothing is there"):
        verify_dataset("s3://chat/nothing")
    with pytest.raises(ConfigError, match="cannot read this kind of URL"):
        find_files("nosuch://a/b")
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(60))
    with pytest.raises(ConfigError, match=r"cannot be written(.|\n)*the same command continues"):
        build_dataset(recipe(raw), "s3://no-such-bucket/set")
    folder = tmp_path / "escape"
    bucket.pipe_file("chat/evil/../../escape", b"x")
    monkeypatch.setattr(remote_files, "remote_files", lambda url: {"../escape": 1})
    with pytest.raises(ConfigError, match="leads outside"), remote_files.local_copy("s3://chat/evil"):
        pass
    assert not folder.exists()


@pytest.mark.parametrize(
    ("url", "advice"), [("s3://a/b", r"chatmill\[s3\]"), ("gs://a/b", "gcsfs"), ("hf://datasets/a/b", "huggingface_hub")]
)
def test_a_missing_package_is_named(url: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(url: str) -> None:
        raise ImportError("Install it to access this")

    monkeypatch.setattr("fsspec.core.url_to_fs", absent)
    with pytest.raises(ConfigError, match=advice):
        find_files(url)


def test_a_remote_path_names_its_parts() -> None:
    path = RemotePath("s3://bucket/raw/chats/a.jsonl.gz")
    assert (path.name, path.suffix, str(path.parent)) == ("a.jsonl.gz", ".gz", "s3://bucket/raw/chats")
    assert path.with_name("b") == path.parent / "b" and RemotePath("http://h/a.zip?x=1").suffix == ".zip"


def test_a_raw_file_of_a_web_server_is_read_without_ranges(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    raw = write_jsonl(tmp_path / "a.jsonl", chats(60))
    (tmp_path / "web/a.jsonl.gz").write_bytes(gzip.compress(raw.read_bytes()))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{served.server_port}"
        build_dataset(recipe(tmp_path, sources=[{"path": f"{url}/a.jsonl.gz"}]), tmp_path / "there")
        with pytest.raises(ConfigError, match="no such file"):
            find_files(f"{url}/b.jsonl")
        served.shutdown()
    build_dataset(recipe(tmp_path / "web/a.jsonl.gz"), tmp_path / "here")
    assert tree(tmp_path / "there") == tree(tmp_path / "here")


def test_other_stores_go_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's store in memory, of this process alone."""
    monkeypatch.chdir(tmp_path)
    files, _ = filesystem("memory://")
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(60))
    files.pipe_file("/raw/a.jsonl", raw.read_bytes())
    shutil.copy(raw, tmp_path / "a.jsonl")
    build_dataset(recipe(tmp_path / "a.jsonl"), tmp_path / "here")
    build_dataset(recipe(tmp_path, sources=[{"path": "memory://raw/*.jsonl"}]), "memory://sets/one")
    assert verify_dataset("memory://sets/one") == []
    assert [found.name for found in find_remote("memory://raw")] == ["a.jsonl"]
    with remote_files.local_copy("memory://sets/one") as copy:
        assert tree(copy) == tree(tmp_path / "here")
