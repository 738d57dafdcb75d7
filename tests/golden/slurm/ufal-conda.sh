#!/bin/bash
#SBATCH --job-name=proctor-first
#SBATCH --output=/work/runs/first/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=gpu-ms,gpu-troja
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --mem=32G
#SBATCH --gres=gpu:2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

trap '' USR1
. -- /opt/conda/etc/profile.d/conda.sh || exit 2
conda activate proctor || exit 2
export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1

exec python -m proctor.worker '/work/runs/first run' jobs/a100.json "${SLURM_ARRAY_TASK_ID:-0}"
