#!/bin/bash
#SBATCH --job-name=proctor-first
#SBATCH --output=/work/runs/first/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=gpu_h100
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue

trap '' USR1
hook=$(conda shell.bash hook) && eval "$hook" || exit 2
conda activate '/envs/conda env' || exit 2
export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export HF_EVALUATE_OFFLINE=1
export TRANSFORMERS_OFFLINE=1

exec python -m proctor.worker '/work/runs/first run' jobs/a100.json "${SLURM_ARRAY_TASK_ID:-0}"
