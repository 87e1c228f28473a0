"""Every setting of a run, with its default."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


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
    mtp_num_layers: int = 0  # method mtp: layers behind the backbone that draft a token each

    @property
    def head_width(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class DataConfig:
    path: Any = "data/quickstart"  # a folder made by `tidar prepare`, or a list of them that have one tokenizer
    weights: list[float] | None = None  # of a list: shares of the samples, in any unit; by the folders' sizes when null
    seq_length: int = 256  # clean tokens of one sequence (S); a TiDAR forward has 2 S rows

    @property
    def folders(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    global_batch_size: int = 16  # sequences of one optimizer step, over all processes
    micro_batch_size: int = 8  # sequences of one forward on one process
    seed: int = 1234
    init_from: str | None = None  # whose weights a new run begins with: a run, a checkpoint or a Hugging Face folder
    # a run or checkpoint that a new run goes on from: weights, optimizer, step and schedule; other data may follow, or
    # another data.seq_length, train.seed, train.block or model.rotary_base
    continue_from: str | None = None
    block: int = 4  # masks of a block: the draft length (B), AR's own token counted by method tidar, not by idlm
    alpha: float = 1.0  # loss = (alpha * CE_AR + CE_draft) / (1 + alpha), of methods tidar and block_diffusion
    clean_weight: float = 0.2  # method idlm: loss = CE_draft + clean_weight * CE_AR
    balance_clean: bool = False  # and with stopgrad(CE_draft / CE_AR) in its place, for one forward more in each step
    mtp_loss_scaling_factor: float = 0.1  # method mtp: loss = CE_AR + this * mean CE of the depths; megatron's default
    draft_fraction: float = 1.0  # share of the blocks of a sequence that are drafted in a step
    random_offset: bool = False  # shift the block starts of each sequence by a random 0..block-1
    # left-to-right losses of a draft on top (arXiv 2606.11552), 0 = without; the paper gives 0.3 for the focal one
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
class LoraConfig:
    """Lossless LoRA: adapters on mask rows alone, over the frozen weights of `train.init_from`, whose AR half stays as
    it is, bit by bit. A checkpoint then holds the adapters and names its base."""

    rank: int = 0  # 0 = none
    alpha: float = 32.0  # what an adapter gives is multiplied by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-3
    min_lr: float = 1e-4
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    warmup_steps: int = 50
    decay_steps: int = 100  # length of the final decay of `wsd`,
    decay_style: str = "cosine"  # and its form: cosine | linear | exponential | minus_sqrt
    weight_decay: float = 0.1  # not applied to biases and norms
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad: float = 1.0


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1
    sequence: bool = False  # sequence parallel: norms and residuals are split over the tensor group
    pipeline: int = 1  # stages, each with num_layers / pipeline layers, but for
    first_stage_layers: int | None = None  # the first, with so many, and
    last_stage_layers: int | None = None  # the last, which has the head as well: a wide one is worth several layers
    virtual_pipeline: int = 1  # parts of each stage, round which micro-batches go this often (interleaved)
    context: int = 1  # the rows of each sequence are split over this many processes
    # replicas: processes / (tensor x pipeline x context) when null; without a launcher, 1 or as many as fit
    data: int | None = None
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_size: int | None = None  # parameters that are reduced or gathered at once when overlapped; null: megatron's
    recompute: str = "none"  # activations made again in the backward: none | selective (attention) | full
    recompute_layers: int = 1  # with full: layers of which only the input is kept, as one unit
    gradient_accumulation_fusion: bool = False  # products add weight gradients into fp32 themselves; needs TE or apex
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
    keep_every: int = 0  # of steps that are a multiple of it, all checkpoints are kept, too; 0 = none
    asynchronous: bool = False  # write in a process beside the training, which goes on meanwhile
    # optimizer state that loads under any layout, for which each rank gathers that of its replica in host memory (12
    # bytes for each of its weights); false: that loads with another number of replicas alone, and nothing is gathered
    fully_reshardable: bool = True


@dataclass(frozen=True)
class LogConfig:
    interval: int = 10  # steps between log lines, TensorBoard points and lines of metrics.jsonl
    tensorboard: bool = True
    profile_step: int | None = None  # from this step on, torch's profiler records a trace in RUN_DIR/profile, of
    profile_steps: int = 3  # so many steps,
    profile_ranks: list[int] = field(default_factory=lambda: [0])  # on these ranks


@dataclass(frozen=True)
class HealthConfig:
    """What is watched while a run trains."""

    # a rank without progress for so long ends the run, with the stacks of all ranks, to be started again; 0 = never.
    # With NCCL, 0.9 of parallel.timeout_minutes does in any case, as NCCL itself ends the process soon after
    hang_minutes: float = 8.0
    straggler_factor: float = 2.0  # a rank that works so many times as long as the median is named; 0 = never
    spike_sigmas: float = 6.0  # a loss so many standard deviations above the recent mean is a spike; 0 = none is
    skip_spikes: bool = False  # the update of such a step is not made


@dataclass(frozen=True)
class LaunchConfig:
    """What surrounds the training on a cluster."""

    preflight: bool = True  # before the first step, look at every node: GPUs, exchange, clocks, disk, versions, config
    # before a job is queued, refuse a run_dir on a disk of this machine alone, and data or weights that are not there
    check_shared: bool = True
    max_restarts: int = 100  # a Slurm job is requeued at most this often
    max_idle_restarts: int = 3  # and at most this often in a row without a new checkpoint


@dataclass(frozen=True)
class DecodeConfig:
    """How `tidar generate`, `tidar bench decode` and evaluations decode; none of it is fixed by the training run."""

    mode: str = "fused"  # fused | ar | blocks: block diffusion, whose output is not AR's
    block: int | None = None  # draft length at decode time; null: the trained one, AR's own token counted
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
class Traits:
    """What settings, plans and the dealing of rows must know of a method. Its mathematics is a file of `methods/`."""

    drafts_blocks: bool = False  # blocks of mask rows (train.block, train.draft_fraction) beside the clean rows
    masks_in_part: bool = False  # some slots of a block keep their token, and have no loss
    causal_in_group: bool = False  # a mask sees those of its block alone that stand before it
    is_left_to_right: bool = True  # the clean rows are a causal model, which `tidar generate` continues a prompt with
    has_causal_block: bool = False  # the last layer is causal in a random order of the places (arXiv 2510.03929)
    has_depths: bool = False  # layers of multi-token prediction stand behind the backbone (arXiv 2412.19437)


METHODS = {  # any other is as TiDAR
    "tidar": Traits(drafts_blocks=True),
    "idlm": Traits(drafts_blocks=True, causal_in_group=True),
    "block_diffusion": Traits(drafts_blocks=True, masks_in_part=True),
    "mtp": Traits(has_depths=True),
    "ar": Traits(),
    "masked_diffusion": Traits(is_left_to_right=False),
    "ssmd": Traits(is_left_to_right=False, has_causal_block=True),
}

# rows and widths of every matrix product are multiples of it under `precision.fp8`
FP8_ALIGN = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


@dataclass(frozen=True)
class Config:
    run_dir: str = "runs/default"  # checkpoints, tensorboard/, metrics.jsonl and config.yaml of this run
    method: str = "tidar"  # a file of tidar_mega/methods
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    @property
    def traits(self) -> Traits:
        return METHODS.get(self.method, METHODS["tidar"])

    @property
    def drafted_rows(self) -> int:
        """Mask rows of a sequence: whole blocks, the share train.draft_fraction of them."""
        if not self.traits.drafts_blocks:
            return 0
        return max(1, round(self.train.draft_fraction * self.data.seq_length / self.train.block)) * self.train.block

    @property
    def forward_rows(self) -> int:
        """Rows of each sequence in a training forward: the clean ones and the drafted ones."""
        return self.data.seq_length + self.drafted_rows

    @property
    def rows_per_place(self) -> int:
        """Rows that leave the last layers for each one that the backbone's first layer takes."""
        return 1 + self.model.mtp_num_layers if self.traits.has_depths else 1 + self.traits.has_causal_block

    @cached_property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each pipeline stage, from the first on."""
        p = self.parallel
        ends = {0: p.first_stage_layers, p.pipeline - 1: p.last_stage_layers}
        ends = {stage: layers for stage, layers in ends.items() if layers is not None}
        others = (self.model.num_layers - sum(ends.values())) // max(1, p.pipeline - len(ends))
        return tuple(ends.get(stage, others) for stage in range(p.pipeline))

    @property
    def row_multiple(self) -> int:
        """The rows of one sequence on one context-parallel rank must be a multiple of this.

        Sequence parallelism deals them to the tensor group, and FP8 wants whole blocks of (rows x sequences) on each.
        """
        ranks = self.parallel.tensor if self.parallel.sequence else 1
        align = FP8_ALIGN[self.precision.fp8]
        return ranks * align // math.gcd(align, self.train.micro_batch_size)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding and the head for a tokenizer of `vocab_size` ids."""
        return -(-vocab_size // self.model.vocab_multiple) * self.model.vocab_multiple
