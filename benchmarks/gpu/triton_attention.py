# SPDX-License-Identifier: Apache-2.0
"""2 x 2 window attention written by hand in Triton, forward and backward: the portable rival.

A program owns a block of windows and one head. It keeps the four keys and values of each window in
registers and goes through the four queries; every tensor is read once and written once, in raster
order. Head sizes are padded to a power of two, which is Triton's rule.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Windows per program, warps. Interpreted, there is nothing to tune; one entry skips the autotuner.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SHAPES = [(4, 4)] if _INTERPRETED else [(4, 2), (4, 4), (8, 4), (8, 8)]
CONFIGS = [triton.Config({"block": block}, num_warps=warps) for block, warps in _SHAPES]


@triton.jit
def _token(windows, slot: tl.constexpr, per_row, width):
    """Token number of one of the four slots of each window."""
    row, column = windows // per_row, windows % per_row
    return (2 * row + slot // 2) * width + 2 * column + slot % 2


@triton.jit
def _rows(windows, slot: tl.constexpr, per_row, width, stride, lanes):
    """Offsets of the elements of one slot's rows."""
    return _token(windows, slot, per_row, width).to(tl.int64)[:, None] * stride + lanes[None, :]


@triton.jit
def _softmax_of_four(s0, s1, s2, s3):
    largest = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    e0, e1 = tl.exp(s0 - largest), tl.exp(s1 - largest)
    e2, e3 = tl.exp(s2 - largest), tl.exp(s3 - largest)
    total = e0 + e1 + e2 + e3
    return e0 / total, e1 / total, e2 / total, e3 / total


@triton.jit
def _dots(a, b0, b1, b2, b3):
    return tl.sum(a * b0, 1), tl.sum(a * b1, 1), tl.sum(a * b2, 1), tl.sum(a * b3, 1)


@triton.jit
def _mixture(p0, p1, p2, p3, b0, b1, b2, b3):
    return p0[:, None] * b0 + p1[:, None] * b1 + p2[:, None] * b2 + p3[:, None] * b3


@triton.jit
def _load(x, offsets, mask):
    return tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_four(x, windows, per_row, width, stride, lanes, mask):
    return (
        _load(x, _rows(windows, 0, per_row, width, stride, lanes), mask),
        _load(x, _rows(windows, 1, per_row, width, stride, lanes), mask),
        _load(x, _rows(windows, 2, per_row, width, stride, lanes), mask),
        _load(x, _rows(windows, 3, per_row, width, stride, lanes), mask),
    )


