"""`chatmill cancel | resume`: stop a run wherever it is, and start it again as last launched."""

from __future__ import annotations

import math
import signal
import subprocess
import time
from pathlib import Path

from chatmill.config import ConfigError
from chatmill.files import disk_problem, replace_text
from chatmill.processes import send_signal
from chatmill.shell import in_this_shell

from ..jobs.launch import next_commands, run_here, submit, write_record
from ..programs import output_of
from ..supervise.run_state import CANCEL, needed_lead_s
from .status import ACTIVE, current_state, find_run, last_job, last_launch, query_slurm, supervisor, training_process

# Slurm 22.05's `scancel --batch --signal` of an array's element keeps trying until that element has ended. The supervisor also
# looks for the file.
SIGNAL_S = 5.0


def cancel(name: str, *, now: bool) -> int:
    """Stop a run. It saves first unless `now`; a job that has not started is taken out of the queue."""
    run_dir = find_run(name)
    job = last_job(run_dir)
    asked = "stopped" if now else "asked to save and stop"
    if job.isdigit():
        state, _ = query_slurm([job]).get(job, ("", ""))
        if state not in ACTIVE:
            print(f"job {job} is not in the queue: nothing to cancel")
            return 0
        try:
            (run_dir / CANCEL).parent.mkdir(parents=True, exist_ok=True)
            replace_text(run_dir / CANCEL, job)
        except OSError as error:  # a run that fills the disk is one to cancel
            print(f"note: {disk_problem(error) or error} The signal is sent all the same.")
        gentle = state == "RUNNING" and not now
        if gentle:  # of a chain, the elements that have not started yet would continue the run
            output_of(["scancel", "--state=PENDING", job])
            output_of(["scancel", "--batch", "--signal=USR1", job], timeout_s=SIGNAL_S)
        else:
            done = subprocess.run(["scancel", job], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ConfigError(f"scancel {job}: {done.stderr.strip()}")
        print(f"job {job}: asked to save and stop" if gentle else f"job {job} cancelled")
    elif (mark := supervisor(run_dir)) and send_signal(mark, signal.SIGTERM):
        if now:
            time.sleep(0.5)
            send_signal(mark, signal.SIGTERM)
        print(f"process {mark['pid']}: {asked}")
    elif (mark := training_process(run_dir)) and send_signal(mark, signal.SIGKILL if now else signal.SIGTERM):
        print(f"process {mark['pid']}: {asked}\nthe command that started it continues it")
        return 0
    else:
        print(f"{run_dir} is not running: nothing to cancel")
        return 0
    print(in_this_shell(f"chatmill resume {name}   continues it"))
    return 0


def resume(name: str, *, detach: bool) -> int:
    """Start a run again exactly as its newest launch did, from its code snapshot; it continues from its newest checkpoint."""
    run_dir = find_run(name)
    record = last_launch(run_dir)
    if record is None:
        raise ConfigError(f"{run_dir} was not started by `chatmill launch`; the command that started it continues it")
    if (state := current_state(run_dir)) in ACTIVE:
        raise ConfigError(f"{run_dir} is {state}: nothing to resume")
    folder = Path(record["folder"])
    if record["on"] != "slurm":
        return run_here(folder, detach)
    command, needed = list(record["command"]), needed_lead_s(run_dir)
    if needed is not None:
        command.insert(-1, f"--signal=B:USR1@{max(60, math.ceil(needed))}")
    job = submit(command, cwd=Path(record["cwd"]))
    write_record(folder, record | {"job": job, "time": round(time.time(), 3)})
    print(f"submitted as Slurm job {job}; then:\n{next_commands(run_dir)}")
    return 0
