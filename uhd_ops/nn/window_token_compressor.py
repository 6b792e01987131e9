# SPDX-License-Identifier: Apache-2.0
"""The windowed token compressor of LLaVA-UHD v3: pooling, content-adaptive or plain."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from uhd_ops import _native
from uhd_ops._checks import check_positive_int, is_plain
from uhd_ops.grids import Grids
from uhd_ops.ops.pixel_unshuffle import pixel_unshuffle
from uhd_ops.ops.window_mean import window_mean
from uhd_ops.ops.window_pool import window_pool
from uhd_ops.windows import Windows, check_tokens, parsed

Pool = Literal["adaptive", "mean", "unshuffle"]
POOLS: tuple[Pool, ...] = get_args(Pool)


class WindowTokenCompressor(nn.Module):
    """Merge each window of tokens into one by pooling.

    ``pool="adaptive"``: with the tokens x_i of a window and their mean m::

        z_i = fc2(gelu(fc1([x_i ; m])))
        y[c] = sum_i softmax_i(z_i[c]) * x_i[c]             the softmax is over the window

    ``fc2`` starts at zero, so the module starts as :func:`uhd_ops.window_mean`, with the kernels
    bit for bit. ``fc1`` does not: with both at zero no gradient would ever reach either.
    ``fc1 [x_i ; m]`` is computed as the sum of two products, one with the tokens and one with the
    means, of which there are f² times fewer; nothing is concatenated.

    ``pool="mean"`` is the mean of a window, without parameters; ``pool="unshuffle"`` is
    ``fc2(gelu(fc1(z)))`` of the concatenated tokens z of a window, without norm and residual.

    Args:
        dim: Channels C of a token.
        pool: ``"adaptive"``, ``"mean"`` or ``"unshuffle"``.
        hidden_dim: Hidden channels of the MLP; None means C. The released variants have C, 4C and
            C / 2.
        window: Side f of a window, in tokens.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``pool`` is unknown, a size is below 1, or ``window`` below 2.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one ``(h, w)`` grid.
        Result: ``(M, C)`` merged tokens, or ``(B, M / B, C)``.

    Source:
        LLaVA-UHD v3, windowed token compression.

    Example:
        >>> compressor = WindowTokenCompressor(dim=32)
        >>> x, grids = torch.randn(4 * 6 + 3 * 5, 32), [(4, 6), (3, 5)]
        >>> compressor(x, grids).shape
        torch.Size([12, 32])
    """

    def __init__(
        self,
        dim: int,
        *,
        pool: Pool = "adaptive",
        hidden_dim: int | None = None,
        window: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = dim if hidden_dim is None else hidden_dim
        dim = check_positive_int(dim, "dim")
        hidden_dim = check_positive_int(hidden_dim, "hidden_dim")
        window = check_positive_int(window, "window")
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        if pool not in POOLS:
            raise ValueError(f'pool must be "adaptive", "mean" or "unshuffle", got {pool!r}')
        self.dim, self.pool, self.window = dim, pool, window
        factory = {"device": device, "dtype": dtype}
        if pool == "adaptive":
            self.fc1 = nn.Linear(2 * dim, hidden_dim, **factory)
            self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        elif pool == "unshuffle":
            self.fc1 = nn.Linear(window**2 * dim, hidden_dim, **factory)
            self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self._zero_last()

    def reuse_(self, block: object = None) -> WindowTokenCompressor:
        """Initialise the compressor again, in place; it takes nothing from a block.

        Args:
            block: Ignored; there so that every compressor is initialised by the same call.

        Returns:
            The compressor itself. The adaptive pooling starts as the mean of a window again.
        """
        for layer in self.children():
            layer.reset_parameters()
        self._zero_last()
        return self

    def _zero_last(self) -> None:
        """Make all weights of the adaptive pooling equal."""
        if self.pool == "adaptive":
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

    def forward(self, x: torch.Tensor, grids: Grids, positions: object = None) -> torch.Tensor:
        """Merge the windows of packed or batched tokens.

        Args:
            x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid; no class or register tokens.
            grids: Their grids.
            positions: Ignored, since pooling has no attention; there so that every compressor is
                called alike.

        Returns:
            Merged tokens ``(M, C)``, or ``(B, M / B, C)``, on the grids
            ``PackedGrids(grids).merged(window)``.

        Raises:
            TypeError: ``x`` is not a tensor of a floating dtype, or ``grids`` has no accepted form.
            ValueError: ``x`` has another number of tokens or channels.
        """
        grids = parsed(grids, x)
        where = check_tokens(x, grids, self.window, self.dim)
        if self.pool == "mean":
            return window_mean(x, grids, self.window)
        if self.pool == "unshuffle":
            hidden = self.fc1(pixel_unshuffle(x, grids, self.window))
            return self.fc2(functional.gelu(hidden))
        return window_pool(x, self._logits(x, grids, where), grids, self.window)

    def _logits(self, x: torch.Tensor, grids: Grids, where: Windows) -> torch.Tensor:
        """The logits of the tokens in their windows.

        ``[x_i ; m]`` is not put together unless fc1 has to be called: its weight has one half for
        the token and one for the mean, and the product with the mean is the same for a window.
        """

        def spread(windows: torch.Tensor) -> torch.Tensor:
            return where.unpack_tokens(_spread_windows(windows, where))

        mean = window_mean(x, grids, self.window).flatten(0, -2)
        if is_plain(self.fc1, nn.Linear):
            with_token, with_mean = self.fc1.weight.chunk(2, 1)
            of_mean = spread(functional.linear(mean, with_mean, self.fc1.bias))
            hidden = functional.linear(x, with_token) + of_mean
        else:
            hidden = self.fc1(torch.cat([x, spread(mean)], -1))
        return self.fc2(functional.gelu(hidden))

    def extra_repr(self) -> str:
        """Show the configuration."""
        return f"dim={self.dim}, pool={self.pool!r}, window={self.window}"


class _Spread(torch.autograd.Function):
    """Gather rows. Indexing would scatter the gradient, on CUDA in no fixed order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, window_of_token, sizes, views, window):
        return rows.index_select(0, window_of_token)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, sizes, views, ctx.window = inputs
        ctx.save_for_backward(sizes, views)

    @staticmethod
    def backward(ctx, grad):
        sizes, views = ctx.saved_tensors
        means = _native.operators.window_mean(grad, views, ctx.window, sizes.shape[0])
        return (means * sizes[:, None]).to(grad.dtype), None, None, None, None


def _spread_windows(rows: torch.Tensor, where: Windows) -> torch.Tensor:
    """Return ``(N, C)`` tokens, in raster order, each the row of its window in ``(M, C)``."""
    index = where.window_of_token()
    if not _native.has_kernels(rows.device):
        return rows.index_select(0, index)
    return _Spread.apply(rows, index, where.sizes(), where.views, where.window)
