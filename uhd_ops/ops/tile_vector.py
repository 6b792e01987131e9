# SPDX-License-Identifier: Apache-2.0
"""A vector repeated end to end."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference


def tile_vector(vector: torch.Tensor, tiles: int) -> torch.Tensor:
    """Repeat ``vector`` ``tiles`` times, end to end.

    The backward pass adds up the gradients of the tiles. Nothing is computed in the forward pass,
    so the result has the dtype of ``vector`` under autocast too.

    Args:
        vector: ``(I,)``: float32, float64, bfloat16 or float16; gradients of half types add up in
            float32 and round once, at the store.
        tiles: Number of tiles.

    Returns:
        ``(tiles * I,)`` with the dtype of ``vector``, contiguous; a copy also for ``tiles=1``.

    Raises:
        TypeError: ``vector`` or ``tiles`` has the wrong type, or ``vector`` none of the four
            dtypes.
        ValueError: ``vector`` does not have one dimension, or ``tiles < 1``.

    Source:
        LLaVA-UHD v4, section 3.2: the normalisation and the first bias of the reused MLP.

    Example:
        >>> tile_vector(torch.tensor([1.0, 2.0]), 2)
        tensor([1., 2., 1., 2.])
    """
    _checks.check_tensor(vector, "vector")
    tiles = _checks.check_positive_int(tiles, "tiles")
    if vector.dim() != 1:
        raise ValueError(f"vector must be (I,), got shape {tuple(vector.shape)}")
    if not _native.has_kernels(vector.device):
        return reference.tile_vector(vector, tiles)
    return torch.ops.uhd_ops.tile_vector(vector, tiles)


def _fake(vector, tiles):
    return vector.new_empty((tiles * vector.shape[0],))


def _backward_fake(grad_out, tiles):
    return grad_out.new_empty((grad_out.shape[0] // tiles,))


def _setup_context(ctx, inputs, output):
    _, ctx.tiles = inputs


def _backward(ctx, grad_out):
    return torch.ops.uhd_ops._tile_vector_backward(grad_out, ctx.tiles), None


# The operator is linear, so the derivative of its backward pass is its forward pass.
def _double_backward(ctx, grad_grad_vector):
    return torch.ops.uhd_ops.tile_vector(grad_grad_vector, ctx.tiles), None


if _native.status["cpu"] == "loaded":
    torch.library.register_fake("uhd_ops::tile_vector", _fake)
    torch.library.register_fake("uhd_ops::_tile_vector_backward", _backward_fake)
    torch.library.register_autograd("uhd_ops::tile_vector", _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        "uhd_ops::_tile_vector_backward", _double_backward, setup_context=_setup_context
    )
