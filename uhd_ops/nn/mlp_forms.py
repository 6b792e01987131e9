# SPDX-License-Identifier: Apache-2.0
"""Exact conversions between the weight forms of :func:`uhd_ops.pixel_unshuffle_mlp`.

Every tied MLP is a block MLP, and every block MLP is a dense one. The way back exists only for
weights that have the structure of the smaller form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from uhd_ops.ops.pixel_unshuffle_mlp import mlp_form
from uhd_ops.ops.tile_weight import tile_average, tile_block_diagonal, tile_vector

FORMS = ("dense", "block", "tied")


class MlpWeights(NamedTuple):
    """Weights of one MLP in any form; the biases may be None.

    Attributes:
        fc1_weight: ``(J, f²C)`` dense, ``(f², I, C)`` block, ``(I, C)`` tied.
        fc1_bias: ``(J,)`` dense, ``(f², I)`` block, ``(I,)`` tied.
        fc2_weight: ``(C_out, J)`` dense, ``(f², C_out, I)`` block, ``(C_out, I)`` tied.
        fc2_bias: ``(C_out,)`` in every form.
    """

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor | None
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor | None


def form_of(weights: MlpWeights, *, factor: int = 2, channels: int | None = None) -> str:
    """Name the form of ``weights``: ``"dense"``, ``"block"`` or ``"tied"``.

    Args:
        weights: Weights in any form.
        factor: Side f of a window, in tokens.
        channels: C, the channels of one token; None means C_out, as with a residual. It tells
            dense ``(J, f²C)`` from tied ``(I, C)``. With ``factor=1`` both are dense.

    Raises:
        ValueError: The shapes are no weight form.
    """
    channels = weights.fc2_weight.shape[-2] if channels is None else channels
    form = mlp_form(weights.fc1_weight, channels, factor)
    if form is None or not _shapes_agree(weights):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in weights]
        raise ValueError(
            f"weights must be dense, block or tied for C = {channels} and factor = {factor}, "
            f"got shapes {shapes}"
        )
    return form


def convert_mlp(
    weights: MlpWeights, form: str, *, factor: int = 2, channels: int | None = None
) -> MlpWeights:
    """Return the same network in another form; differentiable by ``torch.autograd``.

    Towards dense, the result computes what ``weights`` compute: every value is copied, and from
    tied on fc2 is divided by f², without rounding for ``factor`` 1, 2, 4, ... unless it underflows.
    From tied to dense is the reuse initialisation. Towards tied, the conversion succeeds only if
    converting back gives the same weights bit for bit. It compares values, so it waits for a device
    that holds them.

    Args:
        weights: Weights in any form.
        form: The form to return: ``"dense"``, ``"block"`` or ``"tied"``.
        factor: Side f of a window, in tokens.
        channels: C, as for :func:`form_of`.

    Returns:
        Weights in ``form``; ``weights`` itself where it has that form. fc2's bias is shared.

    Raises:
        ValueError: ``form`` is unknown, the shapes are no weight form, or the network is not
            exactly representable in ``form``.

    Example:
        >>> tied = MlpWeights(torch.randn(12, 4), torch.randn(12), torch.randn(4, 12), None)
        >>> dense = convert_mlp(tied, "dense")
        >>> dense.fc1_weight.shape, torch.equal(convert_mlp(dense, "tied").fc2_weight, tied[2])
        (torch.Size([48, 16]), True)
    """
    if form not in FORMS:
        raise ValueError(f'form must be "dense", "block" or "tied", got {form!r}')
    have = form_of(weights, factor=factor, channels=channels)
    if factor == 1 and form == "tied" and have == "dense":
        return weights  # the same network and the same shapes
    if have == "tied" and form == "dense":
        return tied_to_dense(weights, factor=factor)
    # Every other conversion is a walk along dense - block - tied.
    while have != form:
        if have == "tied":
            weights, have = tied_to_block(weights, factor=factor), "block"
        elif have == "dense":
            weights, have = dense_to_block(weights, factor=factor), "block"
        elif form == "dense":
            weights, have = block_to_dense(weights), "dense"
        else:
            weights, have = block_to_tied(weights), "tied"
    return weights


def tied_to_dense(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Put the one FFN on the diagonal of fc1 and, divided by f², side by side in fc2."""
    patches = factor**2
    return MlpWeights(
        tile_block_diagonal(weights.fc1_weight, patches),
        None if weights.fc1_bias is None else tile_vector(weights.fc1_bias, patches),
        tile_average(weights.fc2_weight, patches),
        weights.fc2_bias,
    )


