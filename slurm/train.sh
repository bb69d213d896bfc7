#!/bin/bash
# Trains RECIPE on every node and GPU of the allocation, as one run. The same command continues a run that was stopped.
#
#   sbatch slurm/train.sh RECIPE [section.field=value ...]
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 slurm/train.sh RECIPE parallel.strategy=fsdp2
#   sbatch --nodes=2 --ntasks-per-node=2 slurm/train.sh RECIPE        # no GPUs: two processes on each of two nodes
#   sbatch --array=1-10%1 --time=04:00:00 slurm/train.sh RECIPE       # ten wall times, one after the other
#
# docs/slurm.md lists every way to ask for GPUs and tasks, and what becomes of it: one process per GPU, or per task without GPUs.
# Near the time limit (--signal) all ranks save and the job requeues itself; after a crash they start again from the newest
# checkpoint. Environment: CHATMILL_PYTHON, CHATMILL_PROCESSES (per node), CHATMILL_PREFLIGHT=0|1, CHATMILL_NODE_CHECK=PROGRAM,
# CHATMILL_HANG_S. launcher/jobs/slurm.py writes what lies between here and `set -euo pipefail`.
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
CHATMILL_RUN_DIR=''
CHATMILL_LEAD=180
CHATMILL_MAX_NO_PROGRESS=3
srun_options=()
container=()

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

# Processes per node from what Slurm gave the job; what cannot be one run is refused here (docs/slurm.md has the table).
given=$("$CHATMILL_PYTHON" -m chatmill.launcher.supervise.allocation)
read -r CHATMILL_PROCESSES CHATMILL_GPUS <<<"$given"
export CHATMILL_PROCESSES CHATMILL_GPUS
export CHATMILL_PREFLIGHT=${CHATMILL_PREFLIGHT:-$((SLURM_NNODES > 1 && CHATMILL_GPUS > 0))}

# The step below asks for one task per node with all CPUs, GPUs and memory of the job there. srun also reads how the job was asked
# for (SLURM_GPUS_PER_TASK, SLURM_TRES_PER_TASK ...), even where sbatch inherited that from a shell inside another job.
for name in ${!SLURM_@} ${!SRUN_@}; do
  case $name in
    SLURM_JOB_*) ;;
    SLURM_*_PER_* | SLURM_NTASKS | SLURM_NPROCS | SLURM_GPUS | SLURM_GPU_* | SLURM_GRES* | SLURM_TRES_* | SLURM_STEP* | SRUN_* | \
    SLURM_CPU_* | SLURM_MEM_* | SLURM_DIST* | SLURM_HINT | SLURM_EXACT | SLURM_EXCLUSIVE | SLURM_OVERLAP | SLURM_WHOLE | \
    SLURM_*_SPEC | SLURM_CONSTRAINT | SLURM_HOSTFILE | SLURM_OVERCOMMIT | SLURM_TIMELIMIT | SLURM_EXPORT_ENV | SLURM_*MODE | \
    SLURM_HET_* | SLURM_PACK_*)
      unset "$name" ;;
  esac
done
step_gpus=none
if (( CHATMILL_GPUS )); then step_gpus=gpu:$CHATMILL_GPUS; fi

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
  --gpus "$CHATMILL_GPUS" --processes "$CHATMILL_PROCESSES" --folder "$CHATMILL_RUN_DIR" || exit 78
if (( CHATMILL_PREFLIGHT )); then
  "${agent[@]}" --master-port=$((MASTER_PORT + 1)) --log-dir="$logs-preflight" \
    -m chatmill.launcher.supervise.preflight || exit 79
fi
exec "${agent[@]}" --master-port="$MASTER_PORT" --log-dir="$logs" -m chatmill.trainer.train "$@"
'

# --kill-on-bad-exit and --wait: when one node fails, no other one waits for it for ever.
exec "$CHATMILL_PYTHON" -m chatmill.launcher.supervise --slurm --run-dir "$run_dir" \
  --max-no-progress "$CHATMILL_MAX_NO_PROGRESS" --lead "$CHATMILL_LEAD" --hang "${CHATMILL_HANG_S:-0}" -- \
  srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --gres="$step_gpus" --mem=0 --cpu-bind=none \
  --export=ALL --kill-on-bad-exit=1 --wait=60 "${srun_options[@]}" "${container[@]}" bash -c "$node_program" node "${arguments[@]}"
