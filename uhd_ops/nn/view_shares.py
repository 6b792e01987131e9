# SPDX-License-Identifier: Apache-2.0
"""Views split over ranks: each encodes its own, and all get the tokens of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from uhd_ops._checks import check_positive_int
from uhd_ops.grids import Grids, PackedGrids

# Newer versions of torch warn of the older names.
_NEW = hasattr(distributed, "all_gather_single")
_all_gather = distributed.all_gather_single if _NEW else distributed.all_gather_into_tensor
_reduce_scatter = distributed.reduce_scatter_single if _NEW else distributed.reduce_scatter_tensor


class ViewShares:
    """Which views of a packed sequence each rank of a process group encodes.

    Views do not see each other before the language model, so the ranks of a group that works on
    one sequence, such as those of tensor parallelism, need not encode them all. Each takes a run
    of whole views, as equal in tokens as whole views allow; with fewer views than ranks, some take
    none, and their encoder runs on no tokens, so that its parameters have gradients of zero.

    The gradient of :meth:`gather` is that of the sum of the losses of all ranks, and each rank has
    the part of it that its own views contribute to the parameters of the encoder. Their mean over
    the group, which DistributedDataParallel and FSDP2 take, is the gradient of the mean loss: of
    one loss that all ranks compute alike, or of one each.

    Args:
        grids: Grids of all views, equal on all ranks.
        group: The process group; None for the default one.

    Attributes:
        grids: Grids of the views of each rank, PackedGrids in the order of the ranks.
        rank: This rank in the group.
        own: Its grids.

    Raises:
        TypeError: ``grids`` has no accepted form.
        RuntimeError: There is no process group, as torch says; or this rank is not in it.

    Source:
        None: the papers encode slices of one image on one device.

    Example:
        >>> store = torch.distributed.HashStore()  # torchrun and init_process_group() else
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> shares = ViewShares([(4, 6), (3, 5)])
        >>> shares.own
        PackedGrids([(4, 6), (3, 5)])
        >>> views = shares.take(torch.randn(39, 8))
        >>> tokens = shares.gather(uhd_ops.window_mean(views, shares.own), window=2)
        >>> tokens.shape
        torch.Size([12, 8])
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, grids: Grids, group: Any = None) -> None:
        grids = PackedGrids.of(grids)
        self.group, self.rank = group, distributed.get_rank(group)
        ranks = distributed.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("this process must be in group to take a share of the views")
        runs: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        before = 0
        for height, width in grids:
            tokens = height * width
            # The rank whose share of all tokens the middle of the view lies in.
            middle = (2 * before + tokens) * ranks // max(2 * grids.num_tokens, 1)
            runs[min(middle, ranks - 1)].append((height, width))
            before += tokens
        self.grids = tuple(map(PackedGrids, runs))
        self.own = self.grids[self.rank]

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """Return the rows of this rank's views, as a view of ``packed``.

        Args:
            packed: Anything with a row for each token of all views, ``(N, ...)``.

        Raises:
            TypeError: ``packed`` is not a tensor.
            ValueError: It has another number of rows.
        """
        counts = [grids.num_tokens for grids in self.grids]
        _check_rows(packed, "packed", sum(counts))
        return packed.narrow(0, sum(counts[: self.rank]), counts[self.rank])

    def gather(self, tokens: torch.Tensor, window: int = 1) -> torch.Tensor:
        """Return the tokens of all views, in their order, on every rank.

        All ranks of the group must call it.

        Args:
            tokens: Those of this rank, ``(M, ...)``.
            window: Side of the windows of patches that became one token each: the product of the
                compressor's and the connector's; 1 if nothing was merged.

        Raises:
            TypeError: ``tokens`` is not a tensor, or ``window`` not an int.
            ValueError: ``tokens`` has another number of rows than windows of this side.
        """
        window = check_positive_int(window, "window")
        counts = [grids.num_windows(window) for grids in self.grids]
        _check_rows(tokens, "tokens", counts[self.rank])
        return _Gather.apply(tokens, counts, self.rank, self.group)


def _check_rows(x: object, name: str, rows: int) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[0] != rows:
        raise ValueError(f"{name} must have {rows} rows, got shape {tuple(x.shape)}")


class _Gather(torch.autograd.Function):
    """Rows of all ranks, one rank's after the other's. A collective needs equally many of each."""

    @staticmethod
    def forward(ctx, tokens: torch.Tensor, counts: Sequence[int], rank: int, group: Any):
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        most = max(counts)
        own = _padded(tokens, most)
        everyone = own.new_empty((len(counts) * most, *own.shape[1:]))
        _all_gather(everyone, own, group=ctx.group)
        rows = zip(everyone.split(most) if most else [everyone], counts, strict=False)
        return torch.cat([some[:count] for some, count in rows])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        most = max(ctx.counts)
        everyone = torch.cat([_padded(some, most) for some in grad.split(ctx.counts)])
        own = everyone.new_empty((most, *grad.shape[1:]))
        _reduce_scatter(own, everyone, group=ctx.group)
        return own[: ctx.counts[ctx.rank]], None, None, None


def _padded(rows: torch.Tensor, number: int) -> torch.Tensor:
    padded = rows.new_zeros((number, *rows.shape[1:]))
    padded[: len(rows)] = rows
    return padded
