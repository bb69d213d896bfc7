#!/bin/bash
# Builds data sets on Slurm: every stage, with as many processes as the job has CPUs on its node.
#
#   sbatch slurm/prepare.sh RECIPE [section.field=value ...]
#   sbatch --array=0-2 slurm/prepare.sh RECIPE RECIPE RECIPE [...]    # one data set per element of the job array
#   jid=$(sbatch --parsable slurm/prepare.sh chitchat) && sbatch --dependency=afterok:$jid slurm/train.sh demo
#
# A build that was stopped goes on where it was: near the time limit (--signal) the job requeues itself. A finished one is left alone.
# Environment: CHATMILL_PYTHON.
#SBATCH --job-name=chatmill-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:USR1@60
#SBATCH --open-mode=append
#SBATCH --output=chatmill-data-%j.out
#SBATCH --requeue
# add yours here or on the command line: --partition --account --cpus-per-task --mem --time

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export CHATMILL_CODE=${CHATMILL_CODE:-$SLURM_SUBMIT_DIR}
if [[ -z ${CHATMILL_PYTHON:-} && -x $CHATMILL_CODE/.venv/bin/python ]]; then
  CHATMILL_PYTHON=$CHATMILL_CODE/.venv/bin/python
fi
if [[ -d $CHATMILL_CODE/src/chatmill ]]; then export PYTHONPATH=$CHATMILL_CODE/src${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

recipes=() overrides=()
for word in "$@"; do
  if [[ $word == *=* ]]; then overrides+=("$word"); else recipes+=("$word"); fi
done
recipe=${recipes[${SLURM_ARRAY_TASK_ID:-0}]:-}
[[ -n $recipe ]] || { echo "usage: sbatch [--array=0-N] slurm/prepare.sh RECIPE ... [section.field=value ...]" >&2; exit 2; }

stopped=0
trap 'stopped=1; kill -TERM "$build" 2>/dev/null || true' USR1
"${CHATMILL_PYTHON:-python3}" -m chatmill.launcher data build "$recipe" "workers=${SLURM_CPUS_PER_TASK:-1}" "${overrides[@]}" &
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
