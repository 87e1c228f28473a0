"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, built from a config."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tidar_mega.config import Config
from tidar_mega.device import DTYPES
from tidar_mega.model import precision
from tidar_mega.model.gpt import HybridGPT


def wrap(
    config: Config, chunks: list[HybridGPT], before_exchange: Callable[[], None] = lambda: None
) -> list[DistributedDataParallel]:
    """Each chunk with gradients that are summed over the data-parallel (and context-parallel) group, in float32.

    `before_exchange` is called once in a step, when this rank's own gradients are made and it waits for the others'.

    From here on, torch is as deterministic as `precision.deterministic` says.
    """
    precision.make_deterministic(config)
    p, several = config.parallel, len(chunks) > 1
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=p.distributed_optimizer,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        bucket_size=p.bucket_size,
        align_param_gather=p.overlap_param_gather and several,  # the interleaved schedule starts the gathers
        fp8_param_gather=config.precision.fp8_param_gather,
    )
    wrapped = [
        # only the first chunk's reduction needs buckets: those of the others are hidden behind the chunks before them
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in chunks:  # megatron's schedules read these from the first; all may share one object
        _set_schedule_functions(config, chunk.config, wrapped, before_exchange)
    return wrapped


def _set_schedule_functions(
    config: Config, shape, wrapped: list[DistributedDataParallel], before_exchange: Callable[[], None]
) -> None:
    """What megatron's schedules call: one function with one chunk, a list of them with several."""

    def each(name: str):
        functions = [getattr(chunk, name) for chunk in wrapped]
        return functions if len(functions) > 1 else functions[0]

    def exchange(*args, **settings):
        before_exchange()
        return finalize_model_grads(*args, **settings)

    shape.finalize_model_grads_func = exchange
    if config.parallel.overlap_grad_reduce:
        shape.no_sync_func = each("no_sync")
        shape.grad_sync_func = each("start_grad_sync")
    if config.parallel.overlap_param_gather:
        shape.param_sync_func = each("start_param_sync")


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW (a fused one where Transformer Engine or apex is installed), its state already allocated."""
    optimizer = get_megatron_optimizer(OptimizerConfig(**_optimizer_fields(config)), chunks)
    _allocate_state(optimizer)
    return optimizer


def _optimizer_fields(config: Config) -> dict:
    o, p, dtype = config.optimizer, config.parallel, DTYPES[config.precision.dtype]
    fields = {
        "optimizer": "adam",
        "lr": o.lr,
        "min_lr": o.min_lr,
        "weight_decay": o.weight_decay,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "adam_eps": o.epsilon,
        "clip_grad": o.clip_grad,
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "use_distributed_optimizer": p.distributed_optimizer,
        "overlap_param_gather": p.overlap_param_gather,
    }
    if config.precision.fp8_param_gather:  # how FP8 weights are cut into shards
        fields["fp8_recipe"] = config.precision.fp8
    if p.optimizer_offload > 0:
        fields |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": p.optimizer_offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
            "use_precision_aware_optimizer": True,  # else a float32 copy of the weights stays on the GPU as well
        }
    return fields


def _allocate_state(optimizer: MegatronOptimizer) -> None:
    """Moments as after zero steps: megatron can neither save nor load an optimizer that has none yet."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in part.optimizer.param_groups:
                # classes, which it reads from its defaults alone; with them a checkpoint could not be read back
                group |= {"cpu_optimizer_cls": None, "gpu_optimizer_cls": None}
            for inner in part.optimizer.sub_optimizers:
                _zero_moments(inner)
            part.optimizer._sync_sub_optimizers_state_to_hdo()
        elif isinstance(part.optimizer, torch.optim.AdamW):
            _zero_moments(part.optimizer)
        else:
            part.init_state_fn(part.optimizer, part.config)


def _zero_moments(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            if isinstance(optimizer, torch.optim.AdamW):  # the fused ones count steps in the group
                state["step"] = torch.tensor(0.0)
            optimizer.state[param] = state


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def build_scheduler(config: Config, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Counts optimizer steps. It also applies the weight-decay exemptions, which the optimizer alone does not."""
    o, steps = config.optimizer, config.train.steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=o.lr,
        min_lr=o.min_lr,
        lr_warmup_steps=o.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style={"cosine": "cosine", "wsd": "WSD", "constant": "constant"}[o.schedule],
        start_wd=o.weight_decay,
        end_wd=o.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=o.decay_steps,
        lr_wsd_decay_style=o.decay_style,
        # a resume goes by the config: the checkpoint says only how many steps were taken
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def apply_settings(config: Config, optimizer: MegatronOptimizer) -> None:
    """After a load, gives the parameter groups the settings of `config` instead of those that the checkpoint had.

    The checkpoint may be of another Adam than this machine's (torch's, Transformer Engine's, apex's): what that one did
    not know takes its default, and the fused ones count steps in an integer.
    """
    o = config.optimizer
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            group |= part.optimizer.defaults | group
            group |= {"max_lr": o.lr, "min_lr": o.min_lr, "betas": (o.beta1, o.beta2), "eps": o.epsilon}
            if isinstance(part.optimizer, HybridDeviceOptimizer):
                # its parts count for themselves, and would be set back to this one in every step
                group.pop("step", None)
            elif "step" in group:
                group["step"] = int(group["step"])


@torch.no_grad()
def update(optimizer: MegatronOptimizer, clip: float, wanted: bool = True) -> float:
    """Clips and applies the gradients if that is `wanted` and their norm is finite. Returns the norm before that."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    is_applied = wanted and math.isfinite(norm)
    if is_applied and clip > 0:
        for part in _parts(optimizer):
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8  # where its gradients are
            clip_grad_by_total_norm_fp32(part.get_parameters(), clip, norm, use_decoupled_grad=decoupled)
    if is_applied:
        optimizer.step_with_ready_grads()
    # without the distributed optimizer, the gradient of a float32 weight is now the very memory that those of the next
    # step are added into, and autograd would add to it as well
    optimizer.zero_grad()
    return norm
