"""Megatron's process groups from a config, passed on explicitly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tidar_mega.config import Config, ConfigError, UserError, check_batch
from tidar_mega.device import prepare_megatron


@dataclass(frozen=True)
class Mesh:
    """The groups of this process: `tensor` splits every layer, `data` holds replicas that see different samples."""

    rank: int
    world_size: int
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes logs."""
        return self.rank == 0

    def on_main(self, action):
        """Collective. Calls `action` on the main process and returns its result there, None elsewhere.

        A UserError there is raised on every rank, so that none is left waiting for the others.
        """
        result, error = None, [None]
        if self.is_main:
            try:
                result = action()
            except UserError as raised:
                error = [raised]
        dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise error[0]
        return result


def build_mesh(config: Config) -> Mesh:
    """Makes the groups inside the default process group. Raises ConfigError if the world does not fit the config."""
    prepare_megatron()
    parallel, world = config.parallel, dist.get_world_size()
    if world % parallel.tensor:
        raise ConfigError(f"parallel.tensor = {parallel.tensor}: must divide the number of processes ({world})")
    data = world // parallel.tensor
    if parallel.data not in (None, data):
        raise ConfigError(
            f"parallel.data = {parallel.data}: {world} processes / parallel.tensor {parallel.tensor} make {data}; "
            "set it to that or to null, or start another number of processes"
        )
    check_batch(config, data)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor)
    model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    torch.manual_seed(config.train.seed)  # weights are drawn on the CPU, of which megatron seeds nothing
    return Mesh(
        rank=dist.get_rank(),
        world_size=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
    )
