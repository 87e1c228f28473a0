"""Every setting of a run as a dataclass, read from YAML files and `a.b=c` overrides through OmegaConf.

`load` refuses unknown keys, wrong types and impossible combinations before anything starts. An error names the key,
the value found, what is allowed and what to do. Imports nothing of ours and no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(ValueError):
    """Bad input: the message names what was found, what is allowed and what to do. The CLI shows it without a trace."""

    exit_code = 2  # the same command would fail again


class LostError(UserError):
    """A process, a node or a connection was lost: nothing is wrong with the input, and the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h; a launcher may start the run again


class ConfigError(UserError):
    """A setting that cannot work; the message names the key, the value, the limit and the way out."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the backbone; names are megatron-core's. The vocabulary comes from the tokenizer of `data.path`."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 704
    num_attention_heads: int = 4
    num_query_groups: int = 4  # key/value heads
    kv_channels: int | None = None  # width of one head; hidden_size / num_attention_heads when null
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    tie_embeddings: bool = False  # share the embedding with the output head
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-6
    init_std: float = 0.02
    vocab_multiple: int = 64  # the vocabulary is padded to a multiple of this, for tensor parallel splits
    attention: str = "auto"  # auto | dense | tiles | flex

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    path: str = "data/quickstart"  # a folder made by `tidar prepare`
    seq_length: int = 256  # clean tokens of one sequence (S); a TiDAR forward has 2 S rows


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    global_batch_size: int = 16  # sequences of one optimizer step, over all processes
    micro_batch_size: int = 8  # sequences of one forward on one process
    seed: int = 1234
    block: int = 4  # draft length (B)
    alpha: float = 1.0  # loss = (alpha * CE_AR + CE_draft) / (1 + alpha)
    draft_fraction: float = 1.0  # share of the blocks of a sequence that are drafted in a step
    random_offset: bool = False  # shift the block starts of each sequence by a random 0..block-1
    # left-to-right losses of a draft on top (arXiv 2606.11552), 0 = without; the paper has 1, 0.3 and an unstated one
    position_weight: float = 0.0  # cross entropy weighted by exp(-slot / position_gamma)
    position_gamma: float = 10.0
    focal_weight: float = 0.0  # cross entropy at a draft's first wrong slot
    chain_weight: float = 0.0  # minus the expected accepted length of a draft
    loss_chunk: int = 2048  # rows of which logits exist at once
    nan_limit: int = 3  # a step with a non-finite gradient is skipped; this many in a row end the run
    eval_interval: int = 200  # steps between validations; 0 = only at the end
    eval_sequences: int = 64  # held-out sequences of a periodic validation
    final_eval_sequences: int = 4096  # of the validation at the end, at most all


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    min_lr: float = 1e-4
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup_steps: int = 50
    decay_steps: int = 100  # length of the final decay of `wsd`
    weight_decay: float = 0.1  # not applied to biases and norms
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1
    sequence: bool = False  # sequence parallel: norms and residuals are split over the tensor group
    pipeline: int = 1  # stages, each with num_layers / pipeline layers
    virtual_pipeline: int = (
        1  # parts of each stage; above 1, micro-batches go round the stages this often (interleaved)
    )
    context: int = 1  # the rows of each sequence are split over this many processes
    data: int | None = (
        None  # processes / (tensor x pipeline x context) when null; without a launcher, 1 or as many as fit
    )
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None  # parameters that are reduced or gathered at once when overlapped; null: megatron's
    recompute: str = "none"  # activations made again in the backward: none | selective (attention, see below) | full
    recompute_layers: int = 1  # with full: layers of which only the input is kept, as one unit
    gradient_accumulation_fusion: bool = (
        False  # weight gradients added into fp32 by the product itself; CUDA, TE or apex
    )
    optimizer_offload: float = 0.0  # share of the optimizer that lives in host memory; 0 = none
    timeout_minutes: float = 10.0  # of every collective

    @property
    def model_size(self) -> int:
        """Processes that hold one replica of the model."""
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True)
class PrecisionConfig:
    dtype: str = "bf16"  # bf16 | fp32; optimizer state and gradients are fp32 in both
    layers: str = "auto"  # local | te (Transformer Engine) | auto: te in bf16 where it is installed and there is a GPU
    fp8: str = "none"  # none | delayed | tensorwise | blockwise | mxfp8, megatron-core's recipes; needs te
    fp8_format: str = "hybrid"  # hybrid (e4m3 forward, e5m2 gradients) | e4m3
    fp8_param_gather: bool = False  # the distributed optimizer gathers weights in fp8
    bf16_first_layers: int = 0  # layers at the start and
    bf16_last_layers: int = 0  # at the end that stay in bf16 under fp8
    deterministic: bool = False  # bitwise repeatable on one layout, slower on GPUs


@dataclass(frozen=True)
class CheckpointConfig:
    interval: int = 200  # steps between saves; the last step is always saved
    keep_last: int = 2
    asynchronous: bool = False  # write in a process beside the training, which goes on meanwhile


@dataclass(frozen=True)
class LogConfig:
    interval: int = 10  # steps between log lines, TensorBoard points and lines of metrics.jsonl
    tensorboard: bool = True


@dataclass(frozen=True)
class LaunchConfig:
    """What surrounds the training on a cluster."""

    preflight: bool = True  # before the first step, look at every node: GPUs, exchange, clocks, disk, versions, config
    max_restarts: int = 100  # a Slurm job is requeued at most this often
    max_idle_restarts: int = 3  # and at most this often in a row without a new checkpoint


@dataclass(frozen=True)
class DecodeConfig:
    """How `tidar generate`, `tidar bench decode` and evaluations decode; none of it is fixed by the training run."""

    mode: str = "fused"  # fused | ar | blocks: block diffusion, whose output is not AR's
    block: int | None = None  # draft length at decode time; train.block when null
    # behind which outcomes of a verified draft the next one is made at once: auto | all | last | none | [1, 3, ..]
    outcomes: Any = "auto"
    dtype: str = "fp32"  # fp32 | bf16; only fp32 keeps near-ties, and so exactness, out of the kernels' hands
    tensor: int = 1  # processes that split every layer, whatever the layout of the training run was
    pipeline: int = 1  # processes that hold consecutive layers
    data: int = 1  # replicas, which divide the prompts
    batch: int = 16  # most requests decoded at once
    capacity: int = 4096  # most tokens of a prompt and its continuation together
    cache_tokens: int | None = None  # what the pages of keys and values hold; batch x capacity when null
    prefill_chunk: int = 512  # prompt tokens encoded by one forward
    cuda_graphs: bool = True  # on a GPU, forwards that come again and again are recorded once and replayed
    max_tokens: int = 128
    temperature: float = 0.0  # 0 = greedy
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    seed: int = 0
    acceptance: str = "coupled"  # coupled: the output is AR's own | rejection: distributed as AR's
    beta: float = 1.0  # below 1, mixed verification: the masks have a say, and the output is no longer AR's
    threshold: float = 0.9  # mode=blocks: the probability from which on a slot's token is kept
    stop: list[str] = field(default_factory=list)  # texts that end a continuation


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/default"  # checkpoints, tensorboard/, metrics.jsonl and config.yaml of this run
    method: str = "tidar"  # a file of tidar_mega/methods
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)


def load(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads the YAML file at `path` (all defaults when None), applies the overrides and checks the result.

    Raises ConfigError.
    """
    tree = _read_yaml(Path(path)) if path is not None else OmegaConf.create({})
    return _with_overrides(tree, overrides)


