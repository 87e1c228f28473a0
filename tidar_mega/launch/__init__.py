"""How a run comes to its processes: local ones (`local.py`), the tasks of a Slurm step (`slurm.py`), and jobs that are
handed to Slurm (`jobs.py`) and go back into its queue until the run is finished (`restarts.py`)."""

from tidar_mega.launch.jobs import submit, sweep
from tidar_mega.launch.local import local_processes, processes_of, run_local
from tidar_mega.launch.restarts import begin, finish_or_requeue, finished, note_bad_nodes, note_exit
from tidar_mega.launch.slurm import restart_count, set_distributed_env

__all__ = [
    "begin",
    "finish_or_requeue",
    "finished",
    "local_processes",
    "note_bad_nodes",
    "note_exit",
    "processes_of",
    "restart_count",
    "run_local",
    "set_distributed_env",
    "submit",
    "sweep",
]
