# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers that take images of several sizes in one sequence.

Each has its definition by hand: every image, or frame of a video, runs alone, its tokens in raster
order, through the model's own untouched blocks, with the compressor as a loop over windows.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import transformers
from families.case import merge_by_hand, mlp_mean, randomise
from hf_models import centers
from torch.overrides import TorchFunctionMode

ROUNDINGS = 12 * 512  # products of at most 4 * 48 terms, a dozen in a row
PATCH = 4  # px


class Float64Throughout(TorchFunctionMode):
    """Keeps float64 where transformers computes in float32, whatever the dtype of the model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(a for a in args if a is not torch.float32)
                kwargs = {k: v for k, v in kwargs.items() if v is not torch.float32}
                if len(args) == 1 and not kwargs:
                    return args[0]
        return func(*args, **kwargs)


def exactly(dtype):
    """A context in which models of this dtype compute in it throughout."""
    return Float64Throughout() if dtype == torch.float64 else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class PackedCase:
    """A class of models.

    Attributes:
        make: ``make(num_layers=4)`` returns a model in evaluation, every parameter random.
        inputs: ``inputs(shapes, dtype)`` returns what the model takes, by name, for images or
            videos of so many frames, rows and columns of patches.
        by_hand: ``by_hand(model, inputs, shapes, layer, window, positions, attention)`` returns
            what enters the first block and what leaves each, ``(N, C)``, in the model's order; and
            the other outputs by name.
        layers: Name of the list of blocks.
        shapes: Mixed ones that the model takes with windows of two tokens.
        run_block: ``run_block(model, index, x)``: an untouched block on ``(n, C)``, all at the same
            place.
    """

    make: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict]
    by_hand: Callable[..., tuple]
    layers: str
    shapes: tuple
    run_block: Callable[..., torch.Tensor]


def run_layers(blocks, tokens, run, merge, layer):
    """What enters the first block and what leaves each, for one view with the compressor.

    Args:
        blocks: The blocks.
        tokens: ``(L, C)`` of the view.
        run: ``run(index, x, coarse)`` runs a block.
        merge: ``merge(block, x)`` runs the compressor.
        layer: Behind which block.
    """
    states = [tokens]
    for index, block in enumerate(blocks):
        tokens = run(index, tokens, index > layer)
        if index == layer:
            tokens = merge(block, tokens)
        states.append(tokens)
    return states


# ---- Pixtral -----------------------------------------------------------------------------------


def make_pixtral(num_layers=4):
    config = transformers.PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=num_layers,
        image_size=64,
        patch_size=PATCH,
    )
    return randomise(transformers.PixtralVisionModel(config))


def pixtral_inputs(shapes, dtype=torch.float64):
    """Images of these sizes, and a few px more each, padded with noise to the largest."""
    sizes = [(PATCH * h + h % 3, PATCH * w + w % 3) for _, h, w in shapes]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    images = torch.randn(len(shapes), 3, height, width, dtype=dtype)
    return {"pixel_values": images, "image_sizes": torch.tensor(sizes)}


def pixtral_by_hand(model, inputs, shapes, layer=1, window=2, positions="center", attention=True):
    views = []
    for image, (_, height, width) in zip(inputs["pixel_values"], shapes, strict=True):
        grid = height, width
        patches = model.patch_conv(image[None, :, : PATCH * height, : PATCH * width])
        tokens = model.ln_pre(patches[0].flatten(1).T)
        fine, coarse = (
            model.patch_positional_embedding(tokens, centers(grid, *how) - 0.5)
            for how in ((1, "center"), (window, positions))
        )

        def run(index, x, behind, fine=fine, coarse=coarse):
            table = coarse if behind else fine
            return model.transformer.layers[index](x[None], None, position_embeddings=table)[0]

        def merge(block, x, fine=fine, grid=grid):
            def attend(x, present):
                table = tuple(part[present] for part in fine)
                normed = block.attention_norm(x[None])
                return block.attention(normed, None, position_embeddings=table)[0][0]

            def mlp(z):
                return mlp_mean(block.ffn_norm, block.feed_forward, z)

            return merge_by_hand(x, grid, window, attend if attention else None, mlp)

        views.append(run_layers(model.transformer.layers, tokens, run, merge, layer))
    return [torch.cat(states) for states in zip(*views, strict=True)], {}


def pixtral_block(model, index, x):
    angles = torch.zeros(len(x), 16, dtype=x.dtype)
    tables = angles.cos(), angles.sin()
    return model.transformer.layers[index](x[None], None, position_embeddings=tables)[0]


CASES = {
    "Pixtral": PackedCase(
        make_pixtral,
        pixtral_inputs,
        pixtral_by_hand,
        "transformer.layers",
        ((1, 5, 7), (1, 4, 4), (1, 5, 7), (1, 1, 9), (1, 2, 3), (1, 1, 1)),
        pixtral_block,
    ),
}
