#!/bin/bash
# Decode with a checkpoint on a Slurm cluster, from the root of the repository; any verb of `tidar` that takes one:
#
#     sbatch slurm/evaluate.sh bench decode runs/8b --json runs/8b/decode.json
#     sbatch --gpus-per-node=4 slurm/evaluate.sh generate runs/8b --prompt-file prompt.txt decode.tensor=4
#     sbatch --gpus-per-node=0 slurm/evaluate.sh bench decode runs/quickstart                  # CPU only
#     sbatch --time=2-0 slurm/evaluate.sh evaluate runs/8b --watch      # each new checkpoint, until the run is finished
#     sbatch --dependency=afterok:JOB slurm/evaluate.sh evaluate runs/8b                       # once JOB has ended well
#
# One node: `tidar` starts the processes of decode.tensor x pipeline x data on it by itself.
#
#SBATCH --job-name=tidar-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --time=4:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail

# Modules, virtual environment: as in pretrain.sh.
environment=${TIDAR_ENV:-slurm/env.sh}
if [[ -f $environment ]]; then
    source "$environment"
fi
python=${TIDAR_PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
export SLURM_EXPORT_ENV=ALL # to srun's task, also after sbatch --export=NONE

container=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$PWD}" --container-workdir="$PWD")
fi

srun --ntasks=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${container[@]+"${container[@]}"} --kill-on-bad-exit=1 \
    "$python" -P -u -m tidar_mega.cli "$@"
