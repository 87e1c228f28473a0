"""The same training run, cut every way that megatron can cut it: 20 steps on real text against one process.

`make test-layouts` prints the table. Everything is fp32, so what differs is the order of sums: losses and gradient
norms agree within `LOSS` of their size and each gradient of the first step within `GRADIENT` of its largest element.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests import processes
from tests.steps import full_gradient
from tests.test_main_job import tidar
from tidar_mega import config as config_module

pytestmark = pytest.mark.distributed

STEPS = 20
LOSS, GRADIENT = 1e-5, 2e-5  # relative
LAYOUTS = {  # (tensor, pipeline, virtual pipeline, context, data)
    (1, 1, 1, 1, 1): {},
    (2, 1, 1, 1, 1): {"sequence": True},
    (1, 2, 1, 1, 1): {},
    (1, 2, 2, 1, 1): {},
    (1, 1, 1, 2, 1): {},
    (1, 1, 1, 1, 2): {},
    (2, 2, 1, 1, 1): {},
    (2, 1, 1, 2, 1): {"sequence": True},
    (1, 2, 1, 2, 1): {},
    (2, 1, 1, 1, 2): {},
}
ALONE = (1, 1, 1, 1, 1)


def settings(corpus: Path, layout: tuple, fraction: float = 1.0, **more) -> config_module.Config:
    tensor, pipeline, virtual, context, data = layout
    parallel = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": virtual, "context": context, "data": data}
    return config_module.from_tree(
        {
            "model": {
                "num_layers": 4,
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "qk_layernorm": True,
                "tie_embeddings": fraction < 1,  # both kinds of head go through every layout
            },
            "data": {"path": str(corpus), "seq_length": 128},
            "train": {
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "steps": 100,
                "draft_fraction": fraction,
                "random_offset": fraction < 1,
            },
            "optimizer": {"lr": 3e-4, "warmup_steps": 5},
            "parallel": {**parallel, **LAYOUTS.get(layout, {}), **more},
            "precision": {"dtype": "fp32"},
        }
    )


class Trainer:
    """The parts of a run on one rank, without its folder."""

    FIGURES = ("loss_ar", "loss_draft", "draft_accuracy", "loss_diffusion", "loss_noncausal", "loss_causal")
    FIGURES += ("loss_depth_1", "loss_depth_2")

    def __init__(self, config: config_module.Config) -> None:
        from tidar_mega import methods
        from tidar_mega.checkpoint.state import Progress, TrainState
        from tidar_mega.data.stream import open_stream
        from tidar_mega.model import gpt
        from tidar_mega.parallel.mesh import build_mesh
        from tidar_mega.train import optim
        from tidar_mega.train.step import Task

        self.config, self.mesh = config, build_mesh(config)
        self.stream = open_stream(config.data.path, "train", config.data.seq_length, config.train.seed)
        self.vocab = self.stream.tokenizer.vocab_size
        chunks = optim.wrap(config, gpt.build(config, self.vocab))
        optimizer = optim.build_optimizer(config, chunks)
        self.state = TrainState(chunks, optimizer, optim.build_scheduler(config, optimizer), Progress())
        method = methods.load(config, self.stream.tokenizer.mask)
        self.task = Task(config, self.mesh, method, chunks, torch.as_tensor(self.stream.tokenizer.token_bytes))

    def step(self) -> tuple[float, ...]:
        """The losses, what accuracy of drafts the method has, and the gradient norm of the next step."""
        from tidar_mega.train import optim
        from tidar_mega.train.step import accumulate_gradients, micro_batches, summarise

        progress, count = self.state.progress, self.config.train.global_batch_size
        batch = list(micro_batches(self.task, self.stream, progress.samples, count))
        figures = summarise(self.task, accumulate_gradients(self.task, batch))
        self.gradients = self._gradients() if progress.step == 0 else None
        norm = optim.update(self.state.optimizer, self.config.optimizer.clip_grad)
        assert math.isfinite(norm)
        self.state.scheduler.step(1)
        progress.step += 1
        progress.samples += count
        return *(value for name, value in sorted(figures.items()) if name in self.FIGURES), norm

    def _gradients(self) -> dict[str, torch.Tensor]:
        """This rank's gradients by the names of the whole model; the distributed optimizer left a part on each rank."""
        group, found = self.mesh.sharded_data, {}
        for chunk in self.task.chunks:
            if chunk.ddp_config.use_distributed_optimizer:
                for bucket in (b for buffer in chunk.buffers for b in buffer.buckets):
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
            layers = {f"decoder.layers.{i}.": layer.layer_number for i, layer in enumerate(chunk.module.decoder.layers)}
            for name, weight in chunk.module.named_parameters():
                for local, number in layers.items():
                    name = name.replace(local, f"layer {number} ")
                found[name] = weight.main_grad.clone()
        return found


