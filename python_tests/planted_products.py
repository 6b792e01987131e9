# SPDX-License-Identifier: Apache-2.0
"""A machine on which no product of torch gives the same bits in another memory layout.

Libraries of matrix products choose the order of their additions by shapes, strides, alignment and
number of threads, on each processor in another way. Results that agree bit for bit on one machine
only because its library treats two layouts alike differ on the next. ``plant`` makes torch's CPU
kernels of products, reductions and norms add their terms in an order that depends on all of these.
Equal calls on equal layouts still agree bit for bit, as they do everywhere.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch
from torch.utils._pytree import tree_leaves

_ALIGNMENT = 64  # bytes: what torch's allocator gives, and the widest vector of a processor
_ORDERS = 997
_LIBRARY = torch.library.Library("aten", "IMPL")


def _order(args: object) -> int:
    """Return a number below _ORDERS for the memory layout, the same in every process."""
    layout: list[object] = [torch.get_num_threads()]
    for x in tree_leaves(args):
        if isinstance(x, torch.Tensor):
            layout.append((tuple(x.shape), x.stride(), x.data_ptr() % _ALIGNMENT))
    return zlib.crc32(repr(layout).encode()) % _ORDERS


def _rolled(x: torch.Tensor | None, dims: Iterable[int], shift: int) -> torch.Tensor | None:
    dims = [] if x is None or x.dim() == 0 else list(dims)
    return x.roll([shift] * len(dims), dims) if dims else x


def _rolled_back(y: torch.Tensor | None, dims: Iterable[int], shift: int) -> torch.Tensor | None:
    """Undo :func:`_rolled` in a result, with the strides that the kernel gave it."""
    return None if y is None else torch.empty_like(y).copy_(_rolled(y, dims, -shift))


def _replaces(*overloads: str) -> Callable:
    """Replace CPU kernels by ``function(original, shift, *args)``, with the order as ``shift``."""

    def replace(name: str, function: Callable) -> None:
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

        def planted(keys, *args, **kwargs):
            def original(*args, **kwargs):
                return kernel.call_boxed(keys, *args, **kwargs)

            if not any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args):
                return original(*args, **kwargs)
            return function(original, _order(args), *args, **kwargs)

        _LIBRARY.impl(name, planted, "CPU", with_keyset=True)

    def decorate(function: Callable) -> Callable:
        for name in overloads:
            replace(name, function)
        return function

    return decorate


def plant() -> None:
    """Replace the kernels for the rest of the process."""

    @_replaces("mm", "mm.out", "bmm", "bmm.out")
    def product(original, shift, a, b, **kwargs):
        return original(_rolled(a, [-1], shift), _rolled(b, [-2], shift), **kwargs)

    @_replaces("addmm", "addmm.out", "addmm_", "baddbmm", "baddbmm.out", "baddbmm_", "addbmm")
    def product_and_sum(original, shift, x, a, b, **kwargs):
        return original(x, _rolled(a, [-1], shift), _rolled(b, [-2], shift), **kwargs)

    @_replaces("addmv", "addmv.out", "addmv_")
    def matrix_times_vector(original, shift, x, a, b, **kwargs):
        return original(x, _rolled(a, [-1], shift), _rolled(b, [-1], shift), **kwargs)

    @_replaces("dot")
    def dot(original, shift, a, b):
        return original(_rolled(a, [0], shift), _rolled(b, [0], shift))

    @_replaces("convolution")
    def convolution(original, shift, x, weight, bias, *args):
        if args[-1] == 1:  # groups
            x, weight = _rolled(x, [1], shift), _rolled(weight, [1], shift)
        return original(x, weight, bias, *args)

    @_replaces("convolution_backward")
    def convolution_backward(original, shift, grad, x, weight, bias_sizes, *args):
        if args[-2] != 1:
            return original(grad, x, weight, bias_sizes, *args)
        # The gradient of x sums over the channels of grad, that of the weight over the images.
        grad, weight = _rolled(grad, [0, 1], shift), _rolled(weight, [0], shift)
        results = original(grad, _rolled(x, [0], shift), weight, bias_sizes, *args)
        return tuple(_rolled_back(y, [0], shift) for y in results)

    @_replaces("_scaled_dot_product_flash_attention_for_cpu")
    def attention(original, shift, q, k, v, p=0.0, is_causal=False, *, attn_mask=None, **kwargs):
        if not is_causal:
            k, v = _rolled(k, [-2], shift), _rolled(v, [-2], shift)
            attn_mask = _rolled(attn_mask, [-1], shift)
        return original(q, k, v, p, is_causal, attn_mask=attn_mask, **kwargs)

    @_replaces("_scaled_dot_product_flash_attention_for_cpu_backward")
    def attention_backward(
        original, shift, grad, q, k, v, out, logsumexp, p, is_causal, *, attn_mask=None, **kwargs
    ):
        shift = 0 if is_causal else shift
        attn_mask = _rolled(attn_mask, [-1], shift)
        k, v = _rolled(k, [-2], shift), _rolled(v, [-2], shift)
        grads = original(grad, q, k, v, out, logsumexp, p, is_causal, attn_mask=attn_mask, **kwargs)
        return grads[0], *(_rolled_back(y, [-2], shift) for y in grads[1:])

    @_replaces("native_layer_norm")
    def layer_norm(original, shift, x, shape, weight, bias, eps):
        dims = range(-len(shape), 0)
        affine = (_rolled(y, dims, shift) for y in (weight, bias))
        out, mean, rstd = original(_rolled(x, dims, shift), shape, *affine, eps)
        return _rolled_back(out, dims, shift), mean, rstd

    @_replaces("native_layer_norm_backward")
    def layer_norm_backward(original, shift, grad, x, shape, mean, rstd, weight, bias, mask):
        # The gradient of x sums over its channels, those of weight and bias over the rows.
        every, dims, rows = range(x.dim()), range(-len(shape), 0), range(x.dim() - len(shape))
        grad, x = _rolled(grad, every, shift), _rolled(x, every, shift)
        mean, rstd = _rolled(mean, rows, shift), _rolled(rstd, rows, shift)
        affine = (_rolled(y, dims, shift) for y in (weight, bias))
        grad_x, *grads = original(grad, x, shape, mean, rstd, *affine, mask)
        return _rolled_back(grad_x, every, shift), *(_rolled_back(y, dims, shift) for y in grads)

    @_replaces("_softmax", "_log_softmax")
    def softmax(original, shift, x, dim, half_to_float):
        return _rolled_back(original(_rolled(x, [dim], shift), dim, half_to_float), [dim], shift)

    @_replaces("_softmax_backward_data", "_log_softmax_backward_data")
    def softmax_backward(original, shift, grad, out, dim, dtype):
        grad, out = _rolled(grad, [dim], shift), _rolled(out, [dim], shift)
        return _rolled_back(original(grad, out, dim, dtype), [dim], shift)

    @_replaces("sum.dim_IntList", "mean.dim", "var.correction", "var_mean.correction")
    def reduction(original, shift, x, dim=None, *args, **kwargs):
        return original(_rolled(x, dim or range(x.dim()), shift), dim, *args, **kwargs)

    @_replaces("linalg_vector_norm")
    def norm(original, shift, x, ord=2, dim=None, *args, **kwargs):
        return original(_rolled(x, dim or range(x.dim()), shift), ord, dim, *args, **kwargs)

    # torch computes whole vectors of elements that lie side by side, and the others one by one with
    # another function.
    @_replaces("gelu", "gelu_backward", "silu", "silu_backward", "sigmoid")
    def activation(original, shift, *args, **kwargs):
        if shift % 2 or args[0].dtype == torch.float64:
            return original(*args, **kwargs)
        wide = (x.double() if isinstance(x, torch.Tensor) else x for x in args)
        return original(*wide, **kwargs).to(args[0].dtype)
