# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`uhd_ops.view_attention`."""

from __future__ import annotations

import torch

from uhd_ops.reference._windows import Grids, packed, unpacked


def view_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.view_attention`."""
    q, pairs, batch = packed(q, grids, 2)
    k, v = packed(k, grids, 2)[0], packed(v, grids, 2)[0]
    scale = (q.shape[-1] or 1) ** -0.5
    views, start = [], 0
    for height, width in pairs:
        view = slice(start, start + height * width)
        scores = torch.einsum("ihd,jhd->hij", q[view], k[view]) * scale
        views.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[view]))
        start = view.stop
    return unpacked(torch.cat(views) if views else q * k * v, grids, batch)
