# What is of a cluster and not of a run: copy this to slurm/env.sh, which both scripts source before anything else (or name
# another file in TIDAR_ENV), and change it. Every line is optional.

# module load cuda/12.6 nccl
# export TIDAR_PYTHON=/shared/venvs/tidar/bin/python      # default: .venv/bin/python of the folder of the job, else python3

# NCCL: which interfaces and adapters; what it says.
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# A container of pyxis (enroot) for each process. It needs Python with this package, Slurm's commands for requeues, and the
# folders of data, code and runs.
# export CONTAINER_IMAGE=/shared/images/tidar.sqsh
# export CONTAINER_MOUNTS=/shared:/shared,/usr/bin/scontrol,/usr/lib/x86_64-linux-gnu/slurm-wlm,/run/munge
