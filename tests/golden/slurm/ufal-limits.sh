#!/bin/bash
#SBATCH --job-name=proctor-first
#SBATCH --output=/work/runs/first/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=long,short
#SBATCH --account=lab-7
#SBATCH --qos=high
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=200G
#SBATCH --gres=gpu:2
#SBATCH --time=1-12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --no-requeue
#SBATCH --reservation=eval
#SBATCH --exclusive
#SBATCH --constraint="a100&nvlink"

trap '' USR1
export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1

exec /opt/proctor/bin/python -m proctor.worker '/work/runs/first run' jobs/a100.json "${SLURM_ARRAY_TASK_ID:-0}"
