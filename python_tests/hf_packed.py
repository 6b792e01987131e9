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
from families.case import merge_by_hand, mlp_mean, randomise, window_slots
from hf_models import centers
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

ROUNDINGS = 12 * 512  # products of at most 4 * 48 terms, a dozen in a row
PATCH = 4  # px


class Float64Throughout(TorchFunctionMode):
    """Takes float64 where transformers computes in float32, whatever the dtype of the model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
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
        shapes_for: ``shapes_for(window)``: mixed ones that the model takes with such windows.
        windows: Sides of windows to try beside 2.
        run_block: ``run_block(model, index, x)``: an untouched block on ``(n, C)``, all at the same
            place.
    """

    make: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict]
    by_hand: Callable[..., tuple]
    layers: str
    shapes_for: Callable[[int], tuple]
    windows: tuple
    run_block: Callable[..., torch.Tensor]

    @property
    def shapes(self):
        return self.shapes_for(2)


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


# ---- models with grid_thw ----------------------------------------------------------------------


def nested(rows, cols, sides):
    """Yield rows and columns of the tokens of a grid in blocks inside blocks, like Qwen's."""
    if not sides:
        yield from ((row, col) for row in rows for col in cols)
        return
    for top in range(0, len(rows), sides[0]):
        for left in range(0, len(cols), sides[0]):
            block = rows[top : top + sides[0]], cols[left : left + sides[0]]
            yield from nested(*block, sides[1:])


def places(grid, sides):
    """Index in raster order of each token of a grid in that order."""
    return [row * grid[1] + col for row, col in nested(range(grid[0]), range(grid[1]), sides)]


def inverse(indices):
    return sorted(range(len(indices)), key=indices.__getitem__)


