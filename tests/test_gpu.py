"""What only a GPU can show: NCCL, FlexAttention in a training run, a resume there, and decoding on the device."""

from __future__ import annotations

import json

import pytest
import torch

from tests.test_main_job import CONFIG, losses, make_corpus, metrics, tidar

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; run `make test-gpu` on one"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_corpus(folder)
    text = CONFIG.replace("parallel: {data: 2}", "parallel: {data: 1}").replace("seq_length: 64", "seq_length: 256")
    (folder / "run.yaml").write_text(text)
    tidar(folder, "pretrain", "run.yaml", "run_dir=whole")
    return folder


def test_training_on_the_gpu_learns_and_flex_equals_dense(work):
    tidar(work, "pretrain", "run.yaml", "run_dir=dense", "model.attention=dense")
    flex, dense = losses(work, "whole"), losses(work, "dense")
    assert metrics(work, "whole")[16]["loss"] < metrics(work, "whole")[1]["loss"] - 0.3
    for step, figures in flex.items():
        assert figures[0] == pytest.approx(dense[step][0], rel=2e-2)


def test_a_resume_on_the_gpu_goes_on_where_it_stopped(work):
    tidar(work, "pretrain", "run.yaml", "run_dir=halves", "train.steps=8", "optimizer.schedule=constant")
    tidar(work, "pretrain", "run.yaml", "run_dir=halves", "optimizer.schedule=constant")
    tidar(work, "pretrain", "run.yaml", "run_dir=constant", "optimizer.schedule=constant")
    whole, halves = losses(work, "constant"), losses(work, "halves")
    assert whole.keys() == halves.keys()
    for step, figures in whole.items():
        assert halves[step] == pytest.approx(figures, rel=1e-2)  # kernels may add up in another order


def test_fused_decoding_on_the_gpu_equals_ar(work):
    texts = []
    for mode in ("fused", "ar"):
        arguments = ("--prompt", "def main(", "--json", f"{mode}.json", f"decode.mode={mode}", "decode.max_tokens=64")
        tidar(work, "generate", "whole", *arguments)
        texts.append(json.loads((work / f"{mode}.json").read_text())["text"])
    assert texts[0] == texts[1]
