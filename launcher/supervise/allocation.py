"""What a Slurm job was given, as nodes x processes, or a refusal in words.

    python -m chatmill.launcher.supervise.allocation      # called by slurm/train.sh; prints: PROCESSES_PER_NODE GPUS_PER_NODE

A job can ask for GPUs and tasks in a dozen ways, and its SLURM_* variables may come from the shell that submitted it. So what
counts is what Slurm recorded (`scontrol show job -d`). One process runs on each GPU, or one per task on nodes without GPUs.
Every node gets the same number. docs/slurm.md has the table. Standard library only.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..programs import output_of
from .slurm_job import show_job

CANNOT_WORK = 2
TRY_LATER = 75  # EX_TEMPFAIL
FIRST_SPECIAL_STEP = 0xFFFF_FF00  # the batch script, the interactive step of salloc and the like have numbers above it

_TYPE = r"(?:[:=](?P<type>[^:=,()]+(?=[:=]\d)|[^:=,()]*[A-Za-z][^:=,()]*))?"  # a type like 3090 only before a count
_HELD = re.compile(rf"(?:^|,)(?P<name>gpu|shard|mps){_TYPE}(?::(?P<count>\d+))?\((?:IDX|CNT):(?P<list>[^)]*)\)")
_ASKED = re.compile(rf"(?:^|,)(?:gres[:/])?gpu{_TYPE}(?:[:=](?P<count>\d+))?(?=,|$)")
_NODES = re.compile(r" Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES(?:_IDX)?=(\S*)")
_SIZE = re.compile(r" NumNodes=(\d+)\S* NumCPUs=\S+ NumTasks=(\d+|N/A) ")


class AllocationError(ValueError):
    """This allocation cannot be one run. The message says what was given and what to ask for instead."""


@dataclass(frozen=True)
class Allocation:
    """gpus: per node, by node name. tasks: of the whole job. asked: GPUs that the job named, on all nodes together, or None.

    tasks_per_node: as Slurm laid them out, node by node, or () where Slurm counts CPUs.
    """

    job: str
    gpus: Mapping[str, int]
    tasks: int
    asked: int | None = None
    tasks_per_node: tuple[int, ...] = ()
    shared: str = ""  # "shard" or "mps": a part of a GPU
    slices: bool = False  # MIG
    group: bool = False  # one component of a heterogeneous job
    unthrottled: bool = False  # an array whose elements run at the same time

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self.gpus)


def read(line: str, hosts: Mapping[str, list[str]], environment: Mapping[str, str]) -> Allocation:
    """From the job's line of `scontrol show job -d -o`. hosts: the names that each node expression in it stands for."""
    size = _SIZE.search(line)
    if size is None:
        raise AllocationError(f"`scontrol show job` says nothing about nodes and tasks: {line[:200]!r}")
    nodes, tasks = int(size[1]), int(size[2]) if size[2].isdigit() else int(size[1])
    gpus: dict[str, int] = {}
    shared, slices = "", False
    for names, held in _NODES.findall(line):
        found = list(_HELD.finditer(held))
        shared = next((m["name"] for m in found if m["name"] != "gpu"), shared)
        slices = slices or any(re.match(r"\d+g\.", m["type"] or "") for m in found)
        count = sum(_count(m["count"], m["list"]) for m in found if m["name"] == "gpu")
        gpus |= dict.fromkeys(hosts.get(names, [names]), count)
    if len(gpus) != nodes:
        raise AllocationError(f"`scontrol show job -d` lists {len(gpus)} nodes, but the job has {nodes}: {line[-400:]!r}")
    layout = _layout(environment.get("SLURM_TASKS_PER_NODE", ""))
    several = int(environment.get("SLURM_ARRAY_TASK_COUNT", "1")) > 1
    return Allocation(
        job=line.split()[0].partition("=")[2],
        gpus=gpus,
        tasks=tasks,
        asked=_asked(line, nodes, tasks),
        tasks_per_node=layout if sum(layout) == tasks else (),
        shared=shared,
        slices=slices,
        group=" HetJobId=" in line or " PackJobId=" in line,
        unthrottled=several and " ArrayTaskId=" in line and " ArrayTaskThrottle=1 " not in line,
    )


def processes(given: Allocation, wanted: int | None = None) -> tuple[int, int]:
    """Processes and GPUs on each node. wanted: processes per node (CHATMILL_PROCESSES). Raises AllocationError."""
    if given.group:
        raise AllocationError(
            "this is a heterogeneous job (sbatch ... : ...), and a run needs nodes that are all alike.\n"
            "Submit one job: sbatch --nodes=N --gpus-per-node=G slurm/train.sh RECIPE"
        )
    if given.unthrottled:
        raise AllocationError(
            "the elements of this job array run at the same time, and all of them would write one run.\n"
            "For wall times one after the other add %1: sbatch --array=1-10%1 slurm/train.sh RECIPE"
        )
    gpus = _gpus_per_node(given)
    per_node = given.tasks / given.nodes
    if wanted is not None:
        if gpus and wanted > gpus:
            raise AllocationError(f"CHATMILL_PROCESSES={wanted}, but each node holds {gpus} GPUs: at most one process per GPU")
        return wanted, gpus
    if gpus:
        if per_node not in (1, gpus):
            raise AllocationError(
                f"{given.tasks} tasks on {given.nodes} nodes with {gpus} GPUs each: one process runs on each GPU.\n"
                f"Ask for 1 task per node or for {gpus}, or set CHATMILL_PROCESSES for fewer processes than GPUs"
            )
        return gpus, gpus
    if len(set(given.tasks_per_node)) > 1 or per_node != int(per_node):
        layout = ", ".join(map(str, given.tasks_per_node)) or f"{given.tasks} on {given.nodes} nodes"
        raise AllocationError(
            f"the nodes hold different numbers of tasks ({layout}), and every node runs as many processes as the others.\n"
            f"Ask for --nodes={given.nodes} --ntasks-per-node={max(1, given.tasks // given.nodes)}"
        )
    return int(per_node), 0


