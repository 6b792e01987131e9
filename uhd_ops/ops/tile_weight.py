# SPDX-License-Identifier: Apache-2.0
"""A weight laid out several times in a larger one: what a reused MLP starts from.

Three public functions stand on one native operator, ``uhd_ops::tile_weight``, one mode each.
"""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference


def tile_block_diagonal(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Repeat ``weight`` as the diagonal blocks of a matrix that is zero elsewhere.

    It applies one linear map to each of ``tiles`` tokens that stand side by side. The backward pass
    adds up the gradients of the diagonal blocks. Nothing is computed in the forward pass, so the
    result has the dtype of ``weight`` under autocast too.

    Args:
        weight: ``(O, I)``: float32, float64, bfloat16 or float16; gradients of half types add up
            in float32 or wider and round at the store.
        tiles: Number of blocks.

    Returns:
        ``(tiles * O, tiles * I)`` with the dtype of ``weight``, contiguous.

    Raises:
        TypeError: ``weight`` or ``tiles`` has the wrong type, or ``weight`` none of the four
            dtypes.
        ValueError: ``weight`` does not have two dimensions, or ``tiles < 1``.

    Source:
        LLaVA-UHD v4, section 3.2: the first projection of the reused MLP.

    Example:
        >>> tile_block_diagonal(torch.tensor([[1.0, 2.0]]), 2)
        tensor([[1., 2., 0., 0.],
                [0., 0., 1., 2.]])
    """
    return _tile(weight, tiles, "block_diagonal")


def tile_average(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Repeat ``weight`` side by side, along its inputs, and divide it by ``tiles``.

    For two tiles the result is ``[W | W] / 2``. It applies one linear map to each of ``tiles``
    tokens that stand side by side, and averages the results. The backward pass averages the
    gradients of the tiles. The result has the dtype of ``weight`` under autocast too.

    Args:
        weight: ``(O, I)``: float32, float64, bfloat16 or float16; half types are divided in float32
            and rounded once, at the store. Gradients add up as for :func:`tile_block_diagonal`, and
            are divided last.
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
    return _tile(weight, tiles, "average")


def tile_vector(vector: torch.Tensor, tiles: int) -> torch.Tensor:
    """Repeat ``vector`` ``tiles`` times, end to end.

    The backward pass adds up the gradients of the tiles. Nothing is computed in the forward pass,
    so the result has the dtype of ``vector`` under autocast too.

    Args:
        vector: ``(I,)``: float32, float64, bfloat16 or float16; gradients add up as for
            :func:`tile_block_diagonal`.
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
    return _tile(vector, tiles, "repeat")


def _tile(weight, tiles, mode):
    name, shape = ("vector", "(I,)") if mode == "repeat" else ("weight", "(O, I)")
    _checks.check_tensor(weight, name)
    tiles = _checks.check_positive_int(tiles, "tiles")
    if weight.dim() != (1 if mode == "repeat" else 2):
        raise ValueError(f"{name} must be {shape}, got shape {tuple(weight.shape)}")
    if not _native.has_kernels(weight.device):
        public = "tile_vector" if mode == "repeat" else f"tile_{mode}"
        return getattr(reference, public)(weight, tiles)
    return _native.operators.tile_weight(weight, tiles, mode)


def _times(tiles, mode):
    """How many times larger every dimension becomes."""
    return {"block_diagonal": (tiles, tiles), "average": (1, tiles), "repeat": (tiles,)}[mode]


def _fake(weight, tiles, mode):
    pairs = zip(weight.shape, _times(tiles, mode), strict=True)
    return weight.new_empty([size * times for size, times in pairs])


def _backward_fake(grad_out, tiles, mode):
    pairs = zip(grad_out.shape, _times(tiles, mode), strict=True)
    return grad_out.new_empty([size // times for size, times in pairs])


def _setup_context(ctx, inputs, output):
    _, ctx.tiles, ctx.mode = inputs


def _backward(ctx, grad_out):
    grad_weight = _native.operators._tile_weight_backward(grad_out, ctx.tiles, ctx.mode)
    return grad_weight, None, None


# The operator is linear, so the derivative of its backward pass is its forward pass.
def _double_backward(ctx, grad_grad_weight):
    return _native.operators.tile_weight(grad_grad_weight, ctx.tiles, ctx.mode), None, None


def _rules(weight, tiles, mode):
    return [({"weight": "sum"}, ["sum"]), *([({"weight": 0}, [0])] if mode == "average" else [])]


def _backward_rules(grad_out, tiles, mode):
    rows = [({"grad_out": 0}, [0])] if mode == "average" else []
    return [({"grad_out": "sum"}, ["sum"]), *rows]


_native.register(
    "tile_weight",
    _fake,
    _backward_fake,
    _backward,
    _setup_context,
    twice=(_double_backward, _setup_context),
    sharding=(_rules, _backward_rules),
)
