# SPDX-License-Identifier: Apache-2.0
"""The private operator _unshuffle_norm and its backward, against their definition in float64."""

from typing import NamedTuple

import pytest
import torch
from battery import ISAS, assert_same_bits, using_isa
from battery.calls import sliced, strided, token_rows, transposed
from battery.marks import native_only

from uhd_ops.reference._windows import window_tokens
from uhd_ops.windows import locate

pytestmark = native_only("the operator has no definition of its own")

RAGGED = [(4, 6), (3, 5), (1, 7), (0, 3), (5, 1), (1, 1)]
EPS = 1e-3
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# One row per kernel: windows that a block holds in registers, and loops over all others.
KERNELS = [(2, 72), (2, 1152), (3, 72), (1, 40)]


@pytest.fixture(autouse=True)
def poison():
    """Fill new tensors with NaN; conftest.py restores the switch."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class Inputs(NamedTuple):
    x: torch.Tensor
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None
    grad_z: torch.Tensor
    grad_residual: torch.Tensor | None

    def doubled(self):
        return Inputs(*(None if tensor is None else tensor.double() for tensor in self))


def make(grids, factor, channels, dtype, *, norm=("weight", "bias"), residual=True):
    def rand(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    windows, merged = len(window_tokens(grids, factor)[0]), factor**2 * channels
    x = rand(sum(h * w for h, w in grids), channels) + 0.5
    parameters = [
        rand(merged, dtype=wide(dtype)) if name in norm else None for name in ("weight", "bias")
    ]
    grad_residual = rand(windows, channels) if residual else None
    return Inputs(x, *parameters, rand(windows, merged), grad_residual)


class Results(NamedTuple):
    z: torch.Tensor
    residual: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor
    grad_x: torch.Tensor
    grad_norm_weight: torch.Tensor
    grad_norm_bias: torch.Tensor


def run(inputs, grids, factor, *, affine=None) -> Results:
    """Call both operators; windows beyond those of the grids are padding."""
    x, weight, bias, grad_z, grad_residual = inputs
    views = locate(x[: sum(h * w for h, w in grids)], "x", grids, factor, ("C",)).views
    forward = torch.ops.uhd_ops._unshuffle_norm(
        x, views, len(grad_z), weight, bias, EPS, factor, grad_residual is not None
    )
    affine = (weight, bias) != (None, None) if affine is None else affine
    backward = torch.ops.uhd_ops._unshuffle_norm_backward(
        grad_z, grad_residual, x, views, weight, *forward[2:], factor, affine
    )
    return Results(*forward, *backward)


def definition(inputs, grids, factor) -> Results:
    """Both operators in float64, the gradients by autograd."""
    x, weight, bias, grad_z, grad_residual = inputs.doubled()
    merged = factor**2 * x.shape[1]
    scale = torch.ones(merged).double() if weight is None else weight
    shift = torch.zeros(merged).double() if bias is None else bias
    leaves = [tensor.requires_grad_() for tensor in (x, scale, shift)]
    tokens, present = window_tokens(grids, factor)
    merged_tokens = x[tokens].flatten(1)
    mean = merged_tokens.mean(1, keepdim=True)
    rstd = (((merged_tokens - mean) ** 2).mean(1, keepdim=True) + EPS).rsqrt()
    z = (merged_tokens - mean) * rstd * scale + shift
    residual = (x[tokens] * present[..., None]).sum(1) / present.sum(1, keepdim=True)
    total = (z * grad_z).sum()
    if grad_residual is not None:
        total = total + (residual * grad_residual).sum()
    grads = torch.autograd.grad(total, leaves)
    results = z, residual, mean[:, 0], rstd[:, 0], *grads
    return Results(*(tensor.detach() for tensor in results))


def bounds(inputs, exact, factor) -> Results:
    """Return the largest errors, for sums in whatever order; u is an epsilon, A and B are maxima.

    A sum of K numbers errs by at most K/2 u of the sum of their sizes, so a mean of K numbers by
    K/2 u of the largest one.
      mean       K/2 u max|x|
      rstd       the variance has K/2 + 3 roundings, and K/2 u more through the mean squared, which
                 the eps below it keeps small; the root halves them, and it and the division round
      n          A = max |x| rstd + |mean| rstd bounds n, too: (K/2 + 1) u A by the mean, as much by
                 rstd, so (K + 8) u A
      z          the same times |weight|, and one rounding each for weight and bias
      gradients  B = max |grad_z weight|. grad_x = rstd (g - mean(g) - n mean(g n)): K/2 u B, and
                 A times (3/2 K u A B), and (K u A) times A B: below 3 K u B (1 + A²), times rstd
                 and the slots that a token fills; the norm's gradients are sums over M windows
    Everything is rounded once more where it is stored.
    """
    x, weight, _, grad_z, grad_residual = inputs.doubled()
    u, windows = torch.finfo(wide(inputs.x.dtype)).eps, len(grad_z)
    largest, rstd = x.abs().max(), exact.rstd.max()
    scale = torch.ones(1).double() if weight is None else weight.abs()
    spread = 2 * largest * rstd
    slack = (grad_z.shape[1] + 8) * u
    of_x = 3 * slack * (grad_z * scale).abs().max() * (1 + spread**2) * rstd * factor**2
    if grad_residual is not None:
        of_x = of_x + 2 * u * grad_residual.abs().max()
    sums = grad_z.abs().sum(0)
    slacks = Results(
        z=slack * spread * scale + 2 * u * exact.z.abs(),
        residual=factor**2 * u * largest,
        mean=slack * largest,
        rstd=slack * rstd * (1 + largest * rstd),
        grad_x=of_x,
        grad_norm_weight=(windows * u + slack) * spread * sums,
        grad_norm_bias=windows * u * sums,
    )
    stored = torch.finfo(inputs.x.dtype)
    return Results(
        *(
            bound + 0.5 * stored.eps * ((1 + stored.eps) * value.abs() + stored.smallest_normal)
            if name in ("z", "residual", "grad_x")
            else bound + u * value.abs()
            for name, bound, value in zip(Results._fields, slacks, exact, strict=True)
        )
    )


def assert_close(results, inputs, exact, factor, skip=()):
    for name, actual, wanted, bound in zip(
        Results._fields, results, exact, bounds(inputs, exact, factor), strict=True
    ):
        if name in skip:
            assert actual.numel() == 0, name
            continue
        assert actual.shape == wanted.shape, name
        error = (actual.double() - wanted).abs()
        assert (error <= bound).all(), f"{name}: error {error.max()}, bound {bound}"


def check(grids, factor, channels, dtype, **options):
    inputs = make(grids, factor, channels, dtype, **options)
    exact = definition(inputs, grids, factor)
    skip = [] if inputs[1:3] != (None, None) else ["grad_norm_weight", "grad_norm_bias"]
    skip += [] if inputs.grad_residual is not None else ["residual"]
    for isa in ISAS:
        with using_isa(isa):
            results = run(inputs, grids, factor)
        assert_close(results, inputs, exact, factor, skip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 8, 72, 1152])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_equals_the_definition(factor, channels, dtype):
    check(RAGGED if channels < 1000 else [(3, 4), (1, 1)], factor, channels, dtype)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(4096, torch.bfloat16), (4104, torch.float16), (1540, torch.float32), (2052, torch.float32)],
)
def test_rows_that_no_block_holds(channels, dtype):
    check([(2, 2), (3, 1)], 2, channels, dtype)


@pytest.mark.parametrize(("factor", "grid"), [(2, (95, 97)), (4, (191, 190)), (1, (1, 2500))])
def test_many_windows(factor, grid):
    check([grid], factor, 5, torch.float32)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", [("weight", "bias"), ("weight",), ("bias",), ()])
@pytest.mark.parametrize(("factor", "channels"), [(2, 16), (3, 5)])
def test_what_may_be_absent(factor, channels, norm, residual):
    check(RAGGED, factor, channels, torch.bfloat16, norm=norm, residual=residual)


@pytest.mark.parametrize("factor", [2, 3])
def test_frozen_parameters_have_no_gradient(factor):
    inputs = make(RAGGED, factor, 16, torch.float32)
    trained, frozen = (run(inputs, RAGGED, factor, affine=affine) for affine in (True, False))
    assert [len(tensor) for tensor in frozen[-2:]] == [0, 0]
    for a, b in zip(frozen[:-2], trained, strict=False):
        assert_same_bits(a, b)


def shifted(x):
    """One element further in memory than a vector access could be."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("layout", [shifted, sliced, strided, transposed])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "channels"), KERNELS)
