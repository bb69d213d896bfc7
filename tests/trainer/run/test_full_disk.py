"""A disk without room: records wait in memory, training goes on, nothing half-written stays."""

from __future__ import annotations

import errno
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatmill.run_files import append_jsonl, read_jsonl
from chatmill.trainer.checkpoint import saver as checkpoint_saver
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train
from chatmill.trainer.run import full_disk


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def test_records_wait_while_the_disk_is_full_and_are_written_when_there_is_room(write_recipe, tmp_path, monkeypatch) -> None:
    """No file can be written in steps 3 to 5, the checkpoint of step 4 neither."""
    recipe = write_recipe("base", checkpoint={"every_steps": 2, "asynchronous": False, "best": "loss"})
    train(load_recipe(str(recipe)))
    real = {"append_text": full_disk.append_text, "write_shares": checkpoint_saver.write_shares}
    step = [0]

    def full(name: str, *arguments):
        if name == "append_text" and arguments[0].name == "metrics.jsonl":
            step[0] = json.loads(arguments[1].splitlines()[-1])["step"]
        if 3 <= step[0] <= 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real[name](*arguments)

    monkeypatch.setattr(full_disk, "append_text", functools.partial(full, "append_text"))
    monkeypatch.setattr(checkpoint_saver, "write_shares", functools.partial(full, "write_shares"))
    train(load_recipe(str(recipe), ["run.name=full"]))
    run = tmp_path / "runs" / "full"
    assert losses(run) == losses(tmp_path / "runs" / "base")
    events = list(read_jsonl(run / "events.jsonl"))
    assert [e["event"] for e in events if "checkpoint" in e["event"] or e["event"] == "disk_full"] == [
        "checkpoint",
        "checkpoint_failed",
        "disk_full",
        "checkpoint",
        "checkpoint",
    ]
    assert next(e for e in events if e["event"] == "disk_full")["waited"] == 4, "three lines of metrics, one event"


def test_a_disk_that_is_broken_and_not_full_ends_the_run(write_recipe, monkeypatch) -> None:
    def broken(path: Path, text: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(full_disk, "append_text", broken)
    with pytest.raises(OSError, match="Input/output"):
        train(load_recipe(str(write_recipe("base"))))


def test_a_line_that_does_not_fit_leaves_no_half_of_itself(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30, resource.RLIM_INFINITY))\n"
        "from pathlib import Path; from chatmill.run_files import append_jsonl\n"
        "append_jsonl(Path(sys.argv[1]), {'step': 1})\n"
        "try: append_jsonl(Path(sys.argv[1]), {'text': 'x' * 100})\n"
        "except OSError as error: print('refused')\n"
        "append_jsonl(Path(sys.argv[1]), {'step': 2})\n"
    )
    file = tmp_path / "lines.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_that_a_kill_cut_costs_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    append_jsonl(file, {"step": 1})
    with file.open("a") as handle:
        handle.write('{"step": 2, "lo')
    append_jsonl(file, {"step": 3})
    append_jsonl(file, {"step": 4})
    damaged: list[str] = []
    assert [line["step"] for line in read_jsonl(file, damaged)] == [1, 3, 4] and damaged == ['{"step": 2, "lo']