def tied_to_block(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Repeat the one FFN for every patch; fc2 / f² turns the sum over patches into the mean."""
    patches = factor**2

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tile_vector(tensor.flatten(), patches).view(patches, *tensor.shape)

    fc1_bias = None if weights.fc1_bias is None else repeat(weights.fc1_bias)
    return MlpWeights(
        repeat(weights.fc1_weight), fc1_bias, repeat(weights.fc2_weight / patches), weights.fc2_bias
    )


def block_to_dense(weights: MlpWeights) -> MlpWeights:
    """Put fc1's blocks on the diagonal and fc2's blocks side by side."""
    fc1_bias = None if weights.fc1_bias is None else weights.fc1_bias.flatten()
    return MlpWeights(
        torch.block_diag(*weights.fc1_weight),
        fc1_bias,
        torch.cat(tuple(weights.fc2_weight), 1),
        weights.fc2_bias,
    )


def dense_to_block(weights: MlpWeights, *, factor: int = 2) -> MlpWeights:
    """Take the blocks of a block-diagonal fc1; ValueError where another entry is not zero."""
    patches = factor**2
    rows, columns = weights.fc1_weight.shape
    if rows % patches or columns % patches:
        raise ValueError(
            f"fc1_weight of shape {(rows, columns)} does not divide into {patches} diagonal blocks"
        )
    fc1_bias = None if weights.fc1_bias is None else weights.fc1_bias.unflatten(0, (patches, -1))
    tiles = weights.fc1_weight.unflatten(1, (patches, columns // patches))
    tiles = tiles.unflatten(0, (patches, rows // patches))  # (f², I, f², C)
    block = MlpWeights(
        torch.stack([tiles[p, :, p] for p in range(patches)]),
        fc1_bias,
        torch.stack(weights.fc2_weight.chunk(patches, 1)),
        weights.fc2_bias,
    )
    _check_exact(block_to_dense(block), weights, "block", "fc1_weight is not block-diagonal")
    return block


def block_to_tied(weights: MlpWeights) -> MlpWeights:
    """Take the one FFN that all patches share; ValueError where the blocks differ."""
    patches = weights.fc1_weight.shape[0]
    tied = MlpWeights(
        weights.fc1_weight[0],
        None if weights.fc1_bias is None else weights.fc1_bias[0],
        weights.fc2_weight[0] * patches,
        weights.fc2_bias,
    )
    back = tied_to_block(tied, factor=round(patches**0.5))
    _check_exact(back, weights, "tied", "the patches have different blocks")
    return tied


def _check_exact(back: MlpWeights, weights: MlpWeights, form: str, reason: str) -> None:
    for converted, original in zip(back, weights, strict=True):
        if original is not None and not torch.equal(converted, original):
            raise ValueError(f"weights have no exact {form} form: {reason}")


def _shapes_agree(weights: MlpWeights) -> bool:
    fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
    *blocks, hidden, _ = fc1_weight.shape
    return (
        fc2_weight.dim() == fc1_weight.dim()
        and (*fc2_weight.shape[:-2], fc2_weight.shape[-1]) == (*blocks, hidden)
        and (fc1_bias is None or fc1_bias.shape == (*blocks, hidden))
        and (fc2_bias is None or fc2_bias.shape == fc2_weight.shape[-2:-1])
    )
