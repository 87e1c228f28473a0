"""What is refused before anything starts: impossible values, and settings that cannot be together."""

from __future__ import annotations

import functools
import math
import os
import pkgutil
from collections.abc import Collection
from importlib.util import find_spec
from operator import attrgetter

from tidar_mega.config.batch import check_batch
from tidar_mega.config.errors import require
from tidar_mega.config.settings import FP8_ALIGN, Config

_ABOVE_ZERO = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.vocab_multiple",
    "model.rotary_base",
    "model.norm_epsilon",
    "model.init_std",
    "data.seq_length",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.block",
    "train.loss_chunk",
    "train.nan_limit",
    "train.eval_sequences",
    "train.final_eval_sequences",
    "train.alpha",
    "train.clean_weight",
    "train.mtp_loss_scaling_factor",
    "train.position_gamma",
    "optimizer.lr",
    "optimizer.epsilon",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "parallel.recompute_layers",
    "checkpoint.interval",
    "checkpoint.keep_last",
    "log.interval",
    "log.profile_steps",
    "decode.max_tokens",
    "decode.capacity",
    "decode.tensor",
    "decode.pipeline",
    "decode.data",
    "decode.batch",
    "decode.prefill_chunk",
)
_ZERO_OR_MORE = (
    "train.eval_interval",
    "train.position_weight",
    "train.focal_weight",
    "train.chain_weight",
    "model.mtp_num_layers",
    "lora.rank",
    "checkpoint.keep_every",
    "health.hang_minutes",
    "health.straggler_factor",
    "health.spike_sigmas",
    "launch.max_restarts",
    "launch.max_idle_restarts",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "precision.bf16_first_layers",
    "precision.bf16_last_layers",
    "decode.temperature",
    "decode.top_k",
)


def check(config: Config) -> None:
    """Refuses impossible values and combinations. Raises ConfigError."""
    m, t, o, p = config.model, config.train, config.optimizer, config.parallel
    _choice("method", config.method, _methods())
    for key, value in zip(_ABOVE_ZERO, attrgetter(*_ABOVE_ZERO)(config), strict=True):
        require(0 < value < math.inf, key, value, "a number above 0")
    for key, value in zip(_ZERO_OR_MORE, attrgetter(*_ZERO_OR_MORE)(config), strict=True):
        require(0 <= value < math.inf, key, value, "a number of 0 or more")
    _choice("model.attention", m.attention, ("auto", "dense", "tiles", "flex"))
    _choice("precision.dtype", config.precision.dtype, ("bf16", "fp32"))
    _choice("precision.layers", config.precision.layers, ("auto", "local", "te"))
    _choice("precision.fp8", config.precision.fp8, FP8_ALIGN)
    _choice("precision.fp8_format", config.precision.fp8_format, ("hybrid", "e4m3"))
    _choice("parallel.recompute", p.recompute, ("none", "selective", "full"))
    _choice("optimizer.schedule", o.schedule, ("cosine", "wsd", "constant"))
    _choice("optimizer.decay_style", o.decay_style, ("cosine", "linear", "exponential", "minus_sqrt"))
    for key in ("position_weight", "focal_weight", "chain_weight"):
        if not config.traits.drafts_blocks or config.traits.masks_in_part:
            reason = "has blocks that are masked in part" if config.traits.masks_in_part else "drafts no blocks"
            value, allowed = getattr(t, key), f"0 with method = {config.method}, which {reason}"
            require(value == 0, f"train.{key}", value, allowed, "or set method = tidar")
    health = config.health
    ok = health.spike_sigmas > 0 or not health.skip_spikes
    require(ok, "health.skip_spikes", True, "false with health.spike_sigmas = 0, which finds none")
    if t.continue_from is not None:
        way_out = "the base of adapters, or another run's weights without its optimizer"
        ok = t.init_from is None and config.lora.rank == 0
        require(ok, "train.continue_from", t.continue_from, f"null with lora.rank or train.init_from, {way_out}")
    if t.balance_clean:
        require(config.method == "idlm", "train.balance_clean", True, f"false with method = {config.method}")
    require(0 < t.draft_fraction <= 1, "train.draft_fraction", t.draft_fraction, "above 0 and at most 1")
    for key, beta in {"optimizer.beta1": o.beta1, "optimizer.beta2": o.beta2}.items():
        require(0 <= beta < 1, key, beta, "0 or more and below 1")
    _check_log(config)
    _check_data(config)
    _check_shapes(config)
    _check_parallel(config)
    _check_precision(config)
    _check_schedule(config)
    _check_lora(config)
    _check_decode(config)


