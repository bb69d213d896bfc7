"""report, watch, bench, launch, plan, status, logs, cancel, resume, sweep and doctor on the `chatmill` command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import RUN_HELP, add_command, add_recipe, add_run

DETACH_HELP = "leave it running in the background (not for Slurm jobs)"


def add_commands(commands: Any) -> None:
    """Add the commands about runs and machines."""
    command = add_command(commands, "report", _report, "one self-contained HTML page about a run")
    add_run(command, RUN_HELP)
    command.add_argument("--out", help="file to write (default: report.html in the run folder)")
    command.add_argument("others", metavar="OTHER", nargs="*", help="other run folders to compare it with")
    command.add_argument("--compare", nargs="*", default=[], help="the same, as an option")

    command = add_command(commands, "watch", _watch, "the report of a run as a page on this machine, live while it trains")
    add_run(command, RUN_HELP)
    command.add_argument("--port", type=int, default=8010, help="default 8010; 0: any free one")
    command.add_argument("--no-open", action="store_true", help="print the address, open no browser")

    command = add_command(commands, "bench", _bench, "benchmarks")
    command.add_argument("what", choices=("kernels", "data", "build"))
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the benchmark; --help lists them")

    _add_launch(commands)

    summary = "memory by part for every engine, the largest micro-batch, predicted time of every layout, GPU-hours"
    command = add_command(commands, "plan", _plan, summary)
    add_recipe(command, "train.micro_batch=4")
    command.add_argument("--gpu", help="h200, h100 (default), a100, l40s, 4090 ... (trainer/plan/hardware.py)")
    command.add_argument("--gpus", type=int, help="total number of GPUs (default 1)")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="joined by NVLink or PCIe (default 8)")
    command.add_argument("--node-gbits", type=float, metavar="G", help="Gbit/s of each GPU between nodes (default 400)")
    command.add_argument("--mfu", type=float, help="assume this share of the GPU's peak instead of predicting the time")
    command.add_argument("--json", action="store_true", help="everything as JSON")

    command = add_command(commands, "status", _status, "state, attempts, step, time left, goodput and where the logs are")
    command.add_argument("runs", nargs="*", metavar="RUN", help="run folders (default: all below runs/)")
    command.add_argument("--json", action="store_true", help="one JSON object per run")

    command = add_command(commands, "logs", _logs, "what the ranks of a run printed")
    add_run(command)
    command.add_argument("--rank", type=int, help="one rank's own output (default: the launcher's log)")
    command.add_argument("--attempt", type=int, help="which attempt (default: the newest)")
    command.add_argument("--lines", "-n", type=int, default=40, help="number of lines (default 40)")
    command.add_argument("--follow", "-f", action="store_true", help="keep printing until the run ends")

    command = add_command(commands, "cancel", _cancel, "stop a run; it saves first, and resume continues it")
    add_run(command)
    command.add_argument("--now", action="store_true", help="do not wait for a checkpoint")

    command = add_command(commands, "resume", _resume, "start a stopped run again as last launched")
    add_run(command)
    command.add_argument("--detach", action="store_true", help=DETACH_HELP)

    command = add_command(commands, "sweep", _sweep, "hyper-parameter search over a recipe's fields, here or as a Slurm array")
    command.add_argument("sweep", metavar="SWEEP.yaml", help="recipe, space, sampler, pruning: see launcher/sweep/config.py")
    command.add_argument("--on", choices=("local", "slurm"), default="local")
    command.add_argument("--workers", type=int, help="trials at the same time (default: the file's)")
    command.add_argument("--report", action="store_true", help="only write table, best.yaml and report.html again")
    command.add_argument("--dry-run", action="store_true", help="print what would run, start nothing")

    _add_doctor(commands)


def _add_launch(commands: Any) -> None:
    command = add_command(commands, "launch", _launch, "start a training run here, under torchrun, or on Slurm")
    add_recipe(command)
    command.add_argument("--on", choices=("local", "torchrun", "slurm"), default="local", help="default: one process here")
    command.add_argument("--dry-run", action="store_true", help="print what would run, but start nothing")
    command.add_argument("--full", action="store_true", help="of a dry run, also the resolved recipe and the whole script")
    command.add_argument("--detach", action="store_true", help=DETACH_HELP)
    command.add_argument("--job", metavar="FILE", help="YAML of job fields: partition, modules, environment, container ...")
    command.add_argument("--name", help="job name (default: run.name)")
    command.add_argument("--accelerate", dest="with_accelerate", action="store_true", help="start by `accelerate launch`")
    command.add_argument("--nodes", type=int)
    command.add_argument("--gpus-per-node", type=int)
    command.add_argument("--gpu-type")
    command.add_argument("--processes-per-node", type=int, help="default: one per GPU, or one without GPUs")
    command.add_argument("--node-rank", type=int, help="number of this machine (--on torchrun with several nodes)")
    command.add_argument("--master-addr", default="127.0.0.1")
    command.add_argument("--master-port", type=int, default=29500)
    slurm = command.add_argument_group("Slurm")
    for name in ("partition", "account", "qos", "time", "memory", "constraint", "exclude"):
        slurm.add_argument(f"--{name}")
    slurm.add_argument("--cpus-per-task", type=int)
    slurm.add_argument("--chain", type=int, help="number of consecutive jobs")
    slurm.add_argument("--signal-lead-s", type=int, help="seconds before the limit to save (default: measured, or 180)")
    slurm.add_argument("--max-no-progress", type=int, help="failures without a newer checkpoint before giving up (default 3)")


def _add_doctor(commands: Any) -> None:
    command = add_command(commands, "doctor", _doctor, "what this machine can do, what is missing, and what to do about it")
    command.add_argument("--folder", default=".", help="folder of runs and data, whose disk is measured")
    command.add_argument("--json", action="store_true", help="findings as JSON")
    command.add_argument("--quick", action="store_true", help="skip kernels and disk")
    parity = command.add_argument_group("parity of the engines (instead of the findings; exit 1 if a case differs)")
    parity.add_argument("--parity", action="store_true", help="same losses and gradients from every engine, measured here")
    parity.add_argument("--full", action="store_true", help="every combination instead of a covering set")
    parity.add_argument("--engines", help="only these, for example ddp,fsdp2")
    parity.add_argument("--world-sizes", help="only these (default 1,2,4)")
    parity.add_argument("--kernels", help="only these: reference, torch, triton (interpreted on a CPU), auto")
    parity.add_argument("--out", help="also write the table as JSON to this file")
    world = command.add_argument_group(
        "a large world on paper (instead of the findings; exit 1 if ranks disagree); --json as above"
    )
    world.add_argument("--dry-world", type=int, metavar="N", help="one step of N processes: memory, collectives, agreement")
    world.add_argument("--ranks", help="simulate these, for example 0,1,4095 (default: corners, small groups, two drawn)")
    world.add_argument("words", nargs="*", metavar="RECIPE section.field=value", help="of --dry-world, for example 8b")
    faults = command.add_argument_group("faults (instead of the findings; exit 1 if anything is lost); --out as above")
    faults.add_argument("--faults", action="store_true", help="make runs fail on purpose: what is detected, what it costs")
    faults.add_argument("--only", help="only these faults, for example kill,hang")
    faults.add_argument("--seed", help="repeat the random steps of an earlier call")


def _report(options: argparse.Namespace) -> int:
    from ...trainer.report.page import build_report

    others = [Path(other) for other in (*options.others, *options.compare)]
    print(build_report(Path(options.run_dir), Path(options.out) if options.out else None, others))
    return 0


def _watch(options: argparse.Namespace) -> int:
    from ..runs.watch import watch

    return watch(options.run_dir, options.port, not options.no_open)


def _bench(options: argparse.Namespace) -> int:
    if options.what == "data":
        from ...data.bench import stream

        return stream.main(options.arguments)
    if options.what == "build":
        from ...data.bench import build

        return build.main(options.arguments)
    from ...kernels.bench import harness

    return harness.main(options.arguments)


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
    from ..runs.logs import logs

    return logs(options.run_dir, rank=options.rank, attempt=options.attempt, lines=options.lines, follow=options.follow)


def _cancel(options: argparse.Namespace) -> int:
    from ..runs.control import cancel

    return cancel(options.run_dir, now=options.now)


def _resume(options: argparse.Namespace) -> int:
    from ..runs.control import resume

    return resume(options.run_dir, detach=options.detach)


def _sweep(options: argparse.Namespace) -> int:
    from ..sweep.sweep import sweep

    return sweep(options)


def _doctor(options: argparse.Namespace) -> int:
    if options.parity:
        from ..doctor.parity import parity

        return parity(options)
    if options.faults:
        from ..doctor.faults import main as faults

        given = {f"--{name}": getattr(options, name) for name in ("only", "seed", "out")}
        return faults([word for name, value in given.items() if value for word in (name, value)])
    if options.dry_world is not None:
        from ..doctor.dry_world import main as dry_world

        return dry_world(options)
    if options.words or options.ranks:
        from chatmill.config import ConfigError

        raise ConfigError(f"{' '.join(options.words) or '--ranks'}: a recipe and --ranks belong to doctor --dry-world N")
    from ..doctor.doctor import doctor

    return doctor(options.folder, as_json=options.json, quick=options.quick)
