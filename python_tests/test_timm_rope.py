# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings behind a compressor, where the table alone does not tell the angle."""

import pytest
import torch
from families import eva
from families.case import assert_close
from rope_by_hand import ROUNDINGS
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.layers.pos_embed_sincos import _apply_coord_augs

from uhd_ops import insert_early_compressor
from uhd_ops.retrofit.adapter import TokenLayout
from uhd_ops.retrofit.rope import frequencies_of, merge_rope, window_rotary

EPS = torch.finfo(torch.float32).eps
DIM = 32
ROPES = {
    "axial": lambda **options: RotaryEmbeddingCat(DIM, in_pixels=False, **options),
    "axial, halves": lambda **options: RotaryEmbeddingCat(
        DIM, in_pixels=False, rotate_half=True, **options
    ),
    "axial, stretched": lambda **options: RotaryEmbeddingCat(
        DIM, in_pixels=False, ref_feat_shape=(16, 16), **options
    ),
    "axial, xy": lambda **options: RotaryEmbeddingCat(
        DIM, in_pixels=False, grid_indexing="xy", grid_offset=1.0, **options
    ),
    "DINOv3": lambda **options: RotaryEmbeddingDinoV3(DIM, **options),
    "DINOv3, xy": lambda **options: RotaryEmbeddingDinoV3(
        DIM, rotate_half=False, grid_indexing="xy", normalize_coords="max", **options
    ),
    "sections": lambda **options: RotaryEmbeddingMRope(DIM, (6, 5, 5), **options),
    "mixed": lambda **options: RotaryEmbeddingMixed(2 * DIM, 3, 2, **options),
}
# Up to 16 tokens from the origin, stretched by 16 over a side and by 4 in training, in float32:
# angles of less than 16 * 16 * 4 carry that many roundings, and the middle two more.
TOLERANCE = 2 * 16 * 16 * 4 * EPS


def central_coordinates(coordinates, grid, window):
    """Mean of the coordinates ``(h * w, 2)`` over each window's tokens: the centre."""
    height, width = grid
    table = coordinates.view(height, width, 2)
    return torch.stack(
        [
            table[top : top + window, left : left + window].flatten(0, 1).mean(0)
            for top in range(0, height, window)
            for left in range(0, width, window)
        ]
    )


def table_at(rope, coordinates):
    """The table of arbitrary coordinates, each ``(rows, columns)`` in the order of the module."""
    if isinstance(rope, RotaryEmbeddingMixed):
        x, y = (c[:, None] for c in coordinates.double().unbind(-1))
        angles = x * rope.freqs[0, :, :, None] + y * rope.freqs[1, :, :, None]
        return torch.cat([angles.sin(), angles.cos()], -1).repeat_interleave(2, -1)
    if isinstance(rope, RotaryEmbeddingMRope):
        places = torch.cat([torch.zeros_like(coordinates[:, :1]), coordinates], -1)
        angles = places[:, rope.axis] * rope.inv_freq
        return torch.cat([angles.sin()] * 2 + [angles.cos()] * 2, -1)
    per_axis = 2 * torch.pi / rope.periods if hasattr(rope, "periods") else rope.bands
    angles = (coordinates[:, :, None].double() * per_axis.double()).flatten(1)
    sin, cos = angles.sin(), angles.cos()
    if rope.rotate_half:
        return torch.cat([sin, sin, cos, cos], -1)
    return torch.cat([sin.repeat_interleave(2, -1), cos.repeat_interleave(2, -1)], -1)


def fine_coordinates(rope, grid):
    """Coordinates of the patches, written out from the description of each kind."""
    height, width = grid
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    sides = (height, width)
    if isinstance(rope, RotaryEmbeddingDinoV3):
        if rope.normalize_coords == "max":
            sides = (max(sides),) * 2
        rows, columns = (2 * (x + 0.5) / s - 1 for x, s in zip((rows, columns), sides, strict=True))
    else:
        offset = getattr(rope, "grid_offset", 0.0)
        rows, columns = rows + offset, columns + offset
        if getattr(rope, "ref_feat_shape", None):
            rows, columns = rows / height * 16, columns / width * 16
    table = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)
    return table.flip(-1) if rope.grid_indexing == "xy" else table


def merged(rope, fine, grid, window=2, positions="center"):
    layout = TokenLayout(*grid, 0, frequencies_of(rope))
    return merge_rope(fine, layout, window, positions)


GRIDS = [(8, 8), (4, 4), (3, 5), (2, 9), (1, 4), (5, 1), (1, 1)]


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize("kind", ROPES)
def test_center_is_the_angle_at_the_centre(kind, window):
    rope = ROPES[kind]()
    for grid in GRIDS:
        fine = rope.get_embed(shape=grid)
        centres = central_coordinates(fine_coordinates(rope, grid), grid, window)
        expected = table_at(rope, centres)
        actual = merged(rope, fine, grid, window)
        assert actual.dtype == fine.dtype
        assert (actual - expected).abs().max() <= TOLERANCE, grid