@dataclass(frozen=True)
class Result:
    figures: list[tuple]
    gradients: dict[str, torch.Tensor]
    tensor_rank: int
    has_head: bool


def train(rank: int, configs: list[config_module.Config], steps: int = STEPS) -> list[Result]:
    results = []
    for config in configs:
        trainer = Trainer(config)
        first = trainer.step()
        gradients = trainer.gradients
        figures = [first, *(trainer.step() for _ in range(steps - 1))]
        results.append(Result(figures, gradients, trainer.mesh.tensor.rank(), trainer.mesh.has_head))
    return results


def whole_gradients(results: list[Result]) -> dict[str, torch.Tensor]:
    """The full gradients, from the first rank that holds each slice."""
    slices: dict[str, dict[int, torch.Tensor]] = {}
    for result in results:
        for name, gradient in result.gradients.items():
            slices.setdefault(name, {}).setdefault(result.tensor_rank, gradient)
    return {name: full_gradient(name, [parts[r] for r in sorted(parts)]) for name, parts in slices.items()}


def packed_corpus(folder: Path) -> Path:
    """Real source code cut at empty lines, so that most windows of 128 tokens hold several documents."""
    text = "\n\n".join(Path(__import__(name).__file__).read_text() for name in ("argparse", "difflib", "inspect"))
    lines = [json.dumps({"text": piece}) for piece in text.split("\n\n") if piece.strip()]
    (folder / "pieces.jsonl").write_text("\n".join(lines))
    tidar(
        folder, "prepare", "pieces.jsonl", "--output", "corpus", "--vocab-size", "320", "--validation-fraction", "0.2"
    )
    return folder / "corpus"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return packed_corpus(tmp_path_factory.mktemp("layouts"))


def test_most_windows_hold_several_documents(corpus):
    from tidar_mega.data.stream import open_stream

    stream = open_stream(corpus, "train", 128, 1234)
    assert sum(int(stream.rows(i).document.max()) > 0 for i in range(160)) > 80, "what 20 steps read"


def run_layout(corpus: Path, layout: tuple, **more) -> list[list[Result]]:
    """Results by draft fraction (1 and 0.5), then by rank."""
    size = layout[0] * layout[1] * layout[3] * layout[4]
    configs = [settings(corpus, layout, fraction, **more) for fraction in (1.0, 0.5)]
    return list(zip(*processes.run(train, size, configs), strict=True))


@pytest.fixture(scope="module")
def alone(corpus) -> list[list[Result]]:
    return run_layout(corpus, ALONE)


@pytest.fixture
def tell(record_property):
    """A line of the table, which conftest.py prints at the end."""
    return lambda line: record_property("layouts", line)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != ALONE], ids=str)
def test_a_layout_equals_one_process(layout, corpus, alone, tell):
    results = run_layout(corpus, layout)
    worst = [compare(got, expected) for got, expected in zip(results, alone, strict=True)]
    line = " | ".join(f"figures {a:.1e} gradients {b:.1e}" for a, b in worst)
    tell(f"{layout}{' + SP' if LAYOUTS[layout].get('sequence') else '':5} {line}")
    for figures, gradients in worst:
        assert figures < LOSS
        assert gradients < GRADIENT


def test_overlapped_communication_changes_nothing(corpus, alone, tell):
    """Gradients reduced and weights gathered while others compute, in the layouts where the schedules differ.

    Small buckets: the head's is then its own, and the loss reads its weight without calling its layer.
    """
    for layout in ((1, 1, 1, 1, 2), (1, 2, 2, 1, 1)):
        results = run_layout(corpus, layout, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=10_000)
        worst = [compare(got, expected) for got, expected in zip(results, alone, strict=True)]
        tell(f"{layout} overlapped: " + " | ".join(f"figures {a:.1e} gradients {b:.1e}" for a, b in worst))
        assert all(figures < LOSS and gradients < GRADIENT for figures, gradients in worst)


