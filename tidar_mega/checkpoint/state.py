"""What a resume needs, listed once: weights, optimizer, schedule, random states and `Progress`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from tidar_mega import device
from tidar_mega.checkpoint import torch_adam
from tidar_mega.model import lora
from tidar_mega.model.gpt import HybridGPT

RANDOM = "random"  # the key of the random states on disk
# by which a saved group of parameters is found again
_KINDS_OF_GROUPS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _sharding(fully_reshardable: bool = True) -> dict:
    """How megatron lays out the state (checkpoint.fully_reshardable); its own default cannot be saved. A new dict each
    time, as megatron adds the groups of the moment to it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable" if fully_reshardable else "dp_reshardable",
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
    # of the losses so far, the recent ones counting most, for what is a spike
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_steps: int = 0
    spikes: int = 0


@dataclass
class TrainState:
    """The live objects of a run. `window` holds the sums since the last log line, equal on every rank: with them, a
    line that spans a restart says what it would have said."""

    chunks: list[DistributedDataParallel]  # the model chunks of this rank; several with a virtual pipeline
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    progress: Progress
    window: dict[str, Tensor] = field(default_factory=dict)


def sharded(state: TrainState, fully_reshardable: bool) -> dict:
    """Collective. Everything as megatron's sharded state dict, to be saved."""
    for chunk in state.chunks:
        if chunk.ddp_config.overlap_param_gather:  # else only the next forward would gather the new weights
            chunk.start_param_sync(force_sync=True)
    return {**_template(state, fully_reshardable, is_loading=False), "random": _random_states()}


def template(state: TrainState, same_layout: bool, fully_reshardable: bool) -> dict:
    """What `store.load` fills in, of a checkpoint that was made with this `fully_reshardable`.

    Random states belong to model-parallel ranks: another layout of them has none. Nothing is lost without them: what
    training draws is a function of the sample, and dropout is not used.
    """
    parts = _template(state, fully_reshardable, is_loading=True)
    return {**parts, "random": _random_states()} if same_layout else parts


def _template(state: TrainState, fully_reshardable: bool, is_loading: bool) -> dict:
    parts = {name: _weights(model, model.has_adapters) for name, model in _chunks(state).items()}
    how = _sharding(fully_reshardable)
    parts["optimizer"] = state.optimizer.sharded_state_dict(parts, is_loading=is_loading, metadata=how)
    parts["scheduler"] = state.scheduler.state_dict()
    parts["progress"] = asdict(state.progress)
    parts["window"] = dict(state.window)
    return parts


def size_bytes(state: TrainState) -> int:
    """Collective. About what a checkpoint takes on disk: the weights that are trained, and three float32 numbers of the
    optimizer for each. It is the sum over the ranks that hold one replica of the model."""
    trained = [p for chunk in state.chunks for p in chunk.parameters() if p.requires_grad]
    mine = sum(p.numel() * (p.element_size() + 12) for p in trained)
    total = torch.tensor(mine, device=device.device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total)


def sharded_weights(model: HybridGPT) -> dict:
    """What a checkpoint of this model holds of its weights: all that decoding needs, but for the base of adapters."""
    return {"model": _weights(model, model.has_adapters)}


def sharded_base(chunks: list[HybridGPT]) -> dict:
    """The weights of a model without its adapters, chunk by chunk (`base.py`)."""
    return {f"model{i}": _weights(chunk, adapters=False) for i, chunk in enumerate(chunks)}


def _weights(model: HybridGPT, adapters: bool) -> dict:
    """The adapters alone, or all other weights."""
    whole = model.sharded_state_dict(metadata=_sharding())
    return {name: weight for name, weight in whole.items() if lora.is_adapter(name) == adapters}


def restore(state: TrainState, loaded: dict) -> None:
    """Puts what `store.load` made of `template` into the live objects."""
    for name, model in _chunks(state).items():
        fill(model, loaded[name])
    # megatron-core 0.19 also goes by their learning rates, which a resume may change (`optim.apply_settings`)
    megatron_optimizer.param_group_identifier_keys = distrib_optimizer.param_group_identifier_keys = _KINDS_OF_GROUPS
    torch_adam.load_state(state.optimizer, loaded["optimizer"])
    state.scheduler.num_steps = 0  # its load_state_dict adds the saved steps to those already taken
    state.scheduler.load_state_dict(loaded["scheduler"])
    if "random" in loaded:
        torch.set_rng_state(loaded["random"]["torch"])
        get_cuda_rng_tracker().set_states(loaded["random"]["megatron"])
    state.progress = Progress(**loaded["progress"])
    state.window = loaded["window"]


def fill(model: HybridGPT, weights: dict) -> None:
    """Puts loaded weights into the model: its own, those of its adapters or those of its base."""
    wrong = model.load_state_dict(weights, strict=False)
    partly = {name for name in wrong.missing_keys if model.has_adapters and _is_other(name, weights)}
    # `store.load` has compared the names of all weights; a checkpoint made without FP8 has no states of it
    rest = [*(set(wrong.missing_keys) - partly), *wrong.unexpected_keys]
    assert all(key.endswith("._extra_state") for key in rest), wrong


def _is_other(name: str, weights: dict) -> bool:
    """Whether a weight is of the kind, adapter or base, that is not among `weights`."""
    return lora.is_adapter(name) != any(map(lora.is_adapter, weights))


def _chunks(state: TrainState) -> dict[str, HybridGPT]:
    """The chunks of this rank by their names in a state dict. On disk a weight has the name of its layer in the whole
    model, so any number of chunks loads what any other has saved."""
    if len(state.chunks) == 1:
        return {"model": state.chunks[0].module}
    return {f"model{i}": chunk.module for i, chunk in enumerate(state.chunks)}


def _random_states() -> ShardedObject:
    """torch's and megatron's random states; they differ between model-parallel ranks, not between replicas."""
    states = {"torch": torch.get_rng_state(), "megatron": get_cuda_rng_tracker().get_states()}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    tensor = parallel_state.get_tensor_model_parallel_group()
    replica = parallel_state.get_data_parallel_group(with_context_parallel=True).rank()
    shape, place = (pipeline.size(), tensor.size()), (pipeline.rank(), tensor.rank())
    return ShardedObject(RANDOM, states, shape, place, replica_id=replica)
