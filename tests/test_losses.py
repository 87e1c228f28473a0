"""The head's loss against torch's cross entropy in float64, and split over the vocabulary against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests import processes
from tidar_mega.losses import cross_entropy
from tidar_mega.rows import Rows

B, T, D, V = 2, 11, 16, 24


def inputs(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, B, D, generator=draw, dtype=dtype)
    head = torch.randn(V, D, generator=draw, dtype=dtype)
    label = torch.randint(V, (B, T), generator=draw)
    weight = torch.rand(B, T, generator=draw) * (torch.rand(B, T, generator=draw) > 0.4)
    zero = torch.zeros(B, T, dtype=torch.int64)
    return hidden, head, Rows(zero, zero, zero, zero, zero, zero, label, weight)


def reference(hidden, head, rows):
    hidden, head = hidden.double().requires_grad_(), head.double().requires_grad_()
    logits = torch.einsum("tbd,vd->btv", hidden, head)
    loss = F.cross_entropy(logits.flatten(0, 1), rows.label.flatten(), reduction="none").view(B, T)
    total = (loss * rows.weight).sum()
    return total, *torch.autograd.grad(total, (hidden, head)), loss, logits


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_equal_torchs(chunk, dtype, tolerance):
    hidden, head, rows = inputs(dtype)
    hidden.requires_grad_(), head.requires_grad_()
    got = cross_entropy(hidden, head, rows, None, chunk)
    (3 * got.total).backward()
    total, grad_hidden, grad_head, loss, logits = reference(hidden.detach(), head.detach(), rows)
    close = {"rtol": tolerance, "atol": tolerance * 10}
    torch.testing.assert_close(got.total.double(), total.detach(), **close)
    torch.testing.assert_close(hidden.grad.double(), 3 * grad_hidden, **close)
    torch.testing.assert_close(head.grad.double(), 3 * grad_head, **close)
    torch.testing.assert_close(got.loss.double(), loss[got.index].detach(), **close)
    if dtype == torch.float64:
        assert torch.equal(got.prediction, logits[got.index].argmax(-1))


def test_rows_without_weight_cost_nothing_and_get_no_gradient():
    hidden, head, rows = inputs()
    hidden.requires_grad_()
    got = cross_entropy(hidden, head, rows, None, 4)
    got.total.backward()
    assert len(got.loss) == int((rows.weight > 0).sum()) < B * T
    assert torch.equal(hidden.grad.transpose(0, 1).abs().sum(-1) > 0, rows.weight > 0)


def test_no_weighted_row_at_all_is_a_zero_that_can_be_differentiated():
    hidden, head, rows = inputs()
    rows = rows.map(lambda x: torch.zeros_like(x))
    hidden.requires_grad_()
    got = cross_entropy(hidden, head, rows, None, 4)
    got.total.backward()
    assert got.total == 0 and not hidden.grad.any()


def on_one_rank(rank):
    hidden, head, rows = inputs()
    width = V // dist.get_world_size()
    part = head[rank * width : (rank + 1) * width].clone().requires_grad_()
    hidden.requires_grad_()
    got = cross_entropy(hidden, part, rows, dist.group.WORLD, 4)
    got.total.backward()
    dist.all_reduce(hidden.grad)
    return got.total.detach(), hidden.grad, part.grad, got.prediction


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_split_vocabulary_gives_the_same(size):
    hidden, head, rows = inputs()
    total, grad_hidden, grad_head, _, _ = reference(hidden, head, rows)
    whole = cross_entropy(hidden, head, rows, None, 4)
    results = processes.run(on_one_rank, size)
    for got in results:
        torch.testing.assert_close(got[0].double(), total.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got[1], grad_hidden, rtol=1e-6, atol=1e-6)
        assert torch.equal(got[3], whole.prediction)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), grad_head, rtol=1e-6, atol=1e-6)
