"""Megatron's process groups from a config, passed on explicitly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from tidar_mega.config import Config, ParallelConfig, UserError, replicas
from tidar_mega.device import prepare_megatron, settle_kernels


@dataclass(frozen=True)
class Mesh:
    """The groups of this process.

    tensor splits every layer, pipeline the layers, context the rows of each sequence; `data` holds the replicas that
    see different samples. `sharded_data` is data x context: those who hold the same weights and share the optimizer.
    """

    rank: int
    world_size: int
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    sharded_data: dist.ProcessGroup

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

    @property
    def has_head(self) -> bool:
        """True on the last pipeline stage, where the losses are."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    def from_head(self, value):
        """Collective over the pipeline. The object that the last stage passes, on every stage."""
        if self.pipeline.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.pipeline, group_src=self.pipeline.size() - 1)
        return box[0]

    def same(self, value):
        """Collective. The object that the main process passes, on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

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


def share_out(items: Sequence, work: Callable[[list], list], group: dist.ProcessGroup | None) -> list:
    """Collective over the group (None: alone). What `work` makes of all items, one result each and in their order, on
    every rank; each rank does it for a share of them."""
    if group is None or group.size() == 1:
        return work(list(items))
    size, found = group.size(), [None] * group.size()
    dist.all_gather_object(found, work(list(items[group.rank() :: size])), group=group)
    return [found[i % size][i // size] for i in range(len(items))]


def build_mesh(config: Config) -> Mesh:
    """Makes the groups inside the default process group. Raises ConfigError if the world does not fit the config."""
    prepare_megatron()
    settle_kernels()
    parallel, world = config.parallel, dist.get_world_size()
    replicas(config, world, f"{world} processes (WORLD_SIZE)")
    if not _exists(parallel):
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            distributed_timeout_minutes=parallel.timeout_minutes,
        )
    model_parallel_cuda_manual_seed(config.train.seed, force_reset_rng=True)
    torch.manual_seed(config.train.seed)  # megatron seeds only CUDA
    return Mesh(
        rank=dist.get_rank(),
        world_size=world,
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        context=parallel_state.get_context_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        sharded_data=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def _exists(parallel: ParallelConfig) -> bool:
    """Whether the groups of this layout are there already: an engine or a model more in a process makes no new ones,
    of which each would keep threads and sockets that nothing takes away."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    try:
        dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group())
    except KeyError:  # of a process group that was destroyed
        return False
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
    )
    return sizes == (parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.context)
