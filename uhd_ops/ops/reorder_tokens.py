# SPDX-License-Identifier: Apache-2.0
"""The tokens of each view in another order."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, reference, windows
from uhd_ops.grids import Grids
from uhd_ops.padded_grids import PaddedGrids
from uhd_ops.windows import TokenOrder


def reorder_tokens(
    x: torch.Tensor,
    grids: Grids,
    order: TokenOrder = "raster",
    *,
    order_in: TokenOrder = "raster",
) -> torch.Tensor:
    """Put the tokens of each view into another order; views stay where they are.

    An order is the sides of nested blocks, from the outermost to the innermost:

    ============  =================================================================================
    order         tokens of a view
    ============  =================================================================================
    ``"raster"``  row by row; the order of every tensor of this library unless it says otherwise
    ``"block"``   2 x 2 blocks in raster order, the tokens of a block in raster order: what the
                  processors of Qwen2-VL and its successors return. The same as ``(2,)``
    ``(8, 2)``    8 x 8 blocks in raster order, each of them ordered by 2 x 2 blocks: what the
                  layers of Qwen2.5-VL see (112 px windows of 14 px patches)
    ============  =================================================================================

    Operators with windows also take ``"window"``: blocks of their own window's side. Blocks at the
    right and bottom edge of a view may be ragged; no side needs to divide another.

    Nothing is computed, so the result has the dtype of ``x`` under autocast too. The backward pass
    puts the gradient back into the order of ``x``. The index is made once for PackedGrids and
    device, and kept with them.

    Args:
        x: Tokens ``(N, C)`` of packed views, or ``(B, h*w, C)`` with one ``(h, w)`` grid. float32,
            float64, bfloat16 or float16.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        order: Order of the result, as in the table.
        order_in: Order of ``x``, likewise.

    Returns:
        Tensor with the shape and dtype of ``x``, contiguous.

    Raises:
        TypeError: ``x``, ``grids`` or an order has the wrong type, or ``x`` none of the four
            dtypes.
        ValueError: Shape and grids do not fit, or the sides of an order do not shrink.

    Source:
        The orders are those of Qwen2VLImageProcessor and Qwen2_5_VisionTransformerPretrainedModel
        in transformers.

    Example:
        >>> x = torch.arange(8.0)[:, None]
        >>> reorder_tokens(x, (2, 4), "block").flatten()
        tensor([0., 1., 4., 5., 2., 3., 6., 7.])
    """
    _checks.check_tensor(x, "x")
    sides = windows.check_order(order, "order")
    sides_in = windows.check_order(order_in, "order_in")
    # Any table says where the views are; padded ones have those of their window sides alone.
    side = grids.windows[0] if isinstance(grids, PaddedGrids) else 1
    where = windows.locate(x, "x", grids, side, ("C",))
    if not _native.has_kernels(x.device):
        return reference.reorder_tokens(x, grids, order, order_in=order_in)
    out = windows.reorder(where.pack(x), where, sides_in, sides)
    if where.grids is None:
        beyond = torch.arange(len(out), device=out.device) >= where.views[-1, 0]
        out = out.masked_fill(beyond[:, None], 0)
    return where.unpack_tokens(out)
