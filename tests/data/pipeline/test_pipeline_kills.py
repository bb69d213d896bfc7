"""A build that is killed, anywhere, goes on to the same bytes; two builds never write one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.data.build_cases import chats, recipe, tree, write_jsonl

from chatmill.config import ConfigError
from chatmill.data.check.verify import verify_dataset
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.pipeline.work_folder import remove_rest
from chatmill.data.recipe import RECIPES

# Ends the whole process group at the MOMENT-th fsync (of a file or folder) that the processes of a build make together,
# after it or, TORN, before it and with half of the file's bytes: a kill in the middle of writing. Python imports a module of
# this name at the start of every process, whichever way it was started.
DIE_AT_FSYNC = """
import os, signal, stat
real = os.fsync
def fsync(descriptor):
    if (tally := os.environ.get("TALLY")) is None:
        return real(descriptor)
    moment, torn = int(os.environ["MOMENT"]), os.environ["TORN"] == "1"
    if not torn:
        real(descriptor)
    with open(tally, "ab") as file:  # one byte per fsync: appending is atomic
        file.write(b".")
        file.flush()
        if file.tell() >= moment > 0:
            if torn and stat.S_ISREG(os.fstat(descriptor).st_mode):  # in the middle of writing this file, then
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.killpg(os.getpgrp(), signal.SIGKILL)
    if torn:
        real(descriptor)
os.fsync = fsync
"""

# Builds the whole data set, then starts the build of another one again and again, each time until its moment. One interpreter
# imports everything and forks: ten starts of Python would take longer than the builds.
TEN_KILLS = """
import os, sys
from pathlib import Path
from chatmill.data import recipe
from chatmill.data.pipeline import pipeline, stages

stages.CHUNK_BYTES = 12_000
folder = Path(sys.argv[1])

def build(out, moment, workers, torn):
    tally = folder / "tally"
    tally.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ.update(TALLY=str(tally), MOMENT=str(moment), TORN=str(int(torn)))
        made = recipe.DataRecipe.model_validate_json(sys.argv[2]).model_copy(update={"workers": workers})
        pipeline.build_dataset(made, folder / out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status, tally.stat().st_size

status, total = build("whole", 0, 1, False)
print(status, total, flush=True)
moments = sorted(int(x) for x in (float(x) * (total - 8) for x in sys.argv[3].split(",")))
done = 0
for k, moment in enumerate(moments):
    # What the builds before have made is not made again: this one makes at least total - done fsyncs, and so meets its own.
    status, tally = build("again", max(1, moment - done), 1 + k % 2, k % 4 < 2)
    done += max(1, moment - done)
    print(status, int((folder / "again").exists()), flush=True)
print(*build("again", 0, 2, False), flush=True)
"""


def test_a_build_killed_at_ten_random_moments_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(900))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DIE_AT_FSYNC)
    paths = f"{tmp_path / 'site'}{os.pathsep}{RECIPES.parents[1] / 'src'}"
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    moments = ",".join(f"{x:.4f}" for x in np.random.default_rng(1).uniform(0, 1, 10))
    command = [sys.executable, "-c", TEN_KILLS, str(tmp_path), recipe(raw).model_dump_json(), moments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, *kills, last = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert first[0] == last[0] == 0 and first[1] > 60
    assert kills == [[signal.SIGKILL, 0]] * 10  # every one hit, and nothing half-made stood under the data set's name
    assert last[1] < first[1]  # it did go on rather than begin again
    assert tree(tmp_path / "again") == tree(tmp_path / "whole")
    assert verify_dataset(tmp_path / "again") == []
    assert not [path for path in tmp_path.iterdir() if "work" in path.name]


def test_a_build_that_is_killed_while_it_clears_up_leaves_nothing_to_trip_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(100))

    def killed(folder: Path, **options: bool) -> None:
        next(folder.rglob("tokenize/*.json")).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("chatmill.data.pipeline.work_folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(recipe(raw), tmp_path / "out")
    monkeypatch.undo()
    assert verify_dataset(tmp_path / "out") == []
    shutil.rmtree(tmp_path / "out")
    build_dataset(recipe(raw), tmp_path / "out")
    assert verify_dataset(tmp_path / "out") == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out", "raw.jsonl"]


def test_what_a_build_leaves_that_was_killed_after_it_had_published_goes_with_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, place = write_jsonl(tmp_path / "raw.jsonl", chats(80)), tmp_path / "out"

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("chatmill.data.pipeline.pipeline.remove_work", killed)
        build_dataset(recipe(raw), place)
    assert list(tmp_path.glob(".out.work-*"))
    assert not build_dataset(recipe(raw), place)["built"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "out", "raw.jsonl"]
    assert verify_dataset(place) == []
    shutil.copytree(place, tmp_path / "staged")
    remove_rest(tmp_path / "staged", is_staged=True)
    remove_rest(tmp_path / "never" / "was", is_staged=True)
    assert not (tmp_path / "staged").exists() and not (tmp_path / "never").exists()


def test_a_worker_that_outlives_a_killed_build_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from chatmill.data.pipeline import work_folder\n"
        "with work_folder.build_lock(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child: print(child, flush=True); os._exit(1)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parents[1] / "src")}
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout
    worker = int(process.stdout.readline())
    try:
        assert process.wait() == 1
        raw = write_jsonl(tmp_path / "raw.jsonl", chats(80))
        assert build_dataset(recipe(raw), tmp_path / "out")["built"]
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_second_build_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from chatmill.data.pipeline import work_folder\n"
        "with work_folder.build_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parents[1] / "src")}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], env=environment, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"held\n"
    try:
        raw = write_jsonl(tmp_path / "raw.jsonl", chats(80))
        with pytest.raises(ConfigError, match="another build of it is running"):
            build_dataset(recipe(raw), tmp_path / "out")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
