"""launch, status, logs, cancel, resume, sweep and doctor on the `chatmill` command line.

add_commands(subparsers)        each command imports what it needs only when it runs
"""

from __future__ import annotations

import argparse
from typing import Any

from .examples import with_examples


class _KeepOverrides(argparse.ArgumentParser):
    """Takes section.field=value words wherever they stand; argparse alone refuses them after an option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        if found is not None and hasattr(found, "overrides"):
            found.overrides = [*found.overrides, *(word for word in rest if "=" in word and not word.startswith("-"))]
            rest = [word for word in rest if "=" not in word or word.startswith("-")]
        return found, rest


def add_commands(commands: Any) -> None:
    """Register this part's commands on an argparse subparsers object."""
    _add_launch(commands)
    _add_plan(commands)
    command = _add(commands, "status", _status, "state, attempts, step, time left, goodput and where the logs are")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders (default: all below runs/)")
    command.add_argument("--json", action="store_true", help="one JSON object per run")
    command = _add(commands, "logs", _logs, "what the ranks of a run printed")
    command.add_argument("run_dir", metavar="RUN")
    command.add_argument("--rank", type=int, help="one rank's own output (default: the launcher's log)")
    command.add_argument("--attempt", type=int, help="which attempt (default: the newest)")
    command.add_argument("--lines", "-n", type=int, default=40, help="last so many lines (default 40)")
    command.add_argument("--follow", "-f", action="store_true", help="go on printing until the run ends")
    command = _add(commands, "cancel", _cancel, "stop a run; it saves first, and resume continues it")
    command.add_argument("run_dir", metavar="RUN")
    command.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    command = _add(commands, "resume", _resume, "start a stopped run again as it was launched last")
    command.add_argument("run_dir", metavar="RUN")
    command.add_argument("--detach", action="store_true", help="leave it running in the background (not for Slurm jobs)")
    command = _add(commands, "sweep", _sweep, "hyper-parameter search over a recipe's fields, here or as a Slurm array")
    command.add_argument("sweep", metavar="SWEEP.yaml", help="recipe, space, sampler, pruning: see launcher/sweep/config.py")
    command.add_argument("--on", choices=("local", "slurm"), default="local")
    command.add_argument("--workers", type=int, help="trials at the same time (default: the file's)")
    command.add_argument("--report", action="store_true", help="only write table, best.yaml and report.html again")
    command.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")
    command = _add(commands, "doctor", _doctor, "what this machine can do, what is missing, and what to do about it")
    command.add_argument("--folder", default=".", help="where runs and data live: its disk is measured")
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.add_argument("--quick", action="store_true", help="skip kernels and disk")
    parity = command.add_argument_group("parity of the engines (instead of the findings; 1 when a case is off)")
    parity.add_argument("--parity", action="store_true", help="same losses and gradients from every engine, measured here")
    parity.add_argument("--full", action="store_true", help="every combination instead of a covering set")
    parity.add_argument("--engines", help="only these, for example ddp,fsdp2")
    parity.add_argument("--world-sizes", help="only these (default 1,2,4)")
    parity.add_argument("--kernels", help="only these: reference, torch, triton (interpreted on a CPU), auto")
    parity.add_argument("--out", help="also write the table as JSON to this file")
    faults = command.add_argument_group("faults (instead of the findings; 1 when something is lost); --out as above")
    faults.add_argument("--faults", action="store_true", help="make runs fail on purpose: what is noticed, what it costs")
    faults.add_argument("--only", help="only these faults, for example kill,hang")
    faults.add_argument("--seed", help="repeat the random steps of an earlier call")


def _add(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, **with_examples(name))
    command.set_defaults(run=run)
    return command


def _add_plan(commands: Any) -> None:
    command = _add(commands, "plan", _plan, "memory by part for every engine, the largest micro-batch, time and GPU-hours")
    command.__class__ = _KeepOverrides
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides such as train.micro_batch=4")
    command.add_argument("--gpu", help="h200, h100 (default), a100, l40s, 4090 ... (trainer/plan/hardware.py)")
    command.add_argument("--gpus", type=int, help="GPUs in all (default 1)")
    command.add_argument("--mfu", type=float, help="share of the GPU's peak that is assumed to be reached (default 0.4)")
    command.add_argument("--json", action="store_true", help="everything as JSON")


def _add_launch(commands: Any) -> None:
    command = _add(commands, "launch", _launch, "start a training run here, under torchrun, or on Slurm")
    command.__class__ = _KeepOverrides
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides such as optimizer.lr=3e-4")
    command.add_argument("--on", choices=("local", "torchrun", "slurm"), default="local", help="default: one process here")
    command.add_argument("--dry-run", action="store_true", help="print exactly what would run, start nothing")
    command.add_argument("--detach", action="store_true", help="leave it running in the background (not for Slurm jobs)")
    command.add_argument("--job", metavar="FILE", help="YAML of job fields: partition, modules, environment, container ...")
    command.add_argument("--name", help="job name (default: run.name)")
    command.add_argument("--accelerate", dest="with_accelerate", action="store_true", help="start by `accelerate launch`")
    command.add_argument("--nodes", type=int)
    command.add_argument("--gpus-per-node", type=int)
    command.add_argument("--gpu-type")
    command.add_argument("--processes-per-node", type=int, help="default: one per GPU, or one without GPUs")
    command.add_argument("--node-rank", type=int, help="this machine's place (--on torchrun with several nodes)")
    command.add_argument("--master-addr", default="127.0.0.1")
    command.add_argument("--master-port", type=int, default=29500)
    slurm = command.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "time", "memory", "constraint", "exclude"):
        slurm.add_argument(f"--{name}")
    slurm.add_argument("--cpus-per-task", type=int)
    slurm.add_argument("--chain", type=int, help="so many wall times, one after the other")
    slurm.add_argument("--signal-lead-s", type=int, help="seconds before the limit to save (default: measured, or 180)")
    slurm.add_argument("--max-no-progress", type=int, help="give up after so many failures without a newer checkpoint (3)")


def _launch(options: argparse.Namespace) -> int:
    from ..jobs.launch import launch

    return launch(options)


def _plan(options: argparse.Namespace) -> int:
    from ..jobs.plan import plan_command

    return plan_command(options)


def _status(options: argparse.Namespace) -> int:
    from ..runs.status import status

    return status(options.runs, as_json=options.json)


def _logs(options: argparse.Namespace) -> int:
    from ..runs.status import logs

    return logs(options.run_dir, rank=options.rank, attempt=options.attempt, lines=options.lines, follow=options.follow)


def _cancel(options: argparse.Namespace) -> int:
    from ..runs.status import cancel

    return cancel(options.run_dir, now=options.now)


def _resume(options: argparse.Namespace) -> int:
    from ..runs.status import resume

    return resume(options.run_dir, detach=options.detach)


def _sweep(options: argparse.Namespace) -> int:
    from ..sweep.sweep import sweep

    return sweep(options)


def _doctor(options: argparse.Namespace) -> int:
    from ..doctor.doctor import doctor, parity

    if options.parity:
        return parity(options)
    if options.faults:
        from ..doctor.faults import main as fault_matrix

        words = [word for name in ("only", "seed", "out") if (value := getattr(options, name)) for word in (f"--{name}", value)]
        return fault_matrix(words)
    return doctor(options.folder, as_json=options.json, quick=options.quick)
