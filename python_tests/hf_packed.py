# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers that take images of several sizes in one sequence.

Each has its definition by hand: every image, or frame of a video, runs alone, its tokens in raster
order, through the model's own untouched blocks, with the compressor as a loop over windows.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import torch
import transformers
from families.case import merge_by_hand, mlp_mean, randomise, window_slots
from hf_models import centers
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.glm4v import modeling_glm4v
from transformers.models.glm4v_moe import modeling_glm4v_moe
from transformers.models.kimi_k25 import modeling_kimi_k25
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe

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
        by_hand: ``by_hand(model, inputs, shapes, layers, window, positions, attention, pool)``
            returns what enters the first block and what leaves each, ``(N, C)``, in the model's
            order; and the other outputs by name. With ``pool``, windows are averaged.
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


def run_layers(blocks, tokens, run, merge, layers, window):
    """What enters the first block and what leaves each, for one view with compressors.

    Args:
        blocks: The blocks.
        tokens: Those of the view.
        run: ``run(index, x, side)`` runs a block, on tokens that were ``side x side`` patches.
        merge: ``merge(block, x, side)`` merges windows of tokens.
        layers: Behind which blocks.
        window: Side of a window.

    Returns:
        A list of pairs: side of the patches that became one token, tokens.
    """
    side, states = 1, [(1, tokens)]
    for index, block in enumerate(blocks):
        tokens = run(index, tokens, side)
        if index in layers:
            tokens, side = merge(block, tokens, side), side * window
        states.append((side, tokens))
    return states


