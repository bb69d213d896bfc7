#!/bin/bash
# One worker of a sweep per element of the job array; each takes trials until none are left.
#
#   sbatch --array=1-8 slurm/sweep.sh SWEEP.yaml
#   sbatch --array=1-8 --gpus-per-node=1 --cpus-per-task=12 --time=12:00:00 slurm/sweep.sh SWEEP.yaml
#
# Needs optuna (pip install 'chatmill[sweep]'). Near the time limit a worker puts its trial back and requeues itself; the trial
# goes on from its checkpoint. launcher/jobs/slurm.py writes what lies between here and `set -euo pipefail`.
#SBATCH --job-name=chatmill
#SBATCH --nodes=1
#SBATCH --signal=B:USR1@180
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
trap '' USR1                                  # until the worker takes over
(( $# == 1 )) || { echo "usage: sbatch --array=1-8 slurm/sweep.sh SWEEP.yaml" >&2; exit 2; }
cd "$SLURM_SUBMIT_DIR"
if [[ -d $CHATMILL_CODE/src/chatmill ]]; then export PYTHONPATH=$CHATMILL_CODE/src${PYTHONPATH:+:$PYTHONPATH}; fi
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
exec "$CHATMILL_PYTHON" -m chatmill.launcher.sweep.worker --slurm "$@"
