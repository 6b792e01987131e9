# SPDX-License-Identifier: Apache-2.0
"""What is measured, the most important first, and how much work each case is. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"

ATTENTION = "window_attention"
NORM = "gather + LayerNorm + mean"
TIED, DENSE = "pixel_unshuffle_mlp tied", "pixel_unshuffle_mlp dense"
UNSHUFFLE, MEAN, POOL = "pixel_unshuffle", "window_mean", "window_pool"
TILES = "tile_block_diagonal + tile_average"

# Tokens of the sizes that are compared. 70 x 70 is one view of 980 px; its sides are no multiples
# of 8 and 16, so larger windows use the nearest grid that every rival can divide.
GRIDS = {1024: (32, 32), 4900: (70, 70), 16384: (128, 128), 32768: (128, 256)}
LARGE_WINDOW_GRIDS = {**GRIDS, 4900: (64, 80)}


@dataclass(frozen=True)
class Case:
    """One operator in one direction on one grid.

    Attributes:
        thorough: Whether the rivals that have to be compiled take part; that takes seconds each.
    """

    op: str
    direction: str
    dtype: str = "bfloat16"
    grid: tuple[int, int] = GRIDS[32768]
    window: int = 2
    thorough: bool = False
    channels: int = 1152
    heads: int = 16
    hidden: int = 4304

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def name(self) -> str:
        """What a table shows, and what is unique among the cases."""
        side = f" {self.window}x{self.window}" if self.op == ATTENTION else ""
        size = "" if self.op == TILES else f", {self.tokens}"
        return f"{self.op}{side} {self.direction}, {self.dtype}{size}"

    @property
    def bytes_moved(self) -> int:
        """Bytes that must move at least: each input read once, each output written once."""
        nc, ci = self.tokens * self.channels, self.channels * self.hidden
        merged = nc / self.window**2
        backward = self.direction == BACKWARD
        elements = {
            ATTENTION: 7 * nc if backward else 4 * nc,
            # Forward: x; z, mean. Backward: grad_z, x, grad_mean; grad_x.
            NORM: 3 * nc + merged if backward else 2 * nc + merged,
            UNSHUFFLE: 2 * nc,
            MEAN: nc + merged,
            # Forward: x, logits. Backward: the same, and a gradient of each.
            POOL: 4 * nc + merged if backward else 2 * nc + merged,
            # Backward reads the diagonal blocks only. Each of the two reads or writes 4 tiles.
            TILES: 10 * ci if backward else 22 * ci,
            TIED: self._mlp_bytes(ci * 2),
            DENSE: self._mlp_bytes(ci * 20),
        }[self.op]
        return int(elements * BYTES[self.dtype])

    def _mlp_bytes(self, weights: int) -> float:
        tokens = self.tokens * self.channels * 1.25
        return (tokens + weights) * (1 if self.direction == FORWARD else 3)

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, a multiply-add counted as two."""
        nc, passes = self.tokens * self.channels, 1 if self.direction == FORWARD else 3
        return {
            ATTENTION: (10 if self.direction == BACKWARD else 4) * nc * self.window**2,
            TIED: passes * nc * self.hidden * 5 // 2,
            DENSE: passes * nc * self.hidden * 10,
        }.get(self.op, 0)

    @property
    def compute_bound(self) -> bool:
        """Whether the ceiling that counts is the matrix product's rather than the copy's."""
        return self.op in (TIED, DENSE)


def all_cases() -> list[Case]:
    """Return every case in the order of importance; none twice."""
    cases = [*_important(), *_sizes(), *_dtypes(), *_rest()]
    return list({case.name: case for case in reversed(cases)}.values())[::-1]


def _both_ways(op: str, **options) -> list[Case]:
    second = BOTH if op in (TIED, DENSE) else BACKWARD
    return [Case(op, direction, **options) for direction in (FORWARD, second)]


def _important() -> list[Case]:
    """bfloat16 at 32768 tokens; against every rival where that decides something."""
    full = {"thorough": True}
    return [
        *_both_ways(ATTENTION, **full),
        *_both_ways(NORM, **full),
        Case(TIED, FORWARD, **full),
        *_both_ways(ATTENTION, window=8, **full),
        Case(DENSE, FORWARD, **full),
        Case(TIED, BOTH),
        Case(DENSE, BOTH),
        *_both_ways(UNSHUFFLE, **full),
        *_both_ways(MEAN, **full),
        *_both_ways(POOL, **full),
        *_both_ways(TILES, **full),
    ]


def _attention(tokens: int, **options) -> list[Case]:
    return [
        case
        for window in (2, 8, 16)
        for case in _both_ways(
            ATTENTION,
            window=window,
            grid=(GRIDS if window == 2 else LARGE_WINDOW_GRIDS)[tokens],
            **options,
        )
    ]


def _sizes() -> list[Case]:
    """bfloat16: one view of 980 px, then the largest windows, then the other sizes."""
    cases = _attention(4900)
    for op in (NORM, TIED, DENSE):
        cases += _both_ways(op, grid=GRIDS[4900])
    cases += _both_ways(ATTENTION, window=16, thorough=True)
    for tokens in (16384, 1024):
        cases += _attention(tokens)
        for op in (NORM, TIED):
            cases += _both_ways(op, grid=GRIDS[tokens])
    return cases


def _dtypes() -> list[Case]:
    """float16 and float32 at 32768 tokens."""
    return [
        case
        for dtype in ("float16", "float32")
        for case in (
            *_attention(32768, dtype=dtype),
            *_both_ways(NORM, dtype=dtype),
            *_both_ways(TIED, dtype=dtype),
        )
    ]


def _rest() -> list[Case]:
    cases = []
    for dtype in ("float16", "float32"):
        for tokens in (4900, 16384, 1024):
            cases += _attention(tokens, dtype=dtype)
            cases += _both_ways(NORM, dtype=dtype, grid=GRIDS[tokens])
    for tokens in (4900, 16384, 1024):
        for op in (UNSHUFFLE, MEAN, POOL):
            cases += _both_ways(op, grid=GRIDS[tokens])
    return cases
