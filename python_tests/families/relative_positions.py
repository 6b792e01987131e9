# SPDX-License-Identifier: Apache-2.0
"""timm's models that add relative positions to the scores: Beit, VisionTransformerRelPos, SAM."""

import functools

import torch
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch.nn import functional

from families.case import Case, merge_batch, mlp_mean, randomise

SIZE = {"img_size": 28, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
SIZE["num_classes"] = 5


def attend(attn, x, score_bias):
    """Attention of ``x (B, L, C)`` by its formula, with ``score_bias(q (B, H, L, D))``."""
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
    qkv = functional.linear(x, attn.qkv.weight, bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + score_bias(q)
    return attn.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def run_block(block, x, attention):
    """A block on ``x (B, L, C)``, with ``attention(x)`` in the place of its own."""
    if isinstance(block, ResPostRelPosBlock):
        x = x + block.norm1(attention(x))
        return x + block.norm2(block.mlp(x))
    x = x + scaled(block, 1, attention(block.norm1(x)))
    return x + scaled(block, 2, block.mlp(block.norm2(x)))


def scaled(block, index, branch):
    """Apply the LayerScale of a branch of a pre-norm block."""
    if hasattr(block, "ls1"):
        return (block.ls1, block.ls2)[index - 1](branch)
    gamma = (block.gamma_1, block.gamma_2)[index - 1]
    return branch if gamma is None else gamma * branch


def merge(block, tokens, grid, prefix, window, bias_inside):
    """The compressor; ``bias_inside(present)`` gives ``q -> bias`` for tokens of a window."""
    post_norm = isinstance(block, ResPostRelPosBlock)

    def branch(x, present):
        y = x if post_norm else block.norm1(x)
        y = attend(block.attn, y[None], bias_inside(present))[0]
        return block.norm1(y) if post_norm else scaled(block, 1, y)

    def mlp(z):
        if post_norm:
            return block.norm2(mlp_mean(None, block.mlp, z))
        return scaled(block, 2, mlp_mean(block.norm2, block.mlp, z))

    return merge_batch(tokens, grid, prefix, window, bias_inside and branch, mlp)


def representatives(grid, window, positions):
    """The fine token whose distances each merged token has."""
    stride = window if positions == "center" else 1
    height, width = (-(-side // window) for side in grid)
    return [i * stride * grid[1] + j * stride for i in range(height) for j in range(width)]


# ---- one bias for each head and pair of tokens -------------------------------------------------


def by_hand(model, x, layer=1, window=2, positions="center", attention=True):
    """Beit and VisionTransformerRelPos; a bias is a matrix ``(H, P + N, P + N)``."""
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    tokens = model.patch_embed(x)
    if model.cls_token is not None:
        tokens = torch.cat([model.cls_token.expand(len(x), -1, -1), tokens], 1)
    if getattr(model, "pos_embed", None) is not None:
        tokens = tokens + model.pos_embed
    kept = [*range(prefix), *(prefix + i for i in representatives(grid, window, positions))]
    outs = []
    for index, block in enumerate(model.blocks):
        bias = bias_of(model, block)
        coarse = bias[:, kept][:, :, kept] if index > layer else bias
        own = functools.partial(attend, block.attn, score_bias=lambda q, coarse=coarse: coarse)
        tokens = run_block(block, tokens, own)
        if index == layer:

            def inside(present, bias=bias):
                pairs = [prefix + i for i in present]
                return lambda q: bias[:, pairs][:, :, pairs]

            tokens = merge(block, tokens, grid, prefix, window, inside if attention else None)
        outs.append(tokens)
    return outs, model.norm(tokens)


def bias_of(model, block):
    """What a block adds to the scores of the fine tokens."""
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    bias = torch.zeros(block.attn.num_heads, tokens, tokens, dtype=torch.float64)
    if isinstance(model, VisionTransformerRelPos):
        source = block.attn.rel_pos or model.shared_rel_pos
        return bias if source is None else source.get_bias()[0]
    if block.attn.relative_position_bias_table is not None:
        bias = bias + block.attn._get_rel_pos_bias()[0]
    return bias if model.rel_pos_bias is None else bias + model.rel_pos_bias()


def make_beit(**options):
    options = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.3, **options}
    return randomise(Beit(**{**SIZE, **options}))


def make_relpos(**options):
    return randomise(VisionTransformerRelPos(**{**SIZE, "rel_pos_dim": 8, **options}))


# ---- vectors for offsets, multiplied by the query ----------------------------------------------


def run_sam(model, x, layer=1, window=2, positions="center", attention=True):
    """VisionTransformerSAM on maps, with its own windows as a loop."""
    tokens = model.patch_embed(x)
    grid = tuple(tokens.shape[1:3])
    if model.pos_embed is not None:
        tokens = tokens + resample_abs_pos_embed_nhwc(model.pos_embed, grid)
    tokens = model.norm_pre(tokens).flatten(1, 2)
    here, stride, outs = grid, 1, []
    for index, block in enumerate(model.blocks):
        own = functools.partial(sam_attention, block, grid, here, stride)
        tokens = run_block(block, tokens, own)
        if index == layer:

            def inside(present, attn=block.attn):
                places = [divmod(i, grid[1]) for i in present]
                tables = offsets_of(attn, None)
                return lambda q: sam_bias(q, places, tables, 1)

            tokens = merge(block, tokens, grid, 0, window, inside if attention else None)
            here = tuple(-(-side // window) for side in grid)
            stride = window if positions == "center" else 1
        outs.append(tokens)
    return outs, model.neck(tokens.transpose(1, 2).unflatten(2, here))


def sam_attention(block, grid, here, stride, x):
    """Attention of a block on ``x (B, L, C)``, the map ``here``, within its own windows.

    Neighbours lie ``stride`` tokens apart on the fine ``grid``. Places of a window that stick out
    of the map hold tokens of zeros.
    """
    side = -(-block.window_size // stride)
    tables = offsets_of(block.attn, None if side else grid)
    height, width = (side, side) if side else here
    out = torch.empty_like(x)
    places = [(i, j) for i in range(height) for j in range(width)]
    bias = functools.partial(sam_bias, places=places, tables=tables, stride=stride)
    for top in range(0, here[0], height):
        for left in range(0, here[1], width):
            inside = [top + i < here[0] and left + j < here[1] for i, j in places]
            rows = [(top + i) * here[1] + left + j for i, j in places]
            rows = [row for row, present in zip(rows, inside, strict=True) if present]
            inner = x.new_zeros(len(x), len(places), x.shape[2])
            inner[:, inside] = x[:, rows]
            out[:, rows] = attend(block.attn, inner, bias)[:, inside]
    return out


def offsets_of(attn, grid):
    """Return the vectors by offset, for the size they were made for or interpolated to ``grid``."""
    if not attn.use_rel_pos:
        return None
    tables = [attn.rel_pos_h, attn.rel_pos_w]
    for axis, side in enumerate(grid or ()):
        if len(tables[axis]) != 2 * side - 1:
            table = functional.interpolate(tables[axis].T[None], size=2 * side - 1, mode="linear")
            tables[axis] = table[0].T
    return tables


def sam_bias(q, places, tables, stride):
    """``q (B, H, L, D)`` times the vectors of the offsets between tokens at ``places``."""
    if tables is None:
        return 0
    bias = q.new_zeros(*q.shape[:3], len(places))
    for i, (row, col) in enumerate(places):
        for j, (other_row, other_col) in enumerate(places):
            vertical = vector(tables[0], stride * (row - other_row))
            horizontal = vector(tables[1], stride * (col - other_col))
            bias[..., i, j] = q[:, :, i] @ (vertical + horizontal)
    return bias


def vector(table, offset):
    """The vector of an offset; zeros where a block never looks that far."""
    reach = len(table) // 2
    return table[reach + offset] if abs(offset) <= reach else torch.zeros_like(table[0])


def make_sam(**options):
    own = {"window_size": 4, "global_attn_indexes": (2,), "use_rel_pos": True, "neck_chans": 16}
    return randomise(VisionTransformerSAM(**{**SIZE, **own, **options}))


def run_sam_block(model, index, x):
    """A block on one of its own windows, or on a row of tokens where it is global."""
    block = model.blocks[index]
    side = block.window_size
    shape = (side, side) if side else (1, x.shape[1])
    return block(x[:, : shape[0] * shape[1]].unflatten(1, shape)).flatten(1, 2)


EVEN, NOT_SQUARE = {"img_size": 32}, {"img_size": (20, 36)}
POST_NORM = {"block_fn": ResPostRelPosBlock, "init_values": 0.3}

CASES = {
    "Beit": Case(
        make_beit,
        by_hand,
        {
            "own bias": {},
            "even": EVEN,
            "not square": NOT_SQUARE,
            "shared bias": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
            "both": {"use_shared_rel_pos_bias": True},
            "absolute": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
            "shared bias, absolute": {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
            "gated": {"swiglu_mlp": True, "scale_mlp": True},
            "no biases, no layer scale": {"qkv_bias": False, "init_values": None},
            "class token": {"global_pool": "token"},
        },
    ),
    "VisionTransformerRelPos": Case(
        make_relpos,
        by_hand,
        {
            "mlp, class token": {"class_token": True, "global_pool": "token"},
            "mlp": {},
            "even": EVEN,
            "not square": NOT_SQUARE,
            "mlp, normalised": {"rel_pos_type": "mlp-swin"},
            "mlp, shared": {"shared_rel_pos": True},
            "table": {"rel_pos_type": "bias"},
            "table, class token": {"rel_pos_type": "bias", "class_token": True},
            "table, shared": {"rel_pos_type": "bias", "shared_rel_pos": True, "class_token": True},
            "post-norm": POST_NORM,
            "query and key norm": {"qk_norm": True, "qkv_bias": False, "fc_norm": True},
        },
    ),
    "VisionTransformerSAM": Case(
        make_sam,
        run_sam,
        {
            "own windows": {},
            "even": EVEN,
            "not square": NOT_SQUARE,
            "global": {"global_attn_indexes": (1, 3)},
            "odd windows": {"window_size": 3},
            "no relative positions": {"use_rel_pos": False},
            "no neck": {"neck_chans": None, "use_abs_pos": False},
            "norms": {"qk_norm": True, "init_values": 0.3, "pre_norm": True},
        },
        sizes=((28, 28), (12, 40), (4, 4), (32, 20)),
        num_prefix=lambda model: 0,
        run_block=run_sam_block,
    ),
}
