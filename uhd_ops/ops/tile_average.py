# SPDX-License-Identifier: Apache-2.0
"""A weight repeated along its inputs and averaged."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference


def tile_average(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Repeat ``weight`` along its inputs, divided by ``tiles``: ``1/tiles [W | W | ... | W]``.

    It applies one linear map to each of ``tiles`` tokens that stand side by side, and averages the
    results. The backward pass averages the gradients of the tiles. The result has the dtype of
    ``weight`` under autocast too.

    Args:
        weight: ``(O, I)``: float32, float64, bfloat16 or float16; half types are divided, and their
            gradients added up, in float32 and rounded once, at the store.
        tiles: Number of tiles.

    Returns:
        ``(O, tiles * I)`` with the dtype of ``weight``, contiguous.

    Raises:
        TypeError: ``weight`` or ``tiles`` has the wrong type, or ``weight`` none of the four
            dtypes.
        ValueError: ``weight`` does not have two dimensions, or ``tiles < 1``.

    Source:
        LLaVA-UHD v4, section 3.2: the second projection of the reused MLP.

    Example:
        >>> tile_average(torch.tensor([[2.0, 4.0]]), 2)
        tensor([[1., 2., 1., 2.]])
    """
    _checks.check_tensor(weight, "weight")
    tiles = _checks.check_positive_int(tiles, "tiles")
    if weight.dim() != 2:
        raise ValueError(f"weight must be (O, I), got shape {tuple(weight.shape)}")
    if not _native.has_kernels(weight.device):
        return reference.tile_average(weight, tiles)
    return torch.ops.uhd_ops.tile_average(weight, tiles)


def _fake(weight, tiles):
    rows, cols = weight.shape
    return weight.new_empty((rows, tiles * cols))


def _backward_fake(grad_out, tiles):
    rows, cols = grad_out.shape
    return grad_out.new_empty((rows, cols // tiles))


def _setup_context(ctx, inputs, output):
    _, ctx.tiles = inputs


def _backward(ctx, grad_out):
    return torch.ops.uhd_ops._tile_average_backward(grad_out, ctx.tiles), None


# The operator is linear, so the derivative of its backward pass is its forward pass.
def _double_backward(ctx, grad_grad_weight):
    return torch.ops.uhd_ops.tile_average(grad_grad_weight, ctx.tiles), None


if _native.status["cpu"] == "loaded":
    torch.library.register_fake("uhd_ops::tile_average", _fake)
    torch.library.register_fake("uhd_ops::_tile_average_backward", _backward_fake)
    torch.library.register_autograd(
        "uhd_ops::tile_average", _backward, setup_context=_setup_context
    )
    torch.library.register_autograd(
        "uhd_ops::_tile_average_backward", _double_backward, setup_context=_setup_context
    )
