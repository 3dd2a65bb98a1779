#!/bin/bash
# Trains on GPU nodes under Slurm: one process a node, which drives all of its GPUs. (For one process a GPU set
# --ntasks-per-node to the number of GPUs; each process then takes its share, here and in jax.)
#
#     sbatch --nodes=4 launch/slurm_gpu.sh --config configs/X.py --workdir /shared/runs/x [--config.a.b=c ...]
#
# Everything after the script's name goes to `python -m fmcv_jax train`. The workdir must be on a file system that all
# nodes see: a run that is started again resumes from it.
#
# Edit: the #SBATCH lines (partition, account, GPUs, cores, time), and PYTHON if the environment is not .venv in the
# folder that you submit from (PYTHON=/path/to/python sbatch ... does too).
#
# What happens when it ends: shortly before the time limit (--signal), or when Slurm preempts the job, the processes get
# SIGTERM, save, and exit with 75; the job is then requeued, as often as needed. When a process was lost to a signal
# (out of memory, a node that died) it is requeued too, while the job has been restarted fewer than REQUEUES times.
# A user error (2) or another failure ends the job with that status.

#SBATCH --job-name=fmcv
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

PREEMPTED=75 # EX_TEMPFAIL: the run saved and wants to be started again
REQUEUES=${REQUEUES:-5}
PYTHON=${PYTHON:-.venv/bin/python}

# The place of one process in the run, from what Slurm tells it. Without JAX_LOCAL_DEVICE_IDS jax would give each
# process the one GPU of its number on the node. shellcheck cannot see that srun's processes call it, below.
# shellcheck disable=SC2329
set_process_environment() {
  local gpus=${SLURM_GPUS_ON_NODE:?no GPUs: set --gpus-per-node} tasks=${SLURM_NTASKS_PER_NODE:-1}
  if ((gpus % tasks)); then
    echo "$gpus GPUs are not divisible by $tasks processes per node: change --ntasks-per-node" >&2
    return 2
  fi
  local share=$((gpus / tasks))
  local first=$((SLURM_LOCALID * share))
  export FMCV_PROCESSES=$SLURM_NTASKS
  export FMCV_PROCESS=$SLURM_PROCID
  JAX_LOCAL_DEVICE_IDS=$(seq -s, "$first" $((first + share - 1)))
  export JAX_LOCAL_DEVICE_IDS
}

# Process 0 runs on the first node of the job, and is where the others find each other. The port lies above the range
# that Linux hands out, and differs from job to job and from start to start.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export FMCV_COORDINATOR=${hosts%%$'\n'*}:$((61440 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 4096))

trap : TERM # the processes save and end first; a handler, since an ignored signal would be ignored by them as well

# --kill-on-bad-exit=0 with --wait: when one process ends, the others have two minutes to finish their save.
code=0
# srun does not take --cpus-per-task over from sbatch.
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --distribution=block --kill-on-bad-exit=0 --wait=120 \
  bash -c "$(declare -f set_process_environment)
    set_process_environment || exit
    exec \"\$@\"" \
  fmcv "$PYTHON" -m fmcv_jax train "$@" || code=$?

if ((code == PREEMPTED || (code > 128 && ${SLURM_RESTART_COUNT:-0} < REQUEUES))); then
  echo "ended with $code: requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
