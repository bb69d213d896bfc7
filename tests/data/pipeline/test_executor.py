"""Tasks run once, on any executor, and nobody is left behind when the build dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.data.build_cases import chats, recipe, tree, write_jsonl

from chatmill.config import ConfigError
from chatmill.data.pipeline import pipeline, stages
from chatmill.data.pipeline.executor import run_tasks
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import RECIPES, ExecutorSection
from chatmill.data.tokenizer.tokenizer import ChatTokenizer, train_bpe

ENVIRONMENT = os.environ | {"PYTHONPATH": str(RECIPES.parents[1] / "src")}

# Two workers: one never comes back from its task, the other has nothing left to do and waits for more.
STUCK = """
import os, sys, time
from pathlib import Path
from chatmill.data.pipeline.executor import run_tasks

def task(name):
    if name == "stuck":
        (Path(sys.argv[1]) / "pid").write_text(str(os.getpid()))
        time.sleep(3600)
    return {}

run_tasks(Path(sys.argv[1]), ["stuck", "quick"], task, workers=2)
"""


def until(what: str, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # whoever adopted it need not have asked yet
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def stuck(tmp_path: Path) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """A build whose only worker that works is in an endless task."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], env=ENVIRONMENT, stderr=subprocess.PIPE)
    until("the tasks begin", lambda: (tmp_path / "pid").is_file() and (tmp_path / "quick.done").is_file())
    return process, psutil.Process(process.pid).children()


def test_kill_9_of_the_parent_alone_leaves_no_worker(
    stuck: tuple[subprocess.Popen[bytes], list[psutil.Process]],
) -> None:
    process, workers = stuck
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    until("the workers end", lambda: all(gone(worker) for worker in workers))


def test_kill_9_of_a_worker_ends_the_build_with_advice_and_not_in_waiting(
    stuck: tuple[subprocess.Popen[bytes], list[psutil.Process]], tmp_path: Path
) -> None:
    process, _ = stuck
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    said = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 1 and "a worker process was killed" in said and "workers=1" in said


def test_datatroves_local_executor_gives_the_same_bytes_and_goes_on_from_a_build_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHUNK_BYTES", 10_000)
    raw = write_jsonl(tmp_path / "raw.jsonl", chats(200))
    build_dataset(recipe(raw), tmp_path / "ours")
    datatrove = recipe(raw, executor={"kind": "datatrove"})
    build_dataset(recipe(raw), tmp_path / "theirs", until="import")
    (imported,) = tmp_path.glob(".theirs.work-*/import/*.done")
    written = imported.stat().st_mtime_ns
    build_dataset(datatrove, tmp_path / "theirs", until="clean")
    assert imported.stat().st_mtime_ns == written and list(tmp_path.glob(".theirs.work-*/prepare/datatrove/001/completions/*"))
    build_dataset(datatrove, tmp_path / "theirs")
    assert tree(tmp_path / "theirs") == tree(tmp_path / "ours")


def test_a_missing_datatrove_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "datatrove" or name.endswith("datatrove_steps")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ConfigError, match=r"chatmill\[data\]"):
        run_tasks(tmp_path, ["a"], lambda name: {}, 1, executor=ExecutorSection(kind="datatrove"))


@pytest.mark.parametrize("partition", ["a b", "$(id)", "a\n#SBATCH --uid=0", ""])
def test_names_for_the_scheduler_are_words(partition: str) -> None:
    with pytest.raises(ValueError, match="partition"):
        ExecutorSection(kind="slurm", partition=partition)


def test_processes_of_a_stage_have_one_thread_each_and_what_follows_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    assert run_tasks(tmp_path / "a", ["1", "2"], threads, workers=2) == [{"asked": "false"}] * 2
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert run_tasks(tmp_path / "b", ["1", "2"], threads, workers=2) == [{"asked": "true"}] * 2
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def threads(name: str) -> dict[str, str | None]:
    """What a worker's tokenizers are told about threads."""
    return {"asked": os.environ.get("TOKENIZERS_PARALLELISM")}


def test_a_tokenizer_is_trained_on_a_sample_of_the_size_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, seen = write_jsonl(tmp_path / "raw.jsonl", chats(300)), list[list[str]]()

    def train(texts: Iterator[str], *rest: Any) -> ChatTokenizer:
        seen.append(list(texts))
        return train_bpe(iter(seen[-1]), *rest)

    monkeypatch.setattr(pipeline, "train_bpe", train)
    for megabytes in (32, 0.03, 0.03):
        made = recipe(raw, tokenizer={"train": {"vocab_size": 300, "sample_mb": megabytes}})
        build_dataset(made, tmp_path / f"out{len(seen)}", until="tokenize")
    whole, sample, again = seen
    size = sum(path.stat().st_size for path in next(tmp_path.glob(".out1.work-*")).glob("prepare/*.jsonl"))
    assert size > 90_000 and sample == again and set(sample) < set(whole)
    assert len(sample) / len(whole) == pytest.approx(30_000 / size, rel=0.25)