def override(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """`config` with `a.b=c` overrides, checked again. Raises ConfigError."""
    return _with_overrides(OmegaConf.create(to_tree(config)), overrides)


def _with_overrides(tree: DictConfig, overrides: list[str] | tuple[str, ...]) -> Config:
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example train.steps=100")
    tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides)))
    return from_tree(tree)


def from_tree(tree: DictConfig | dict) -> Config:
    """A checked Config from a (possibly partial) tree of settings, as stored in a checkpoint. Raises ConfigError."""
    tree = OmegaConf.create(tree) if isinstance(tree, dict) else tree
    _refuse_unknown(tree, Config, "")
    schema = OmegaConf.structured(Config)
    _set_writable(schema)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, tree))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    check(config)
    return config


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_tree(config: Config) -> dict:
    """Plain nested dicts, the form that a checkpoint stores."""
    return dataclasses.asdict(config)


def check(config: Config) -> None:
    """Refuses impossible values and combinations. Raises ConfigError."""
    m, t, o, p = config.model, config.train, config.optimizer, config.parallel
    for key, value in {
        "model.num_layers": m.num_layers,
        "model.hidden_size": m.hidden_size,
        "model.ffn_hidden_size": m.ffn_hidden_size,
        "model.num_attention_heads": m.num_attention_heads,
        "model.num_query_groups": m.num_query_groups,
        "model.vocab_multiple": m.vocab_multiple,
        "data.seq_length": config.data.seq_length,
        "train.steps": t.steps,
        "train.global_batch_size": t.global_batch_size,
        "train.micro_batch_size": t.micro_batch_size,
        "train.block": t.block,
        "train.loss_chunk": t.loss_chunk,
        "train.nan_limit": t.nan_limit,
        "train.eval_sequences": t.eval_sequences,
        "train.final_eval_sequences": t.final_eval_sequences,
        "train.alpha": t.alpha,
        "train.position_gamma": t.position_gamma,
        "optimizer.lr": o.lr,
        "optimizer.epsilon": o.epsilon,
        "parallel.tensor": p.tensor,
        "parallel.pipeline": p.pipeline,
        "parallel.virtual_pipeline": p.virtual_pipeline,
        "parallel.context": p.context,
        "parallel.recompute_layers": p.recompute_layers,
        "parallel.timeout_minutes": p.timeout_minutes,
        "checkpoint.interval": config.checkpoint.interval,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "log.interval": config.log.interval,
        "decode.max_tokens": config.decode.max_tokens,
        "decode.capacity": config.decode.capacity,
        "decode.tensor": config.decode.tensor,
        "decode.pipeline": config.decode.pipeline,
        "decode.data": config.decode.data,
        "decode.batch": config.decode.batch,
        "decode.prefill_chunk": config.decode.prefill_chunk,
    }.items():
        _require(value > 0, key, value, "a number above 0")
    for key, value in {
        "train.eval_interval": t.eval_interval,
        "train.position_weight": t.position_weight,
        "train.focal_weight": t.focal_weight,
        "train.chain_weight": t.chain_weight,
        "launch.max_restarts": config.launch.max_restarts,
        "launch.max_idle_restarts": config.launch.max_idle_restarts,
        "optimizer.min_lr": o.min_lr,
        "optimizer.warmup_steps": o.warmup_steps,
        "optimizer.weight_decay": o.weight_decay,
        "optimizer.clip_grad": o.clip_grad,
        "precision.bf16_first_layers": config.precision.bf16_first_layers,
        "precision.bf16_last_layers": config.precision.bf16_last_layers,
        "decode.temperature": config.decode.temperature,
        "decode.top_k": config.decode.top_k,
    }.items():
        _require(value >= 0, key, value, "0 or more")
    _choice("model.attention", m.attention, ("auto", "dense", "tiles", "flex"))
    _choice("precision.dtype", config.precision.dtype, ("bf16", "fp32"))
    _choice("precision.layers", config.precision.layers, ("auto", "local", "te"))
    _choice("precision.fp8", config.precision.fp8, ("none", "delayed", "tensorwise", "blockwise", "mxfp8"))
    _choice("precision.fp8_format", config.precision.fp8_format, ("hybrid", "e4m3"))
    _choice("parallel.recompute", p.recompute, ("none", "selective", "full"))
    _choice("optimizer.schedule", o.schedule, ("cosine", "wsd", "constant"))
    for key in ("position_weight", "focal_weight", "chain_weight"):
        if config.method == "ar":
            value, allowed = getattr(t, key), "0 with method = ar, which drafts nothing"
            _require(value == 0, f"train.{key}", value, allowed, "or set method = tidar")
    _require(0 < t.draft_fraction <= 1, "train.draft_fraction", t.draft_fraction, "above 0 and at most 1")
    for key, beta in {"optimizer.beta1": o.beta1, "optimizer.beta2": o.beta2}.items():
        _require(0 <= beta < 1, key, beta, "0 or more and below 1")
    _check_shapes(config)
    _check_parallel(config)
    _check_precision(config)
    _check_schedule(config)
    _check_decode(config)


