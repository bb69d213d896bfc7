"""`chatmill launch`: show what would run, then run it on this machine or hand it to Slurm.

    chatmill launch tiny --on torchrun --processes-per-node 2 optimizer.lr=1e-3
    chatmill launch recipe.yaml --on slurm --nodes 4 --gpus-per-node 8 --time 24:00:00 --job cluster.yaml --dry-run

--job names a YAML file of JobSpec fields (a cluster's partition, modules, container ...); options on the command line override
them. The job runs a copy of the code and of the resolved recipe that is kept in RUN/launches/NNN.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chatmill.config import ConfigError, dump_yaml, read_json, read_yaml, validate
from chatmill.files import disk_problem, replace_text
from chatmill.formatting import counted
from chatmill.shell import in_this_shell, typed

from ...trainer.parallel_config import grid_of
from ..programs import visible_gpus
from ..supervise.run_state import needed_lead_s
from ..supervise.supervise import LOGS
from .job import JobSpec
from .resolve import Resolved, model_shape, resolve
from .slurm import render_sbatch, sbatch_command
from .snapshot import new_launch, snapshot_code
from .torchrun import accelerate_command, accelerate_config, single_command, torchrun_command

# options of `chatmill launch` that are fields of JobSpec under the same name
FIELDS: tuple[str, ...] = ("nodes", "gpus_per_node", "gpu_type", "processes_per_node", "cpus_per_task", "memory", "time")
FIELDS += ("partition", "account", "qos", "constraint", "exclude", "chain", "signal_lead_s", "max_no_progress")


@dataclass(frozen=True)
class Launch:
    """A launch before it is made. `node_rank` and `master_addr` are for several nodes without Slurm."""

    on: str
    spec: JobSpec
    resolved: Resolved
    starter: str = "torchrun"
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500


def launch(options: argparse.Namespace) -> int:
    """The command: returns the exit code."""
    prepared = prepare(options)
    print(describe(prepared))
    if options.dry_run:
        from .plan import plan_lines

        print(f"\n{plan_lines(prepared.resolved.recipe, prepared.spec.world_size, prepared.spec.gpu_type)}\n")
        print(preview(prepared, full=options.full))
        return 0
    check_inputs(prepared)
    return start(prepared, detach=options.detach)


def prepare(options: argparse.Namespace) -> Launch:
    """Validate everything that was typed. Raises ConfigError."""
    fields: dict[str, Any] = read_yaml(Path(options.job), empty={}) if options.job else {}
    fields |= {name: getattr(options, name) for name in FIELDS if getattr(options, name) is not None}
    if options.on == "local":
        fields |= {"nodes": 1, "processes_per_node": 1}
    draft = validate(JobSpec, fields, options.job or "chatmill launch")
    resolved = resolve(options.recipe, options.overrides, draft.world_size)
    grid_of(resolved.recipe.parallel, draft.world_size)  # raises where so many processes do not make the grid
    run_dir = resolved.run_dir
    if "name" not in fields:
        fields["name"] = options.name or resolved.recipe.run.name
    if "signal_lead_s" not in fields and (needed := needed_lead_s(run_dir)) is not None:
        fields["signal_lead_s"] = max(60, math.ceil(needed))
    spec = validate(JobSpec, fields | {"run_dir": str(run_dir), "arguments": resolved.arguments}, "chatmill launch")
    if options.with_accelerate and options.on == "slurm":
        raise ConfigError("--accelerate is for this machine; a Slurm job starts torchrun on every node")
    if options.on != "slurm" and spec.container:
        raise ConfigError("container: only Slurm jobs are started in a container")
    if options.on == "torchrun" and spec.nodes > 1 and not options.dry_run and options.node_rank is None:
        raise ConfigError(
            f"--on torchrun --nodes {spec.nodes}: run this on every node, with --node-rank 0 to {spec.nodes - 1} and\n"
            "--master-addr HOST (of node 0); --dry-run prints the commands. On a cluster use --on slurm."
        )
    starter = "accelerate" if options.with_accelerate else "torchrun"
    return Launch(options.on, spec, resolved, starter, options.node_rank or 0, options.master_addr, options.master_port)


def describe(prepared: Launch) -> str:
    """What will run, in figures: recipe, parameters, processes, tokens."""
    recipe, spec = prepared.resolved.recipe, prepared.spec
    shape = model_shape(recipe)
    grid = grid_of(recipe.parallel, spec.world_size)
    packs = grid.batches * recipe.train.accumulation * recipe.train.micro_batch
    step_tokens = packs * recipe.data.sequence_length
    lines = [f"note: {note}" for note in prepared.resolved.notes]
    if prepared.on == "slurm" and spec.cpus_per_task is None and "--exclusive" not in spec.options:
        lines.append("note: no --cpus-per-task: the processes of a node share the cluster's default, often one CPU")
    if prepared.on != "slurm" and spec.world_size == 1 and (shown := visible_gpus() or 0) > 1:
        lines.append(f"note: 1 process uses 1 of the {shown} GPUs here; for all: --on torchrun --gpus-per-node {shown}")
    lines.append(f"run         {prepared.resolved.run_dir}")
    nodes = f"{counted(spec.nodes, 'node')} x {spec.processes}"
    divided = f", {grid.context} of them divide each batch" if grid.context > 1 else ""
    lines.append(f"processes   {spec.world_size} = {nodes}, {recipe.parallel.strategy}{divided}")
    if shape is None:
        lines.append(f"parameters  unknown: {recipe.model.checkpoint} cannot be read from here")
    else:
        counts = shape.parameter_counts()
        parts = "  ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total" and count)
        lines.append(f"parameters  {counts['total']:,}  ({parts})")
        frozen = recipe.adapter is not None or bool(recipe.train.freeze)
        flops = shape.flops_per_token(recipe.data.sequence_length) * step_tokens
        lines.append(
            f"per step    {flops:.3g} FLOPs at most (every pack one dialogue{', all weights trained' if frozen else ''})"
        )
    lines.append(f"tokens      {packs} packs x {recipe.data.sequence_length} = {step_tokens:,} per step at most")
    train = recipe.train
    if train.epochs is None and train.tokens is None:
        lines.append(f"steps       {train.steps:,}, {step_tokens * train.steps:,} tokens at most")
    else:
        budgets = [counted(n, noun) for n, noun in ((train.epochs, "epoch"), (train.tokens, "token")) if n is not None]
        lines.append(f"steps       counted at the start, for {' or '.join(budgets)}")
    return "\n".join(lines)


def preview(prepared: Launch, full: bool = True) -> str:
    """Exactly what would run: the resolved recipe, then the command or the script with its sbatch line.

    full=False: only the commands, and of a script what it asks the scheduler for.
    """
    place = Path(prepared.spec.run_dir or "") / "launches" / "NNN"
    if not full:
        return _short_preview(prepared, place)
    parts = [f"\n# resolved recipe\n{dump_yaml(prepared.resolved.recipe)}"]
    if prepared.spec.environment:
        shown = sorted(prepared.spec.environment.items())
        parts.append("# environment\n" + "".join(f"{name}={shlex.quote(value)}\n" for name, value in shown))
    spec = _placed(prepared.spec, place)
    if prepared.on == "slurm":
        script = str(place / "job.sh")
        parts.append(f"# {script}\n{render_sbatch(spec)}\n# command\n{shlex.join(sbatch_command(spec, script))}")
    else:
        if prepared.starter == "accelerate":
            parts.append(f"# {place / 'accelerate.yaml'}\n{yaml.safe_dump(accelerate_config(spec), sort_keys=False)}")
        ranks = range(spec.nodes) if prepared.on == "torchrun" and spec.nodes > 1 else (0,)
        parts += [f"# node {rank}\n{shlex.join(local_command(prepared, spec, place, rank))}" for rank in ranks]
    return "\n".join(parts) + "\nnothing was started (--dry-run)"


def _short_preview(prepared: Launch, place: Path) -> str:
    spec = _placed(prepared.spec, place)
    if prepared.on == "slurm":
        script = str(place / "job.sh")
        lines = [line for line in render_sbatch(spec).splitlines() if line.startswith("#SBATCH ")]
        lines.append(shlex.join(sbatch_command(spec, script)))
    else:
        ranks = range(spec.nodes) if prepared.on == "torchrun" and spec.nodes > 1 else (0,)
        lines = [shlex.join(local_command(prepared, spec, place, rank)) for rank in ranks]
    return "\n".join([*lines, "nothing was started (--dry-run); --full also prints the resolved recipe and the whole script"])


def check_inputs(prepared: Launch) -> None:
    """Refuse now what would fail in the queue: missing data, checkpoint or secrets. Raises ConfigError."""
    recipe = prepared.resolved.recipe
    missing = [name for name in prepared.spec.secrets if name not in os.environ]
    if missing:
        raise ConfigError(f"secrets: {', '.join(missing)} is not set in this shell; export it before launching")
    shown, wanted = visible_gpus(), prepared.spec.processes if prepared.spec.gpus_per_node else 0
    if prepared.on != "slurm" and shown is not None and shown < wanted:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        where = "" if chosen is None else f" (CUDA_VISIBLE_DEVICES={chosen})"
        raise ConfigError(f"gpus_per_node: {wanted} processes, but this machine shows {shown} GPUs{where}: one process per GPU")
    if prepared.spec.container:
        return  # paths are those inside the image
    for path in recipe.data.paths.values():
        if not (Path(path) / "manifest.json").is_file():
            raise ConfigError(f"data.path: {path} is not a finished data set (no manifest.json); run: chatmill data build")
    if model_shape(recipe) is None:
        raise ConfigError(f"model.checkpoint: {recipe.model.checkpoint} holds no config.json")


def start(prepared: Launch, detach: bool) -> int:
    """Snapshot, start or submit, and print what to type next."""
    run_dir = prepared.resolved.run_dir
    with new_launch(run_dir) as folder:
        record = _prepare(prepared, folder)
        write_record(folder, record)
    if prepared.on != "slurm":
        return run_here(folder, detach)
    job = submit_recorded(folder, record)
    print(f"\nsubmitted as Slurm job {job}; then:\n{next_commands(run_dir)}")
    return 0


def _prepare(prepared: Launch, folder: Path) -> dict[str, Any]:
    """Fill the folder of a launch; what its job.json will say."""
    run_dir = prepared.resolved.run_dir
    (run_dir / "logs").mkdir(exist_ok=True)
    print(snapshot_code(folder))
    replace_text(folder / "config.yaml", dump_yaml(prepared.resolved.recipe))
    spec = _placed(prepared.spec, folder)
    record: dict[str, Any] = {"on": prepared.on, "time": round(time.time(), 3), "cwd": str(Path.cwd()), "typed": sys.argv[1:]}
    record["spec"] = spec.model_dump(mode="json")
    if prepared.on == "slurm":
        script = folder / "job.sh"
        replace_text(script, render_sbatch(spec))
        script.chmod(0o755)
        command = sbatch_command(spec, str(script))
        return record | {"command": command, "job": ""}
    if prepared.starter == "accelerate":
        config = accelerate_config(spec, master_addr=prepared.master_addr, master_port=prepared.master_port)
        replace_text(folder / "accelerate.yaml", yaml.safe_dump(config, sort_keys=False))
    supervisor = [spec.python or sys.executable, "-m", "chatmill.launcher.supervise", "--run-dir", str(run_dir)]
    supervisor += ["--max-no-progress", str(spec.max_no_progress), "--"]
    command = [*supervisor, *local_command(prepared, spec, folder, prepared.node_rank)]
    return record | {"command": command, "variables": dict(spec.environment) | local_variables(spec)}


def submit_recorded(folder: Path, record: dict[str, Any]) -> str:
    """Submit what folder/job.json describes and note its job there. Raises ConfigError."""
    try:
        job = submit(record["command"])
    except ConfigError:
        (folder / "job.json").unlink()  # nothing was launched
        raise
    try:
        write_record(folder, record | {"job": job})
    except OSError as error:
        raise ConfigError(
            f"{disk_problem(error) or error}\nSlurm has taken the job as {job}, which could not be noted: scancel {job}"
        ) from None
    return job


def run_here(folder: Path, detach: bool) -> int:
    """Start what folder/job.json describes on this machine: in this terminal (replacing this process) or in the background."""
    record = read_json(folder / "job.json")
    if not {"variables", "cwd", "command"} <= record.keys():
        raise ConfigError(f"{folder / 'job.json'}: not the record of a launch: expected variables, cwd and command.")
    run_dir = folder.parents[1]
    environment = os.environ | record["variables"]
    if not detach:
        print(f"\nfrom another terminal:\n{next_commands(run_dir)}\n", flush=True)
        os.chdir(record["cwd"])
        os.execvpe(record["command"][0], record["command"], environment)
    output = run_dir / "logs" / f"launch-{folder.name}.out"
    with output.open("ab") as log:
        child = subprocess.Popen(
            record["command"],
            env=environment,
            cwd=record["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"\nstarted as process {child.pid}, output in {output}; then:\n{next_commands(run_dir)}")
    return 0


def local_command(prepared: Launch, spec: JobSpec, folder: Path, node_rank: int) -> list[str]:
    """Words of the training processes on this machine."""
    python = spec.python or sys.executable
    if prepared.starter == "accelerate":
        beside = Path(python).with_name("accelerate")
        return accelerate_command(
            spec,
            accelerate=str(beside) if beside.exists() else "accelerate",
            config_file=str(folder / "accelerate.yaml"),
            script=str(folder / "code" / "trainer" / "train.py"),
            node_rank=node_rank,
        )
    if prepared.on == "local":
        return single_command(spec, python=python)
    return torchrun_command(
        spec,
        python=python,
        log_dir=LOGS,
        node_rank=node_rank,
        master_addr=prepared.master_addr,
        master_port=prepared.master_port,
    )


def local_variables(spec: JobSpec) -> dict[str, str]:
    """Variables that make the snapshot run, and give workers time to save."""
    source = f"{spec.code}/src"
    path = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{source}{os.pathsep}{path}" if path else source,
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(spec.signal_lead_s),
        "CHATMILL_RUN_DIR": str(spec.run_dir),
    }


def submit(command: list[str], cwd: Path | None = None) -> str:
    """Run sbatch; returns the job id. Raises ConfigError with Slurm's own words."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError("sbatch not found: launch from a login node of the cluster, or use --on torchrun here") from None
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]


def next_commands(run_dir: Path) -> str:
    """The three commands to type next."""
    run = typed(run_dir)
    return in_this_shell(f"  chatmill status {run}\n  chatmill logs {run} --follow\n  chatmill cancel {run}")


def _placed(spec: JobSpec, folder: Path) -> JobSpec:
    """The spec that runs the snapshot in `folder`."""
    python = spec.python or (None if spec.container else sys.executable)
    arguments = (str(folder / "config.yaml"),)
    return spec.model_copy(update={"code": str(folder / "code"), "python": python, "arguments": arguments})


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Keep how a launch was started: `chatmill status` and `resume` read it."""
    replace_text(folder / "job.json", json.dumps(record, indent=2) + "\n")
