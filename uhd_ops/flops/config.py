# SPDX-License-Identifier: Apache-2.0
"""The sizes that the cost of a ViT and of its connector depend on."""

from __future__ import annotations

import dataclasses

from uhd_ops._checks import check_int


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a plain vision transformer.

    Args:
        dim: Width C of a token.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_hidden: Hidden width I of the MLP.
        patch: Side of a patch in px.
        in_channels: Colour channels.
        prefix_tokens: Class and register tokens in front of every view.

    Raises:
        TypeError: A value is not an int.
        ValueError: A value is below 1 (``prefix_tokens``: below 0), or ``heads`` does not divide
            ``dim``.
    """

    dim: int
    depth: int
    heads: int
    mlp_hidden: int
    patch: int
    in_channels: int = 3
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 0 if field.name == "prefix_tokens" else 1
            check_int(getattr(self, field.name), field.name, least)
        if self.dim % self.heads:
            raise ValueError(
                f"dim must be a multiple of heads, got dim = {self.dim} and heads = {self.heads}"
            )


SIGLIP_SO400M = ViTConfig(dim=1152, depth=27, heads=16, mlp_hidden=4304, patch=14)
"""The encoder of LLaVA-UHD v4 and MiniCPM-V 4.6; MoonViT, of LLaVA-UHD v3, has the same sizes."""


@dataclasses.dataclass(frozen=True)
class ConnectorConfig:
    """Structure of :class:`uhd_ops.nn.PixelUnshuffleConnector`, behind the encoder.

    Args:
        out_dim: Width of a token of the language model.
        merger_times: Number of stages; each merges windows.
        window: Side f of a window, in tokens.

    Raises:
        TypeError: A value is not an int.
        ValueError: A value is below 1.
    """

    out_dim: int
    merger_times: int = 1
    window: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_int(getattr(self, field.name), field.name, 1)