def _check_shapes(config: Config) -> None:
    m, t, p, length = config.model, config.train, config.parallel, config.data.seq_length
    _require(
        length % t.block == 0,
        "train.block",
        t.block,
        f"a divisor of data.seq_length ({length})",
        _near(length, t.block),
    )
    _require(
        m.kv_channels is not None or m.hidden_size % m.num_attention_heads == 0,
        "model.num_attention_heads",
        m.num_attention_heads,
        f"a divisor of model.hidden_size ({m.hidden_size})",
        "or set model.kv_channels",
    )
    _require(m.head_width % 2 == 0, "model.kv_channels", m.head_width, "an even number, as RoPE rotates pairs")
    _require(
        m.num_attention_heads % m.num_query_groups == 0,
        "model.num_query_groups",
        m.num_query_groups,
        f"a divisor of model.num_attention_heads ({m.num_attention_heads})",
    )
    for key, value in {
        "model.num_attention_heads": m.num_attention_heads,
        "model.num_query_groups": m.num_query_groups,
        "model.ffn_hidden_size": m.ffn_hidden_size,
        "model.vocab_multiple": m.vocab_multiple,
    }.items():
        way = "lower parallel.tensor or change the shape"
        _require(value % p.tensor == 0, key, value, f"a multiple of parallel.tensor ({p.tensor})", way)


