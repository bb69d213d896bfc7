"""Renders a JobSpec to an sbatch script and to the sbatch command that submits it. Pure functions; golden-tested.

    render_sbatch(JobSpec())        the text of slurm/train.sh, for any recipe, by hand
    render_sbatch(spec)             the same script with a job's own header and settings

A script is its usage, header (#SBATCH lines), settings (quoted values) and body. Usage and body are those of slurm/train.sh,
prepare.sh and sweep.sh, which are also next to this file: as links in a checkout, as copies in a wheel.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from .job import JobSpec

BODY_BEGINS = "\nset -euo pipefail\n"


def render_sbatch(spec: JobSpec) -> str:
    """The training script. Without arguments in the spec it takes RECIPE and overrides from sbatch's command line."""
    return _filled("train", [*header(spec), "", *settings(spec)])


def render_prepare(spec: JobSpec) -> str:
    """The script that builds a data set; recipe and overrides come from sbatch's command line."""
    return _filled("prepare", [*header(spec), "", *site_settings(spec)])


def render_sweep(spec: JobSpec, workers: int | None = None) -> str:
    """A job array of sweep workers; without `workers` the array is given on sbatch's command line."""
    array = [f"#SBATCH --array=1-{workers}"] if workers else []
    given = [f"set -- {shlex.join(spec.arguments)}"] if spec.arguments else []
    return _filled("sweep", [*header(spec), *array, "", *site_settings(spec), *given])


def _filled(script: str, lines: list[str]) -> str:
    text = Path(__file__).with_name(f"{script}.sh").read_text(encoding="utf-8")
    return text[: text.index("#SBATCH ")] + "\n".join(lines) + "\n" + text[text.index(BODY_BEGINS) :]


def header(spec: JobSpec) -> list[str]:
    """#SBATCH lines. Slurm stops reading them at the first command."""
    by_hand = not spec.arguments
    output = "chatmill-%j.out" if spec.run_dir is None else None
    options: list[tuple[str, object | None]] = [
        ("--job-name", spec.name),
        ("--nodes", spec.nodes),
        ("--gpus-per-node", _gpus(spec)),
        ("--cpus-per-task", spec.cpus_per_task),
        ("--mem", spec.memory),
        ("--time", spec.time),
        ("--partition", spec.partition),
        ("--account", spec.account),
        ("--qos", spec.qos),
        ("--constraint", f'"{spec.constraint}"' if spec.constraint else None),
        ("--exclude", spec.exclude),
        ("--array", f"1-{spec.chain}%1" if spec.chain > 1 else None),
        ("--signal", f"B:USR1@{spec.signal_lead_s}"),
        ("--open-mode", "append"),
        ("--output", output),
    ]
    lines = [f"#SBATCH {name}={value}" for name, value in options if value is not None]
    lines.append("#SBATCH --requeue")
    lines += [f"#SBATCH {option}" for option in spec.options]
    if by_hand:
        lines.append("# add yours here or on the command line: --partition --account --gpus-per-node --cpus-per-task --time")
    return lines


def site_settings(spec: JobSpec) -> list[str]:
    """Modules, variables and commands of the site; where code and Python are. Every value is quoted."""
    lines = [f"module load {shlex.quote(module)}" for module in spec.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(spec.environment.items())]
    lines += [f': "${{{name}:?export {name} in the shell that submits this job}}"' for name in spec.secrets]
    lines += list(spec.setup)
    code = "${CHATMILL_CODE:-$SLURM_SUBMIT_DIR}" if spec.code is None else shlex.quote(spec.code)
    lines.append(f"export CHATMILL_CODE={code}")
    if spec.python is not None:
        return [*lines, f"export CHATMILL_PYTHON={shlex.quote(spec.python)}"]
    lines.append("if [[ -z ${CHATMILL_PYTHON:-} && -x $CHATMILL_CODE/.venv/bin/python ]]; then")
    lines.append("  CHATMILL_PYTHON=$CHATMILL_CODE/.venv/bin/python")
    lines.append("fi")
    return [*lines, "export CHATMILL_PYTHON=${CHATMILL_PYTHON:-python3}"]


def settings(spec: JobSpec) -> list[str]:
    """Everything that the body of train.sh reads."""
    lines = site_settings(spec)
    if spec.arguments:
        lines.append(f"export CHATMILL_PROCESSES={spec.processes}")
        lines.append(f"set -- {shlex.join(spec.arguments)}")
    lines.append(f"CHATMILL_RUN_DIR={shlex.quote(spec.run_dir or '')}")
    lines.append(f"CHATMILL_LEAD={spec.signal_lead_s}")
    lines.append(f"CHATMILL_MAX_NO_PROGRESS={spec.max_no_progress}")
    lines.append(f"srun_options=({shlex.join(_srun_options(spec))})")
    lines.append(f"container=({shlex.join(_container(spec))})")
    return lines


def sbatch_command(spec: JobSpec, script: str) -> list[str]:
    """Words that submit a rendered script; Slurm's own output goes into the run folder."""
    log = [f"--output={spec.run_dir}/logs/slurm-%j.out"] if spec.run_dir else []
    return ["sbatch", "--parsable", *log, script]


def _gpus(spec: JobSpec) -> str | None:
    if spec.gpus_per_node == 0:
        return None
    return f"{spec.gpu_type}:{spec.gpus_per_node}" if spec.gpu_type else str(spec.gpus_per_node)


def _folders(spec: JobSpec) -> list[str]:
    own = [path for path in (spec.run_dir, spec.code) if path]
    return own + list(spec.container.mounts if spec.container else ())


def _srun_options(spec: JobSpec) -> list[str]:
    if spec.container is None or spec.container.kind != "pyxis":
        return []
    mounts = ",".join(path if ":" in path else f"{path}:{path}" for path in _folders(spec))
    return [f"--container-image={spec.container.image}", "--no-container-mount-home"] + (
        [f"--container-mounts={mounts}"] if mounts else []
    )


def _container(spec: JobSpec) -> list[str]:
    if spec.container is None or spec.container.kind != "apptainer":
        return []
    words = ["apptainer", "exec", *(["--nv"] if spec.gpus_per_node else [])]
    for mount in _folders(spec):
        words += ["--bind", mount]
    return [*words, spec.container.image]
