"""What a resume needs, listed once: weights, optimizer, schedule, random states and `Progress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

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
    """The live objects of a run. `window` holds the sums since the last log line, equal on every rank: with them, a
    line that spans a restart says what it would have said."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress
    window: dict[str, Tensor] = field(default_factory=dict)


def sharded(state: TrainState) -> dict:
    """Collective. Everything as megatron's sharded state dict, to be saved."""
    if state.model.ddp_config.overlap_param_gather:  # else only the next forward would gather the new weights
        state.model.start_param_sync(force_sync=True)
    return {**_template(state, is_loading=False), "random": _random_states()}


def template(state: TrainState, same_tensor_size: bool) -> dict:
    """What `store.load` fills in. Random states belong to tensor-parallel ranks: another number of them has none."""
    parts = _template(state, is_loading=True)
    return {**parts, "random": _random_states()} if same_tensor_size else parts


def _template(state: TrainState, is_loading: bool) -> dict:
    parts = sharded_weights(state.model.module)
    parts["optimizer"] = state.optimizer.sharded_state_dict(parts, is_loading=is_loading, metadata=SHARDING)
    parts["scheduler"] = state.scheduler.state_dict()
    parts["progress"] = asdict(state.progress)
    parts["window"] = dict(state.window)
    return parts


def size_bytes(state: TrainState) -> int:
    """About what a checkpoint takes on disk: the weights, and three float32 numbers of the optimizer for each."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return tensor * sum(p.numel() * (p.element_size() + 12) for p in state.model.module.parameters())


def sharded_weights(model: HybridGPT) -> dict:
    """The weights alone, all that decoding needs."""
    return {"model": model.sharded_state_dict(metadata=SHARDING)}


def restore(state: TrainState, loaded: dict) -> None:
    """Puts what `store.load` made of `template` into the live objects."""
    state.model.module.load_state_dict(loaded["model"], strict=True)
    torch_adam.load_state(state.optimizer, loaded["optimizer"])
    state.scheduler.num_steps = 0  # its load_state_dict adds the saved steps to those already taken
    state.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in loaded:
        torch.set_rng_state(loaded["random"]["torch"])
        get_cuda_rng_tracker().set_states(loaded["random"]["megatron"])
    state.progress = Progress(**loaded["progress"])
    state.window = loaded["window"]


def _random_states() -> ShardedObject:
    """torch's and megatron's random states; they differ between tensor-parallel ranks, not between replicas."""
    states = {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    tensor = parallel_state.get_tensor_model_parallel_group()
    replica = dist.get_rank(parallel_state.get_data_parallel_group())
    return ShardedObject("random", states, (tensor.size(),), (tensor.rank(),), replica_id=replica)
