"""Every way to ask Slurm for GPUs and tasks, on a real Slurm: one run of the right size, or a refusal in words.

All rows are submitted at once to one cluster. Slurm, slurm/train.sh, the allocation, the supervisor and srun are real. Instead
of Python a script notes what each node's torchrun was started with. docs/slurm.md has the same rows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs

ROOT = Path(__file__).resolve().parents[3]
REASON = missing_programs()
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

STAND_IN = """\
#!/bin/bash
here={folder}/$SLURM_JOB_ID
mkdir -p $here
case $2 in
  chatmill.launcher.jobs.resolve) echo "$4" >$here/world_size; echo $here/run; echo recipe ;;
  torch.distributed.run)
    [[ " $* " == *preflight* ]] && exit 0
    echo "$SLURM_NNODES $CHATMILL_PROCESSES gpus=$CUDA_VISIBLE_DEVICES $MASTER_ADDR $MASTER_PORT" >$here/agent-$SLURM_NODEID
    echo "$*" >$here/words-$SLURM_NODEID ;;
  chatmill.launcher.supervise) env >$here/environment; exec {python} "$@" ;;
  *) exec {python} "$@" ;;
esac
"""
# What a shell inside another job hands on to sbatch, and what newer versions of Slurm add to it.
INHERITED = {
    "SLURM_GPUS_PER_TASK": "1",
    "SLURM_TRES_PER_TASK": "cpu=2,gres/gpu=1",
    "SLURM_NTASKS": "7",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NTASKS_PER_GPU": "1",
    "SLURM_MEM_PER_CPU": "7",
    "SLURM_MEM_PER_NODE": "9",
    "SLURM_CPUS_PER_TASK": "3",
    "SRUN_CPUS_PER_TASK": "5",
    "SLURM_EXACT": "1",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_GPU_BIND": "single:1",
    "SLURM_DISTRIBUTION": "arbitrary",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_GPUS": "1",
    "SLURM_HET_SIZE": "2",
    "SLURM_ARRAY_JOB_ID": "77",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "9",
    "SLURM_EXPORT_ENV": "NONE",
    "CUDA_VISIBLE_DEVICES": "3",
}


@dataclass(frozen=True)
class Row:
    """runs: nodes, processes per node, GPUs that each node's step sees. refused: what the job's output says instead."""

    options: str
    runs: tuple[int, int, int] | None = None
    refused: str = ""
    extra: dict[str, str] = field(default_factory=dict)


ROWS = [
    Row("", (1, 1, 0)),
    Row("--gres=gpu:2", (1, 2, 2)),
    Row("--gres=gpu:h100:2", (1, 2, 2)),
    Row("--gpus=2", (1, 2, 2)),
    Row("--nodes=2 --gpus=3", refused=r"different numbers of GPUs \(n\d: \d, n\d: \d\)"),
    Row("--gpus-per-node=h100:2", (1, 2, 2)),
    Row("--nodes=2 --gpus-per-node=2", (2, 2, 2)),
    Row("--ntasks-per-node=2 --gpus-per-task=1", (1, 2, 2)),
    Row("--nodes=2 --ntasks-per-node=2 --gpus-per-task=1", (2, 2, 2)),
    Row("--ntasks=2 --gpus-per-task=1", (1, 2, 2)),
    Row("--ntasks=1 --gpus-per-task=2", (1, 2, 2)),
    Row("--sockets-per-node=1 --gpus-per-socket=2", (1, 2, 2)),
    Row("--exclusive", (1, 4, 4)),
    Row("--exclusive --gpus-per-node=2", (1, 2, 2)),
    Row("--gpus=2 --ntasks-per-gpu=1", (1, 2, 2)),
    Row("--gpus=2 --ntasks-per-gpu=2", refused="4 tasks on 1 nodes with 2 GPUs each: one process runs on each GPU"),
    Row("--gpus-per-node=2 --ntasks-per-node=2", (1, 2, 2)),
    Row("--gpus-per-node=4 --ntasks-per-node=2", refused="Ask for 1 task per node or for 4"),
    Row("--gpus-per-node=2 --cpus-per-gpu=2", (1, 2, 2)),
    Row("--gpus-per-node=2 --mem-per-gpu=100", (1, 2, 2)),
    Row("--gpus-per-node=2 --mem=300 --hint=nomultithread", (1, 2, 2)),
    Row("--gpus-per-node=2 --ntasks-per-node=2 --gpu-bind=single:1", (1, 2, 2)),
    Row("--gpus-per-node=2 --export=CHATMILL_PYTHON", (1, 2, 2)),
    Row("--ntasks=3", (1, 3, 0)),
    Row("--cpus-per-task=3 --mem-per-cpu=100 --ntasks-per-node=2", (1, 2, 0)),
    Row("--nodes=2 --ntasks=3", refused=r"different numbers of tasks \(\d, \d\)"),
    Row("--gpus-per-node=1 : --gpus-per-node=2", refused="this is a heterogeneous job"),
    Row("--array=1-2", refused="--array=1-10%1"),
    Row("", (1, 2, 2), extra={"SBATCH_GRES": "gpu:2"}),
    Row("", (1, 4, 4), extra={"SBATCH_EXCLUSIVE": "exclusive"}),
    Row("--gpus-per-node=2", (1, 2, 2), extra=INHERITED),
    Row("--gpus-per-node=2", (1, 1, 2), extra={"CHATMILL_PROCESSES": "1"}),
    Row("--gpus-per-node=2", refused="CHATMILL_PROCESSES=3, but each node holds 2 GPUs", extra={"CHATMILL_PROCESSES": "3"}),
]


def name_of(row: Row) -> str:
    return " ".join([row.options or "nothing", *(f"{name}={value}" for name, value in list(row.extra.items())[:1])])


@dataclass(frozen=True)
class Bench:
    """A cluster to which every row was submitted; jobs by the row's name."""

    cluster: SlurmCluster
    folder: Path
    jobs: dict[str, str]

    def output(self, job: str) -> str:
        return "".join(file.read_text() for file in sorted(self.folder.glob(f"out-{job}*")))

    def agents(self, job: str) -> list[str]:
        return [file.read_text() for file in sorted((self.folder / job).glob("agent-*"))]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("requests")
    stand_in = folder / "python"
    stand_in.write_text(STAND_IN.format(folder=folder, python=sys.executable))
    stand_in.chmod(0o755)
    with SlurmCluster(folder / "cluster", nodes=3) as cluster:
        jobs = {}
        for row in ROWS:
            variables = {"CHATMILL_PYTHON": str(stand_in)} | row.extra
            words = [f"--output={folder}/out-%j", *row.options.split()]
            if ":" in words:
                words.insert(words.index(":") + 1, f"--output={folder}/out-%j")
            try:
                jobs[name_of(row)] = cluster.sbatch(*words, "slurm/train.sh", "recipe", cwd=ROOT, extra=variables)
            except RuntimeError as error:
                jobs[name_of(row)] = str(error)
        yield Bench(cluster, folder, jobs)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_request_becomes_one_run_of_the_right_size_or_is_refused_in_words(row: Row, bench: Bench) -> None:
    job = bench.jobs[name_of(row)]
    assert job.isdigit(), job  # sbatch took it
    element = f"{job}_1" if "--array" in row.options else job
    state = bench.cluster.wait(element, 300)
    said, agents = bench.output(job), bench.agents(job)
    if row.runs is None:
        assert state == "FAILED" and re.search(row.refused, said), (state, said)
        assert not agents and "attempt 1" not in said
        return
    nodes, processes, gpus = row.runs
    assert state == "COMPLETED", said
    assert (bench.folder / job / "world_size").read_text() == f"{nodes * processes}\n"
    started = [agent.split() for agent in agents]
    assert [(words[0], words[1]) for words in started] == [(str(nodes), str(processes))] * nodes, said
    assert [len(re.findall(r"\d", words[2])) for words in started] == [gpus] * nodes, agents
    assert len({tuple(words[3:]) for words in started}) == 1 and started[0][3] == "127.0.0.1"  # one rendezvous
    for node in range(nodes):
        words = (bench.folder / job / f"words-{node}").read_text()
        assert f"--nnodes={nodes} --node-rank={node} --nproc-per-node={processes} " in words


