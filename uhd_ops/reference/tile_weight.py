# SPDX-License-Identifier: Apache-2.0
"""Definitions of the operators that repeat a weight."""

from __future__ import annotations

import torch


def tile_block_diagonal(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_block_diagonal`."""
    return torch.block_diag(*_wide(weight).expand(tiles, *weight.shape)).to(weight.dtype)


def tile_average(weight: torch.Tensor, tiles: int) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_average`."""
    return (_wide(weight).repeat(1, tiles) / tiles).to(weight.dtype)


def tile_vector(vector: torch.Tensor, tiles: int) -> torch.Tensor:
    """Plain PyTorch, any float dtype; arguments as :func:`uhd_ops.tile_vector`."""
    return _wide(vector).repeat(tiles).to(vector.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the type that its gradient is added up in: half types in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
