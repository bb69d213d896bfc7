"""Renders a JobSpec to an sbatch script and to the sbatch command that submits it. Pure functions; golden-tested.

    render_sbatch(JobSpec())        the text of slurm/train.sh, for any recipe, by hand
    render_sbatch(spec)             the same script with a job's own header and settings

The script is header (#SBATCH lines), settings (quoted values), and one body that both share.
"""

from __future__ import annotations

import shlex

from .job import JobSpec

USAGE = """\
# Trains RECIPE on every node and GPU of the allocation, as one run. The same command continues a run that was stopped.
#
#   sbatch slurm/train.sh RECIPE [section.field=value ...]
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 slurm/train.sh RECIPE parallel.strategy=fsdp2
#   sbatch --nodes=2 --ntasks-per-node=2 slurm/train.sh RECIPE        # no GPUs: two processes on each of two nodes
#   sbatch --array=1-10%1 --time=04:00:00 slurm/train.sh RECIPE       # ten wall times, one after the other
#
# Near the time limit (--signal) all ranks save and the job requeues itself; after a crash they start again from the newest
# checkpoint. Environment: CHATMILL_PYTHON, CHATMILL_PROCESSES (per node), CHATMILL_PREFLIGHT=0|1, CHATMILL_NODE_CHECK=PROGRAM,
# CHATMILL_HANG_S. This file is written by launcher/jobs/slurm.py (tests compare them): change it there.
"""

SWEEP_USAGE = """\
# One worker of a sweep per element of the job array; each takes trials until none are left.
#
#   sbatch --array=1-8 slurm/sweep.sh SWEEP.yaml
#   sbatch --array=1-8 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00 slurm/sweep.sh SWEEP.yaml
#
# Needs optuna (pip install 'chatmill[sweep]'). Near the time limit a worker puts its trial back and requeues itself; the trial
# goes on from its checkpoint. This file is written by launcher/jobs/slurm.py (tests compare them): change it there.
"""

SWEEP_BODY = r"""
set -euo pipefail
trap '' USR1                                  # until the worker takes over
(( $# == 1 )) || { echo "usage: sbatch --array=1-8 slurm/sweep.sh SWEEP.yaml" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"
if [[ -d $CHATMILL_CODE/src/chatmill ]]; then export PYTHONPATH=$CHATMILL_CODE/src${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "$CHATMILL_PYTHON" -m chatmill.launcher.sweep.worker "$@"
"""

PREPARE_USAGE = """\
# Builds a data set: this small job waits and does the serial parts, every other stage runs as a job array of its own.
#
#   sbatch slurm/prepare.sh RECIPE [section.field=value ...]
#   sbatch slurm/prepare.sh RECIPE executor.tasks=64 executor.cpus=4           # 64 elements of 4 processes for each stage
#   sbatch --cpus-per-task=32 slurm/prepare.sh RECIPE executor.kind=local      # no arrays: 32 processes in this job
#   sbatch --array=0-2 slurm/prepare.sh RECIPE RECIPE RECIPE [...]             # one data set per element of this job
#   jid=$(sbatch --parsable slurm/prepare.sh chitchat) && sbatch --dependency=afterok:$jid slurm/train.sh demo
#
# The arrays go to this job's partition, account and QOS unless executor.* says otherwise (data/recipe.py lists its fields).
# They need datatrove (pip install 'chatmill[data]'). A build that was stopped goes on where it was: near the time limit
# (--signal) the job requeues itself and waits for its array again. A finished one is left alone.
# Environment: CHATMILL_PYTHON. This file is written by launcher/jobs/slurm.py (tests compare them): change it there.
"""

PREPARE_BODY = r"""
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
if [[ -d $CHATMILL_CODE/src/chatmill ]]; then export PYTHONPATH=$CHATMILL_CODE/src${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

recipes=() overrides=("workers=${SLURM_CPUS_PER_TASK:-1}" executor.kind=slurm "executor.partition=$SLURM_JOB_PARTITION")
if [[ -n ${SLURM_JOB_ACCOUNT:-} ]]; then overrides+=("executor.account=$SLURM_JOB_ACCOUNT"); fi
if [[ -n ${SLURM_JOB_QOS:-} ]]; then overrides+=("executor.qos=$SLURM_JOB_QOS"); fi
for word in "$@"; do
  if [[ $word == *=* ]]; then overrides+=("$word"); else recipes+=("$word"); fi
done
recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]:-}
[[ -n $recipe ]] || { echo "usage: sbatch [--array=0-N] slurm/prepare.sh RECIPE ... [section.field=value ...]" >&2; exit 2; }

stopped=0
trap 'stopped=1; kill -TERM "$build" 2>/dev/null || true' USR1
"$CHATMILL_PYTHON" -m chatmill.launcher data build "$recipe" "${overrides[@]}" &
build=$!
code=0
wait "$build" || code=$?
while kill -0 "$build" 2>/dev/null; do code=0; wait "$build" || code=$?; done # a signal ends `wait` before the build
if (( stopped && code )); then
  echo "stopped before the time limit; requeued, the build goes on where it was"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
"""

