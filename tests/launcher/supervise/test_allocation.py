"""What is read from Slurm's own words, in the forms of several versions. The requests: jobs/test_slurm_requests.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from chatmill.launcher.supervise.allocation import AllocationError, processes, read
from chatmill.launcher.supervise.node_check import missing_gpus

SIZE = "JobId=5 JobName=a NumTasks=9 BatchFlag=1 NodeList=n[1-2] NumNodes=2 NumCPUs=2 NumTasks={tasks} CPUs/Task=1 "
HOSTS = {"n[1-2]": ["n1", "n2"]}


def line(held: str, asked: str = "", tasks: int | str = 2) -> str:
    return f"{SIZE.format(tasks=tasks)}TRES=cpu=2 Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES={held} MinCPUsNode=1 {asked} Power="


@pytest.mark.parametrize(
    ("held", "gpus"),
    [
        ("gpu:2(IDX:0-1)", 2),
        ("gpu:h100:3(IDX:0,2-3)", 3),
        ("gpu:3090:2(CNT:2)", 2),
        ("gpu:a100:1(IDX:0),gpu:h100:1(IDX:1)", 2),
        ("gpu(IDX:0,3-5)", 4),
        ("gpu(CNT:4)", 4),
        ("nic:1(IDX:0),gpu:2(IDX:0-1)", 2),
        ("", 0),
        ("nic:1(IDX:0)", 0),
    ],
)
def test_the_gpus_of_a_node_are_read_in_every_form(held: str, gpus: int) -> None:
    given = read(line(held), HOSTS, {})
    assert given.gpus == {"n1": gpus, "n2": gpus} and given.tasks == 2 and processes(given) == (gpus or 1, gpus)


@pytest.mark.parametrize(
    "asked",
    [
        "TresPerNode=gres:gpu:2",  # 22.05
        "TresPerNode=gres:gpu:h100:2",
        "TresPerNode=gres/gpu:2",  # 23.02
        "TresPerNode=gpu:2",
        "TresPerNode=gpu:3090:2",
        "TresPerNode=gres/gpu:a100:1,gres/gpu:h100:1",
        "TresPerJob=gres/gpu:4",
        "TresPerTask=cpu=4,gres/gpu=2",  # 23.11
        "TresPerTask=cpu:4,gres/gpu:2",
        "TresPerTask=gres/gpu:h100:2",
    ],
)
def test_of_whole_nodes_only_the_gpus_that_were_asked_for_are_used(asked: str) -> None:
    assert processes(read(line("gpu:8(IDX:0-7)", asked), HOSTS, {})) == (2, 2)


@pytest.mark.parametrize("asked", ["", "TresPerTask=cpu=4", "TresPerNode=gres/nic:1", "TresPerSocket=gres/gpu:4"])
def test_where_no_number_was_named_all_gpus_are_used(asked: str) -> None:
    assert processes(read(line("gpu:8(IDX:0-7)", asked), HOSTS, {})) == (8, 8)


@pytest.mark.parametrize(
    ("held", "asked", "tasks", "why"),
    [
        ("shard:2(IDX:0)", "", 2, "a share of a GPU"),
        ("gpu:1g.10gb:2(IDX:0-1)", "", 2, "2 MIG slices per node"),
        ("gpu:8(IDX:0-7)", "TresPerJob=gres/gpu:3", 2, "3 GPUs were asked for on 2 nodes"),
        ("gpu:8(IDX:0-7)", "", 8, "8 tasks on 2 nodes with 8 GPUs each"),
        ("", "", 3, "different numbers of tasks"),
        ("", "HetJobId=5 HetJobOffset=0", 2, "heterogeneous"),
    ],
)
def test_what_cannot_be_one_run_is_refused_in_words(held: str, asked: str, tasks: int, why: str) -> None:
    given = read(line(held, asked, tasks), HOSTS, {})
    with pytest.raises(AllocationError, match=why):
        processes(given)


def test_a_job_of_which_slurm_says_something_else_is_refused() -> None:
    with pytest.raises(AllocationError, match="says nothing about nodes and tasks"):
        read("JobId=5 JobName=a", {}, {})
    with pytest.raises(AllocationError, match="lists 1 nodes, but the job has 2"):
        read(line(""), {"n[1-2]": ["n1"]}, {})


def test_nodes_without_a_number_of_tasks_run_one_each_and_a_wanted_number_counts_first() -> None:
    assert processes(read(line("", tasks="N/A"), HOSTS, {})) == (1, 0)
    assert processes(read(line("", tasks=3), HOSTS, {}), 4) == (4, 0)
    assert processes(read(line("gpu:8(IDX:0-7)"), HOSTS, {}), 6) == (6, 8)


@pytest.mark.parametrize(
    ("visible", "processes_wanted", "short"),
    [("0,1", 2, False), ("0", 2, True), ("", 1, True), (None, 8, False), ("MIG-a,MIG-b", 2, True), ("GPU-a,GPU-b", 2, False)],
)
def test_a_step_that_sees_too_few_gpus_is_refused(visible: str | None, processes_wanted: int, short: bool) -> None:
    assert bool(missing_gpus(processes_wanted, visible)) == short


def test_a_step_that_sees_too_few_gpus_is_refused_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatmill.launcher.supervise.first_cause import find_cause
    from chatmill.launcher.supervise.node_check import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CHATMILL_LOGS", str(tmp_path))
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert main(["--gpus", "4", "--processes", "4", "--folder", str(tmp_path)]) == 78
    cause = find_cause(tmp_path)
    assert cause is not None and cause.permanent and str(cause).startswith("node 3, local rank 0: this step sees 1 GPUs")