def _gpus_per_node(given: Allocation) -> int:
    if given.shared:
        raise AllocationError(
            f"this job holds a share of a GPU (--gres={given.shared}): ask for whole GPUs with --gpus-per-node=N"
        )
    counts, held = set(given.gpus.values()), sum(given.gpus.values())
    least = min(counts)
    if given.asked is not None and given.asked < held:  # whole nodes (--exclusive), but only some of their GPUs
        least, rest = divmod(given.asked, given.nodes)
        if rest or least > min(counts):
            raise AllocationError(
                f"{given.asked} GPUs were asked for on {given.nodes} nodes: not the same number on each.\n"
                f"Ask for --nodes={given.nodes} --gpus-per-node=N"
            )
    elif len(counts) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in given.gpus.items())
        number = held // given.nodes if held % given.nodes == 0 else "N"
        raise AllocationError(
            f"the nodes hold different numbers of GPUs ({listed}), and every node runs as many processes as the others.\n"
            f"Ask for --nodes={given.nodes} --gpus-per-node={number}"
        )
    if given.slices and least > 1:
        raise AllocationError(f"{least} MIG slices per node: a process sees only one of them. Ask for one, or for whole GPUs")
    return least


def _asked(line: str, nodes: int, tasks: int) -> int | None:
    """GPUs of all nodes together, as far as the job named a number."""
    for field, times in (("TresPerNode", nodes), ("TresPerJob", 1), ("TresPerTask", tasks)):
        value = re.search(rf" {field}=(\S+)", line)
        found = list(_ASKED.finditer(value[1])) if value else []
        if found:
            return sum(int(m["count"] or 1) for m in found) * times
    return None


def _count(number: str | None, listed: str) -> int:
    """2 of gpu:2(IDX:0-1), gpu(IDX:0,3) or gpu(CNT:2)."""
    if number is not None:
        return int(number)
    if listed.isdigit():
        return int(listed)
    spans = [span.split("-") for span in listed.split(",") if span]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def _layout(text: str) -> tuple[int, ...]:
    """(2, 2, 1) of `2(x2),1`."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(count) for count, times in parts for _ in range(int(times or 1)))


def current(environment: Mapping[str, str]) -> Allocation:
    """The allocation of the job that this process runs in. Raises AllocationError, or OSError where Slurm does not answer."""
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        raise AllocationError("this is no Slurm job (no SLURM_JOB_ID): submit it, sbatch slurm/train.sh RECIPE")
    line = None
    for pause in (0.0, 2.0, 5.0, 15.0):
        time.sleep(pause)
        if (line := show_job(job, details=True)) is not None:
            break
    else:
        raise OSError(f"`scontrol show job {job}` does not answer")
    step = environment.get("SLURM_STEP_ID", "")
    if "BatchFlag=0" in line and step.isdigit() and int(step) < FIRST_SPECIAL_STEP:
        raise AllocationError(
            f"this shell is step {step} of job {job} and holds its CPUs and GPUs, so no further step could start.\n"
            "Use sbatch or salloc instead of srun --pty, or start the processes here: chatmill launch RECIPE --on torchrun"
        )
    expressions = {names for names, _ in _NODES.findall(line)}
    hosts = {names: (output_of(["scontrol", "show", "hostnames", names]) or names).split() for names in expressions}
    return read(line, hosts, environment)


def main() -> int:
    """Print processes and GPUs per node; 2 for an allocation that cannot be one run, 75 where Slurm does not answer."""
    wanted = os.environ.get("CHATMILL_PROCESSES", "")
    try:
        if wanted and not (wanted.isdigit() and int(wanted)):
            raise AllocationError(f"CHATMILL_PROCESSES={wanted}: expected the number of processes per node")
        given = current(os.environ)
        count, gpus = processes(given, int(wanted) if wanted else None)
    except AllocationError as error:
        print(f"error: {error}", file=sys.stderr)
        return CANNOT_WORK
    except OSError as error:
        print(f"error: {error}; submit the same command again", file=sys.stderr)
        return TRY_LATER
    unused = max(given.gpus.values()) - (count if gpus else 0)
    idle = f"; {unused} GPUs of each node stay unused" if unused else ""
    print(f"allocation: {given.nodes} nodes x {count} processes, {gpus} GPUs per node{idle}", file=sys.stderr)
    print(count, gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
