# SPDX-License-Identifier: Apache-2.0
"""What was inserted into a model: the options, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from uhd_ops._checks import check_int, check_positive_int
from uhd_ops.nn.block_spec import BlockSpec
from uhd_ops.nn.checks import check_reusable
from uhd_ops.nn.early_compressor import EarlyCompressor, check_options
from uhd_ops.nn.positions import POSITIONS
from uhd_ops.nn.window_token_compressor import WindowTokenCompressor


@dataclass(frozen=True)
class EarlyCompressorConfig:
    """Options of one early compressor.

    Attributes:
        layer: 0-based index of the block after whose body the compressor runs.
        attention: Whether tokens attend inside their window before they are merged, or which query
            attends to its window.
        mlp: Where the MLP comes from: "reuse", "plain" or "none".
        form: Its weight form: "dense", "block" or "tied".
        window: Side of a window, in tokens.
        positions: Positions of merged tokens: "center" or "reindex".
        removed_by: The function that undoes the insertion.
    """

    layer: int
    attention: bool | str
    mlp: str
    form: str
    window: int
    positions: str = "center"

    removed_by: ClassVar[str] = "remove_early_compressor"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", check_int(self.layer, "layer"))
        window = check_options(self.window, self.form, self.attention, self.mlp)
        object.__setattr__(self, "window", window)
        _check_positions(self.positions)

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks after which tokens are merged, 0-based."""
        return (self.layer,)

    def build(self, host: BlockSpec) -> EarlyCompressor:
        """Make the compressor of a block."""
        return EarlyCompressor.from_host(
            host, window=self.window, form=self.form, attention=self.attention, mlp=self.mlp
        )

    def check_depth(self, depth: int) -> None:
        """Check ``layer`` against the number of blocks of a model."""
        if not 0 <= self.layer < depth:
            raise ValueError(
                f"layer must be in 0..{depth - 1} for a model of {depth} blocks, got {self.layer}"
            )


@dataclass(frozen=True)
class ProgressiveCompressionConfig:
    """Options of progressive compression.

    Attributes:
        layers: Numbers of blocks in front of each merge.
        pool: How a window becomes one token: "adaptive", "mean" or "unshuffle".
        hidden_dim: Hidden channels of the pooling's MLP, or None for its default.
        window: Side of a window, in tokens.
        positions: Positions of merged tokens: "center" or "reindex".
        removed_by: The function that undoes the insertion.
    """

    layers: tuple[int, ...]
    pool: str
    hidden_dim: int | None
    window: int
    positions: str = "center"

    removed_by: ClassVar[str] = "remove_progressive_compression"

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Sequence) or isinstance(self.layers, str):
            raise TypeError(f"layers must be a sequence of ints, got {type(self.layers).__name__}")
        layers = (check_positive_int(n, f"layers[{i}]") for i, n in enumerate(self.layers))
        object.__setattr__(self, "layers", tuple(layers))
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend, with at least one, got {self.layers}")
        object.__setattr__(self, "window", check_positive_int(self.window, "window"))
        if self.hidden_dim is not None:
            hidden_dim = check_positive_int(self.hidden_dim, "hidden_dim")
            object.__setattr__(self, "hidden_dim", hidden_dim)
        _check_positions(self.positions)
        self._make(4, device="meta")  # checks pool, hidden_dim and window as its class does

    @property
    def indices(self) -> tuple[int, ...]:
        """The blocks after which tokens are merged, 0-based."""
        return tuple(layer - 1 for layer in self.layers)

    def build(self, host: BlockSpec) -> WindowTokenCompressor:
        """Make the compressor behind a block."""
        like = check_reusable(host).mlps[0].fc2.weight
        return self._make(host.dim, device=like.device, dtype=like.dtype)

    def _make(self, dim: int, **factory: object) -> WindowTokenCompressor:
        return WindowTokenCompressor(
            dim, pool=self.pool, hidden_dim=self.hidden_dim, window=self.window, **factory
        )

    def check_depth(self, depth: int) -> None:
        """Check ``layers`` against the number of blocks of a model."""
        if self.layers[-1] > depth:
            raise ValueError(
                f"layers must be in 1..{depth} for a model of {depth} blocks, got {self.layers}"
            )


Config = EarlyCompressorConfig | ProgressiveCompressionConfig


def _check_positions(positions: str) -> None:
    if positions not in POSITIONS:
        raise ValueError(f'positions must be "center" or "reindex", got {positions!r}')
