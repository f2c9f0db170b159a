#!/usr/bin/env bash
# A run on GPU nodes under SLURM, from the repository's folder:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/quickstart.py --workdir=/shared/run
#
# One process a GPU, which is what JAX expects here: with fewer, GPUs stay idle. PYTHON
# names the interpreter. Three minutes before the time limit, and where SLURM preempts,
# SIGTERM has the run save; it is queued again until it is done (exit code 0) or something
# doesn't fit (2), at most RESTARTS times (100).
#SBATCH --job-name=mmjax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmjax-%j.log
set -u

# A process that ends takes the others along by itself; SLURM gives them time to.
code=0
srun --kill-on-bad-exit=0 --wait=300 "${PYTHON:-python}" train.py "$@" || code=$?

if [ "$code" -eq 0 ] || [ "$code" -eq 2 ]; then
  exit "$code"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-100}" ]; then
  echo "exit code $code; that was restart ${SLURM_RESTART_COUNT:-0}, the last" >&2
  exit "$code"
fi
echo "exit code $code: queued again" >&2
scontrol requeue "$SLURM_JOB_ID"
