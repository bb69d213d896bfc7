"""The Slurm job this process runs in: its nodes, time left, steps, and requeueing.

Standard library only; every call is one of Slurm's own commands, and one that fails is an answer (None or False), not a crash.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from ..programs import output_of


def show_job(job: str, *, details: bool = False) -> str | None:
    """The line of `scontrol show job` about this job, without other elements of its array; None where Slurm does not answer."""
    text = output_of(["scontrol", "show", "job", *(["-d"] if details else []), "-o", job])
    lines = [line for line in (text or "").splitlines() if line.startswith(f"JobId={job} ")]
    return lines[0] if lines else None


@dataclass(frozen=True)
class SlurmJob:
    """id: what squeue and scontrol take. array: the id of the job array (a chain of jobs that is one run), or None."""

    id: str
    nodes: list[str]
    array: str | None = None

    @classmethod
    def current(cls) -> SlurmJob | None:
        """The job of this process, or None outside of Slurm.

        Whether it is an element of an array is asked of Slurm: a job that was submitted from within an element inherits its
        SLURM_ARRAY_* variables.
        """
        job = os.environ.get("SLURM_JOB_ID")
        if not job or "SLURM_JOB_NODELIST" not in os.environ:
            return None
        listed = output_of(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]])
        nodes = listed.split() if listed else [os.environ.get("SLURMD_NODENAME", "?")]
        shown = show_job(job)
        if shown is None:
            return cls(job, nodes, os.environ.get("SLURM_ARRAY_JOB_ID"))
        array = re.search(r" ArrayJobId=(\d+) ", shown)
        return cls(job, nodes, array[1] if array else None)

    def has_successor(self) -> bool:
        """Whether an element of the same array is still to come."""
        if self.array is None:
            return False
        queued = output_of(["squeue", "-h", "-j", self.array, "-t", "PENDING,CONFIGURING,RUNNING,SUSPENDED", "-o", "%A"])
        if queued is None:  # Slurm does not answer
            return os.environ.get("SLURM_ARRAY_TASK_ID") != os.environ.get("SLURM_ARRAY_TASK_MAX")
        return any(job != self.id for job in queued.split())

    def seconds_left(self) -> float | None:
        """Seconds to the time limit, or None when there is none or Slurm does not answer."""
        text = output_of(["squeue", "-h", "-j", self.id, "-o", "%L"])
        return parse_duration(text.strip()) if text else None

    def signal_steps(self, name: str = "USR1") -> None:
        """Send a signal to every process of the job's steps (not to the batch script).

        Steps are named one by one: for an element of an array of which two are still to come, Slurm 22.05's scancel takes the
        whole job for one "in transitional state", and sends the signal again and again for more than a minute.
        """
        listed = output_of(["squeue", "-h", "-s", "-j", self.id, "-o", "%i"]) or ""
        steps = [step for step in listed.split() if step.rpartition(".")[2].isdigit()]  # not .batch and .extern
        output_of(["scancel", f"--signal={name}", *(steps or [self.id])], timeout_s=10.0)

    def requeue(self, exclude: list[str] | None = None) -> bool:
        """Put this job back into the queue, without the nodes in `exclude`. False: it no longer runs, or Slurm refused."""
        shown = show_job(self.id)
        if shown is None or " JobState=RUNNING " not in shown:
            return False
        if output_of(["scontrol", "requeue", self.id]) is None:
            return False
        if exclude:
            already = re.search(r"ExcNodeList=(\S+)", shown)
            names = [*exclude, *([already[1]] if already and already[1] != "(null)" else [])]
            for _ in range(20):  # refused until slurmctld has taken the job off its nodes
                if output_of(["scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(names)}"]) is not None:
                    break
                time.sleep(0.2)
        return True


def parse_duration(text: str) -> float | None:
    """Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS in seconds; None for UNLIMITED, INVALID and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
