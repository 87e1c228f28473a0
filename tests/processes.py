"""Runs a test function in several real gloo processes, as a cluster would, one thread each.

They are forked from a server that has imported torch and megatron-core, and nothing else has happened in it: importing
these takes some five seconds of each process, which is more than most steps of the tests.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function, processes: int, *args, timeout_seconds: float = 1200) -> list:
    """Calls `function(rank, *args)` in every rank of a gloo world and returns what the ranks returned, in order.

    `function` must be importable (module level). The first failing rank's traceback is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["tidar_mega.train.loop", "tidar_mega.model.gpt"])
        ranks = [
            context.Process(target=_rank, args=(function, rank, processes, folder, args)) for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout_seconds)
        hung = [i for i, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        errors = sorted(Path(folder).glob("error_*"), key=os.path.getmtime)
        if errors:
            raise AssertionError(f"{errors[0].name}:\n{errors[0].read_text()}")
        assert not hung, f"ranks {hung} did not end within {timeout_seconds} s"
        return [torch.load(f"{folder}/result_{rank}", weights_only=False) for rank in range(processes)]


def _rank(function, rank: int, processes: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/world", rank=rank, world_size=processes)
        result = function(rank, *args)
        torch.save(result, f"{folder}/result_{rank}")
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/error_{rank}").write_text(traceback.format_exc())
        os._exit(1)
