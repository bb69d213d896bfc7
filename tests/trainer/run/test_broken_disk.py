"""A full, read-only or failing disk under every command that writes: one line that names the file, and nothing half-written.

broken_disk.py lets one operation after the other fail.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.trainer.checkpoint.broken_disk import BrokenDisk

from chatmill.launcher.__main__ import main as chatmill
from chatmill.launcher.jobs import launch
from chatmill.launcher.sweep.config import load_sweep
from chatmill.launcher.sweep.study import open_study
from chatmill.run_files import list_checkpoints, read_jsonl
from chatmill.trainer.config import load_recipe
from chatmill.trainer.loop.loop import train

CODES = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO)
WORDS = ("the disk is full", "read-only", "quota", "EIO", "may not grow this large")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """What the commands work on: chats, a run of two steps, its export, prompts, a sweep."""
    folder = tmp_path_factory.mktemp("bench")
    lines = [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"format": "openai", "path": str(folder / "chats.jsonl")}
    data = {"name": "d", "out": str(folder / "d"), "sources": [source], "split": {"validation": 0.2}, "workers": 1}
    (folder / "data.yaml").write_text(yaml.safe_dump(data | {"tokenizer": {"train": {"vocab_size": 300}}}))
    shape = {"hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2, "kv_heads": 1, "context": 256}
    recipe = {
        "run": {"name": "run", "dir": str(folder / "runs")},
        "data": {"path": str(tiny_data), "sequence_length": 128},
        "model": {"vocab_size": 384, **shape},
        "train": {"steps": 2, "precision": "fp32", "cpu_threads": 1},
        "checkpoint": {"every_steps": 1, "asynchronous": False},
        "evaluation": {"at_start": False, "at_end": False},
        "logging": {"trackers": []},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(str(folder / "train.yaml")))
    assert chatmill(["export", str(folder / "runs" / "run"), str(folder / "hf")]) == 0
    (folder / "prompts.jsonl").write_text('{"prompt": "Where?"}\n')
    sweep: dict[str, Any] = {"name": "s", "dir": str(folder / "sweeps"), "recipe": str(folder / "train.yaml"), "trials": 2}
    sweep["overrides"] = ["evaluation.at_end=true"]
    sweep["pruning"] = {"kind": "none"}
    sweep["space"] = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    open_study(load_sweep(folder / "sweep.yaml"))
    return folder


# words of each command, with the folder that it writes to as {out}
COMMANDS = {
    "data build": "data build {bench}/data.yaml --out {out}/d",
    "data clean": "data clean {bench}/data.yaml --out {out}/cleaned.jsonl",
    "data inspect": "data inspect {data} --samples 0 --html {out}/page.html",
    "train": "train {bench}/train.yaml run.dir={out}",
    "import": "import {bench}/hf {out}/imported",
    "export hf": "export {bench}/runs/run {out}/hf --dtype bf16",
    "export gguf": "export {bench}/runs/run {out}/run.gguf --to gguf",
    "eval": "eval {bench}/runs/run --out {out}/e.json --generate 0 --select 0 --max-dialogues 2",
    "report": "report {bench}/runs/run --out {out}/r.html",
    "generate": "generate {bench}/runs/run --file {bench}/prompts.jsonl --out {out}/replies.jsonl --max-new-tokens 2",
    "launch": "launch {bench}/train.yaml --on slurm run.dir={out}",
    "sweep": "sweep {bench}/sweep.yaml --report",
}
# what a command leaves on purpose: the same command goes on from there
KEPT = {
    "data build": (".d.work-", ".d.lock"),
    "data clean": (".d.work-", ".d.lock"),
    "train": ("run",),
    "generate": (".replies.jsonl.progress",),
    "launch": ("run",),
    "sweep": ("journal.log", "lock"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def check(name: str, bench: Path, data: Path, out: Path, code: int, first: int) -> int:
    """Run a command on a disk that fails from an operation on, and check what it says and leaves. Operations that it did."""
    if name == "sweep":
        out = bench / "sweeps" / "s"
    out.mkdir(exist_ok=True)
    before = contents(out)
    with BrokenDisk(out, code, first) as disk:
        ended = chatmill(COMMANDS[name].format(bench=bench, data=data, out=out).split())
    if not first:
        assert ended == 0 or name == "sweep"
        return disk.operations
    if name == "data build" and ended == 0:  # only its work folder could not be removed
        return disk.operations
    if name == "train" and ended == 0:  # only records that waited for room were lost; the last checkpoint is there
        assert code in (errno.ENOSPC, errno.EDQUOT) and list_checkpoints(out / "run")[-1].name == "step-00000002"
        return disk.operations
    assert ended == 2, f"{name}, operation {first}: exit code {ended}"

    def looked_at(found: dict[str, bytes]) -> dict[str, bytes]:
        return {k: v for k, v in found.items() if not k.startswith(KEPT.get(name, ()))}

    left = looked_at(contents(out))
    whole = first == disk.operations  # all is written, and the last rename was not synced
    assert left == looked_at(before) or (whole and not any(Path(k).name.startswith(".") for k in left)), f"{name}, {first}"
    if name in ("train", "launch"):  # no half checkpoint, no half launch
        assert not [p for p in out.rglob("*.safetensors") if ".writing" in str(p)]
        recorded = list(out.glob("run/launches/001/job.json"))
        assert recorded or not list(out.glob("run/launches/001/*"))
    return disk.operations


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "submit", lambda command, cwd=None: "7")
    monkeypatch.setattr(launch, "snapshot_code", lambda folder: (folder / "code").mkdir())
    yield


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_fails_ends_a_command_with_a_named_error_and_leaves_nothing_half_written(
    name: str, bench: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = check(name, bench, tiny_data, tmp_path / "whole", 0, 0)
    assert total > 1
    capsys.readouterr()
    moments = random.Random(name).sample(range(2, total), min(1, total - 2))
    for number, first in enumerate([1, *moments, total]):
        code = CODES[(number + len(name)) % len(CODES)]
        check(name, bench, tiny_data, tmp_path / f"broken-{number}", code, first)
        said = capsys.readouterr().err
        if name in ("data build", "train") and first == total:
            continue
        assert "error: " in said and "Traceback" not in said and any(word in said for word in WORDS), said
        assert "broken-" in said or "sweeps" in said, "the file is named"


def test_a_disk_that_fills_up_while_a_run_saves_costs_no_good_checkpoint(bench: Path, tmp_path: Path, capsys) -> None:
    """A real limit of the system: every write beyond so many bytes of a file fails, in the library of the tensors, too."""
    words = ["train", f"{bench}/train.yaml", f"run.dir={tmp_path}", "schedule.name=constant", "train.steps=1"]
    assert chatmill(words) == 0
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = contents(run / "checkpoints")
    for size in (12_000, 40_000):  # in the first file, in a later one
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert chatmill([*words[:-1], "train.steps=2"]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = capsys.readouterr().err
        assert "the last checkpoint (step 2) could not be written" in said and "it continues after step 1" in said
        assert contents(run / "checkpoints") == before
    assert [e["step"] for e in read_jsonl(run / "events.jsonl") if e["event"] == "checkpoint_failed"]
    assert chatmill([*words[:-1], "train.steps=2"]) == 0
    assert [p.name for p in list_checkpoints(run)] == ["step-00000001", "step-00000002"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs root, who may mount a small disk")
def test_an_export_to_a_small_disk_leaves_it_empty(bench: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "disk").mkdir()
    if os.system(f"mount -t tmpfs -o size=16k tmpfs {tmp_path / 'disk'} 2>/dev/null"):
        pytest.skip("this machine lets nobody mount")
    try:
        for words in ("hf", "run.gguf --to gguf"):
            assert chatmill(f"export {bench}/runs/run {tmp_path}/disk/{words}".split()) == 2
            assert f"{tmp_path}/disk" in (said := capsys.readouterr().err) and "the disk is full" in said
            assert not list((tmp_path / "disk").iterdir())
    finally:
        os.system(f"umount {tmp_path / 'disk'}")
