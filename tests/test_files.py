"""Folders are published whole: whoever looks sees the old one or the new one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from chatmill import files
from chatmill.files import disk_problem, publish_folder, read_unchanged, replace_text, replace_texts


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    return fill(folder, text)


def fill(folder: Path, text: str) -> Path:
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
    for n in range(1, 100):
        publish_folder(make(tmp_path / "new", str(n)), place)
    done.set()
    reader.join()
    assert not mixed and seen(place) == {"99"}
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


WRITER = """
import sys, time
from pathlib import Path
from chatmill.files import beside, folder_beside
place = Path(sys.argv[1])
with folder_beside(place) as folder, beside(place.with_name("file")) as file:
    (folder / "a").write_text("half")
    file.write(b"half")
    file.flush()
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_leaves_is_removed_by_the_next_one_and_a_living_ones_is_not(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "set")], stdout=subprocess.PIPE, env=environment
    ) as first:
        try:
            assert first.stdout and first.stdout.readline() == b"held\n"
            hidden = {path.name for path in tmp_path.iterdir()}
            assert hidden == {f".set.writing-{first.pid}.1", ".file.writing"}
            with files.folder_beside(tmp_path / "set") as folder:
                publish_folder(fill(folder, "new"), tmp_path / "set")
            replace_text(tmp_path / "file", "new")
            assert {path.name for path in tmp_path.iterdir()} == hidden | {"set", "file"}, "its writer lives"
        finally:
            first.kill()
    (tmp_path / ".set.writing-1").mkdir()  # of a version without locks
    (tmp_path / ".other.writing-1").mkdir()  # of another place
    with files.folder_beside(tmp_path / "set") as folder:
        publish_folder(fill(folder, "newer"), tmp_path / "set")
    replace_text(tmp_path / "file", "newer")
    assert {path.name for path in tmp_path.iterdir()} == {"set", "file", ".other.writing-1"}
    assert seen(tmp_path / "set") == {"newer"} and (tmp_path / "file").read_text() == "newer"


def test_without_locks_only_what_is_a_day_old_and_of_no_process_counts_as_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_lock", lambda handle: None)  # as NFS answers for a folder
    for name in (".a.writing-999999999", ".b.writing-999999999", f".c.writing-{os.getpid()}"):
        make(tmp_path / name, "half")
    for name in (".a.writing-999999999", f".c.writing-{os.getpid()}"):
        os.utime(tmp_path / name, (0, 0))
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".b.writing-999999999", f".c.writing-{os.getpid()}"}


def test_a_writer_that_dies_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    """One of 60 kills left neither the old folder nor the new one."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    place = make(tmp_path / "set", "old")
    real = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target == place:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(make(tmp_path / "new", "new"), place)
    assert not place.exists()
    monkeypatch.setattr(Path, "replace", real)
    with files.folder_beside(place):
        assert seen(place) == {"old"}


@pytest.mark.parametrize("exchange", [True, False])
def test_two_writers_and_a_reader_never_meet_a_mixture_an_error_or_an_old_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """A reader that opens one file after the other saw 9 mixed folders in 9,300."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    place, until, errors, published = tmp_path / "set", time.monotonic() + 1.5, [], [0, 0]
    publish_folder(make(tmp_path / "new", "0"), place)

    def write(number: int) -> None:
        try:
            while time.monotonic() < until:
                with files.folder_beside(place) as folder:
                    publish_folder(fill(folder, f"{number} {published[number]}"), place)
                published[number] += 1
        except OSError as error:
            errors.append(error)

    def read() -> set[str]:
        return {(place / "a").read_text(), (place / "b").read_text()}

    writers = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for writer in writers:
        writer.start()
    opened = mixed = absent = 0
    while any(writer.is_alive() for writer in writers):
        try:
            mixed += len(read_unchanged(place, read)) != 1
        except FileNotFoundError:
            absent += 1
        opened += 1
    assert not errors and min(published) > 3 and opened > 20
    assert mixed == 0 and (absent == 0 or not exchange), f"{mixed} mixed, {absent} absent of {opened}"
    assert {path.name for path in tmp_path.iterdir()} == {"set"}


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    replace_texts({a: "1", b: "1"})
    real, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/b'") as caught:
        replace_texts({a: "2", b: "2"})
    assert disk_problem(caught.value) == f"{b}: the disk is full. Free some space and run it again."
    assert (a.read_text(), b.read_text()) == ("1", "1") and {path.name for path in tmp_path.iterdir()} == {"a", "b"}
