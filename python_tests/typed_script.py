# SPDX-License-Identifier: Apache-2.0
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true, reportMissingTypeStubs=false
"""A user's script; `make lint` checks its types, and that wrong calls are found.

Each ignored error is a wrong call. If the types no longer tell, the comment is unnecessary, and
that is an error too.
"""

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from typing_extensions import assert_type

import uhd_ops
from uhd_ops.nn import CompressorConfig, EarlyCompressor, SliceEncoder, SliceTokens, param_groups


class OwnVit(nn.Module):
    """The class stays what it was for its users."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x


def models(vit: OwnVit) -> None:
    assert_type(uhd_ops.insert_early_compressor(vit, layer=3), OwnVit)
    assert_type(uhd_ops.remove_early_compressor(vit), OwnVit)
    assert_type(uhd_ops.insert_progressive_compression(vit, layers=(3, 17), pool="mean"), OwnVit)
    assert_type(uhd_ops.remove_progressive_compression(vit), OwnVit)
    assert_type(uhd_ops.refine_patch_embedding(vit, patch_size=10), OwnVit)
    assert_type(uhd_ops.freeze_for_stage(vit, 1), OwnVit)
    assert_type(uhd_ops.freeze_for_stage(vit, 4, tower="vit", llm=["lm", vit]), OwnVit)
    groups = param_groups(vit, 3, recipe="v3-code", rates={"tower": 1e-4, "llm": None})
    torch.optim.AdamW(groups, weight_decay=0.01)
    assert_type(uhd_ops.load_plain_checkpoint(vit, {}), OwnVit)
    compressed = uhd_ops.insert_early_compressor(vit, attention=False, mlp="none", form="tied")
    assert_type(compressed.forward_features(torch.zeros(1)), torch.Tensor)

    uhd_ops.insert_early_compressor(vit, form="tide")  # pyright: ignore[reportArgumentType]
    uhd_ops.insert_early_compressor(vit, mlp="plane")  # pyright: ignore[reportArgumentType]
    uhd_ops.insert_early_compressor(vit, attention="all")  # pyright: ignore[reportArgumentType]
    uhd_ops.insert_early_compressor(vit, positions="centre")  # pyright: ignore[reportArgumentType]
    uhd_ops.insert_progressive_compression(vit, pool="max")  # pyright: ignore[reportArgumentType]
    uhd_ops.freeze_for_stage(vit, 5)  # pyright: ignore[reportArgumentType]
    param_groups(vit, 1, rates={"head": 1.0})  # pyright: ignore[reportArgumentType]
    uhd_ops.insert_early_compressor(torch.zeros(1))  # pyright: ignore[reportArgumentType]


def modules(vit: OwnVit, pixels: torch.Tensor, grids: uhd_ops.PackedGrids) -> None:
    assert_type(EarlyCompressor(8, 2, form="block").from_block(vit), EarlyCompressor)
    assert_type(CompressorConfig(6, attention=True).layers, tuple[int, ...])
    result = SliceEncoder(vit, positions="nearest")(pixels, grids)
    assert_type(result, SliceTokens)
    assert_type(result.tokens, torch.Tensor)
    assert_type(result.per_view(), list[torch.Tensor])

    CompressorConfig(form="tide")  # pyright: ignore[reportArgumentType]
    EarlyCompressor(8, 2, activation="gelu_tan")  # pyright: ignore[reportArgumentType]
    SliceEncoder(vit, positions="center")  # pyright: ignore[reportArgumentType]


def operators(x: torch.Tensor, qkv: torch.Tensor) -> None:
    grids = uhd_ops.PackedGrids([(32, 32), (28, 36)])
    assert_type(grids.num_tokens, int)
    q, k, v = qkv.unbind(1)
    y = uhd_ops.window_attention(q, k, v, grids)
    assert_type(uhd_ops.window_mean(y, [(4, 4)], order_in="block"), torch.Tensor)
    assert_type(uhd_ops.window_mean(y, np.array([[4, 4]])), torch.Tensor)
    assert_type(uhd_ops.reorder_tokens(x, (4, 4), order=(8, 2)), torch.Tensor)
    assert_type(uhd_ops.reference.window_mean(x, (4, 4)), torch.Tensor)
    assert_type(uhd_ops.flops.count_vit.__name__, str)

    uhd_ops.reorder_tokens(x, (4, 4), order="rastr")  # pyright: ignore[reportArgumentType]


def images(image: Image.Image) -> None:
    plan = uhd_ops.plan_slices(*image.size, scale_resolution=224, patch_size=16)
    assert_type(plan, uhd_ops.SlicePlan)
    pixels, grids = uhd_ops.pack_views(uhd_ops.slice_image(image, plan), patch_size=16)
    assert_type(pixels, torch.Tensor)
    assert_type(grids, uhd_ops.PackedGrids)


def pictures(image: Image.Image, plan: uhd_ops.SlicePlan, x: torch.Tensor) -> None:
    assert_type(uhd_ops.plot.views(image, plan, window=2), Axes)
    assert_type(uhd_ops.plot.merge(x, x, plan.grids, plan, show="pca", figure=Figure()), Figure)

    uhd_ops.plot.tokens(x, plan.grids, plan, show="pac")  # pyright: ignore[reportArgumentType]


def integrations(model: nn.Module) -> None:
    assert_type(uhd_ops.integrations.transformers.restore(model), nn.Module)
    uhd_ops.integrations.transformers.acelerate(model)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