@pytest.mark.parametrize("kind", ["axial", "axial, stretched", "DINOv3", "DINOv3, xy"])
def test_center_uses_the_draw_of_training(kind):
    augmentation = {"shift_coords": 0.5, "jitter_coords": 1.5, "rescale_coords": 2.0}
    rope = ROPES[kind](**augmentation).train()
    for seed, grid in enumerate(GRIDS):
        torch.manual_seed(seed)
        fine = rope.get_embed(shape=grid)
        torch.manual_seed(seed)
        drawn = _apply_coord_augs(fine_coordinates(rope, grid), *augmentation.values())
        expected = table_at(rope, central_coordinates(drawn, grid, 2))
        assert (merged(rope, fine, grid) - expected).abs().max() <= TOLERANCE, grid


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ROPES)
def test_half_precision_tables(kind, dtype):
    # timm casts the table that it keeps for one grid; each entry is then off by half an epsilon.
    rope = ROPES[kind]()
    for grid in GRIDS:
        fine = rope.get_embed(shape=grid)
        expected = merged(rope, fine, grid)
        actual = merged(rope, fine.to(dtype), grid)
        assert actual.dtype == dtype
        # Turned to the middle, those of a window that point the same way have an average as exact
        # as they are; one more rounding at the store.
        assert (actual - expected).abs().max() <= 2 * torch.finfo(dtype).eps, grid


@pytest.mark.parametrize("kind", ROPES)
def test_reindex_takes_the_first_rows_and_columns(kind):
    rope = ROPES[kind]()
    fine = rope.get_embed(shape=(5, 7))
    actual = merged(rope, fine, (5, 7), positions="reindex")
    assert torch.equal(actual, fine.unflatten(-2, (5, 7))[..., :3, :4, :].flatten(-3, -2))


def test_every_shape_of_table():
    by_head = ROPES["mixed"]().get_embed(shape=(4, 6))
    assert by_head.shape == (3, 2, 24, 2 * DIM)
    layout = TokenLayout(4, 6, 0)
    batch = merge_rope(by_head, layout, 2, "center")
    assert batch.shape == (3, 2, 6, 2 * DIM)
    for table, expected in zip(by_head, batch, strict=True):
        assert torch.equal(merge_rope(table, layout, 2, "center"), expected)
    by_token = by_head.transpose(1, 2)  # as the queries of the compressor have them
    for table, expected in (
        (by_head, by_token),
        (by_head[0], by_token[0]),
        (by_head[:, :1], by_token[:, :, :1]),
        (by_head[0, 0], by_token[0, :, :1]),
    ):
        assert torch.equal(torch.cat(window_rotary(table), -1), expected)


@pytest.mark.parametrize("grid", [(3, 11), (4, 2)])
def test_tiny_grids_of_dinov3(grid):
    # The fastest channels of neighbours differ by 4 pi / 3, by pi and by 2 pi.
    model = eva.make(**eva.ROPE, **eva.DINOV3, dynamic_img_size=True).double()
    x = torch.randn(2, 3, 4 * grid[0], 4 * grid[1], dtype=torch.float64)
    centres = central_coordinates(fine_coordinates(model.rope, grid), grid, 2)
    coarse = table_at(model.rope, centres)
    with torch.no_grad():
        expected = eva.by_hand(model, x, layer=1)[0][1]
        for block in model.blocks[2:]:
            expected = block(expected, rope=coarse)
        insert_early_compressor(model, 1)
        assert_close(model.forward_features(x), model.norm(expected), ROUNDINGS)


def test_training_draws_once():
    model = eva.make(**eva.ROPE, **eva.SAPIENS2).double().train()
    x = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    results = []
    for inserted in (False, True):
        torch.manual_seed(0)
        if inserted:
            insert_early_compressor(model, 1)
            results.append(model.forward_features(x))
        else:
            results.append(eva.by_hand(model, x, layer=1)[1])
    assert_close(results[1], results[0], ROUNDINGS)
    assert not torch.equal(model.forward_features(x), results[1])


def test_learned_frequencies_get_the_gradient_of_the_definition():
    model = eva.make(
        **eva.ROPE, rope_type="mixed", attn_type="rope", rope_temperature=10.0
    ).double()
    x = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    weight = torch.randn(2, 17, 32, dtype=torch.float64)
    (expected,) = torch.autograd.grad(
        (eva.by_hand(model, x, layer=1)[1] * weight).sum(), model.rope.freqs
    )
    insert_early_compressor(model, 1)
    (actual,) = torch.autograd.grad((model.forward_features(x) * weight).sum(), model.rope.freqs)
    assert expected.abs().amax((0, 2, 3)).min() > 0  # of every block
    # timm computes the angles in float32, forwards and backwards, up to 4 blocks of them.
    assert_close(actual, expected, 2 * ROUNDINGS)


def test_table_is_derived_once_in_a_forward_pass(monkeypatch):
    calls = []
    original = TokenLayout.merge_table

    def counted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(TokenLayout, "merge_table", counted)
    model = insert_early_compressor(eva.make(**eva.ROPE), 0)
    model(torch.randn(1, 3, 28, 28))
    assert len(calls) == 1
    model(torch.randn(1, 3, 28, 28))
    assert len(calls) == 2


def test_unknown_rotary_embeddings_are_refused():
    model = eva.make(**eva.ROPE)

    class Other(RotaryEmbeddingCat):
        pass

    model.rope.__class__ = Other
    with pytest.raises(NotImplementedError, match=r"vit\.rope must be None or one of .*got Other"):
        insert_early_compressor(model, 1)
