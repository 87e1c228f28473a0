"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, built from a config."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tidar_mega.checkpoint import torch_adam
from tidar_mega.config import Config
from tidar_mega.device import DTYPES
from tidar_mega.model.gpt import HybridGPT


def wrap(config: Config, model: HybridGPT) -> DistributedDataParallel:
    """The model with gradients that are summed over the data-parallel group, in float32."""
    p = config.parallel
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=p.distributed_optimizer,
            overlap_grad_reduce=p.overlap_grad_reduce,
            overlap_param_gather=p.overlap_param_gather,
        ),
        model,
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    if p.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
        model.config.grad_sync_func = wrapped.start_grad_sync
    if p.overlap_param_gather:
        model.config.param_sync_func = wrapped.start_param_sync
    return wrapped


def build_optimizer(config: Config, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW (a fused one where Transformer Engine or apex is installed), its state already allocated."""
    o = config.optimizer
    dtype = DTYPES[config.precision.dtype]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.epsilon,
            clip_grad=o.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        [model],
    )
    torch_adam.allocate_state(optimizer)
    return optimizer


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
        lr_wsd_decay_style="cosine",
        # a resume goes by the config: the checkpoint says only how many steps were taken
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def apply_settings(config: Config, optimizer: MegatronOptimizer) -> None:
    """After a load, gives the parameter groups the settings of `config` instead of those that the checkpoint had."""
    o = config.optimizer
    for group in optimizer.param_groups:
        group |= {"max_lr": o.lr, "min_lr": o.min_lr, "betas": (o.beta1, o.beta2), "eps": o.epsilon}


@torch.no_grad()
def update(optimizer: MegatronOptimizer, clip: float) -> tuple[float, bool]:
    """Clips and applies the gradients unless their norm is not finite. Returns (norm before clipping, applied)."""
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm, False
    if clip > 0:
        clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=clip, total_norm=norm)
    return norm, bool(optimizer.step_with_ready_grads())