@triton.autotune(CONFIGS, key=["heads"])
@triton.jit
def _forward(
    q, k, v, out, num_windows, per_row, width, stride, heads, scale,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    windows = tl.program_id(0) * block + tl.arange(0, block)
    lanes = tl.arange(0, padded)
    mask = (windows < num_windows)[:, None] & (lanes < dim)[None, :]
    lanes += head * dim
    k0, k1, k2, k3 = _load_four(k, windows, per_row, width, stride, lanes, mask)
    v0, v1, v2, v3 = _load_four(v, windows, per_row, width, stride, lanes, mask)
    for slot in tl.static_range(4):
        query = _load(q, _rows(windows, slot, per_row, width, stride, lanes), mask) * scale
        s0, s1, s2, s3 = _dots(query, k0, k1, k2, k3)
        p0, p1, p2, p3 = _softmax_of_four(s0, s1, s2, s3)
        result = _mixture(p0, p1, p2, p3, v0, v1, v2, v3)
        target = out + _rows(windows, slot, per_row, width, heads * dim, lanes)
        tl.store(target, result.to(out.dtype.element_ty), mask=mask)


@triton.autotune(CONFIGS, key=["heads"])
@triton.jit
def _backward(
    grad, q, k, v, grad_q, grad_k, grad_v, num_windows, per_row, width, stride, heads, scale,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    windows = tl.program_id(0) * block + tl.arange(0, block)
    lanes = tl.arange(0, padded)
    mask = (windows < num_windows)[:, None] & (lanes < dim)[None, :]
    lanes += head * dim
    k0, k1, k2, k3 = _load_four(k, windows, per_row, width, stride, lanes, mask)
    v0, v1, v2, v3 = _load_four(v, windows, per_row, width, stride, lanes, mask)
    dk0 = tl.zeros_like(k0)
    dk1, dk2, dk3, dv0, dv1, dv2, dv3 = dk0, dk0, dk0, dk0, dk0, dk0, dk0
    for slot in tl.static_range(4):
        rows = _rows(windows, slot, per_row, width, heads * dim, lanes)
        query = _load(q, _rows(windows, slot, per_row, width, stride, lanes), mask) * scale
        upstream = _load(grad, rows, mask)
        s0, s1, s2, s3 = _dots(query, k0, k1, k2, k3)
        p0, p1, p2, p3 = _softmax_of_four(s0, s1, s2, s3)
        g0, g1, g2, g3 = _dots(upstream, v0, v1, v2, v3)
        mean = p0 * g0 + p1 * g1 + p2 * g2 + p3 * g3
        d0, d1, d2, d3 = p0 * (g0 - mean), p1 * (g1 - mean), p2 * (g2 - mean), p3 * (g3 - mean)
        grad_query = _mixture(d0, d1, d2, d3, k0, k1, k2, k3) * scale
        tl.store(grad_q + rows, grad_query.to(grad_q.dtype.element_ty), mask=mask)
        dk0 += d0[:, None] * query
        dk1 += d1[:, None] * query
        dk2 += d2[:, None] * query
        dk3 += d3[:, None] * query
        dv0 += p0[:, None] * upstream
        dv1 += p1[:, None] * upstream
        dv2 += p2[:, None] * upstream
        dv3 += p3[:, None] * upstream
    _store_four(grad_k, windows, per_row, width, heads * dim, lanes, mask, dk0, dk1, dk2, dk3)
    _store_four(grad_v, windows, per_row, width, heads * dim, lanes, mask, dv0, dv1, dv2, dv3)


@triton.jit
def _store_four(x, windows, per_row, width, stride, lanes, mask, a0, a1, a2, a3):
    element = x.dtype.element_ty
    tl.store(x + _rows(windows, 0, per_row, width, stride, lanes), a0.to(element), mask=mask)
    tl.store(x + _rows(windows, 1, per_row, width, stride, lanes), a1.to(element), mask=mask)
    tl.store(x + _rows(windows, 2, per_row, width, stride, lanes), a2.to(element), mask=mask)
    tl.store(x + _rows(windows, 3, per_row, width, stride, lanes), a3.to(element), mask=mask)


def _launch(kernel, tensors, q, grid) -> None:
    tokens, heads, dim = q.shape
    num_windows = tokens // 4
    kernel[lambda meta: (triton.cdiv(num_windows, meta["block"]), heads)](
        *tensors,
        num_windows,
        grid[1] // 2,
        grid[1],
        q.stride(0),
        heads,
        dim**-0.5,
        dim=dim,
        padded=triton.next_power_of_2(dim),
    )


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, grid):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _launch(_forward, (q, k, v, out), q, grid)
        ctx.save_for_backward(q, k, v)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(grad) for _ in range(3)]
        _launch(_backward, (grad, q, k, v, *grads), q, ctx.grid)
        return (*grads, None)


def window_attention(q, k, v, grid):
    """Attend within the 2 x 2 windows of one grid with even sides.

    ``q``, ``k``, ``v`` are ``(N, H, D)`` with one and the same stride between tokens and heads that
    lie side by side, as the slices of a packed projection have; gradients are contiguous.
    """
    if len({x.stride() for x in (q, k, v)}) != 1 or q.stride()[1:] != (q.shape[2], 1):
        raise ValueError(f"strides of q, k and v must agree, got {[x.stride() for x in (q, k, v)]}")
    return _WindowAttention.apply(q, k, v, grid)