def test_the_layout_changes_no_bit(factor, channels, dtype, layout):
    grids = [(4, 6), (3, 5)] if channels < 1000 else [(3, 3)]
    inputs = make(grids, factor, channels, dtype)
    wanted = run(inputs, grids, factor)
    norm = [shifted(tensor) for tensor in inputs[1:3]]
    rows = [layout(tensor) for tensor in (inputs.x, *inputs[3:])]
    moved = run(Inputs(rows[0], *norm, *rows[1:]), grids, factor)
    for name, a, b in zip(Results._fields, moved, wanted, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "channels"), KERNELS)
def test_a_window_depends_on_its_own_tokens_only(factor, channels, dtype, isa):
    grids = [(7, 9), *RAGGED] if channels < 1000 else [(5, 8), (3, 3), (1, 2)]
    inputs = make(grids, factor, channels, dtype)
    with using_isa(isa):
        together = run(inputs, grids, factor)
    window = 0
    for view, tokens in zip(grids, token_rows(grids), strict=True):
        windows = slice(window, window + len(window_tokens([view], factor)[0]))
        window = windows.stop
        x, weight, bias, *rows = inputs
        alone = Inputs(x[tokens], weight, bias, *(row[windows] for row in rows))
        with using_isa(isa):
            results = run(alone, [view], factor)
        for name, a, b in zip(Results._fields[:5], together, results, strict=False):
            assert_same_bits(a[tokens if name == "grad_x" else windows], b, name)


