"""The optimizer against plain AdamW, its schedule against the formulas, and the policy for non-finite gradients."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from tests import processes
from tests.steps import MASK, SEQUENCES, VOCAB, Text, plain_step, settings

STEPS = 20


def learning_rates(rank: int, config) -> list[float]:
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim

    build_mesh(config)
    (model,) = optim.wrap(config, gpt.build(config, VOCAB))
    optimizer = optim.build_optimizer(config, [model])
    scheduler = optim.build_scheduler(config, optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(1)
    return rates


def expected(schedule: str, style: str, step: int) -> float:
    """Warm-up of 4 steps to 1e-2, then down to 1e-3 at step 20 (the decay of wsd takes the last 6)."""
    top, low, warmup = 1e-2, 1e-3, 4
    if step <= warmup:
        return top * step / warmup
    if schedule == "constant":
        return top
    if schedule == "cosine":
        share = (step - warmup) / (STEPS - warmup)
    else:
        share = max(0.0, (step - (STEPS - 6)) / 6)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "minus_sqrt": 1 - math.sqrt(share)}
    return low + (top - low) * left[style]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "schedule, style",
    [("cosine", "cosine"), ("wsd", "cosine"), ("wsd", "linear"), ("wsd", "minus_sqrt"), ("constant", "cosine")],
)
def test_the_learning_rate_is_the_formulas(schedule, style):
    optimizer = {"lr": 1e-2, "min_lr": 1e-3, "schedule": schedule, "warmup_steps": 4, "decay_steps": 6}
    optimizer["decay_style"] = style
    (rates,) = processes.run(learning_rates, 1, settings(train={"steps": STEPS}, optimizer=optimizer))
    assert rates == pytest.approx([expected(schedule, style, step) for step in range(STEPS)], rel=1e-6)


def three_steps(rank: int, config):
    """The weights before and after three steps, and after one more whose gradient is not finite."""
    from tidar_mega import methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches

    mesh = build_mesh(config)
    (model,) = optim.wrap(config, gpt.build(config, VOCAB))
    optimizer = optim.build_optimizer(config, [model])
    scheduler = optim.build_scheduler(config, optimizer)
    task = Task(config, mesh, methods.load(config, MASK), [model], torch.ones(VOCAB))

    def weights():
        return {n: p.detach().clone() for n, p in model.module.named_parameters()}

    def gradients() -> None:
        accumulate_gradients(task, list(micro_batches(task, Text, 0, SEQUENCES)))

    before = weights()
    for _ in range(3):
        gradients()
        assert math.isfinite(optim.update(optimizer, config.optimizer.clip_grad))
        scheduler.step(1)
    after = weights()
    gradients()
    next(iter(model.module.parameters())).main_grad.view(-1)[3] = float("nan")
    norm = optim.update(optimizer, config.optimizer.clip_grad)
    return before, after, weights(), norm


def adamw(weights: dict, config) -> dict:
    """Three steps of decoupled weight decay Adam (arXiv 1711.05101, algorithm 2) in float64 with exempt vectors."""
    o = config.optimizer
    weights = {n: w.double().clone() for n, w in weights.items()}
    first, second = ({n: torch.zeros_like(w) for n, w in weights.items()} for _ in range(2))
    for step in range(3):
        _, gradient = plain_step(weights, config)
        norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
        scale = min(1.0, o.clip_grad / (norm + 1e-6))
        lr = expected("cosine", "cosine", step)
        for name, w in weights.items():
            g = gradient[name] * scale
            first[name] = o.beta1 * first[name] + (1 - o.beta1) * g
            second[name] = o.beta2 * second[name] + (1 - o.beta2) * g * g
            mean = first[name] / (1 - o.beta1 ** (step + 1))
            square = second[name] / (1 - o.beta2 ** (step + 1))
            decay = o.weight_decay if w.dim() > 1 else 0.0
            weights[name] = w * (1 - lr * decay) - lr * mean / (square.sqrt() + o.epsilon)
    return weights


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False])
def test_steps_are_adamws_with_clipping_and_exempt_norms_and_a_nan_changes_nothing(distributed):
    optimizer = {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4, "clip_grad": 0.5, "weight_decay": 0.5, "epsilon": 1e-4}
    parallel = {"distributed_optimizer": distributed}
    config = settings(train={"steps": STEPS}, optimizer=optimizer, parallel=parallel)
    ((before, after, later, norm),) = processes.run(three_steps, 1, config)
    for name, wanted in adamw(before, config).items():
        moved = (wanted - before[name]).abs().max()
        assert (after[name] - wanted).abs().max() < 2e-3 * moved + 1e-7, name
    assert not math.isfinite(norm)
    assert all(torch.equal(after[n], later[n]) for n in after)


def interleaved_steps(rank: int, configs: list) -> list:
    """Loss and gradient norm of three steps with each config, and the weights of this rank's chunks after them."""
    from tidar_mega import methods
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim
    from tidar_mega.train.step import Task, accumulate_gradients, micro_batches, summarise

    results = []
    for config in configs:
        mesh = build_mesh(config)
        chunks = optim.wrap(config, gpt.build(config, VOCAB))
        optimizer = optim.build_optimizer(config, chunks)
        task = Task(config, mesh, methods.load(config, MASK), chunks, torch.ones(VOCAB))
        figures = []
        for _ in range(3):
            sums = accumulate_gradients(task, list(micro_batches(task, Text, 0, 2 * SEQUENCES)))
            figures.append((summarise(task, sums)["loss"], optim.update(optimizer, config.optimizer.clip_grad)))
        if config.parallel.overlap_param_gather:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
        results.append((figures, [p.detach().clone() for chunk in chunks for p in chunk.parameters()]))
    return results


