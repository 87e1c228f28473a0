"""What is looked at on every node before the first step, and who is named when something is odd."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import processes
from tidar_mega import config as config_module
from tidar_mega.config import LostError, UserError
from tidar_mega.train import preflight
from tidar_mega.train.preflight import Facts, NodeError

GOOD = Facts("n1", "8 x H200", "torch 2", "abc", "9 bytes", 1000.0, 50.0, "", True, True, True, 100.0)
FOUR = [GOOD, GOOD, replace(GOOD, host="n2"), replace(GOOD, host="n2")]


def with_last(**odd) -> list[Facts]:
    return [*FOUR[:3], replace(FOUR[3], **odd)]


@pytest.mark.parametrize(
    "odd, said",
    [
        ({"gpus": "7 x H200"}, "n2: GPUs: 7 x H200"),
        ({"versions": "torch 1"}, "n2: versions: torch 1"),
        ({"data": "no data/index.json"}, "n2: data.path: no data/index.json"),
        ({"computes": False}, "n2: a product came out wrong"),
        ({"exchanges": False}, "n2: a sum over all ranks came out wrong"),
        ({"cannot_write": "disk full", "shares_folder": False}, "n2: disk full"),
    ],
)
def test_a_bad_node_is_named_and_may_be_replaced(odd, said):
    with pytest.raises(NodeError) as error:
        preflight.verdict(with_last(**odd), "runs/x")
    assert said in str(error.value) and error.value.nodes == ["n2"]
    assert error.value.exit_code == LostError.exit_code


def test_what_another_node_would_not_mend_is_not_tried_again():
    for facts, said in (
        (with_last(shares_folder=False), "run_dir = runs/x: what rank 0 writes there is not seen on n2"),
        (with_last(config="abd"), "the settings on n2 are not those"),
        ([replace(f, cannot_write="read-only") for f in FOUR], "cannot be written on any node"),
    ):
        with pytest.raises(UserError) as error:
            preflight.verdict(facts, "runs/x")
        assert said in str(error.value) and error.value.exit_code == UserError.exit_code


def test_one_node_of_many_that_does_not_see_the_run_folder_may_be_replaced():
    many = [replace(GOOD, host=f"n{i}", shares_folder=i != 4) for i in range(1, 5)]
    with pytest.raises(NodeError, match="is not seen on n4") as error:
        preflight.verdict(many, "runs/x")
    assert error.value.nodes == ["n4"]


def test_a_node_with_fewer_gpus_than_slurm_has_given_is_named_before_anything_waits_for_it(monkeypatch):
    noted: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    preflight.check_gpu(7, noted.extend)  # not of Slurm
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    preflight.check_gpu(6, noted.extend)
    with pytest.raises(NodeError, match="n2: process 7 of this node has no GPU .7 can be used.") as error:
        preflight.check_gpu(7, noted.extend)
    assert noted == error.value.nodes == ["n2"]
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for CPUs
    preflight.check_gpu(7, noted.extend)


def test_a_sum_that_is_wrong_everywhere_excludes_no_node():
    with pytest.raises(LostError, match="one of them or its network") as error:
        preflight.verdict([replace(f, exchanges=False) for f in FOUR], "runs/x")
    assert not isinstance(error.value, NodeError)
    with pytest.raises(NodeError, match="n2: a product") as error:  # which has spoilt the sum of the others
        preflight.verdict([replace(f, exchanges=False, computes=f.host == "n1") for f in FOUR], "runs/x")
    assert error.value.nodes == ["n2"]


def test_what_is_only_odd_is_a_warning():
    preflight.verdict(FOUR, "runs/x")
    assert "warning" not in preflight.describe(FOUR, 1e9, "runs/x")
    assert "the clock of n2 is +100 s off" in preflight.describe(with_last(clock=1100.0), 1e9, "runs/x")
    assert "warning: n2: less than half as fast" in preflight.describe(with_last(products_per_second=10.0), 1e9, "x")
    assert "warning: 1.0 GiB are free" in preflight.describe(with_last(free_gib=1.0), 1e9, "runs/x")


def look(rank: int, folder: str, what: str) -> tuple[str, list[str]]:
    """One rank's own place and settings, and what it is told; the nodes that were noted."""
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    place = Path(folder) / (str(rank) if what == "own folders" else "shared")
    place.mkdir(exist_ok=True)
    os.chdir(place)
    settings = ["run_dir=run", f"train.seed={rank if what == 'own settings' else 1}"]
    noted: list[str] = []
    try:
        return preflight.check(config_module.load(None, settings), noted.extend), noted
    except UserError as error:
        return str(error), noted


@pytest.mark.distributed
@pytest.mark.parametrize(
    "what, said",
    [
        ("nothing", "preflight: 3 ranks on 3 node(s), no GPU; all sums are right"),
        ("own folders", "run_dir = run: what rank 0 writes there is not seen on node1, node2"),
        ("own settings", "are not those of the other nodes"),
    ],
)
def test_real_ranks_come_to_one_verdict(tmp_path, what, said):
    told = processes.run(look, 3, str(tmp_path), what)
    assert all(said in text for text, _ in told), told
    assert not any(noted for _, noted in told)
    assert not list(tmp_path.rglob(".preflight*"))


def exchange_as_gpus_do(rank: int) -> bool:
    return preflight._exchange(numbers=2**24 + 64)[0]


@pytest.mark.distributed
def test_what_is_exchanged_on_gpus_is_more_than_float32_can_count():
    assert processes.run(exchange_as_gpus_do, 2) == [True, True]