def _check_parallel(config: Config) -> None:
    m, t, p, length = config.model, config.train, config.parallel, config.data.seq_length
    if p.sequence:
        _require(p.tensor > 1, "parallel.sequence", True, "true only with parallel.tensor above 1")
    if p.sequence and p.context == 1:  # with context parallelism, each rank's rows are filled up to a multiple
        drafted = 0 if config.method == "ar" else max(1, round(t.draft_fraction * length / t.block)) * t.block
        allowed = (
            f"a length whose clean and mask rows ({length} + {drafted}) are a multiple of parallel.tensor ({p.tensor})"
        )
        _require(
            (length + drafted) % p.tensor == 0, "data.seq_length", length, allowed, "or change train.draft_fraction"
        )
    parts = p.pipeline * p.virtual_pipeline
    allowed = f"a multiple of parallel.pipeline x parallel.virtual_pipeline ({p.pipeline} x {p.virtual_pipeline})"
    _require(m.num_layers % parts == 0, "model.num_layers", m.num_layers, allowed)
    _require(
        p.virtual_pipeline == 1 or p.pipeline > 1,
        "parallel.virtual_pipeline",
        p.virtual_pipeline,
        "1 with parallel.pipeline = 1",
    )
    allowed = f"a multiple of 2 x parallel.context ({2 * p.context})"
    _require(p.context == 1 or length % (2 * p.context) == 0, "data.seq_length", length, allowed)
    if p.overlap_param_gather:
        allowed = "true only with parallel.distributed_optimizer and parallel.overlap_grad_reduce"
        ok = p.distributed_optimizer and p.overlap_grad_reduce
        _require(ok, "parallel.overlap_param_gather", True, allowed)
    _require(p.bucket_size is None or p.bucket_size > 0, "parallel.bucket_size", p.bucket_size, "1 or more, or null")
    _require(0 <= p.optimizer_offload <= 1, "parallel.optimizer_offload", p.optimizer_offload, "between 0 and 1")
    if p.data is not None:
        _require(p.data > 0, "parallel.data", p.data, "a number above 0")
        check_batch(config, p.data)


def _check_precision(config: Config) -> None:
    precision, layers = config.precision, config.model.num_layers
    if precision.fp8 == "none":
        _require(not precision.fp8_param_gather, "precision.fp8_param_gather", True, "false with precision.fp8=none")
        return
    _require(precision.dtype == "bf16", "precision.fp8", precision.fp8, "none with precision.dtype=fp32")
    _require(precision.layers != "local", "precision.fp8", precision.fp8, "none with precision.layers=local", "use te")
    kept = precision.bf16_first_layers + precision.bf16_last_layers
    if kept:
        allowed = f"at most model.num_layers ({layers}) with precision.bf16_last_layers"
        _require(kept <= layers, "precision.bf16_first_layers", precision.bf16_first_layers, allowed)
        allowed = "tensorwise, blockwise or mxfp8 with layers kept in bf16: delayed scaling knows one recipe for all"
        _require(precision.fp8 != "delayed", "precision.fp8", precision.fp8, allowed)


