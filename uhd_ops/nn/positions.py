# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings: applied inside windows, and given to merged tokens.

A table holds the sine and cosine of one angle for every token and channel, as the host made it.
Inside a window the tokens keep their own rows: only differences of angles matter to attention, and
those are the host's. The merged tokens get rows of their own, derived from those of their window.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

Positions = Literal["center", "reindex"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)


class Rotary(NamedTuple):
    """Sines and cosines for tokens, each ``(..., N, 1 or H, D)`` beside queries ``(..., N, H, D)``.

    Attributes:
        sin: Sine of the angle of each token and channel.
        cos: Its cosine.
    """

    sin: torch.Tensor
    cos: torch.Tensor


def rotate(x: torch.Tensor, rotary: Rotary, rotate_half: int) -> torch.Tensor:
    """Rotate pairs of channels of ``x (..., N, H, D)``; the result has the dtype of ``x``.

    Args:
        x: Queries or keys.
        rotary: Their table.
        rotate_half: Number of equal parts of the channels; a channel pairs with the one half a part
            away from it. True is one part; False, or 0, is none: neighbours pair.
    """
    if rotate_half:
        first, second = x.unflatten(-1, (int(rotate_half), 2, -1)).unbind(-2)
        other = torch.stack([-second, first], -2).flatten(-3)
    else:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * rotary.cos + other * rotary.sin).to(x.dtype)


class Frequencies(NamedTuple):
    """How fast the channels of a table turn, for angles that may reach pi between neighbours.

    A table holds angles only up to full turns. The slowest channel of an axis turns by less than
    pi, so it tells how far its neighbours are apart, and by that what the others turn by.

    Attributes:
        ratio: Frequency of each channel over that of its axis' slowest, ``(D,)``.
        slowest: That channel, ``(D,)``.
    """

    ratio: torch.Tensor
    slowest: torch.Tensor


def merge_table(
    sin: torch.Tensor,
    cos: torch.Tensor,
    grid: tuple[int, int],
    window: int,
    positions: str,
    frequencies: Frequencies | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each merged token its sine and cosine.

    ``"center"`` takes the angle at the centre of the window's tokens: that of its central token
    where a side has an odd number of them, and of the middle between the two central ones where it
    is even, which is the direction of their mean. That is exact for angles linear in the
    coordinates as long as neighbours differ by less than pi, or by more if the frequencies are
    given. ``"reindex"`` gives merged token ``(i, j)`` the angle of token ``(i, j)``: all distances
    shrink by ``window``.

    Args:
        sin: ``(..., h * w, D)``.
        cos: Likewise.
        grid: ``(h, w)``.
        window: Side of a window, in tokens.
        positions: ``"center"`` or ``"reindex"``.
        frequencies: Needed where neighbours may differ by pi or more.

    Returns:
        Sine and cosine, ``(..., ceil(h / window) * ceil(w / window), D)``; differentiable.
    """
    height, width = grid
    sin, cos = (table.unflatten(-2, grid) for table in (sin, cos))
    if positions == "reindex":
        rows, cols = -(-height // window), -(-width // window)
        return sin[..., :rows, :cols, :].flatten(-3, -2), cos[..., :rows, :cols, :].flatten(-3, -2)
    dtype = sin.dtype
    sin, cos = (table.to(torch.promote_types(dtype, torch.float32)) for table in (sin, cos))
    for _ in grid:  # columns, then rows
        sin, cos = _merge_columns(sin, cos, window, frequencies)
        sin, cos = sin.transpose(-3, -2), cos.transpose(-3, -2)
    length = torch.hypot(sin, cos)
    return tuple((table / length).to(dtype).flatten(-3, -2) for table in (sin, cos))


def _merge_columns(
    sin: torch.Tensor, cos: torch.Tensor, window: int, frequencies: Frequencies | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the two central columns of every window; ``(..., h, w, D)``.

    With frequencies, each is turned to the middle first, so that what is added points the same way.
    """
    side = sin.shape[-2]
    starts = torch.arange(0, side, window, device=sin.device)
    last = (starts + window).clamp(max=side) - 1
    low, high = (starts + last) // 2, (starts + last + 1) // 2
    sin_low, cos_low = sin.index_select(-2, low), cos.index_select(-2, low)
    sin_high, cos_high = sin.index_select(-2, high), cos.index_select(-2, high)
    if frequencies is None or side == 1:
        return sin_low + sin_high, cos_low + cos_high
    turn = _step(sin, cos, frequencies) * ((high - low) / 2)[:, None]
    turn_sin, turn_cos = turn.sin(), turn.cos()
    return (
        (sin_low + sin_high) * turn_cos + (cos_low - cos_high) * turn_sin,
        (cos_low + cos_high) * turn_cos + (sin_high - sin_low) * turn_sin,
    )


def _step(sin: torch.Tensor, cos: torch.Tensor, frequencies: Frequencies) -> torch.Tensor:
    """Angle between the first two columns of the first row, ``(..., 1, 1, D)``, beyond pi too."""
    sin, cos = (table[..., :1, :2, :][..., frequencies.slowest] for table in (sin, cos))
    sin_first, sin_second = sin.split(1, -2)
    cos_first, cos_second = cos.split(1, -2)
    angle = torch.atan2(
        sin_second * cos_first - cos_second * sin_first,
        cos_second * cos_first + sin_second * sin_first,
    )
    return angle * frequencies.ratio.to(angle.dtype)
