# SPDX-License-Identifier: Apache-2.0
"""What a family brings to the battery, and the compressor as a loop over windows."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def random_images(model, batch=2, dtype=torch.float32, size=None):
    """Return images of the size that the model was made for, or of ``size`` (height, width)."""
    embed = getattr(model, "patch_embed", None) or model.embeds
    height, width = size or embed.img_size
    return torch.randn(batch, 3, height, width, dtype=dtype)


def run_sequence_block(model, index, x):
    """Run block ``index`` of an untouched model on tokens ``(B, L, C)``."""
    return model.blocks[index](x)


def run_features(model, x):
    """What ``forward_features`` returns; NaFlex models return their tokens in a dictionary."""
    result = model.forward_features(x)
    return result["patches"] if isinstance(result, dict) else result


def patches_of_blocks(model, x):
    """Maps of all blocks from ``forward_intermediates`` as patches ``(B, h * w, C)``."""
    _, maps = model.forward_intermediates(x)
    assert all(y.dim() == 4 for y in maps)
    return [y.flatten(2).transpose(1, 2) for y in maps]


def snapshot(model):
    """Everything that a user of the model could see of it."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "info": copy.deepcopy(getattr(model, "feature_info", None)),
        "keys": list(model.state_dict()),
        "pointers": [p.data_ptr() for p in model.parameters()],
        "repr": repr(model),
    }


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of models, small, and what it must compute with a compressor.

    Attributes:
        make: ``make(**options)`` returns a model in evaluation, float32, every parameter random.
        by_hand: ``by_hand(model, x, layer=1, window=2, positions="center", attention=True)`` runs
            an untouched float64 model by its own modules, with the compressor as a loop over
            windows. Returns the outputs of all blocks, each ``(B, L, C)`` with prefix tokens, and
            what ``forward_features`` returns.
        variants: Options of ``make`` for each feature of the class; the first is the default case.
        sizes: Other sizes (height, width) of images, in px, that the default variant takes.
        images: ``images(model, batch, dtype, size)`` returns an input of the model.
        blocks: Name of the list of blocks.
        num_prefix: ``num_prefix(model)``: tokens in front of the patches in a block's output.
        run_block: ``run_block(model, index, x)``: an untouched block on tokens ``(1, L, C)``.
        roundings: Bound on the error of float64, in units of its epsilon times the largest value.
        fullgraph: Whether torch.compile traces the model without a break.
        exact: ``exact(model)``: the model in float64 throughout.
        run: ``run(model, x)``: the features of a model, with or without a compressor.
        patches: ``patches(model, x)``: what each block returns, behind the prefix tokens.
        checkpoint: ``checkpoint(model)`` turns gradient checkpointing on.
    """

    make: Callable[..., nn.Module]
    by_hand: Callable[..., tuple[list[torch.Tensor], Any]]
    variants: dict[str, dict] = dataclasses.field(default_factory=lambda: {"default": {}})
    sizes: tuple[tuple[int, int], ...] = ()
    images: Callable[..., Any] = random_images
    blocks: str = "blocks"
    num_prefix: Callable[[nn.Module], int] = lambda model: model.num_prefix_tokens
    run_block: Callable[..., torch.Tensor] = run_sequence_block
    roundings: float = 12 * 512  # products of at most 4 * 4 * 32 terms, a dozen in a row
    fullgraph: bool = True
    exact: Callable[[nn.Module], nn.Module] = nn.Module.double
    run: Callable[..., torch.Tensor] = run_features
    patches: Callable[..., list[torch.Tensor]] = patches_of_blocks
    checkpoint: Callable[[nn.Module], None] = lambda model: model.set_grad_checkpointing()

    def make_variant(self, variant):
        """Make the model of one variant."""
        return self.make(**self.variants[variant])

    def make_first(self, **options):
        """Make the model of the default variant, with other options beside its own."""
        return self.make(**next(iter(self.variants.values())), **options)


def randomise(model):
    """Give every parameter random values, so that no branch vanishes; norms stay about one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def window_slots(height, width, f=2):
    """Yield the windows of a grid: indices of the tokens present, and those of all f² slots.

    A slot without a token repeats the nearest one.
    """
    for top in range(0, height, f):
        for left in range(0, width, f):
            slots = [
                min(top + i, height - 1) * width + min(left + j, width - 1)
                for i in range(f)
                for j in range(f)
            ]
            yield sorted(set(slots)), slots


def packed_windows(grids, f=2):
    """Yield (tokens present, all slots) of each window of a packed sequence of views."""
    start = 0
    for height, width in grids:
        for present, slots in window_slots(height, width, f):
            yield [start + i for i in present], [start + i for i in slots]
        start += height * width


def tiled_norm(norm, z):
    """Normalise the patches ``z (p, C)`` of a window as one vector of p * C channels.

    ``norm`` is a LayerNorm or an RMSNorm over C, or Identity or None; its affine map repeats.
    """
    if norm is None or isinstance(norm, nn.Identity):
        return z
    flat, eps = z.flatten(), getattr(norm, "variance_epsilon", None) or norm.eps
    if isinstance(norm, nn.LayerNorm):
        flat = flat - flat.mean()
    flat = flat / (flat.square().mean() + eps).sqrt()
    out = flat.view_as(z)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def mlp_mean(norm, mlp, z):
    """Mean over the patches of what the host's MLP makes of the normalised window ``z (p, C)``.

    With fc1 block-diagonal and fc2 a mean, the reused MLP is just that.
    """
    return mlp(tiled_norm(norm, z)[None])[0].mean(0)


def merge_by_hand(patches, grid, window, attend, mlp, parallel=False):
    """Merge the patches ``(L, C)`` of one view, window by window.

    Args:
        patches: Tokens in raster order.
        grid: (height, width).
        window: Side of a window.
        attend: ``attend(x, present)`` returns the attention branch ``(n, C)`` of the n tokens ``x``
            of a window, whose indices in the view are ``present``; None for no attention.
        mlp: ``mlp(z)`` returns the MLP branch ``(C,)`` of the window ``z (window², C)``.
        parallel: Whether the MLP reads the tokens before the attention.
    """
    height, width = grid
    merged = []
    for present, slots in window_slots(height, width, window):
        y = patches.clone()
        if attend is not None:
            y[present] = patches[present] + attend(patches[present], present)
        branch = mlp((patches if parallel else y)[slots])
        merged.append(y[present].mean(0) + branch)
    return torch.stack(merged)


def merge_batch(tokens, grid, prefix, *args, **kwargs):
    """Apply :func:`merge_by_hand` to the patches of ``(B, P + L, C)``; prefix tokens stay."""
    merged = [merge_by_hand(x, grid, *args, **kwargs) for x in tokens[:, prefix:]]
    return torch.cat([tokens[:, :prefix], torch.stack(merged)], 1)


def assert_close(actual, expected, roundings):
    """Compare within ``roundings`` times epsilon of the largest expected value."""
    assert actual.shape == expected.shape
    bound = roundings * torch.finfo(actual.dtype).eps * expected.abs().max()
    assert (actual - expected).abs().max() <= bound