@dataclasses.dataclass(frozen=True)
class GridModel:
    """How a class with ``grid_thw`` differs from the others.

    Attributes:
        blocks: Its list of blocks.
        rotary: Its rotary embeddings.
        embed: ``embed(model, inputs)``: what enters the first block, in the order of the inputs.
        order: Order of a frame's tokens in the blocks, by window of the compressor in front.
        across: ``across(model, index)``: patches across an attention window of a block; None for
            attention in whole frames.
        clips: Whether all frames of a video attend to each other.
        finish: ``finish(model, states, ends)``: the other outputs by name, by what leaves each
            block, in lists of ``(clip, frames, grid, tokens in raster order)``.
    """

    blocks: str
    rotary: str
    embed: Callable
    order: Callable
    finish: Callable
    across: Callable = lambda model, index: None
    clips: bool = False

    def by_hand(self, model, inputs, shapes, layer=1, window=2, positions="center", attention=True):
        embedded, start, clips = self.embed(model, inputs), 0, []
        if not self.clips:
            shapes = [(1, height, width) for frames, height, width in shapes for _ in range(frames)]
        blocks = getattr(model, self.blocks)
        for frames, *grid in shapes:
            tokens = embedded[start : (start := start + frames * grid[0] * grid[1])]
            frames = tokens.unflatten(0, (frames, -1))[:, inverse(places(grid, self.order(1)[-1:]))]
            run, merge = self.functions(model, frames, grid, window, positions, attention)
            clips.append((grid, run_layers(blocks, frames, run, merge, layer)))
        sides = [1 if index <= layer else window for index in range(len(blocks) + 1)]
        states = []
        for index, side in enumerate(sides):
            parts = []
            for grid, own in clips:
                merged = [-(-length // side) for length in grid]
                parts.append(own[index][:, places(merged, self.order(side))].flatten(0, 1))
            states.append(torch.cat(parts))
        clips = [
            [
                ([-(-length // side) for length in grid], x)
                for side, x in zip(sides, own, strict=True)
            ]
            for grid, own in clips
        ]
        return states, self.finish(model, clips, window)

    def functions(self, model, frames, grid, window, positions, attention):
        """What run_layers takes, for the frames ``(T, L, C)`` of one clip."""
        tables = {
            coarse: getattr(model, self.rotary)(frames[0], centers(grid, *how) - 0.5)
            for coarse, how in ((False, (1, "center")), (True, (window, positions)))
        }

        def run(index, x, coarse):
            block, table = getattr(model, self.blocks)[index], tables[coarse]
            if self.clips:
                table = tuple(part.repeat(len(x), 1) for part in table)
                return call(block, x.flatten(0, 1), table).view_as(x)
            merged = [-(-length // window) for length in grid] if coarse else grid
            across = self.across(model, index)
            if across is not None and coarse:
                across //= window
            out = x.clone()
            for rows in attention_windows(merged, across):
                out[0, rows] = call(block, x[0, rows], tuple(part[rows] for part in table))
            return out

        def merge(block, x):
            def attend(x, present):
                table = tuple(part[present] for part in tables[False])
                return call(block.attn, block.norm1(x), table)

            def mlp(z):
                return mlp_mean(block.norm2, block.mlp, z)

            merged = [merge_by_hand(y, grid, window, attend if attention else None, mlp) for y in x]
            return torch.stack(merged)

        return run, merge

    def run_block(self, model, index, x):
        block = getattr(model, self.blocks)[index]
        angles = torch.zeros(len(x), x.shape[1] // block.attn.num_heads, dtype=x.dtype)
        return call(block, x, (angles.cos(), angles.sin()))


def call(module, x, table):
    """A block, or its attention, on tokens that all attend to each other."""
    whole = torch.tensor([0, len(x)], dtype=torch.int32)
    return module(x, cu_seqlens=whole, position_embeddings=table)


def attention_windows(grid, across):
    """Indices in raster order of each window of attention."""
    if across is None:
        return [list(range(grid[0] * grid[1]))]
    windows = []
    for top in range(0, grid[0], across):
        for left in range(0, grid[1], across):
            rows, cols = range(grid[0])[top : top + across], range(grid[1])[left : left + across]
            windows.append([row * grid[1] + col for row in rows for col in cols])
    return windows


def even_shapes(window):
    """Images, a video, and equal neighbours; every side becomes an even number of tokens."""
    side = 2 * window
    grids = (1, 2, 3), (3, 1, 1), (1, 3, 2), (1, 3, 2), (1, 1, 4)
    return tuple((frames, side * height, side * width) for frames, height, width in grids)


def grid_inputs(name, temporal=2):
    """Patches of images for models that take them as ``name``."""

    def make(shapes, dtype=torch.float64):
        count = sum(frames * height * width for frames, height, width in shapes)
        shape = (count, 3 * temporal * PATCH**2) if temporal else (count, 3, PATCH, PATCH)
        return {name: torch.randn(shape, dtype=dtype), "grid_thw": torch.tensor(shapes)}

    return make


def merged_rows(merger, grid, tokens):
    """What a merger makes of a frame: a row for each 2 x 2 block."""
    return merger(tokens[0, places(grid, (2,))])


def pooled(model, clips, window):
    return {"pooler_output": torch.cat([merged_rows(model.merger, *own[-1]) for own in clips])}


def grid_case(make, model, windows=(3,), inputs=None):
    inputs = inputs or grid_inputs("hidden_states")
    return PackedCase(
        make, inputs, model.by_hand, model.blocks, even_shapes, windows, model.run_block
    )


# ---- Qwen2-VL ----------------------------------------------------------------------------------

VISION = {"patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2, "num_heads": 2}


def make_qwen2(num_layers=4):
    config = modeling_qwen2_vl.Qwen2VLVisionConfig(
        depth=num_layers, embed_dim=32, hidden_size=24, mlp_ratio=2, in_channels=3, **VISION
    )
    return randomise(modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config))


QWEN2 = GridModel(
    "blocks",
    "rotary_pos_emb",
    lambda model, inputs: model.patch_embed(inputs["hidden_states"]),
    lambda window: (2,),
    pooled,
)


# ---- Qwen3-VL ----------------------------------------------------------------------------------


def make_qwen3(num_layers=4):
    config = modeling_qwen3_vl.Qwen3VLVisionConfig(
        depth=num_layers,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=24,
        num_position_embeddings=25,
        deepstack_visual_indexes=[0, 1, 2][:num_layers],
        **VISION,
    )
    return randomise(modeling_qwen3_vl.Qwen3VLVisionModel(config))


def embed_qwen3(model, inputs):
    """Patches with learned positions, interpolated to each grid, corner to corner."""
    table = model.pos_embed.weight.unflatten(0, (5, 5)).permute(2, 0, 1)[None]
    parts = []
    for frames, *grid in inputs["grid_thw"].tolist():
        resized = functional.interpolate(table, grid, mode="bilinear", align_corners=True)[0]
        own = resized.flatten(1).T[places(grid, (2,))]
        parts.append(own.repeat(frames, 1))
    return model.patch_embed(inputs["hidden_states"]) + torch.cat(parts)


def finish_qwen3(model, clips, window):
    """Deepstack in front of the compressor: mean over its windows of what the merger returns."""
    features = []
    for index, merger in zip((0, 1, 2), model.deepstack_merger_list, strict=False):
        rows = []
        for own in clips:
            grid, tokens = own[index + 1]
            merged = merged_rows(merger, grid, tokens)
            if grid != own[-1][0]:
                units = [length // 2 for length in grid]
                merged = torch.stack(
                    [merged[present].mean(0) for present, _ in window_slots(*units, window)]
                )
            rows.append(merged)
        features.append(torch.cat(rows))
    return pooled(model, clips, window) | {"deepstack_features": features}


QWEN3 = GridModel("blocks", "rotary_pos_emb", embed_qwen3, lambda window: (2,), finish_qwen3)


# ---- Qwen2.5-VL --------------------------------------------------------------------------------


def make_qwen25(num_layers=4):
    config = modeling_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        depth=num_layers,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=24,
        window_size=8 * PATCH,
        fullatt_block_indexes=[2],
        **VISION,
    )
    return randomise(modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config))


QWEN25 = GridModel(
    "blocks",
    "rotary_pos_emb",
    QWEN2.embed,
    lambda window: (8 // window, 2) if window < 4 else (2,),
    pooled,
    across=lambda model, index: None if index == 2 else 8,
)


CASES = {
    "Pixtral": PackedCase(
        make_pixtral,
        pixtral_inputs,
        pixtral_by_hand,
        "transformer.layers",
        lambda window: ((1, 5, 7), (1, 4, 4), (1, 5, 7), (1, 1, 9), (1, 2, 3), (1, 1, 1)),
        (3, 8),
        pixtral_block,
    ),
    "Qwen2-VL": grid_case(make_qwen2, QWEN2),
    "Qwen2.5-VL": grid_case(make_qwen25, QWEN25, windows=(4,)),
    "Qwen3-VL": grid_case(make_qwen3, QWEN3),
}
