"""`chatmill launch`, status, logs, cancel and resume on this machine, typed as a user types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.launcher.tiny_run import make_data, wait_until, write_recipe

from chatmill.config import ConfigError
from chatmill.launcher.__main__ import main
from chatmill.launcher.jobs.resolve import resolve
from chatmill.launcher.programs import visible_gpus
from chatmill.launcher.runs.status import all_runs, describe, find_run, query_slurm
from chatmill.launcher.supervise.run_state import ATTEMPTS, attempts, newest_step
from chatmill.run_files import append_jsonl, read_jsonl


def chatmill(cwd: Path, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTHON"))}
    variables["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "chatmill.launcher", *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False)


def recipe(folder: Path, name: str = "r", steps: int = 20, every: int = 5) -> Path:
    return write_recipe(folder, name, folder / "data", make_data(folder / "data"), steps=steps, every=every)


def test_a_dry_run_prints_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = [
        "launch",
        str(path),
        "--on",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--partition",
        "p1",
        "--dry-run",
        "--full",
    ]
    assert main([*words, "optimizer.lr=0.25"]) == 0
    text = capsys.readouterr().out
    for part in (
        "parameters  7,152",
        "8 = 2 nodes x 4, ddp",
        "lr: 0.25",
        "#SBATCH --partition=p1",
        "sbatch --parsable",
        "exec ",
    ):
        assert part in text
    assert sorted(tmp_path.rglob("*")) == before


def test_overrides_may_stand_before_and_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "launch",
        str(recipe(tmp_path)),
        "train.steps=7",
        "--on",
        "local",
        "optimizer.lr=0.5",
        "--dry-run",
        "--full",
        "train.seed=3",
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "steps: 7\n" in text and "lr: 0.5\n" in text and "seed: 3\n" in text


def test_each_node_of_a_torchrun_launch_is_told_its_own_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", str(recipe(tmp_path)), "--on", "torchrun", "--nodes", "2", "--gpus-per-node", "4"]
    assert main([*words, "--master-addr", "h0", "--dry-run", "--full"]) == 0
    text = capsys.readouterr().out
    assert "# node 0\n" in text and "--node-rank=1" in text and text.count("--master-addr=h0") == 2
    assert main(words) == 2
    assert "--node-rank 0 to 1" in capsys.readouterr().err


def test_a_job_file_gives_the_cluster_and_options_come_on_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "cluster.yaml"
    job.write_text("partition: train\naccount: lab\nnodes: 4\ngpus_per_node: 8\nmodules: [cuda/12.8]\n")
    words = ["launch", str(recipe(tmp_path)), "--on", "slurm", "--job", str(job), "--dry-run", "--full"]
    assert main([*words, "--nodes", "2"]) == 0
    text = capsys.readouterr().out
    assert "#SBATCH --account=lab\n" in text and "#SBATCH --nodes=2\n" in text and "module load cuda/12.8\n" in text
    job.write_text("partitoin: train\n")
    assert main(words) == 2
    assert "did you mean 'partition'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\nb", "$(id)", "x,y", "ä"])
def test_a_job_name_that_is_not_a_name_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path)
    assert main(["launch", str(path), "--on", "slurm", "--name", name, "--dry-run"]) == 2
    assert main(["launch", str(path), "--on", "slurm", "--dry-run", f"run.name={name}"]) == 2
    assert "#SBATCH" not in capsys.readouterr().out


def test_missing_data_and_missing_secrets_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path)
    assert main(["launch", str(path), "data.path=nowhere"]) == 2
    assert "chatmill data build" in capsys.readouterr().err
    job = tmp_path / "job.yaml"
    job.write_text("secrets: [CHATMILL_TEST_TOKEN]\n")
    monkeypatch.delenv("CHATMILL_TEST_TOKEN", raising=False)
    assert main(["launch", str(path), "--job", str(job)]) == 2
    assert "CHATMILL_TEST_TOKEN is not set" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("visible", "shown"), [("", 0), ("0", 1), ("0,3", 2), ("GPU-a,GPU-b", 2), ("MIG-a,MIG-b", 1), ("-1", 0), (None, None)]
)
def test_the_gpus_that_a_process_would_see_are_counted(
    visible: str | None, shown: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == shown
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-a)'\necho 'GPU 1: A (UUID: GPU-b)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus({}) == 2


def test_more_processes_than_visible_gpus_are_refused_here_and_unused_gpus_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert main(["launch", str(path), "--on", "torchrun", "--gpus-per-node", "4"]) == 2
    assert "4 processes, but this machine shows 2 GPUs (CUDA_VISIBLE_DEVICES=0,1)" in capsys.readouterr().err
    assert main(["launch", str(path), "--on", "torchrun", "--dry-run"]) == 0
    assert "note: 1 process uses 1 of the 2 GPUs here; for all: --on torchrun --gpus-per-node 2" in capsys.readouterr().out


def test_several_processes_make_a_recipe_for_one_into_ddp_unless_one_was_asked_for(tmp_path: Path) -> None:
    path = str(recipe(tmp_path))
    assert resolve(path, [], 1).recipe.parallel.strategy == "single"
    found = resolve(path, [], 4)
    assert found.recipe.parallel.strategy == "ddp" and found.arguments[-1] == "parallel.strategy=ddp" and found.notes
    assert resolve(path, ["parallel.strategy=fsdp2"], 4).recipe.parallel.strategy == "fsdp2"
    with pytest.raises(ConfigError, match="4 processes would start"):
        resolve(path, ["parallel.strategy=single"], 4)
    with pytest.raises(ConfigError, match="line breaks"):
        resolve(path, ["data.path=a\nb"], 1)


@pytest.mark.slow
def test_a_launch_runs_its_own_copy_of_the_code_and_is_cancelled_and_resumed_as_it_was(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=100_000, every=50)
    words = ("launch", str(path), "--on", "torchrun", "--processes-per-node", "2", "--detach", "train.accumulation=2")
    started = chatmill(tmp_path, *words)
    assert started.returncode == 0, started.stderr
    run = tmp_path / "runs" / "r"
    try:
        commands = re.findall(r"^  \S*(chatmill .*)", started.stdout, re.M)  # where this shell finds the program
        assert commands == ["chatmill status runs/r", "chatmill logs runs/r --follow", "chatmill cancel runs/r"]
        wait_until("a checkpoint", lambda: newest_step(run) >= 50)
        status = json.loads(chatmill(tmp_path, "status", "runs/r", "--json").stdout)
        assert status["state"] == "running" and status["step"] >= 50 and status["eta_s"] > 0 and 0 < status["goodput"] <= 1
        assert "step " in chatmill(tmp_path, "logs", "runs/r").stdout
        assert "step " in chatmill(tmp_path, "logs", "runs/r", "--rank", "0").stdout
        assert "the output of 2 ranks" in chatmill(tmp_path, "logs", "runs/r", "--rank", "2").stderr
        assert "nothing to resume" in chatmill(tmp_path, "resume", "runs/r").stderr
    finally:
        assert "asked to save" in chatmill(tmp_path, "cancel", "runs/r").stdout
    wait_until("the end", lambda: attempts(run)[0].outcome is not None)
    assert attempts(run)[0].outcome == "preempted"
    stopped = newest_step(run)
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    code = run / "launches" / "001" / "code"
    assert list((code / "trainer" / "loop" / "__pycache__").glob("loop.*.pyc")), "the copy was not what ran"
    assert chatmill(tmp_path, "status", "r").stdout.count("chatmill resume runs/r continues") == 1
    assert "nothing to cancel" in chatmill(tmp_path, "cancel", "r").stdout
    assert chatmill(tmp_path, "resume", "r", "--detach").returncode == 0
    wait_until("further steps", lambda: newest_step(run) >= stopped + 50)
    assert chatmill(tmp_path, "cancel", "r", "--now").returncode == 0
    wait_until("the end", lambda: attempts(run)[1].outcome is not None)
    resumed = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [stopped]


@pytest.mark.slow
def test_accelerate_starts_the_same_run(tmp_path: Path) -> None:
    path = recipe(tmp_path, steps=3)
    words = ("launch", str(path), "--on", "torchrun", "--processes-per-node", "2", "--accelerate")
    done = chatmill(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = json.loads((tmp_path / "runs" / "r" / "environment.json").read_text())
    assert (environment["world_size"], environment["strategy"]) == (2, "ddp")


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str, sacct: str = "") -> Path:
    """squeue and sacct that print what they are given and count their calls."""
    calls = folder / "calls"
    for name, text in (("squeue", squeue), ("sacct", sacct)):
        program = folder / name
        program.write_text(f"#!/bin/sh\necho {name} >>{calls}\ncat <<'END'\n{text}\nEND\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


def make_run(folder: Path, job: str, *, step: int, outcome: str | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 100}\n")
    now = time.time()
    for i in range(1, step + 1):
        append_jsonl(folder / "metrics.jsonl", {"step": i, "loss": 2.0, "tokens": 100, "tokens_per_s": 50.0, "time": now})
    line = {"attempt": 1, "job": job, "nodes": ["n1"], "time": now - 400.0, "step": -1}
    append_jsonl(folder / ATTEMPTS, line | {"event": "begin"})
    if outcome:
        append_jsonl(folder / ATTEMPTS, line | {"event": "end", "outcome": outcome, "code": 1, "time": now})
    return folder


def test_the_state_of_many_runs_takes_one_question_to_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = "11|11|RUNNING|None|1:00:00|n1\n12|12|PENDING|Priority|1:00:00|"
    calls = fake_slurm(tmp_path, monkeypatch, queue, "13|13|NODE_FAIL|1:0")
    monkeypatch.chdir(tmp_path)
    for job in ("11", "12", "13"):
        make_run(tmp_path / "runs" / f"r{job}", job, step=50, outcome=None)
    assert main(["status", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["state"], one["step"]) for one in found] == [("RUNNING", 50), ("PENDING", 50), ("killed", 50)]
    assert "NODE_FAIL" in found[2]["detail"]
    assert found[0]["eta_s"] == pytest.approx(50 * 2.0) and found[0]["goodput"] == pytest.approx(50 * 2.0 / 400, rel=0.05)
    assert calls.read_text().split() == ["squeue", "sacct"]


def test_a_chain_between_two_elements_waits_and_is_neither_resumed_nor_called_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = "71|70|COMPLETED|None|0:00|n1\n70|70|PENDING|Priority|1:00:00|\n72|70|FAILED|NonZeroExitCode|0:00|n1"
    fake_slurm(tmp_path, monkeypatch, queue)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "chained", "71", step=50, outcome=None)
    line = {"event": "begin", "attempt": 2, "job": "71", "nodes": ["n1"], "time": time.time(), "step": -1, "array": "70"}
    append_jsonl(run / ATTEMPTS, line)
    append_jsonl(run / ATTEMPTS, line | {"event": "end", "outcome": "preempted", "code": 0})
    assert main(["status", "chained", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["detail"], shown["job"]) == ("PENDING", "Priority", "70")
    (run / "launches" / "001").mkdir(parents=True)
    (run / "launches" / "001" / "job.json").write_text(json.dumps({"on": "slurm", "job": "70", "time": 1.0, "command": []}))
    assert main(["resume", "chained"]) == 2
    assert "nothing to resume" in capsys.readouterr().err


def test_a_failed_run_shows_its_first_cause_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "runs" / "broken", "local-1", step=3, outcome="failed")
    ranks = run / "logs" / "attempt-001" / "node-0" / "none_x" / "attempt_0" / "1"
    ranks.mkdir(parents=True)
    (ranks / "stderr.log").write_text("Traceback\nOSError: disk is full\n")
    monkeypatch.chdir(tmp_path)
    assert main(["status", "broken"]) == 1
    text = capsys.readouterr().out
    assert "state       failed" in text and "node 0, local rank 1: OSError: disk is full" in text and "stderr.log" in text


def test_a_run_without_a_launcher_is_shown_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "plain"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("train: {steps: 2}\n")
    append_jsonl(run / "events.jsonl", {"event": "finished", "time": 1.0, "step": 2})
    assert describe(find_run(str(run)), {}).state == "finished" and all_runs(tmp_path / "runs") == [run]
    with pytest.raises(ConfigError, match="no run there"):
        find_run(str(tmp_path / "nothing"))
    assert query_slurm([]) == {}