@pytest.mark.distributed
def test_overlapped_communication_of_several_chunks_changes_no_bit():
    layout = {"pipeline": 2, "virtual_pipeline": 2, "data": 2}
    train = {"global_batch_size": 2 * SEQUENCES, "micro_batch_size": 2}
    overlapped = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    kinds = [{}, {"overlap_grad_reduce": True}, overlapped, overlapped | {"recompute": "full"}]
    configs = [settings(model={"num_layers": 4}, train=train, parallel=layout | more) for more in kinds]
    for (expected, weights), *others in processes.run(interleaved_steps, 4, configs):
        for figures, after in others:
            assert figures == expected
            assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def settings_after_another_adams_checkpoint(rank: int, config) -> list[dict]:
    from tidar_mega.model import gpt
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim

    build_mesh(config)
    optimizer = optim.build_optimizer(config, optim.wrap(config, gpt.build(config, VOCAB)))
    for group in optimizer.param_groups:
        for unknown in ("amsgrad", "maximize"):
            del group[unknown]
        group |= {"step": 7.0, "bias_correction": True, "lr": 0.25}
    optim.apply_settings(config, optimizer)
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


@pytest.mark.distributed
def test_a_checkpoint_of_another_adam_gives_no_group_that_misses_a_setting():
    (groups,) = processes.run(settings_after_another_adams_checkpoint, 1, settings())
    for group in groups:
        assert group["amsgrad"] is False and group["maximize"] is False
        assert group["step"] == 7 and isinstance(group["step"], int)  # a kernel of Transformer Engine takes it
        assert group["lr"] == 0.25 and group["betas"] == (0.9, 0.95)


def test_offloading_and_fp8_weights_are_told_to_megatrons_optimizer():
    from tidar_mega.train import optim

    fields = optim._optimizer_fields(settings(precision={"dtype": "bf16"}, parallel={"optimizer_offload": 0.75}))
    assert fields["optimizer_cpu_offload"] and fields["optimizer_offload_fraction"] == 0.75
    # without it megatron keeps a float32 copy of all weights on the GPU; its own check of it needs Transformer Engine
    assert fields["use_precision_aware_optimizer"] and fields["use_distributed_optimizer"]
    fp8 = {"dtype": "bf16", "fp8": "blockwise", "fp8_param_gather": True}
    fields |= optim._optimizer_fields(settings(precision=fp8))
    assert fields["fp8_recipe"] == "blockwise"
    assert fields.keys() <= {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert not OptimizerConfig(**optim._optimizer_fields(settings())).optimizer_cpu_offload


def offloaded_optimizer_loads_itself(rank: int) -> list[dict]:
    """As far as a CPU can go: megatron's own HybridDeviceOptimizer, built and loaded, with all of it in host memory."""
    from megatron.core.optimizer import distrib_optimizer, optimizer_config
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from tidar_mega.model import gpt, precision
    from tidar_mega.parallel.mesh import build_mesh
    from tidar_mega.train import optim

    precision.check = lambda *_: None  # what would refuse this machine, and megatron's own two checks of the same
    distrib_optimizer.HAVE_APEX_OR_TE, optimizer_config.is_te_min_version = True, lambda _: True
    config = settings(precision={"dtype": "bf16", "layers": "local"}, parallel={"optimizer_offload": 0.5})
    build_mesh(config)
    optimizer = optim.build_optimizer(config, optim.wrap(config, gpt.build(config, VOCAB)))
    (part,) = optimizer.chained_optimizers
    assert isinstance(part.optimizer, HybridDeviceOptimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optim.apply_settings(config, optimizer)
    return [
        {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.state_dict()["optimizer"]["param_groups"]
    ]


@pytest.mark.distributed
def test_an_offloaded_optimizer_loads_what_it_has_saved():
    (groups,) = processes.run(offloaded_optimizer_loads_itself, 1)
    assert groups and all(isinstance(v, int | float | bool | tuple | None) for g in groups for v in g.values()), (
        "no classes"
    )
