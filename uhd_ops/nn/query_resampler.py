# SPDX-License-Identifier: Apache-2.0
"""The connector that pixel-unshuffle replaced: learned queries that attend to a view."""

from __future__ import annotations

import functools

import torch
from torch import nn

from uhd_ops._cache import to_device
from uhd_ops._checks import check_finite, check_positive_int
from uhd_ops.grids import Grids, PackedGrids, is_single_pair
from uhd_ops.windows import check_tokens


class QueryResampler(nn.Module):
    """Turn each view into a fixed number of tokens of the language model.

    With the tokens X of a view and their 2-D sine-cosine embedding P, which is float32 as in the
    released model::

        K = ln_kv(kv_proj(X))
        Y = attention(ln_q(query), K + P, K)        query: (Q, D), learned
        out = ln_post(Y) @ proj

    Every view gives Q tokens, however large it is. The baseline against which LLaVA-UHD measures
    its connectors; spatial order is lost, which pixel-unshuffle keeps.

    Args:
        dim: Channels C of a visual token.
        out_dim: Channels D of a token of the language model; a multiple of 4.
        num_queries: Tokens Q per view.
        num_heads: Attention heads; None means ``out_dim // 128``, as released, but at least one.
        eps: Of the norms.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A size is below 1, ``out_dim`` no multiple of 4 and of ``num_heads``, or ``eps``
            negative.

    Shape:
        x: ``(N, C)`` packed tokens, or ``(B, h*w, C)`` with one ``(h, w)`` grid.
        Result: ``(S, Q, out_dim)`` for S views, or ``(B, Q, out_dim)``.

    Source:
        The resampler of MiniCPM-V 2.5 and 2.6, whose parameter names and shapes these are;
        LLaVA-UHD v1 and v4 compare with it.

    Example:
        >>> resampler = QueryResampler(dim=32, out_dim=64, num_queries=16)
        >>> resampler(torch.randn(4 * 6 + 3 * 5, 32), [(4, 6), (3, 5)]).shape
        torch.Size([2, 16, 64])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        num_queries: int = 64,
        num_heads: int | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = check_positive_int(dim, "dim")
        out_dim = check_positive_int(out_dim, "out_dim")
        num_queries = check_positive_int(num_queries, "num_queries")
        num_heads = max(1, out_dim // 128) if num_heads is None else num_heads
        num_heads = check_positive_int(num_heads, "num_heads")
        if out_dim % 4 or out_dim % num_heads:
            raise ValueError(
                f"out_dim must be a multiple of 4 and of num_heads = {num_heads}, got {out_dim}"
            )
        if check_finite(eps, "eps") < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        factory = {"device": device, "dtype": dtype}
        norm = functools.partial(nn.LayerNorm, out_dim, eps, **factory)
        self.dim, self.out_dim, self.num_queries = dim, out_dim, num_queries
        self.query = nn.Parameter(torch.empty(num_queries, out_dim, **factory))
        nn.init.trunc_normal_(self.query, std=0.02)
        if dim == out_dim:
            self.kv_proj = nn.Identity()
        else:
            self.kv_proj = nn.Linear(dim, out_dim, bias=False, **factory)
        self.attn = nn.MultiheadAttention(out_dim, num_heads, batch_first=True, **factory)
        self.ln_q, self.ln_kv, self.ln_post = norm(), norm(), norm()
        self.proj = nn.Parameter(torch.empty(out_dim, out_dim, **factory))
        nn.init.normal_(self.proj, std=out_dim**-0.5)

    def forward(self, x: torch.Tensor, grids: Grids) -> torch.Tensor:
        """Resample packed or batched tokens.

        Args:
            x: Tokens ``(N, C)``, or ``(B, h*w, C)`` with one grid; no class or register tokens.
            grids: Their grids; every view must hold a token.

        Returns:
            ``(S, Q, out_dim)``, or ``(B, Q, out_dim)``.

        Raises:
            TypeError: ``x`` is not a tensor of a floating dtype, or ``grids`` has no accepted form.
            ValueError: ``x`` has another number of tokens or channels, or a view is empty.
        """
        check_tokens(x, grids, 1, self.dim)
        if x.dim() == 3 and is_single_pair(grids):
            pairs, views, absent = PackedGrids.of(grids), x, None
        else:
            pairs = PackedGrids.of(grids)
            views, absent = _padded(x, pairs)
        if any(0 in pair for pair in pairs):
            raise ValueError(f"grids must not hold an empty view, got {list(pairs)}")
        keys = self.ln_kv(self.kv_proj(views))
        tables = {pair: sincos_2d(pair, self.out_dim, x.device) for pair in dict.fromkeys(pairs)}
        positions = [tables[pair] for pair in pairs]
        positions = nn.utils.rnn.pad_sequence(positions, batch_first=True) if positions else keys
        query = self.ln_q(self.query).expand(len(views), -1, -1)
        out, _ = self.attn(
            query,
            keys + positions.to(keys.dtype),
            keys,
            key_padding_mask=absent,
            need_weights=False,
        )
        return self.ln_post(out) @ self.proj

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"dim={self.dim}, out_dim={self.out_dim}, num_queries={self.num_queries}"


def sincos_2d(grid: tuple[int, int], dim: int, device: torch.device | str) -> torch.Tensor:
    """Return the sine-cosine embedding ``(h * w, dim)`` of a grid, float32.

    The first half of the channels embeds the column, the second the row; in each half sines come
    before cosines, of frequencies from 1 down to 1 / 10000.
    """
    quarter = dim // 4
    # Computed on the device, which nothing has to wait for; MPS knows no float64.
    wide = {
        "dtype": torch.float64,
        "device": None if torch.device(device).type == "mps" else device,
    }
    frequencies = 10000.0 ** (-torch.arange(quarter, **wide) / quarter)
    angles = (torch.arange(side, **wide)[:, None] * frequencies for side in grid)
    axes = (torch.cat([angle.sin(), angle.cos()], 1).float() for angle in angles)
    rows, columns = (to_device(axis, device) for axis in axes)
    shape = *grid, 2 * quarter
    return torch.cat([columns.expand(shape), rows[:, None].expand(shape)], 2).flatten(0, 1)


def _padded(x: torch.Tensor, grids: PackedGrids) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed tokens as ``(S, L, C)``, and where there are none."""
    lengths = [height * width for height, width in grids]
    if not lengths:
        return x.new_zeros((0, 1, x.shape[-1])), None
    views = nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
    slots = torch.arange(views.shape[1], device=x.device)
    return views, slots >= grids.cu_seqlens(x.device).diff()[:, None]