def test_what_another_job_left_in_the_environment_does_not_reach_the_step(bench: Bench) -> None:
    """SLURM_TRES_PER_TASK is from Slurm 23.11 on, whose srun would start the step with one GPU."""
    inherited = next(row for row in ROWS if row.extra is INHERITED)
    job = bench.jobs[name_of(inherited)]
    assert bench.cluster.wait(job, 300) == "COMPLETED"
    left = set((bench.folder / job / "environment").read_text().splitlines())
    kept = {f"{name}={value}" for name, value in INHERITED.items()} & left
    assert {line.partition("=")[0] for line in kept} == {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"}
    assert "next element" not in bench.output(job)  # it is no array, whatever its variables say


def test_a_range_of_nodes_runs_on_as_many_as_slurm_gave(bench: Bench) -> None:
    stand_in = {"CHATMILL_PYTHON": str(bench.folder / "python")}
    words = ["--nodes=1-2", "--gpus-per-node=1", f"--output={bench.folder}/out-%j", "slurm/train.sh", "recipe"]
    job = bench.cluster.sbatch(*words, cwd=ROOT, extra=stand_in)
    assert bench.cluster.wait(job, 300) == "COMPLETED", bench.output(job)
    nodes = len(bench.agents(job))
    assert str(nodes) == bench.cluster.field(job, "NumNodes") == (bench.folder / job / "world_size").read_text().strip()


def test_an_interactive_allocation_is_used_from_its_shell_and_a_step_that_holds_the_gpus_is_refused(bench: Bench) -> None:
    stand_in = {"CHATMILL_PYTHON": str(bench.folder / "python")}
    command = ["bash", "slurm/train.sh", "recipe"]
    said = bench.cluster.call("salloc", "--gpus-per-node=2", *command, cwd=ROOT, extra=stand_in)
    assert "attempt 1 finished" in said and "gpus=0,1 " in bench.agents(max(bench_jobs(bench), key=int))[0]
    with pytest.raises(RuntimeError, match=r"this shell is step 0 of job \d+ and holds its CPUs and GPUs"):
        bench.cluster.call("srun", "--gpus-per-node=2", *command, cwd=ROOT, extra=stand_in)


def bench_jobs(bench: Bench) -> list[str]:
    return [folder.name for folder in bench.folder.iterdir() if folder.name.isdigit() and (folder / "world_size").is_file()]
