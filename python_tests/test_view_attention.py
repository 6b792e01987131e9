# SPDX-License-Identifier: Apache-2.0
"""What view_attention promises beyond the generic battery: how views share torch's kernel."""

import pytest
import torch
from battery import TWELVE
from battery.marks import native_only
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
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


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("dim", [0, 8])
def test_nothing_to_attend(heads, dim):
    q, k, v = (x.requires_grad_() for x in qkv(6 if heads * dim == 0 else 0, heads, dim))
    grids = [(2, 3)] if len(q) else []
    out = uhd_ops.view_attention(q, k, v, grids)
    assert out.shape == q.shape
    out.sum().backward()


def assert_gradients(actual, wanted, length):
    """Two ways to add up ``length`` products, each off by an epsilon of them, four in a row."""
    for grad, expected in zip(actual, wanted, strict=True):
        bound = 4 * length * torch.finfo(grad.dtype).eps * max(1, expected.abs().max())
        assert (grad - expected).abs().max() <= bound


def test_three_graphs_serve_all_grids():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(uhd_ops.view_attention, fullgraph=True, backend=backend)
    for pairs in TWELVE:
        grids = PackedGrids(pairs)
        leaves = [x.contiguous().requires_grad_() for x in qkv(grids.num_tokens)]
        out, wanted = compiled(*leaves, grids), uhd_ops.view_attention(*leaves, grids)
        assert torch.equal(out, wanted)
        grad_out = torch.randn_like(out)
        grads = (torch.autograd.grad(y, leaves, grad_out) for y in (out, wanted))
        assert_gradients(*grads, grids.max_seqlen)
    assert backend.frame_count <= 3
    torch._dynamo.reset()


@pytest.mark.parametrize("block", [2**22, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_the_traced_operator(block, dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)  # 7: a query at a time
    grids = PackedGrids([(4, 6), (0, 3), (3, 5), (1, 1)])
    leaves = [x.requires_grad_() for x in qkv(grids.num_tokens, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    grad_out = torch.randn_like(leaves[0])
    for scale in (None, 0.3):
        out = torch.ops.uhd_ops._view_attention(*leaves, grids.rows, scale)
        wanted = module.attend_views(*exact, grids, scale)
        grads = torch.autograd.grad(out, leaves, grad_out)
        assert all(grad.dtype == dtype for grad in grads)
        wanted_grads = torch.autograd.grad(wanted, exact, grad_out.double())
        # Computed in float32 for bfloat16, and rounded once to it.
        for grad, expected in zip(grads, wanted_grads, strict=True):
            bound = 4 * 24 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            bound = max(bound, torch.finfo(dtype).eps) * max(1, expected.abs().max())
            assert (grad.double() - expected).abs().max() <= bound


class Attention(torch.nn.Module):
    def forward(self, x, grids):
        q, k, v = x.unflatten(-1, (3, 2, -1)).unbind(1)
        y = uhd_ops.view_attention(q, k, v, grids).flatten(1)
        return uhd_ops.window_mean(y, grids, 2), grids.merged(2)


@native_only("the definitions need the sides as integers")
def test_one_exported_program_takes_all_grids():
    dynamic = {0: torch.export.Dim.DYNAMIC}
    example = PackedGrids([(4, 6), (3, 5)])
    program = torch.export.export(
        Attention(), (torch.randn(39, 48), example), dynamic_shapes=(dynamic, [dynamic])
    ).module()
    for pairs in TWELVE:
        grids = PackedGrids(pairs)
        x = torch.randn(grids.num_tokens, 48)
        (out, merged), (wanted, wanted_grids) = program(x, grids), Attention()(x, grids)
        assert torch.equal(out, wanted)
        assert merged is wanted_grids
    with pytest.raises(RuntimeError, match="Eq"):  # another number of tokens than the grids have
        program(torch.randn(40, 48), example)


@pytest.fixture
def varlen(monkeypatch):
    """Send what CUDA would take to a stand-in for torch's variable-length attention."""
    calls = []

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, scale=None):
        assert cu_q is cu_k
        assert cu_q.dtype == torch.int32
        assert max_q == max_k == cu_q.diff().max()
        calls.append(scale)
        return module.attend_by_length(q, k, v, cu_q.diff().tolist(), scale)

    monkeypatch.setattr(module, "_varlen_attn", lambda: attend)
    return calls


def test_variable_length_attention_gets_the_views(varlen, monkeypatch):
    monkeypatch.setattr(module, "_suits_varlen", lambda q, grids: True)
    q, k, v = qkv(17)
    grids = [(2, 3), (1, 5), (2, 3)]
    out = uhd_ops.view_attention(q, k, v, grids)
    scaled = module.attend_views(q, k, v, PackedGrids(grids), 0.5)
    assert varlen == [None, 0.5]
    monkeypatch.undo()
    assert torch.equal(out, uhd_ops.view_attention(q, k, v, grids))
    assert torch.equal(scaled, module.attend_views(q, k, v, PackedGrids(grids), 0.5))


def test_who_goes_to_variable_length_attention(varlen, monkeypatch):
    monkeypatch.setattr(module._native, "has_kernels", lambda device: True)

    def suits(device="cuda", dtype=torch.bfloat16, shape=(6, 2, 64), grids=((2, 3),)):
        return module._suits_varlen(
            torch.empty(shape, dtype=dtype, device=device), PackedGrids(grids)
        )

    with FakeTensorMode():
        assert suits()
        assert suits(dtype=torch.float16, shape=(6, 2, 256))
        assert not suits("cpu")
        assert not suits(dtype=torch.float32)
        assert not suits(shape=(6, 2, 7))
        assert not suits(shape=(6, 2, 264))
        assert not suits(shape=(6, 0, 64))
        assert not suits(shape=(0, 2, 64), grids=())
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert not suits()
        monkeypatch.undo()
        monkeypatch.setattr(module, "_varlen_attn", lambda: None)
        assert not suits()