def merged_grid(grid, side):
    return [-(-length // side) for length in grid]


def no_mlp(z):
    return torch.zeros_like(z[0])


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


def pixtral_by_hand(
    model,
    inputs,
    shapes,
    layers=(1,),
    window=2,
    positions="center",
    attention=True,
    pool=False,
):
    blocks, views = model.transformer.layers, []
    for image, (_, *grid) in zip(inputs["pixel_values"], shapes, strict=True):
        patches = model.patch_conv(image[None, :, : PATCH * grid[0], : PATCH * grid[1]])
        tokens = model.ln_pre(patches[0].flatten(1).T)

        def table(side, grid=grid, tokens=tokens):
            how = positions if side > 1 else "center"
            return model.patch_positional_embedding(tokens, centers(grid, side, how) - 0.5)

        def run(index, x, side, table=table):
            return blocks[index](x[None], None, position_embeddings=table(side))[0]

        def merge(block, x, side, table=table, grid=grid):
            def attend(x, present):
                rows = tuple(part[present] for part in table(side))
                normed = block.attention_norm(x[None])
                return block.attention(normed, None, position_embeddings=rows)[0][0]

            def mlp(z):
                return mlp_mean(block.ffn_norm, block.feed_forward, z)

            attend = attend if attention and not pool else None
            where = merged_grid(grid, side), window
            return merge_by_hand(x, *where, attend, no_mlp if pool else mlp)

        own = run_layers(blocks, tokens, run, merge, layers, window)
        views.append([x for _, x in own])
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
        last: ``last(model, x)``: what the model returns of what leaves its last block.
        finish: ``finish(model, clips)``: the other outputs by name. A clip is a list of what enters
            the first block and leaves each: the grid, and tokens ``(T, L, C)`` of T frames in
            raster order.
    """

    blocks: str
    rotary: str
    embed: Callable
    order: Callable
    finish: Callable
    across: Callable = lambda model, index: None
    clips: bool = False
    last: Callable = lambda model, x: x

    def by_hand(
        self,
        model,
        inputs,
        shapes,
        layers=(1,),
        window=2,
        positions="center",
        attention=True,
        pool=False,
    ):
        embedded, start, clips = self.embed(model, inputs), 0, []
        if not self.clips:
            shapes = [(1, *grid) for frames, *grid in shapes for _ in range(frames)]
        blocks = getattr(model, self.blocks)
        for count, *grid in shapes:
            tokens = embedded[start : (start := start + count * grid[0] * grid[1])]
            frames = tokens.unflatten(0, (count, -1))[:, inverse(places(grid, self.order(1)[-1:]))]
            functions = self.functions(model, grid, window, positions, attention, pool)
            own = run_layers(blocks, frames, *functions, layers, window)
            clips.append([(side, merged_grid(grid, side), x) for side, x in own])
        states = []
        for of_clips in zip(*clips, strict=True):
            parts = [
                x[:, places(grid, self.order(side))].flatten(0, 1) for side, grid, x in of_clips
            ]
            states.append(torch.cat(parts))
        states[-1] = self.last(model, states[-1])
        clips = [[(grid, x) for _, grid, x in own] for own in clips]
        return states, self.finish(model, clips)

    def functions(self, model, grid, window, positions, attention, pool):
        """What run_layers takes, for the frames ``(T, L, C)`` of one clip."""

        def table(x, side):
            how = positions if side > 1 else "center"
            return getattr(model, self.rotary)(x[0], centers(grid, side, how) - 0.5)

        def run(index, x, side):
            block, rows = getattr(model, self.blocks)[index], table(x, side)
            if self.clips:
                rows = tuple(part.repeat(len(x), 1) for part in rows)
                return call(block, x.flatten(0, 1), rows).view_as(x)
            across, out = self.across(model, index), x.clone()
            for own in attention_windows(merged_grid(grid, side), across and across // side):
                out[0, own] = call(block, x[0, own], tuple(part[own] for part in rows))
            return out

        def merge(block, x, side):
            def attend(tokens, present):
                rows = tuple(part[present] for part in table(x, side))
                return call(block.attn, block.norm1(tokens), rows)

            def mlp(z):
                return mlp_mean(block.norm2, block.mlp, z)

            how = attend if attention and not pool else None, no_mlp if pool else mlp
            where = merged_grid(grid, side), window
            return torch.stack([merge_by_hand(frame, *where, *how) for frame in x])

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


def pooled(model, clips):
    return {"pooler_output": torch.cat([merged_rows(model.merger, *own[-1]) for own in clips])}


def grid_case(make, model, windows=(3,), inputs=None, shapes=even_shapes):
    inputs = inputs or grid_inputs("hidden_states")
    return PackedCase(make, inputs, model.by_hand, model.blocks, shapes, windows, model.run_block)


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


def make_qwen3(num_layers=4, module=modeling_qwen3_vl, name="Qwen3VL", deepstack=True):
    layers = {"deepstack_visual_indexes": [0, 1, 2][:num_layers]} if deepstack else {}
    config = getattr(module, f"{name}VisionConfig")(
        depth=num_layers,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=24,
        num_position_embeddings=25,
        **layers,
        **VISION,
    )
    return randomise(getattr(module, f"{name}VisionModel")(config))


def embed_qwen3(model, inputs):
    """Patches with learned positions, interpolated to each grid, corner to corner."""
    table = model.pos_embed.weight.unflatten(0, (5, 5)).permute(2, 0, 1)[None]
    parts = []
    for frames, *grid in inputs["grid_thw"].tolist():
        resized = functional.interpolate(table, grid, mode="bilinear", align_corners=True)[0]
        own = resized.flatten(1).T[places(grid, (2,))]
        parts.append(own.repeat(frames, 1))
    return model.patch_embed(inputs["hidden_states"]) + torch.cat(parts)


def finish_qwen3(model, clips):
    """Deepstack in front of the compressor: mean over its windows of what the merger returns."""
    features = []
    for index, merger in zip((0, 1, 2), model.deepstack_merger_list, strict=False):
        rows = []
        for own in clips:
            grid, tokens = own[index + 1]
            merged = merged_rows(merger, grid, tokens)
            windows = window_slots(grid[0] // 2, grid[1] // 2, grid[0] // own[-1][0][0])
            rows.append(torch.stack([merged[present].mean(0) for present, _ in windows]))
        features.append(torch.cat(rows))
    return pooled(model, clips) | {"deepstack_features": features}


QWEN3 = GridModel("blocks", "rotary_pos_emb", embed_qwen3, lambda window: (2,), finish_qwen3)
QWEN35 = dataclasses.replace(QWEN3, finish=pooled)


# ---- GLM-4V ------------------------------------------------------------------------------------


def make_glm4v(num_layers=4, module=modeling_glm4v, name="Glm4v"):
    config = getattr(module, f"{name}VisionConfig")(
        depth=num_layers,
        hidden_size=32,
        intermediate_size=40,
        out_hidden_size=48,
        image_size=5 * PATCH,
        **VISION,
    )
    return randomise(getattr(module, f"{name}VisionModel")(config))


def embed_glm4v(model, inputs):
    """Patches, normed, with learned positions, interpolated to each grid by bicubic splines."""
    table = model.embeddings.position_embedding.weight.unflatten(0, (5, 5)).permute(2, 0, 1)[None]
    parts = []
    for frames, *grid in inputs["grid_thw"].tolist():
        resized = functional.interpolate(table, grid, mode="bicubic", align_corners=False)[0]
        own = resized.flatten(1).T[places(grid, (2,))]
        parts.append(own.repeat(frames, 1))
    patches = model.patch_embed(inputs["hidden_states"])
    return model.post_conv_layernorm(patches) + torch.cat(parts)


def blocks_glm4v(model, x):
    """What the convolution makes of each four tokens in a row, a 2 x 2 block."""
    weight = model.downsample.weight.permute(0, 2, 3, 1).flatten(1)
    blocks = model.post_layernorm(x).unflatten(0, (-1, 4)).flatten(1)
    return functional.linear(blocks, weight, model.downsample.bias)


def single_frames(window):
    """The model is given every frame of a video as an image."""
    return tuple((1, *grid) for frames, *grid in even_shapes(window) for _ in range(frames))


def finish_glm4v(model, clips):
    def row(blocks):
        return model.merger(blocks_glm4v(model, blocks))

    return {"pooler_output": torch.cat([merged_rows(row, *own[-1]) for own in clips])}


GLM4V = GridModel(
    "blocks",
    "rotary_pos_emb",
    embed_glm4v,
    lambda window: (2,),
    finish_glm4v,
    last=blocks_glm4v,
)


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


# ---- MoonViT -----------------------------------------------------------------------------------


def make_moonvit(num_layers=4):
    config = modeling_kimi_k25.Kimi_K25VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=num_layers,
        patch_size=PATCH,
        pos_emb_height=5,
        pos_emb_width=5,
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
    )
    return randomise(modeling_kimi_k25.Kimi_K25VisionModel(config))


def finish_moonvit(model, clips):
    """A 2 x 2 block of tokens is a row; frames are averaged."""
    rows = []
    for own in clips:
        grid, frames = own[-1]
        blocks = model.final_layernorm(frames)[:, places(grid, (2,))].unflatten(1, (-1, 4))
        rows.append(blocks.mean(0))
    return {"pooler_output": torch.cat(rows)}


def shapes_of_moonvit(window):
    """Images for windows of 2, videos for others: all in a call must have as many frames."""
    frames = 1 if window == 2 else 3
    return tuple((frames, height, width) for _, height, width in even_shapes(window)[1:])


MOONVIT = GridModel(
    "layers",
    "rotary_emb",
    lambda model, inputs: model.patch_embed(**inputs),
    lambda window: (),
    finish_moonvit,
    clips=True,
    last=lambda model, x: model.final_layernorm(x),
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
    "GLM-4V": grid_case(make_glm4v, GLM4V, shapes=single_frames),
    "Qwen2-VL": grid_case(make_qwen2, QWEN2),
    "Qwen2.5-VL": grid_case(make_qwen25, QWEN25, windows=(4,)),
    "Qwen3-VL": grid_case(make_qwen3, QWEN3),
    "MoonViT": grid_case(
        make_moonvit,
        MOONVIT,
        inputs=grid_inputs("pixel_values", temporal=0),
        shapes=shapes_of_moonvit,
    ),
}
# The same towers by other names: what differs is in their blocks' and configs' classes.
RELATIVES = {
    "GLM-4V-MoE": grid_case(
        functools.partial(make_glm4v, module=modeling_glm4v_moe, name="Glm4vMoe"),
        GLM4V,
        shapes=single_frames,
    ),
    "Qwen3-VL-MoE": grid_case(
        functools.partial(make_qwen3, module=modeling_qwen3_vl_moe, name="Qwen3VLMoe"), QWEN3
    ),
    **{
        kind: grid_case(
            functools.partial(make_qwen3, module=module, name=name, deepstack=False), QWEN35
        )
        for kind, module, name in (
            ("Qwen3.5", modeling_qwen3_5, "Qwen3_5"),
            ("Qwen3.5-MoE", modeling_qwen3_5_moe, "Qwen3_5Moe"),
        )
    },
}
