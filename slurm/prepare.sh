#!/bin/bash
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
# Environment: CHATMILL_PYTHON. launcher/jobs/slurm.py writes what lies between here and `set -euo pipefail`.
#SBATCH --job-name=chatmill-data
#SBATCH --nodes=1
#SBATCH --cpus-per-task=2
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=chatmill-%j.out
#SBATCH --requeue
# add yours here or on the command line: --partition --account --gpus-per-node --cpus-per-task --time

export CHATMILL_CODE=${CHATMILL_CODE:-$SLURM_SUBMIT_DIR}
if [[ -z ${CHATMILL_PYTHON:-} && -x $CHATMILL_CODE/.venv/bin/python ]]; then
  CHATMILL_PYTHON=$CHATMILL_CODE/.venv/bin/python
fi
export CHATMILL_PYTHON=${CHATMILL_PYTHON:-python3}

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