def _check_schedule(config: Config) -> None:
    o, steps = config.optimizer, config.train.steps
    _require(o.min_lr <= o.lr, "optimizer.min_lr", o.min_lr, f"at most optimizer.lr ({o.lr})")
    _require(o.warmup_steps < steps, "optimizer.warmup_steps", o.warmup_steps, f"less than train.steps ({steps})")
    if o.schedule == "wsd":
        rest = steps - o.warmup_steps
        _require(0 < o.decay_steps <= rest, "optimizer.decay_steps", o.decay_steps, f"1 to {rest} (steps - warm-up)")


def _check_decode(config: Config) -> None:
    d, m = config.decode, config.model
    _choice("decode.mode", d.mode, ("fused", "ar", "blocks"))
    _choice("decode.dtype", d.dtype, ("fp32", "bf16"))
    _choice("decode.acceptance", d.acceptance, ("coupled", "rejection"))
    _require(0 < d.top_p <= 1, "decode.top_p", d.top_p, "above 0 and at most 1")
    _require(0 <= d.beta <= 1, "decode.beta", d.beta, "from 0 (trust the masks) to 1 (trust AR, exact)")
    _require(0 < d.threshold <= 1, "decode.threshold", d.threshold, "above 0 and at most 1")
    _require(d.block is None or d.block > 0, "decode.block", d.block, "1 or more")
    _require(d.cache_tokens is None or d.cache_tokens > 0, "decode.cache_tokens", d.cache_tokens, "1 or more")
    named = d.outcomes in ("auto", "all", "last", "none")
    listed = isinstance(d.outcomes, list) and all(isinstance(o, int) and o > 0 for o in d.outcomes)
    _require(named or listed, "decode.outcomes", d.outcomes, "auto, all, last, none or a list such as [1,4]")
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_multiple"):
        value = getattr(m, name)
        _require(value % d.tensor == 0, "decode.tensor", d.tensor, f"a divisor of model.{name} ({value})")
    _require(
        m.num_layers % d.pipeline == 0, "decode.pipeline", d.pipeline, f"a divisor of model.num_layers ({m.num_layers})"
    )


def check_batch(config: Config, data_parallel: int) -> None:
    """The global batch must be whole micro-batches on each of `data_parallel` replicas. Raises ConfigError."""
    t, p = config.train, config.parallel
    unit = t.micro_batch_size * data_parallel
    allowed = f"a multiple of train.micro_batch_size x parallel.data ({t.micro_batch_size} x {data_parallel})"
    if p.virtual_pipeline > 1:  # the interleaved schedule takes micro-batches in turns of one for each stage
        unit *= p.pipeline
        allowed = f"a multiple of train.micro_batch_size x parallel.data x parallel.pipeline ({unit})"
    _require(
        t.global_batch_size % unit == 0,
        "train.global_batch_size",
        t.global_batch_size,
        allowed,
        f"for example {max(unit, t.global_batch_size // unit * unit)}",
    )


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml"))
        hint = f"; found there: {', '.join(near)}" if near else ""
        raise ConfigError(f"config file {path} does not exist{hint}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:  # yaml and OmegaConf raise many kinds
        raise ConfigError(f"config file {path} is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"config file {path} must hold a mapping of keys, found {type(tree).__name__}")
    return tree


def _refuse_unknown(tree: DictConfig, kind: type, prefix: str) -> None:
    allowed = {f.name: f for f in dataclasses.fields(kind)}
    for key in tree:
        name = f"{prefix}{key}"
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ConfigError(f"unknown key {name}; {hint}allowed here: {', '.join(sorted(allowed))}")
        section = allowed[key].default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            value = tree._get_node(key)
            if not isinstance(value, DictConfig):
                names = ", ".join(f.name for f in dataclasses.fields(section))
                raise ConfigError(f"{name} = {value} is a section, not a value; set one of its keys: {names}")
            _refuse_unknown(value, section, f"{name}.")


def _set_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)  # frozen dataclasses come out read-only, which also refuses the merge
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _set_writable(child)


def _require(ok: bool, key: str, value: object, allowed: str, way_out: str = "") -> None:
    if not ok:
        raise ConfigError(f"{key} = {value}: must be {allowed}" + (f"; {way_out}" if way_out else ""))


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, key, value, f"one of {', '.join(allowed)}")


def _near(length: int, block: int) -> str:
    divisors = [d for d in range(1, min(length, 65)) if length % d == 0]
    return f"for example {min(divisors, key=lambda d: abs(d - block))}"