@pytest.mark.parametrize(
    ("layout", "layers", "ends"),
    [
        ((1, 2, 1, 1, 1), 4, {"last_stage_layers": 1}),
        ((1, 3, 1, 1, 1), 4, {"first_stage_layers": 1, "last_stage_layers": 1}),
        ((1, 2, 2, 1, 1), 6, {"last_stage_layers": 2}),
        ((2, 2, 1, 1, 1), 4, {"first_stage_layers": 1}),
    ],
    ids=str,
)
def test_stages_of_unlike_lengths_change_nothing(layout, layers, ends, corpus, tell):
    def configs(layout, **more):
        made = [settings(corpus, layout, fraction, **more) for fraction in (1.0, 0.5)]
        return [config_module.override(config, [f"model.num_layers={layers}"]) for config in made]

    alone = zip(*processes.run(train, 1, configs(ALONE), 4), strict=True)
    size = layout[0] * layout[1]
    results = zip(*processes.run(train, size, configs(layout, sequence=layout[0] > 1, **ends), 4), strict=True)
    worst = [compare(got, expected) for got, expected in zip(results, alone, strict=True)]
    line = " | ".join(f"figures {a:.1e} gradients {b:.1e}" for a, b in worst)
    tell(f"{layout}, {layers} layers, {ends}: {line}")
    assert all(figures < LOSS and gradients < GRADIENT for figures, gradients in worst)


def compare(got: list[Result], expected: list[Result]) -> tuple[float, float]:
    """Largest relative errors of the figures of all steps and of the gradients of the first."""
    (expected,) = expected
    want = torch.tensor(expected.figures)
    figures = max(float(((torch.tensor(r.figures) - want).abs() / want.abs().clamp(min=0.1)).max()) for r in got)
    gradients = whole_gradients(got)
    tied = {"output_layer.weight"} - expected.gradients.keys()  # the last stage's copy of the embedding
    for name in tied & gradients.keys():
        assert torch.equal(gradients.pop(name), gradients["embedding.word_embeddings.weight"])
    assert gradients.keys() == expected.gradients.keys()
    errors = [float((gradients[n] - g).abs().max() / g.abs().max()) for n, g in expected.gradients.items()]
    return figures, max(errors)


def save_and_go_on(rank: int, config: config_module.Config, folder: Path):
    from tidar_mega.checkpoint import state
    from tidar_mega.checkpoint.store import CheckpointStore

    trainer = Trainer(config)
    for _ in range(5):
        trainer.step()
    meta = {
        "config": config_module.to_tree(config),
        "data_fingerprint": trainer.stream.fingerprint,
        "vocab_size": trainer.vocab,
    }
    checkpoints = CheckpointStore(folder, keep_last=2)
    tokenizer = trainer.stream.tokenizer_folder
    checkpoints.begin(trainer.mesh, 5, state.sharded(trainer.state, True), meta, tokenizer, 0)
    path = checkpoints.finish(trainer.mesh, wait=True)
    return path, [trainer.step() for _ in range(5)]


def load_and_go_on(rank: int, config: config_module.Config, path: Path):
    from tidar_mega.train.resume import resume

    trainer = Trainer(config)
    resume(path, config, trainer.mesh, trainer.stream, trainer.state)
    return [trainer.step() for _ in range(5)]


def test_a_checkpoint_goes_on_under_any_layout(corpus, tmp_path, tell):
    ((path, expected), *_) = processes.run(save_and_go_on, 4, settings(corpus, (2, 1, 1, 1, 2)), tmp_path)
    two, uneven = (1, 2, 1, 1, 1), {"last_stage_layers": 1}
    for layout, ends in ((two, {}), (two, uneven), ((1, 2, 2, 1, 1), {}), ((1, 1, 1, 2, 1), {}), (ALONE, {})):
        size = layout[1] * layout[3]
        got = torch.tensor(processes.run(load_and_go_on, size, settings(corpus, layout, **ends), path)[0])
        error = float(((got - torch.tensor(expected)).abs() / torch.tensor(expected).abs().clamp(min=0.1)).max())
        tell(f"saved at (2, 1, 1, 1, 2), gone on at {layout}{ends or ''}: figures {error:.1e}")
        assert error < LOSS
