# SPDX-License-Identifier: Apache-2.0
"""What a model makes of one view by its own forward pass: the reference of packed encoding."""

import copy

import torch
from timm.layers import RmsNorm, RmsNormFp32, resample_abs_pos_embed
from timm.models.cait import Cait
from torch import nn

from uhd_ops.retrofit.registry import packed_of

# Odd, not square, and two of one size.
GRIDS = ((7, 7), (4, 5), (3, 9), (4, 5))


def random_views(model, grids=GRIDS, dtype=torch.float64):
    """Views with the given grids, pixels from 0 to 1."""
    vit, packed = packed_of(model)
    rows, cols = packed.patch_size(vit)
    return [torch.rand(3, height * rows, width * cols, dtype=dtype) for height, width in grids]


def exact(model):
    """A float64 model whose norms compute in float64 too."""
    for module in model.modules():
        if type(module) is RmsNormFp32:
            module.__class__, module._fast_norm = RmsNorm, False
    return model.double()


def resized(model, size):
    """A copy of the model for views of ``size`` px, by the means of its library."""
    model = copy.deepcopy(model)
    vit, _ = packed_of(model)
    if isinstance(vit, Cait):  # the only one without set_input_size; as that of the others does it
        grid = vit.patch_embed.grid_size
        vit.patch_embed.set_input_size(img_size=size)
        new = list(vit.patch_embed.grid_size)
        table = resample_abs_pos_embed(vit.pos_embed, new, list(grid), num_prefix_tokens=0)
        vit.pos_embed = nn.Parameter(table)
    elif hasattr(vit, "set_input_size") and not vit.__dict__.get("dynamic_img_size", False):
        vit.set_input_size(img_size=size)
    return model


def alone(model, view, copied=True):
    """Tokens ``(P + h * w, C)`` of one view by the model's own forward pass.

    Not ``copied``, the model itself runs, which must be made for that size.
    """
    vit, packed = packed_of(resized(model, tuple(view.shape[1:])) if copied else model)
    if "transformers" in type(vit).__module__:
        return _alone_in_transformers(vit, packed, view)
    features = vit.forward_features(view[None])
    features = features["patches"] if isinstance(features, dict) else features
    if type(vit).__name__.endswith("VisionTransformerSAM"):  # a map (1, C, h, w)
        return features[0].flatten(1).T
    return features[0].flatten(0, -2)


def _alone_in_transformers(vit, packed, view):
    options = {}
    if type(vit).__name__.startswith(("Siglip", "CLIP", "Janus", "Blip")):
        options["interpolate_pos_encoding"] = True
    if type(vit).__name__ == "Siglip2VisionModel":
        rows, cols = packed.patch_size(vit)
        tiles = view.unfold(1, rows, rows).unfold(2, cols, cols).permute(1, 2, 3, 4, 0)
        patches = tiles.flatten(2).flatten(0, 1)[None]
        mask = torch.ones(patches.shape[:2], dtype=torch.int64)
        out = vit(patches, mask, torch.tensor([tiles.shape[:2]]))
    else:
        out = vit(view[None], **options)
    if getattr(out, "last_hidden_state", None) is not None:
        return out.last_hidden_state[0]
    (last,) = out.feature_maps[-1]  # of a backbone: without class and register tokens
    return last.flatten(1).T if last.dim() == 3 else last


def assert_close(actual, expected, bound):
    """Compare relative to the largest value of a view."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def assert_packed_equals_alone(model, result, views, bound):
    """Compare what an encoder returned for views with what the model makes of each alone."""
    for view, tokens, prefix in zip(views, result.per_view(), result.prefix, strict=True):
        expected = alone(model, view)
        actual = torch.cat([prefix, tokens])
        assert_close(actual[len(actual) - len(expected) :], expected, bound)
