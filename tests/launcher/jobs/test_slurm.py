"""slurm/train.sh on a real Slurm: one run over two nodes, and the same losses whatever happens on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.launcher.conftest import Recovery
from tests.launcher.slurm_cluster import SlurmCluster, missing_network, missing_programs
from tests.launcher.tiny_run import make_data, wait_until, write_recipe

from chatmill.launcher.__main__ import main
from chatmill.launcher.supervise.run_state import attempts, newest_step
from chatmill.run_files import read_jsonl

ROOT = Path(__file__).resolve().parents[3]
LONG, SHORT, EVERY = 400, 120, 40
REASON = missing_programs()

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


@dataclass(frozen=True)
class Bench:
    """A cluster, a data set, and the losses of a run that nothing disturbed."""

    cluster: SlurmCluster
    folder: Path
    vocab: int

    def submit(self, name: str, *options: str, steps: int = SHORT, extra: dict[str, str] | None = None) -> tuple[str, Path]:
        """sbatch slurm/train.sh on 2 nodes x 1 process (a process takes seconds to start); returns job id and run folder."""
        recipe = write_recipe(self.folder, name, self.folder / "data", self.vocab, steps=steps, every=EVERY)
        words = ["--nodes=2", "--ntasks-per-node=1", f"--output={self.folder}/{name}-%j.out", *options]
        job = self.cluster.sbatch(*words, "slurm/train.sh", str(recipe), "train.accumulation=4", cwd=ROOT, extra=extra)
        return job, self.folder / "runs" / name

    def output(self, name: str, job: str) -> str:
        """What the job printed."""
        file = self.folder / f"{name}-{job}.out"
        return file.read_text() if file.is_file() else "(no output)"


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line}


def ranks_of(run: Path) -> dict[int, int]:
    """rank -> process id of the run's workers on this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
        except OSError:
            continue
        if variables.get("CHATMILL_RUN_DIR") == str(run) and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def batch_process(array: str) -> int:
    """Process id of the batch script (by then the supervisor) of the running element of a job array."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if not folder.name.isdigit() or "chatmill.launcher.supervise" not in (folder / "cmdline").read_text().split("\0"):
                continue
            if f"SLURM_ARRAY_JOB_ID={array}" in (folder / "environ").read_text().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    assert len(found) == 1, found
    return found[0]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("slurm")
    vocab = make_data(folder / "data")
    with SlurmCluster(folder / "cluster", nodes=3) as cluster:
        yield Bench(cluster, folder, vocab)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> dict[int, float]:
    """Losses by step of a run of LONG steps on 2 nodes x 1 process that ended by itself."""
    job, run = bench.submit("undisturbed", steps=LONG)
    state = bench.cluster.wait(job, 600)
    assert state == "COMPLETED", bench.output("undisturbed", job)
    return losses(run)


def recovered(fault: str, run: Path, at_step: int, since: float) -> Recovery:
    """Read off the run's own records how many steps were computed twice and how long nothing was."""
    resumed = next(event for event in read_jsonl(run / "events.jsonl") if event["event"] == "resume")
    first = next(m for m in read_jsonl(run / "metrics.jsonl") if m["step"] == resumed["step"] + 1)
    return Recovery(fault, max(0, at_step - resumed["step"]), first["time"] - since)


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


def assert_same_losses(run: Path, undisturbed: dict[int, float], steps: int = SHORT) -> None:
    mine = losses(run)
    assert sorted(mine) == list(range(1, steps + 1))
    assert mine == {step: undisturbed[step] for step in range(1, steps + 1)}  # to the last bit


def test_a_run_that_nothing_disturbs_learns_in_one_attempt(bench: Bench, undisturbed: dict[int, float]) -> None:
    run = bench.folder / "runs" / "undisturbed"
    assert sorted(undisturbed) == list(range(1, LONG + 1)) and newest_step(run) == LONG
    assert undisturbed[LONG] < 0.5 * undisturbed[1]
    (attempt,) = attempts(run)
    assert attempt.nodes == ("n1", "n2") and attempt.outcome == "finished"


def test_two_nodes_of_two_processes_are_one_run_of_world_size_four(bench: Bench) -> None:
    job, run = bench.submit("four", "--ntasks-per-node=2", steps=EVERY)
    assert bench.cluster.wait(job, 600) == "COMPLETED", bench.output("four", job)
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["world_size"], environment["backend"], environment["strategy"]) == (4, "gloo", "ddp")
    assert sorted(losses(run)) == list(range(1, EVERY + 1)) and newest_step(run) == EVERY
    logs = sorted(path.relative_to(run / "logs") for path in (run / "logs").glob("attempt-001/node-*/*/attempt_0/*/stdout.log"))
    assert [path.parts[1] + "/" + path.parts[4] for path in logs] == ["node-0/0", "node-0/1", "node-1/0", "node-1/1"]


