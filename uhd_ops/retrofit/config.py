# SPDX-License-Identifier: Apache-2.0
"""What was inserted into a model: the options of ``insert_early_compressor``, checked."""

from __future__ import annotations

from dataclasses import dataclass

from uhd_ops.nn.mlp_forms import FORMS
from uhd_ops.ops._arguments import check_positive_int


@dataclass(frozen=True)
class EarlyCompressorConfig:
    """Options of one early compressor.

    Attributes:
        layer: 0-based index of the block after whose body the compressor runs.
        attention: Whether tokens attend inside their window before they are merged.
        mlp: Where the MLP comes from: "reuse".
        form: Its weight form: "dense", "block" or "tied".
        window: Side of a window, in tokens.
    """

    layer: int
    attention: bool
    mlp: str
    form: str
    window: int

    def __post_init__(self) -> None:
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise TypeError(f"layer must be an int, got {type(self.layer).__name__}")
        if not isinstance(self.attention, bool):
            raise TypeError(f"attention must be a bool, got {type(self.attention).__name__}")
        if self.mlp != "reuse":
            raise NotImplementedError(f'mlp must be "reuse", got {self.mlp!r}')
        if self.form not in FORMS:
            raise ValueError(f'form must be "dense", "block" or "tied", got {self.form!r}')
        check_positive_int(self.window, "window")
        if self.window < 2:
            raise ValueError(f"window must be at least 2, got {self.window}")

    def check_depth(self, depth: int) -> None:
        """Check ``layer`` against the number of blocks of a model."""
        if not 0 <= self.layer < depth:
            raise ValueError(
                f"layer must be in 0..{depth - 1} for a model of {depth} blocks, got {self.layer}"
            )