def _methods() -> tuple[str, ...]:
    """Their files; they are not imported, as they need torch, and a plan or a launch does not."""
    return _modules_in(tuple(find_spec("tidar_mega.methods").submodule_search_locations))


@functools.cache  # a search for a layout checks thousands of configs
def _modules_in(folders: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


def _check_log(config: Config) -> None:
    log, last = config.log, config.train.steps - config.log.profile_steps + 1
    allowed = f"null, or a step from 2 (the one before warms up) to {last}, so that train.steps holds log.profile_steps"
    ok = log.profile_step is None or 2 <= log.profile_step <= last
    require(ok, "log.profile_step", log.profile_step, allowed)
    ok = all(rank >= 0 for rank in log.profile_ranks)
    require(ok, "log.profile_ranks", log.profile_ranks, "ranks, from 0 on")


def _check_data(config: Config) -> None:
    path, weights = config.data.path, config.data.weights
    several = isinstance(path, list)
    folders = path if several else [path]
    ok = bool(folders) and all(isinstance(f, str) and f for f in folders)
    ok = ok and len(set(map(os.path.normpath, folders))) == len(folders)
    require(ok, "data.path", path, "a folder, or a list of different ones such as [data/web,data/code]")
    require(weights is None or several, "data.weights", weights, "null where data.path is one folder")
    if weights is not None:
        ok = len(weights) == len(folders) and all(0 < weight < math.inf for weight in weights)
        require(ok, "data.weights", weights, f"{len(folders)} numbers above 0, one for each folder of data.path")


def _check_shapes(config: Config) -> None:
    m, t, p, length = config.model, config.train, config.parallel, config.data.seq_length
    require(
        length % t.block == 0,
        "train.block",
        t.block,
        f"a divisor of data.seq_length ({length})",
        _near(length, t.block),
    )
    require(
        m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0,
        "model.num_attention_heads",
        m.num_attention_heads,
        f"a divisor of model.hidden_size ({m.hidden_size})",
        "or set model.kv_channels",
    )
    require(m.head_width % 2 == 0, "model.kv_channels", m.head_width, "an even number, as RoPE rotates pairs")
    require(
        m.num_attention_heads % m.num_query_groups == 0,
        "model.num_query_groups",
        m.num_query_groups,
        f"a divisor of model.num_attention_heads ({m.num_attention_heads})",
    )
    if config.traits.has_causal_block:
        allowed = f"2 or more with method = {config.method}, whose last layer verifies what the others draft"
        require(m.num_layers > 1, "model.num_layers", m.num_layers, allowed)
    allowed = "1 or more with method = mtp" if config.traits.has_depths else f"0 with method = {config.method}"
    require((m.mtp_num_layers > 0) == config.traits.has_depths, "model.mtp_num_layers", m.mtp_num_layers, allowed)
    for key, value in {
        "model.num_attention_heads": m.num_attention_heads,
        "model.num_query_groups": m.num_query_groups,
        "model.ffn_hidden_size": m.ffn_hidden_size,
        "model.vocab_multiple": m.vocab_multiple,
    }.items():
        way = "lower parallel.tensor or change the shape"
        require(value % p.tensor == 0, key, value, f"a multiple of parallel.tensor ({p.tensor})", way)


def _check_parallel(config: Config) -> None:
    p, length = config.parallel, config.data.seq_length
    if p.sequence:
        require(p.tensor > 1, "parallel.sequence", True, "true only with parallel.tensor above 1")
    if p.sequence and p.context == 1:  # with context parallelism, each rank's rows are filled up to a multiple
        found = f"{length} + {config.drafted_rows}"
        allowed = f"a length whose clean and mask rows ({found}) are a multiple of parallel.tensor ({p.tensor})"
        ok = config.forward_rows % p.tensor == 0
        require(ok, "data.seq_length", length, allowed, "or change train.draft_fraction")
    if config.traits.has_depths:  # megatron-core 0.16 cannot hand our attention's context through it
        require(p.recompute != "full", "parallel.recompute", "full", "none or selective with method = mtp")
    _check_stages(config)
    allowed = f"a multiple of 2 x parallel.context ({2 * p.context})"
    require(p.context == 1 or length % (2 * p.context) == 0, "data.seq_length", length, allowed)
    if p.overlap_param_gather:
        allowed = "true only with parallel.distributed_optimizer and parallel.overlap_grad_reduce"
        ok = p.distributed_optimizer and p.overlap_grad_reduce
        require(ok, "parallel.overlap_param_gather", True, allowed)
    require(p.bucket_size is None or p.bucket_size > 0, "parallel.bucket_size", p.bucket_size, "1 or more, or null")
    if not config.checkpoint.fully_reshardable and p.distributed_optimizer:
        allowed = "true with parallel.overlap_grad_reduce and parallel.bucket_size = null: megatron's own size goes by "
        allowed += "the number of replicas, and the buckets must be the same at a resume"
        ok = not p.overlap_grad_reduce or p.bucket_size is not None
        require(ok, "checkpoint.fully_reshardable", False, allowed, "or set parallel.bucket_size, such as to 40000000")
    _check_offload(config)
    minutes, allowed = p.timeout_minutes, "from 0.01 to 100000"  # what the clocks of torch's backends can count
    require(0.01 <= minutes <= 100_000, "parallel.timeout_minutes", minutes, allowed)
    if p.data is not None:
        require(p.data > 0, "parallel.data", p.data, "a number above 0")
        check_batch(config, p.data)


def _check_stages(config: Config) -> None:
    layers, p = config.model.num_layers, config.parallel
    virtual, allowed = p.virtual_pipeline, "1 with parallel.pipeline = 1"
    require(virtual == 1 or p.pipeline > 1, "parallel.virtual_pipeline", virtual, allowed)
    ends = [key for key in ("first_stage_layers", "last_stage_layers") if getattr(p, key) is not None]
    for key in ends:
        value, key = getattr(p, key), f"parallel.{key}"
        require(p.pipeline > 1, key, value, "null with parallel.pipeline = 1")
        allowed = f"1 or more, and a multiple of parallel.virtual_pipeline ({virtual})"
        require(value > 0 and value % virtual == 0, key, value, allowed)
    stages = config.stage_layers
    if not ends:
        allowed = f"a multiple of parallel.pipeline x parallel.virtual_pipeline ({p.pipeline} x {virtual})"
        way = "or give the last stage another number, parallel.last_stage_layers"
        require(layers % (p.pipeline * virtual) == 0, "model.num_layers", layers, allowed, way)
    else:
        others = p.pipeline - len(ends)
        rest = layers - sum(getattr(p, key) for key in ends)
        allowed = f"such that the layers that are left ({rest} of {layers}) are a multiple of {others * virtual}, "
        allowed += "the other stages x parallel.virtual_pipeline" if others else "such that none are left"
        ok = sum(stages) == layers and min(stages) > 0 and all(count % virtual == 0 for count in stages)
        require(ok, f"parallel.{ends[-1]}", getattr(p, ends[-1]), allowed)
    if p.recompute == "full":  # megatron would ask for a layer that does not exist
        chunks = sorted({count // virtual for count in stages})
        allowed = f"a divisor of the layers of a stage ({' and '.join(map(str, chunks))})"
        ok = all(chunk % p.recompute_layers == 0 for chunk in chunks)
        require(ok, "parallel.recompute_layers", p.recompute_layers, allowed)


def _check_offload(config: Config) -> None:
    """The limits of megatron's HybridDeviceOptimizer."""
    key, share, precision = "parallel.optimizer_offload", config.parallel.optimizer_offload, config.precision
    require(0 <= share <= 1, key, share, "between 0 and 1")
    if share == 0:
        return
    allowed = "0 without parallel.distributed_optimizer, on whose shards it works"
    require(config.parallel.distributed_optimizer, key, share, allowed)
    allowed = "0 with precision.dtype=fp32: it restores float32 copies of bf16 weights"
    require(precision.dtype == "bf16", key, share, allowed)
    allowed = "0 with precision.fp8_param_gather: its float32 copies would be made from the FP8 weights"
    require(not precision.fp8_param_gather, key, share, allowed)
    allowed = "0 with checkpoint.fully_reshardable = false: its parts on the host would not be loaded"
    require(config.checkpoint.fully_reshardable, key, share, allowed)


def _check_precision(config: Config) -> None:
    precision, layers = config.precision, config.model.num_layers
    if precision.fp8 == "none":
        require(not precision.fp8_param_gather, "precision.fp8_param_gather", True, "false with precision.fp8=none")
        return
    require(precision.dtype == "bf16", "precision.fp8", precision.fp8, "none with precision.dtype=fp32")
    require(precision.layers != "local", "precision.fp8", precision.fp8, "none with precision.layers=local", "use te")
    _check_fp8_shapes(config)
    if precision.fp8_param_gather:
        allowed = "false without parallel.distributed_optimizer"
        require(config.parallel.distributed_optimizer, "precision.fp8_param_gather", True, allowed)
        allowed = "false with mxfp8, whose weights megatron gathers in bf16"
        require(precision.fp8 != "mxfp8", "precision.fp8_param_gather", True, allowed)
    stage = layers // config.parallel.pipeline  # megatron's rule, also where stages are unlike
    for key in ("bf16_first_layers", "bf16_last_layers"):
        kept, allowed = getattr(precision, key), f"at most the layers of one of equal pipeline stages ({stage})"
        require(kept <= stage, f"precision.{key}", kept, allowed)
    kept = precision.bf16_first_layers + precision.bf16_last_layers
    if kept:
        allowed = f"at most model.num_layers ({layers}) with precision.bf16_last_layers"
        require(kept <= layers, "precision.bf16_first_layers", precision.bf16_first_layers, allowed)
        allowed = "tensorwise, blockwise or mxfp8 with layers kept in bf16: delayed scaling knows one recipe for all"
        require(precision.fp8 != "delayed", "precision.fp8", precision.fp8, allowed)


def _check_fp8_shapes(config: Config) -> None:
    m, tensor, align = config.model, config.parallel.tensor, FP8_ALIGN[config.precision.fp8]
    for name, width in {
        "hidden_size": m.hidden_size,
        "ffn_hidden_size": m.ffn_hidden_size / tensor,
        "num_attention_heads": m.num_attention_heads * m.head_width / tensor,
        "num_query_groups": (m.num_attention_heads + 2 * m.num_query_groups) * m.head_width / tensor,
    }.items():
        allowed = f"such that matrices have a multiple of {align} columns with precision.fp8, found {width:g} on a rank"
        require(width % align == 0, f"model.{name}", getattr(m, name), allowed)
    if config.parallel.context > 1:  # the parts of the rows are filled up to row_multiple
        return
    rows, multiple = config.forward_rows, config.row_multiple
    allowed = f"a length whose rows of a forward ({rows}) are a multiple of {multiple} with precision.fp8"
    way_out = f"or change train.draft_fraction or train.micro_batch_size ({config.train.micro_batch_size})"
    require(rows % multiple == 0, "data.seq_length", config.data.seq_length, allowed, way_out)


def _check_lora(config: Config) -> None:
    lora, targets = config.lora, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    if lora.rank == 0:
        return
    require(lora.alpha > 0, "lora.alpha", lora.alpha, "above 0")
    ok = bool(lora.targets) and set(lora.targets) <= set(targets) and len(set(lora.targets)) == len(lora.targets)
    require(ok, "lora.targets", lora.targets, f"some of {', '.join(targets)}")
    allowed = "the run or checkpoint whose weights stay frozen under the adapters of lora.rank"
    require(config.train.init_from is not None, "train.init_from", None, allowed, "or set lora.rank = 0")
    allowed = f"0 with method = {config.method}, which has no mask rows for adapters to act on"
    require(config.traits.drafts_blocks, "lora.rank", lora.rank, allowed)
    layers, allowed = config.precision.layers, "auto or local with lora.rank: adapters sit in megatron's own layers"
    require(layers != "te", "precision.layers", layers, allowed)
    require(config.precision.fp8 == "none", "precision.fp8", config.precision.fp8, "none with lora.rank")


def _check_schedule(config: Config) -> None:
    o, steps = config.optimizer, config.train.steps
    require(o.min_lr <= o.lr, "optimizer.min_lr", o.min_lr, f"at most optimizer.lr ({o.lr})")
    require(o.warmup_steps < steps, "optimizer.warmup_steps", o.warmup_steps, f"less than train.steps ({steps})")
    if o.schedule == "wsd":
        rest = steps - o.warmup_steps
        require(0 < o.decay_steps <= rest, "optimizer.decay_steps", o.decay_steps, f"1 to {rest} (steps - warm-up)")


def _check_decode(config: Config) -> None:
    d, m = config.decode, config.model
    _choice("decode.mode", d.mode, ("fused", "ar", "blocks"))
    _choice("decode.dtype", d.dtype, ("fp32", "bf16"))
    _choice("decode.acceptance", d.acceptance, ("coupled", "rejection"))
    require(0 < d.top_p <= 1, "decode.top_p", d.top_p, "above 0 and at most 1")
    require(0 <= d.beta <= 1, "decode.beta", d.beta, "from 0 (trust the masks) to 1 (trust AR, exact)")
    require(0 < d.threshold <= 1, "decode.threshold", d.threshold, "above 0 and at most 1")
    require(all(d.stop), "decode.stop", d.stop, "texts that are not empty")
    require(d.block is None or d.block > 0, "decode.block", d.block, "1 or more")
    require(d.cache_tokens is None or d.cache_tokens > 0, "decode.cache_tokens", d.cache_tokens, "1 or more")
    named = d.outcomes in ("auto", "all", "last", "none")
    listed = isinstance(d.outcomes, list) and all(isinstance(o, int) and o > 0 for o in d.outcomes)
    require(named or listed, "decode.outcomes", d.outcomes, "auto, all, last, none or a list such as [1,4]")
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_multiple"):
        value = getattr(m, name)
        require(value % d.tensor == 0, "decode.tensor", d.tensor, f"a divisor of model.{name} ({value})")
    require(
        m.num_layers % d.pipeline == 0, "decode.pipeline", d.pipeline, f"a divisor of model.num_layers ({m.num_layers})"
    )


def _choice(key: str, value: str, allowed: Collection[str]) -> None:
    require(value in allowed, key, value, f"one of {', '.join(allowed)}")


def _near(length: int, block: int) -> str:
    divisors = [d for d in range(1, min(length, 64) + 1) if length % d == 0]
    return f"for example {min(divisors, key=lambda d: abs(d - block))}"