BODY = r"""
set -euo pipefail
trap '' USR1                                  # until the supervisor takes over at the end of this script
run_dir=$CHATMILL_RUN_DIR
arguments=("$@")
(( $# )) || { echo "usage: sbatch slurm/train.sh RECIPE [section.field=value ...]" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"                         # $0 is a copy in Slurm's spool folder: it cannot be used to find the code
if [[ -d $CHATMILL_CODE/src/chatmill ]]; then export PYTHONPATH=$CHATMILL_CODE/src${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1     # the checkout itself must not come first on sys.path
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$CHATMILL_LEAD
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_NTASKS SLURM_NPROCS  # one task per node, with all its CPUs

# One rendezvous: the first node, by the address that Slurm itself uses. The supervisor adds a port of this job's own.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=${MASTER_ADDR:-$first}

# Refuse a recipe that cannot work before any node starts; learn where it writes.
if [[ -z $run_dir ]]; then
  resolved=$("$CHATMILL_PYTHON" -m chatmill.launcher.jobs.resolve --world-size $((SLURM_NNODES * CHATMILL_PROCESSES)) -- "$@")
  mapfile -t arguments <<<"$resolved"
  run_dir=${arguments[0]}
  arguments=("${arguments[@]:1}")
fi
export CHATMILL_RUN_DIR=$run_dir
mkdir -p "$run_dir/logs"

# What each node runs. torchrun would die of USR1, so it ignores it; the workers install a handler of their own.
node_program='
trap "" USR1
agent=("$CHATMILL_PYTHON" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID"
  --nproc-per-node="$CHATMILL_PROCESSES" --rdzv-backend=static --master-addr="$MASTER_ADDR" --max-restarts=0
  --redirects=3 --tee=3 --local-ranks-filter=0)
logs=$CHATMILL_LOGS/node-$SLURM_NODEID
"$CHATMILL_PYTHON" -m chatmill.launcher.supervise.node_check \
  --gpus "${SLURM_GPUS_ON_NODE:-0}" --folder "$CHATMILL_RUN_DIR" || exit 78
if (( CHATMILL_PREFLIGHT )); then
  "${agent[@]}" --master-port=$((MASTER_PORT + 1)) --log-dir="$logs-preflight" \
    -m chatmill.launcher.supervise.preflight || exit 79
fi
exec "${agent[@]}" --master-port="$MASTER_PORT" --log-dir="$logs" -m chatmill.trainer.train "$@"
'

# --kill-on-bad-exit and --wait: when one node fails, no other one waits for it for ever.
exec "$CHATMILL_PYTHON" -m chatmill.launcher.supervise --run-dir "$run_dir" \
  --max-no-progress "$CHATMILL_MAX_NO_PROGRESS" --lead "$CHATMILL_LEAD" --hang "${CHATMILL_HANG_S:-0}" -- \
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 \
  "${srun_options[@]}" "${container[@]}" bash -c "$node_program" node "${arguments[@]}"
"""


def render_sbatch(spec: JobSpec) -> str:
    """The whole script. Without arguments in the spec it takes RECIPE and overrides from sbatch's command line."""
    return "#!/bin/bash\n" + USAGE + "\n".join(header(spec)) + "\n\n" + "\n".join(settings(spec)) + "\n" + BODY


def render_sweep(spec: JobSpec, workers: int | None = None) -> str:
    """A job array of sweep workers; without `workers` the array is given on sbatch's command line (slurm/sweep.sh)."""
    array = [f"#SBATCH --array=1-{workers}"] if workers else []
    given = [f"set -- {shlex.join(spec.arguments)}"] if spec.arguments else []
    lines = [*site_settings(spec), *given]
    return "#!/bin/bash\n" + SWEEP_USAGE + "\n".join([*header(spec), *array]) + "\n\n" + "\n".join(lines) + "\n" + SWEEP_BODY


def render_prepare(spec: JobSpec) -> str:
    """The text of slurm/prepare.sh; recipe and overrides come from sbatch's command line."""
    lines = [*header(spec), "", *site_settings(spec)]
    return "#!/bin/bash\n" + PREPARE_USAGE + "\n".join(lines) + "\n" + PREPARE_BODY


def header(spec: JobSpec) -> list[str]:
    """#SBATCH lines. Slurm stops reading them at the first command."""
    by_hand = not spec.arguments
    output = "chatmill-%j.out" if spec.run_dir is None else None
    options: list[tuple[str, object | None]] = [
        ("--job-name", spec.name),
        ("--nodes", spec.nodes),
        ("--ntasks-per-node", 1),
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
    else:
        lines.append("export CHATMILL_PROCESSES=${CHATMILL_PROCESSES:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}")
    lines.append(f"CHATMILL_RUN_DIR={shlex.quote(spec.run_dir or '')}")
    lines.append(f"CHATMILL_LEAD={spec.signal_lead_s}")
    lines.append(f"CHATMILL_MAX_NO_PROGRESS={spec.max_no_progress}")
    several_gpu_nodes = "SLURM_NNODES > 1 && ${SLURM_GPUS_ON_NODE:-0} > 0"
    lines.append(f"export CHATMILL_PREFLIGHT=${{CHATMILL_PREFLIGHT:-$(({several_gpu_nodes}))}}")
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
