#!/bin/bash
#SBATCH --job-name=proctor-score
#SBATCH --output=/l/%j.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=gpu-ms,gpu-troja
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue

export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1

exec /p -m proctor score