@pytest.mark.parametrize(("factor", "channels"), KERNELS)
def test_a_nan_stays_in_its_window(factor, channels):
    grids = [(3, 5), (2, 2)]
    inputs = make(grids, factor, channels, torch.float32)
    clean = run(inputs, grids, factor)
    tokens, _ = window_tokens(grids, factor)
    inputs.x[tokens[1, 0], -1] = float("nan")
    results = run(inputs, grids, factor)
    others = torch.arange(len(tokens)) != 1
    for a, b in zip(results[:4], clean, strict=False):
        assert_same_bits(a[others], b[others])
    assert results.z[1].isnan().all()
    assert results.residual[1].isnan().sum() == 1
    rest = torch.ones(len(inputs.x), dtype=torch.bool).index_fill(0, tokens[1], False)
    assert_same_bits(results.grad_x[rest], clean.grad_x[rest])
    assert results.grad_x[~rest].isnan().all()


@pytest.mark.parametrize("grids", [[(3, 5), (4, 2)], [(0, 2)], []])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [2, 3])
def test_padding_comes_out_as_zeros(factor, dtype, grids):
    inputs = make(grids, factor, 24, dtype)
    exact = definition(inputs, grids, factor) if inputs.x.numel() else None
    nan = float("nan")
    x, grad_z, grad_residual = (
        torch.cat([tensor, tensor.new_full((extra, tensor.shape[1]), nan)])
        for tensor, extra in ((inputs.x, 7), (inputs.grad_z, 90), (inputs.grad_residual, 90))
    )
    padded = Inputs(x, *inputs[1:3], grad_z, grad_residual)
    results = Results(*run(padded, grids, factor))
    trimmed = []
    for name, tensor in zip(Results._fields, results, strict=True):
        real = len(inputs.x) if name == "grad_x" else len(inputs.grad_z)
        real = len(tensor) if "norm" in name else real
        assert not tensor[real:].count_nonzero(), name
        trimmed.append(tensor[:real])
    if exact is None:
        assert not any(tensor.count_nonzero() for tensor in trimmed)
    else:
        assert_close(trimmed, inputs, exact, factor)


@pytest.mark.parametrize("factor", [1, 2])
def test_nothing_to_do(factor):
    results = run(make([], factor, 16, torch.float16), [], factor)
    assert [len(tensor) for tensor in results[:5]] == [0] * 5
    assert not any(tensor.count_nonzero() for tensor in results[5:])
