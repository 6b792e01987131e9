# SPDX-License-Identifier: Apache-2.0
"""The sizes that the cost of a ViT and of its compressor depend on."""

from __future__ import annotations

import dataclasses
import operator

ATTENTIONS = (None, "window", "cross")
MLPS = (None, "reuse", "plain")
FORMS = ("dense", "block", "tied")


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got bool")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


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
            _check_int(field.name, getattr(self, field.name), least)
        if self.dim % self.heads:
            raise ValueError(
                f"dim must be a multiple of heads, got dim = {self.dim} and heads = {self.heads}"
            )


SIGLIP_SO400M = ViTConfig(dim=1152, depth=27, heads=16, mlp_hidden=4304, patch=14)
"""The encoder of LLaVA-UHD v4 and MiniCPM-V 4.6."""


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
    """Structure of a compressor: one of the rows of LLaVA-UHD v4, table 4.

    Args:
        layer: 0-based index of the block after which it runs.
        attention: ``"window"``: every token attends inside its window; ``"cross"``: one query per
            window does (the window's top-left token or its mean, which costs the same); None: no
            attention.
        mlp: ``"reuse"``: the host block's MLP, once per patch of the window (after ``"cross"``:
            once per merged token); ``"plain"``: 4C -> 4C -> C; None: the mean of the window only.
        form: Weight form of the reused MLP: ``"dense"``, ``"block"`` or ``"tied"``. Other MLPs have
            one form.
        window: Side f of a window, in tokens.

    Raises:
        TypeError: ``layer`` or ``window`` is not an int.
        ValueError: A value is none of those above, or ``layer`` is negative.
    """

    layer: int = 6
    attention: str | None = "window"
    mlp: str | None = "reuse"
    form: str = "dense"
    window: int = 2

    def __post_init__(self) -> None:
        _check_int("layer", self.layer, 0)
        _check_int("window", self.window, 1)
        for name, values in (("attention", ATTENTIONS), ("mlp", MLPS), ("form", FORMS)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
