#!/bin/bash
#SBATCH --job-name=proctor-first
#SBATCH --output=/work/runs/first/logs/%A_%a.log
#SBATCH --open-mode=append
#SBATCH --export=ALL
#SBATCH --partition=small-g
#SBATCH --account="quote'and\"double $(touch pwned)"
#SBATCH --qos="per%cent #hash `id` \\"
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --comment="-leading ünïcødé-模型-🦊"

trap '' USR1
type module >/dev/null 2>&1 || . /etc/profile
module load '$(touch pwned)' || exit 2
. -- '/two words/`id`/bin/activate' || exit 2
export PYTHONNOUSERSITE=1
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export HF_EVALUATE_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export A=$'new\nline\r\n#SBATCH --array=0-9'
export B=''"'"'"$HOME`id`\'
export C=-x

exec python -m proctor.worker '/work/runs/first run' jobs/a100.json "${SLURM_ARRAY_TASK_ID:-0}"