def test_a_rank_killed_with_kill_9_costs_no_more_than_the_steps_since_the_last_checkpoint(
    bench: Bench, undisturbed: dict[int, float], recoveries: list[Recovery]
) -> None:
    job, run = bench.submit("killed")
    wait_until("half way to the second checkpoint", lambda: last_step(run) >= EVERY + EVERY // 2)
    at_step, since = last_step(run), time.time()
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert bench.cluster.wait(job) == "COMPLETED", bench.output("killed", job)
    assert [attempt.outcome for attempt in attempts(run)] == ["failed", "finished"]
    assert "node 1, local rank 0: killed from outside" in (attempts(run)[0].cause or "")
    assert_same_losses(run, undisturbed)
    recoveries.append(recovered("kill -9 of a rank", run, at_step, since))


def test_a_requeued_job_continues_where_it_stopped(
    bench: Bench, undisturbed: dict[int, float], recoveries: list[Recovery]
) -> None:
    job, run = bench.submit("requeued")
    wait_until("first checkpoint", lambda: newest_step(run) >= EVERY)
    at_step, since = last_step(run), time.time()
    bench.cluster.call("scontrol", "requeue", job)
    wait_until("preempted mark or restart", lambda: len(attempts(run)) == 2)
    assert bench.cluster.wait(job) == "COMPLETED", bench.output("requeued", job)
    assert_same_losses(run, undisturbed)
    events = [event for event in read_jsonl(run / "events.jsonl") if event["event"] in ("preempted", "resume")]
    assert [event["event"] for event in events] == ["preempted", "resume"] and events[0]["step"] == events[1]["step"]
    recoveries.append(recovered("scontrol requeue", run, at_step, since))


@pytest.mark.exhaustive  # test_slurm_chains.py has the chain without a training
def test_a_chain_of_wall_times_is_one_run(bench: Bench, undisturbed: dict[int, float]) -> None:
    job, run = bench.submit("chained", "--array=1-2%1")
    wait_until("first checkpoint", lambda: newest_step(run) >= EVERY)
    os.kill(batch_process(job), signal.SIGUSR1)  # what Slurm sends (--signal=B:USR1) near the end of a wall time
    assert [bench.cluster.wait(f"{job}_{element}", 600) for element in (1, 2)] == ["COMPLETED"] * 2
    assert [attempt.outcome for attempt in attempts(run)] == ["preempted", "finished"]
    assert_same_losses(run, undisturbed)


def test_a_job_preempted_by_a_higher_partition_continues_after_it(
    bench: Bench, undisturbed: dict[int, float], recoveries: list[Recovery]
) -> None:
    job, run = bench.submit("preempted")
    wait_until("first checkpoint", lambda: newest_step(run) >= EVERY)
    at_step, since = last_step(run), time.time()
    script = bench.folder / "urgent.sh"
    script.write_text("#!/bin/bash\nsrun true\n")
    urgent = bench.cluster.sbatch(
        "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", str(script), cwd=bench.folder
    )
    assert bench.cluster.wait(urgent) == "COMPLETED"
    assert bench.cluster.wait(job) == "COMPLETED", bench.output("preempted", job)
    assert bench.cluster.field(job, "Restarts") == "1"
    assert_same_losses(run, undisturbed)
    recoveries.append(recovered("preempted by a partition", run, at_step, since))


def test_a_job_saves_before_its_time_limit_and_goes_on_in_the_next_one(
    bench: Bench, undisturbed: dict[int, float], recoveries: list[Recovery]
) -> None:
    # Shortened to 5 minutes, the job is at once within the 300 s before its end, whatever time its start took. Slurm then
    # sends the signal at its next look at time limits, which it takes every 30 s.
    cluster = bench.cluster
    job, run = bench.submit("limited", "--time=30", "--signal=B:USR1@300", steps=LONG)
    wait_until("first step", lambda: last_step(run) >= 1)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=5")
    wait_until("stopped by the signal", lambda: any(a.outcome for a in attempts(run)))
    at_step, since = last_step(run), (attempts(run)[0].ended or 0.0)
    cluster.wait_until(job, ("PENDING",), 600)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # one interruption is enough
    assert cluster.wait(job, 600) == "COMPLETED", bench.output("limited", job)
    assert attempts(run)[0].outcome == "preempted"
    assert "requeued" in bench.output("limited", job)
    assert_same_losses(run, undisturbed, LONG)
    recoveries.append(recovered("time limit", run, at_step, since))


@pytest.mark.skipif(bool(missing_network()), reason=missing_network())
def test_a_run_goes_on_without_a_node_whose_link_was_cut(
    bench: Bench, undisturbed: dict[int, float], recoveries: list[Recovery], tmp_path: Path
) -> None:
    with SlurmCluster(tmp_path / "cluster", nodes=3, isolated=True) as cluster:
        isolated = Bench(cluster, bench.folder, bench.vocab)
        job, run = isolated.submit("cut")
        wait_until("half way to the second checkpoint", lambda: last_step(run) >= EVERY + EVERY // 2)
        at_step, since = last_step(run), time.time()
        cluster.cut("n2")
        state = cluster.wait(job, 600)
    assert state == "COMPLETED", isolated.output("cut", job)
    assert [attempt.nodes for attempt in attempts(run)] == [("n1", "n2"), ("n1", "n3")]
    assert_same_losses(run, undisturbed)
    recoveries.append(recovered("link cut to a node", run, at_step, since))


def test_a_recipe_that_cannot_work_ends_the_job_before_any_process_starts(bench: Bench) -> None:
    job = bench.cluster.sbatch(f"--output={bench.folder}/bad-%j.out", "slurm/train.sh", "tiny", "optimizer.rl=1", cwd=ROOT)
    assert bench.cluster.wait(job) == "FAILED"
    assert re.search(r"optimizer\.rl: unknown key; did you mean 'lr'", bench.output("bad", job))


def test_a_run_that_never_gets_anywhere_is_given_up(bench: Bench) -> None:
    blocker = bench.folder / "runs" / "stuck" / "checkpoints"
    blocker.parent.mkdir(parents=True)
    blocker.write_text("a file where the folder of checkpoints should be")
    job, run = bench.submit("stuck", "--nodes=1")
    assert bench.cluster.wait(job) == "FAILED"
    outcomes = [attempt.outcome for attempt in attempts(run)]
    assert outcomes == ["failed"] * 3, bench.output("stuck", job)
    assert "given up: 3 attempts in a row" in bench.output("stuck", job)


def test_a_node_that_fails_its_check_is_left_out_of_the_next_attempt(bench: Bench, undisturbed: dict[int, float]) -> None:
    check = bench.folder / "check.sh"
    check.write_text('#!/bin/bash\nif [ "$SLURMD_NODENAME" = n1 ]; then echo "fan is broken"; exit 1; fi\n')
    check.chmod(0o755)
    variables = {"CHATMILL_NODE_CHECK": str(check), "CHATMILL_PREFLIGHT": "1"}
    job, run = bench.submit("unfit", steps=EVERY, extra=variables)
    assert bench.cluster.wait(job) == "COMPLETED", bench.output("unfit", job)
    assert bench.cluster.field(job, "ExcNodeList") == "n1"
    assert [attempt.nodes for attempt in attempts(run)] == [("n1", "n2"), ("n2", "n3")]
    assert "fan is broken" in (run / "logs" / "attempt-001" / "bad-node-n1").read_text()
    assert "preflight: 2 ranks" in bench.output("unfit", job)
    assert_same_losses(run, undisturbed, EVERY)


def test_a_launched_job_is_watched_cancelled_and_resumed_by_its_run_folder(
    bench: Bench, undisturbed: dict[int, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", bench.cluster.environment["SLURM_CONF"])
    recipe = write_recipe(bench.folder, "launched", bench.folder / "data", bench.vocab, steps=SHORT, every=EVERY)
    words = ["launch", str(recipe), "--on", "slurm", "--nodes", "2", "--processes-per-node", "1", "train.accumulation=4"]
    monkeypatch.chdir(bench.folder)
    assert main(words) == 0
    said = capsys.readouterr().out
    match = re.search(r"submitted as Slurm job (\d+)", said)
    assert match and len(re.findall(r"\n  \S*chatmill ", said)) == 3
    job, run = match[1], bench.folder / "runs" / "launched"
    wait_until("a checkpoint", lambda: newest_step(run) >= EVERY)
    assert main(["status", "launched", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["job"], shown["nodes"]) == ("RUNNING", job, "n1 n2") and shown["step"] >= EVERY
    assert main(["cancel", "launched"]) == 0
    assert bench.cluster.wait(job) == "COMPLETED"
    assert [attempt.outcome for attempt in attempts(run)] == ["preempted"] and bench.cluster.field(job, "Restarts") == "0"
    assert main(["resume", "launched"]) == 0
    again = re.search(r"submitted as Slurm job (\d+)", capsys.readouterr().out)
    assert again and bench.cluster.wait(again[1]) == "COMPLETED"
    assert_same_losses(run, undisturbed)
    assert main(["status", "launched"]) == 0
    assert "state       finished" in capsys.readouterr().out
