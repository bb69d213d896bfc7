"""Folders are published whole: whoever looks sees the old one or the new one."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from chatmill import files
from chatmill.files import publish_folder


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_text(text)
    return folder


def seen(place: Path) -> set[str]:
    """The texts of one opened folder, as a reader that keeps it open finds them."""
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return {os.fdopen(os.open(name, os.O_RDONLY, dir_fd=handle)).read() for name in ("a", "b")}
    finally:
        os.close(handle)


def test_a_reader_always_finds_a_whole_folder(tmp_path: Path) -> None:
    place, mixed, done = tmp_path / "set", [], threading.Event()
    publish_folder(make(tmp_path / "new", "0"), place)

    def read() -> None:
        while not done.is_set():
            try:
                texts = seen(place)
            except FileNotFoundError as error:
                if error.filename is None or str(error.filename) == str(place):
                    mixed.append("absent")
                continue  # opened before the exchange, removed since
            if len(texts) != 1:
                mixed.append(str(texts))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 200):
        publish_folder(make(tmp_path / "new", str(n)), place)
    done.set()
    reader.join()
    assert not mixed and seen(place) == {"199"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing hidden is left"


def test_without_an_exchange_the_old_folder_is_moved_away_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    place = make(tmp_path / "set", "old")
    publish_folder(make(tmp_path / "new", "new"), place)
    assert seen(place) == {"new"} and [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(make(tmp_path / "old", "old"))
    publish_folder(make(tmp_path / "new", "new"), tmp_path / "link")
    assert seen(tmp_path / "link") == {"new"} and seen(tmp_path / "old") == {"old"}
