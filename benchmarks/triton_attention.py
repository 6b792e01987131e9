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
def _offsets(slot: tl.constexpr, place, stride):
    """Offsets of the elements of one of the four rows of each window."""
    windows, per_row, width, lanes, _ = place
    token = (2 * (windows // per_row) + slot // 2) * width + 2 * (windows % per_row) + slot % 2
    return token.to(tl.int64)[:, None] * stride + lanes[None, :]


@triton.jit
def _load(x, slot: tl.constexpr, place, stride):
    return tl.load(x + _offsets(slot, place, stride), mask=place[4], other=0.0).to(tl.float32)


@triton.jit
def _load_four(x, place, stride):
    return (
        _load(x, 0, place, stride),
        _load(x, 1, place, stride),
        _load(x, 2, place, stride),
        _load(x, 3, place, stride),
    )


@triton.jit
def _store(x, slot: tl.constexpr, place, stride, value):
    tl.store(x + _offsets(slot, place, stride), value.to(x.dtype.element_ty), mask=place[4])


@triton.jit
def _softmax(s):
    largest = tl.maximum(tl.maximum(s[0], s[1]), tl.maximum(s[2], s[3]))
    e0, e1 = tl.exp(s[0] - largest), tl.exp(s[1] - largest)
    e2, e3 = tl.exp(s[2] - largest), tl.exp(s[3] - largest)
    total = e0 + e1 + e2 + e3
    return e0 / total, e1 / total, e2 / total, e3 / total


@triton.jit
def _dots(a, b):
    return tl.sum(a * b[0], 1), tl.sum(a * b[1], 1), tl.sum(a * b[2], 1), tl.sum(a * b[3], 1)


@triton.jit
def _mixture(p, b):
    return p[0][:, None] * b[0] + p[1][:, None] * b[1] + p[2][:, None] * b[2] + p[3][:, None] * b[3]


@triton.jit
def _add(sums, p, row):
    return (
        sums[0] + p[0][:, None] * row,
        sums[1] + p[1][:, None] * row,
        sums[2] + p[2][:, None] * row,
        sums[3] + p[3][:, None] * row,
    )


@triton.jit
def _place(num_windows, per_row, width, dim: tl.constexpr, padded: tl.constexpr, block):
    windows, lanes = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, padded)
    mask = (windows < num_windows)[:, None] & (lanes < dim)[None, :]
    return windows, per_row, width, lanes + tl.program_id(1) * dim, mask


@triton.autotune(CONFIGS, key=["heads"])
@triton.jit
def _forward(
    q, k, v, out, num_windows, per_row, width, stride, heads, scale,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = _place(num_windows, per_row, width, dim, padded, block)
    keys, values = _load_four(k, place, stride), _load_four(v, place, stride)
    for slot in tl.static_range(4):
        p = _softmax(_dots(_load(q, slot, place, stride) * scale, keys))
        _store(out, slot, place, heads * dim, _mixture(p, values))


@triton.autotune(CONFIGS, key=["heads"])
@triton.jit
def _backward(
    grad, q, k, v, grad_q, grad_k, grad_v, num_windows, per_row, width, stride, heads, scale,
    dim: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    place = _place(num_windows, per_row, width, dim, padded, block)
    keys, values = _load_four(k, place, stride), _load_four(v, place, stride)
    zero = tl.zeros_like(keys[0])
    grad_keys, grad_values = (zero, zero, zero, zero), (zero, zero, zero, zero)
    for slot in tl.static_range(4):
        query = _load(q, slot, place, stride) * scale
        upstream = _load(grad, slot, place, heads * dim)
        p, g = _softmax(_dots(query, keys)), _dots(upstream, values)
        mean = p[0] * g[0] + p[1] * g[1] + p[2] * g[2] + p[3] * g[3]
        d = (
            p[0] * (g[0] - mean),
            p[1] * (g[1] - mean),
            p[2] * (g[2] - mean),
            p[3] * (g[3] - mean),
        )
        _store(grad_q, slot, place, stride, _mixture(d, keys) * scale)
        grad_keys, grad_values = _add(grad_keys, d, query), _add(grad_values, p, upstream)
    for slot in tl.static_range(4):
        _store(grad_k, slot, place, stride, grad_keys[slot])
        _store(grad_v, slot, place, stride, grad_values[slot])


def _launch(kernel, tensors, q, grid) -> None:
    (tokens, heads, dim), padded = q.shape, triton.next_power_of_2(q.shape[2])
    sizes = tokens // 4, grid[1] // 2, grid[1], q.stride(0), heads, dim**-0.5
    programs = lambda meta: (triton.cdiv(tokens // 4, meta["block"]), heads)  # noqa: E731
    kernel[programs](*tensors, *sizes, dim=dim, padded=padded)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, grid):
        q, k, v = qkv.unbind(1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        _launch(_forward, (q, k, v, out), q, grid)
        ctx.save_for_backward(qkv)
        ctx.grid = grid
        return out

    @staticmethod
    def backward(ctx, grad):
        (qkv,) = ctx.saved_tensors
        q, k, v = qkv.unbind(1)
        grad_qkv = torch.empty_like(qkv)
        _launch(_backward, (grad.contiguous(), q, k, v, *grad_qkv.unbind(1)), q, ctx.grid)
        return grad_qkv, None


def window_attention(qkv, grid):
    """Attend within the 2 x 2 windows of one grid with even sides.

    ``qkv`` is a packed projection ``(N, 3, H, D)``, contiguous; so is its gradient.
    """
    if not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous, got strides {qkv.stride()}")
    return _WindowAttention.apply(qkv, grid)
