"""Raw chats in WebDataset tars: read member by member, named in errors, whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import webdataset

from chatmill.config import ConfigError
from chatmill.data.conversation import Conversation
from chatmill.data.importers.registry import is_recognised, read_file, recognise
from chatmill.data.ledger import Ledger
from chatmill.data.raw.finding import find_files
from chatmill.data.recipe import SourceSection

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]}


def write(path: Path, *samples: dict[str, object]) -> Path:
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"a/{number:03d}", **sample})
    return path


def read(path: Path, **options: str) -> tuple[list[Conversation], Ledger]:
    (file,), ledger = find_files(str(path)), Ledger()
    return list(read_file(file, SourceSection(path=str(path), **options), ledger)), ledger


def test_members_are_read_in_order_each_in_its_own_format(tmp_path: Path) -> None:
    line = json.dumps(CHAT).encode()
    path = write(
        tmp_path / "chats-0.tar",
        {"json": line, "jpg": b"\xff\xd8"},
        {"jsonl": line + b"\n" + line + b"\n", "__meta__": b"{}"},
        {"txt": b"Ann: hello\nBob: good morning\nAnn: how are you?\nBob: well\nAnn: bye\n"},
        {"json": b'{"conversations": [{"from": "human", "value": "so"}, {"from": "gpt", "value": "yes"}]}'},
        {"json": b'{"caption": "a cat"}'},
    )
    found, ledger = read(path)
    assert [c.origin.rpartition(":")[0] for c in found[:3]] == [f"chats-0.tar:a/{k:03d}.json{'l' * (k > 0)}" for k in (0, 1, 1)]
    assert [c.source for c in found] == ["openai", "openai", "openai", "transcript", "sharegpt"]
    assert ledger.kept == 5 and ledger.dropped == {"member of a tar in no known format": 1}
    assert recognise(find_files(str(path))[0]) == "openai"


def test_a_bad_member_is_named_and_the_given_format_holds_for_all(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.tar", {"json": json.dumps(CHAT).encode()}, {"json": b"{"})
    found, ledger = read(path, format="openai")
    assert len(found) == 1 and ledger.examples["not JSON"][0].startswith("chats.tar:a/001.json:1:")


@pytest.mark.parametrize("size", [9_900, 9_728, 10_240, 10_300, 10_700])
def test_a_tar_that_is_cut_off_is_refused_by_name(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "chats.tar", *({"json": json.dumps(CHAT).encode()} for _ in range(10)))
    whole = path.read_bytes()
    assert len(whole) == 20_480  # ten members of 1,024 bytes, the end marker, padding
    path.write_bytes(whole[:size])
    with pytest.raises(ConfigError, match=r"chats\.tar(:a/009\.json)?: damaged"):
        read(path)


def test_what_cannot_be_read_as_a_tar_is_said(tmp_path: Path) -> None:
    pictures = write(tmp_path / "pictures.tar", {"jpg": b"x"})
    assert not is_recognised(find_files(str(pictures))[0])
    with pytest.raises(ConfigError, match=r"no chats in it"):
        read(pictures)
    packed = tmp_path / "chats.tar.gz"
    packed.write_bytes(b"")
    with pytest.raises(ConfigError, match="Unpack it"):
        read(packed)
