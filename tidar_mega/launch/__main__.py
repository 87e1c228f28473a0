"""What slurm/*.sh ask on a job's first node.

python -m tidar_mega.launch logs CONFIG key=value ..  checks the settings, makes the folder of the logs and prints it;
                                                      its code is 2 if the same command would fail again
python -m tidar_mega.launch after CODE CONFIG key=value ..  once srun has ended with CODE: requeues, or says why not
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tidar_mega import config as config_module
from tidar_mega.config import UserError
from tidar_mega.launch import restarts, slurm


def main(words: list[str]) -> int:
    verb, *rest = words
    code = int(rest.pop(0)) if verb == "after" else 0
    try:
        if not rest:
            raise UserError("no config: use sbatch slurm/pretrain.sh configs/quickstart.yaml key=value ..")
        config = config_module.load(rest[0], rest[1:])
        slurm.check_tasks(os.environ)
        if verb == "after":
            return restarts.after_crash(config, code)
        logs = Path(config.run_dir) / "logs" / str(slurm.own_job())
        logs.mkdir(parents=True, exist_ok=True)
        for log in logs.glob("rank_*.log"):
            restarts.mark_start(log)
        restarts.begin(config)
        print(logs)
    except UserError as error:
        slurm.say(f"error: {error}")
        return error.exit_code
    except OSError as error:  # of a file system, which may come back
        slurm.say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
