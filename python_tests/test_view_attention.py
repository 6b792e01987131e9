# SPDX-License-Identifier: Apache-2.0
"""What view_attention promises beyond the generic battery: how views share torch's kernel."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import uhd_ops
from uhd_ops import PackedGrids
from uhd_ops.ops import view_attention as module


def qkv(tokens, heads=2, dim=8, dtype=torch.float32):
    return torch.randn(tokens, 3, heads, dim, dtype=dtype).unbind(1)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries of every call of torch's kernel."""
    shapes = []
    kernel = functional.scaled_dot_product_attention

    def record(q, k, v, **options):
        shapes.append(tuple(q.shape))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(module.functional, "scaled_dot_product_attention", record)
    return shapes


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ([(2, 3)] * 4, [(4, 2, 6, 8)]),
        ([(1, 5), (2, 3), (3, 2), (6, 1)], [(1, 2, 5, 8), (3, 2, 6, 8)]),  # only h*w matters
        ([(2, 3), (1, 5), (2, 3)], [(2, 2, 6, 8), (1, 2, 5, 8)]),
        ([(0, 4), (2, 3), (0, 0)], [(1, 2, 6, 8)]),
    ],
)
def test_equally_long_views_share_one_call(calls, grids, expected):
    q, k, v = qkv(PackedGrids(grids).num_tokens)
    uhd_ops.view_attention(q, k, v, grids)
    assert calls == expected


def test_neighbours_are_not_copied(monkeypatch):
    q, k, v = qkv(5 + 6 * 3)
    storages = set()
    kernel = functional.scaled_dot_product_attention

    def record(*tensors, **options):
        storages.update(x.untyped_storage().data_ptr() for x in tensors)
        return kernel(*tensors, **options)

    monkeypatch.setattr(module.functional, "scaled_dot_product_attention", record)
    uhd_ops.view_attention(q, k, v, [(1, 5), (2, 3), (2, 3), (2, 3)])
    assert storages == {q.untyped_storage().data_ptr()}


def test_views_do_not_see_each_other():
    grids = [(2, 3), (1, 5), (2, 3)]
    q, k, v = qkv(17, dtype=torch.float64)
    out = uhd_ops.view_attention(q, k, v, grids)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[6:11] = torch.randn_like(x[6:11])
    again = uhd_ops.view_attention(*changed, grids)
    assert torch.equal(again[:6], out[:6])
    assert torch.equal(again[11:], out[11:])
    assert not torch.equal(again[6:11], out[6:11])


class WholeTensors(TorchDispatchMode):
    """Counts the tensors of one size that operators return."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.count += sum(isinstance(x, torch.Tensor) and x.numel() == self.numel for x in outputs)
        return out


@pytest.mark.parametrize(
    "make", [lambda n: [(1, 5), (2, 3)] * n, lambda n: [(1, 1 + i) for i in range(n)]]
)
def test_backward_is_linear_in_the_number_of_views(make):
    counts = []
    for views in (make(4), make(16)):
        q, k, v = (x.requires_grad_() for x in qkv(PackedGrids(views).num_tokens))
        out = uhd_ops.view_attention(q, k, v, views)
        with WholeTensors(q.numel()) as whole:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        counts.append(whole.count)
    assert counts[0] == counts[1] > 0


def test_compiles_to_one_graph():
    grids = PackedGrids([(2, 3), (1, 5), (2, 3)])
    q, k, v = (x.contiguous().requires_grad_() for x in qkv(17))
    compiled = torch.compile(uhd_ops.view_attention, fullgraph=True, backend="aot_eager")
    out, wanted = compiled(q, k, v, grids), uhd_ops.view_attention(q, k, v, grids)
    assert torch.equal(out, wanted)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, expected in zip(grads, torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True):
        # The same kernels, on tensors that may have other strides: twice the float32 epsilon of
        # sums of at most 6 products each.
        bound = 2 * 6 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (grad - expected).abs().max() <= bound


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("dim", [0, 8])
def test_nothing_to_attend(heads, dim):
    q, k, v = (x.requires_grad_() for x in qkv(6 if heads * dim == 0 else 0, heads, dim))
    grids = [(2, 3)] if len(q) else []
    out = uhd_ops.view_attention(q, k, v, grids)
    assert out.shape == q.shape
    out.sum().backward()
