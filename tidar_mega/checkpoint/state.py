"""What a resume needs, listed once: weights, optimizer, schedule, random states and `Progress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from tidar_mega.checkpoint import torch_adam
from tidar_mega.model.gpt import HybridGPT

# megatron's default sharding of the distributed optimizer cannot be saved; this one loads under any layout
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass
class Progress:
    """How far a run is. `samples` is the whole state of the data: the next global sample index."""

    step: int = 0
    samples: int = 0
    skipped_steps: int = 0  # steps whose gradient was not finite, in all
    skipped_in_a_row: int = 0


@dataclass
class TrainState:
    """The live objects of a run."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress


def sharded(state: TrainState, is_loading: bool = False) -> dict:
    """Everything as megatron's sharded state dict; with `is_loading` the template that a load fills in."""
    parts = sharded_weights(state.model.module)
    parts["optimizer"] = state.optimizer.sharded_state_dict(parts, is_loading=is_loading, metadata=SHARDING)
    parts["scheduler"] = state.scheduler.state_dict()
    parts["random"] = _random_states()
    parts["progress"] = asdict(state.progress)
    return parts


def sharded_weights(model: HybridGPT) -> dict:
    """The weights alone, all that decoding needs."""
    return {"model": model.sharded_state_dict(metadata=SHARDING)}


def restore(state: TrainState, loaded: dict) -> None:
    """Puts what `store.load` returned for `sharded(state, is_loading=True)` into the live objects."""
    state.model.module.load_state_dict(loaded["model"], strict=True)
    torch_adam.load_state(state.optimizer, loaded["optimizer"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["random"]["torch"])
    get_cuda_rng_tracker().set_states(loaded["random"]["megatron"])
    state.progress = Progress(**loaded["progress"])


def _random_states() -> ShardedObject:
    """torch's and megatron's random states; they differ between tensor-parallel ranks, not between replicas."""
    states = {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    tensor = parallel_state.get_tensor_model_parallel_group()
    replica = dist.get_rank(parallel_state.get_data_parallel_group())
    return ShardedObject("random", states, (tensor.size(),), (tensor.rank(),), replica_id=replica)
