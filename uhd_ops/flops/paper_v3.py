# SPDX-License-Identifier: Apache-2.0
"""What progressive compression costs by side of a patch, and what LLaVA-UHD v3 published of it.

The paper refines the patch embedding from 16 to 12, 10 and 8 px and merges tokens inside the
encoder. It publishes the numbers of tokens of one such encoder, ViT-UHD, and no operations.
"""

from __future__ import annotations

import dataclasses

from uhd_ops._checks import check_positive_int
from uhd_ops.flops.count import SIGLIP_SO400M, count_vit
from uhd_ops.nn.early_compressor import CompressorConfig

PUBLISHED_TOKENS = {512: 163, 768: 368, 1024: 655}
"""Tokens that ViT-UHD (patches of 10 px, "4-18") hands on, by the side of the image in px."""
PATCHES = (16, 12, 10, 8)
# Blocks count from 1. The released code compares indices from 0, so its "4-18" may be our "5-19";
# of 27 blocks, "4-18-27" can only count from 1.
MERGES = {"none": (), "4-18": (3, 17), "5-19": (4, 18), "4-18-27": (3, 17, 26)}


@dataclasses.dataclass(frozen=True)
class V3Row:
    """One encoder of the sizes of MoonViT on a square image.

    Args:
        patch: Side of a patch in px.
        merges: After which blocks tokens are merged: a key of ``MERGES``.
        side: Side of the image in px, before it is rounded down to whole windows.
    """

    patch: int
    merges: str
    side: int

    @property
    def layers(self) -> tuple[int, ...]:
        """0-based blocks after which a compressor merges 2 x 2 tokens."""
        return MERGES[self.merges]

    @property
    def grid(self) -> tuple[int, int]:
        """Patch grid of as many whole windows as fit; without merges, of a 2 x 2 connector's."""
        unit = 2 ** max(1, len(self.layers))
        cells = self.side // (self.patch * unit) * unit
        return cells, cells

    @property
    def tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def merged_tokens(self) -> int:
        """Tokens that leave the encoder."""
        return self.tokens // 4 ** len(self.layers)

    @property
    def released(self) -> float:
        """1e9 multiply-accumulates, the pooling as the released code computes it."""
        return self._giga(concatenate=True)

    @property
    def computed(self) -> float:
        """1e9 multiply-accumulates with :class:`uhd_ops.nn.WindowTokenCompressor`."""
        return self._giga(concatenate=False)

    def _giga(self, concatenate: bool) -> float:
        vit = dataclasses.replace(SIGLIP_SO400M, patch=self.patch)
        pools = CompressorConfig(self.layers, pool="adaptive") if self.layers else None
        return count_vit(vit, [self.grid], pools, concatenate=concatenate).giga


def v3_rows(side: int = 1024) -> tuple[V3Row, ...]:
    """Return the encoders of LLaVA-UHD v3: each side of a patch with each list of merges.

    Args:
        side: Side of a square image in px; at least 128, so that every encoder has a window.

    Returns:
        First MoonViT, with patches of 14 px and nothing merged, then patches of 16, 12, 10 and 8
        px, each without merges, with ViT-UHD's "4-18" in both ways to read it, and with "4-18-27".

    Raises:
        TypeError: ``side`` is not an int.
        ValueError: ``side`` is below 128.

    Source:
        LLaVA-UHD v3, sections on the refined patch embedding and on windowed token compression.

    Example:
        >>> moonvit, *others = v3_rows(1024)
        >>> vit_uhd = others[9]
        >>> vit_uhd.patch, vit_uhd.merges, vit_uhd.merged_tokens
        (10, '4-18', 625)
        >>> round(moonvit.released), round(vit_uhd.released)
        (3806, 2412)
    """
    if check_positive_int(side, "side") < 128:
        raise ValueError(f"side must be at least 128, got {side}")
    moonvit = V3Row(SIGLIP_SO400M.patch, "none", side)
    return moonvit, *(V3Row(patch, merges, side) for patch in PATCHES for merges in MERGES)
