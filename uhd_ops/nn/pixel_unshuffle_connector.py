# SPDX-License-Identifier: Apache-2.0
"""The connector after a vision tower: pixel-unshuffle and an MLP into the language model."""

from __future__ import annotations

import torch
from torch import nn

from uhd_ops._checks import check_finite, check_positive_int
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.mlp_forms import merge_windows
from uhd_ops.ops.pixel_unshuffle_mlp import Activation, check_activation
from uhd_ops.windows import check_tokens, parsed


class PixelUnshuffleConnector(nn.Module):
    """Merge each window of visual tokens into one token of the language model.

    A stage merges windows of side f::

        z = concatenation of the tokens of the window        (f² * C channels)
        y = fc2(activation(fc1(norm(z))))                    fc1 keeps the f² * C channels

    There are ``merger_times`` stages; each but the last returns to C channels, the last has the
    width of the language model. A ragged window, at the right or bottom edge, repeats the nearest
    token that it holds.

    With one stage and f = 2, the connector divides the number of tokens by 4. Behind a tower with
    an :class:`EarlyCompressor` that makes 16 patches per token of the language model ("16x");
    after the same tower without it, 4 ("4x"). The weights are the same in both modes.

    Args:
        dim: Channels C of a visual token.
        out_dim: Channels of a token of the language model.
        merger_times: Number of stages.
        window: Side f of a window, in tokens.
        activation: As for :func:`uhd_ops.pixel_unshuffle_mlp`; ``"gelu"`` is the one with erf.
        eps: Of the norms, which are over all f² * C channels.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: ``activation`` is unknown, a size is below 1, ``window`` below 2, or ``eps``
            negative.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one ``(h, w)`` grid.
        Result: ``(M, out_dim)`` merged tokens, or ``(B, M / B, out_dim)``.

    Source:
        The merger of MiniCPM-V 4.6 (``MiniCPMV4_6Merger`` in transformers);
        :func:`uhd_ops.integrations.transformers.connector_state_dict` reads its weights.

    Example:
        >>> connector = PixelUnshuffleConnector(dim=32, out_dim=64)
        >>> grids = PackedGrids([(4, 6), (3, 5)])
        >>> connector(torch.randn(grids.num_tokens, 32), grids).shape, connector.merged(grids)
        (torch.Size([12, 64]), PackedGrids([(2, 3), (2, 3)]))
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        merger_times: int = 1,
        window: int = 2,
        activation: Activation = "gelu",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, out_dim = check_positive_int(dim, "dim"), check_positive_int(out_dim, "out_dim")
        merger_times = check_positive_int(merger_times, "merger_times")
        window = check_positive_int(window, "window")
        _check_options(window, activation, eps)
        self.dim, self.out_dim = dim, out_dim
        self.merger_times, self.window, self.activation = merger_times, window, activation
        wide, factory = window**2 * dim, {"device": device, "dtype": dtype}
        self.stages = nn.ModuleList()
        for width in (*(dim,) * (merger_times - 1), out_dim):
            stage = nn.Module()
            stage.norm = nn.LayerNorm(wide, eps, **factory)
            stage.fc1 = nn.Linear(wide, wide, **factory)
            stage.fc2 = nn.Linear(wide, width, **factory)
            self.stages.append(stage)

    def forward(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Merge the windows of packed or batched tokens.

        Args:
            x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid; no class or register tokens.
            grids: Their grids.

        Returns:
            Merged tokens ``(M, out_dim)``, or ``(B, M / B, out_dim)``, on the grids
            ``connector.merged(grids)``.

        Raises:
            TypeError: ``x`` is not a tensor of a floating dtype, or ``grids`` has no accepted form.
            ValueError: ``x`` has another number of tokens or channels.
        """
        grids = parsed(grids, x)
        check_tokens(x, grids, self.window, self.dim)
        for stage in self.stages:
            x = merge_windows(
                x,
                grids,
                stage.norm,
                stage.fc1,
                stage.fc2,
                window=self.window,
                activation=self.activation,
                residual=False,
            )
            if self.merger_times > 1:
                grids = grids.merged(self.window)
        return x

    def merged(self, grids: Grids) -> PackedGrids:
        """Grids of the result: ``(ceil(h / f), ceil(w / f))``, ``merger_times`` times over."""
        return PackedGrids.of(grids).merged(self.window**self.merger_times)

    def extra_repr(self) -> str:
        """Show the configuration."""
        return (
            f"dim={self.dim}, out_dim={self.out_dim}, merger_times={self.merger_times}, "
            f"window={self.window}, activation={self.activation!r}"
        )


def _check_options(window: int, activation: str, eps: float) -> None:
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    check_activation(activation)
    if check_finite(eps, "eps") < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
