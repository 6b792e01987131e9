# SPDX-License-Identifier: Apache-2.0
"""What only models with relative positions have: tables, changing sizes, windows of their own."""

import pytest
import torch
from families.case import assert_close, random_images
from families.relative_positions import CASES, by_hand, make_beit, make_relpos, make_sam
from timm import layers
from timm.models.beit import Attention
from torch.nn.utils import prune

from uhd_ops import insert_early_compressor
from uhd_ops.nn import EarlyCompressor
from uhd_ops.nn.score_bias import DecomposedPositionBias, RelativePositionBias
from uhd_ops.retrofit.relative_positions import resize_table

LAYER = 1


def snapshot(model):
    """Everything that a refused insertion must leave alone."""
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


# ---- the table inside a window -----------------------------------------------------------------


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("prefix", [0, 1])
def test_table_reads_query_minus_key(window, prefix):
    height, width = 3, 4
    size = prefix + height * width
    bias = torch.arange(2.0 * size * size).view(2, size, size)
    # What depends on the offset only, as a host's bias does: the value of the first such pair.
    places = [divmod(i, width) for i in range(height * width)]
    offsets = {}
    for i, (row, col) in enumerate(places):
        for j, (other_row, other_col) in enumerate(places):
            values = offsets.setdefault((row - other_row, col - other_col), bias[:, i, j].clone())
            bias[:, prefix + i, prefix + j] = values
    table = RelativePositionBias.from_grid(bias, (height, width), window).table
    assert table.shape == (2, 2 * window - 1, 2 * window - 1)
    for row in range(1 - window, window):
        for col in range(1 - window, window):
            expected = offsets.get((row, col), torch.zeros(2))
            assert torch.equal(table[:, row + window - 1, col + window - 1], expected)


def test_vectors_are_cropped_or_padded():
    rows, cols = torch.randn(5, 8), torch.randn(13, 8)  # of 3 rows and 7 columns
    bias = DecomposedPositionBias.from_grid(rows, cols, 4)
    assert torch.equal(bias.rows, torch.cat([torch.zeros(1, 8), rows, torch.zeros(1, 8)]))
    assert torch.equal(bias.cols, cols[3:10])


def test_shared_bias_belongs_to_the_model():
    options = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    model = make_beit(**options)
    assert EarlyCompressor.from_block(model.blocks[LAYER]).attn.score_bias is None
    compressor = insert_early_compressor(model, LAYER).blocks[LAYER].compressor
    centre = model.rel_pos_bias()[:, 1, 1]
    assert torch.equal(compressor.attn.score_bias.table[:, 1, 1], centre)


# ---- behind the compressor ---------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["center", "reindex"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_unfused_attention(name, positions):
    case = CASES[name]
    for options in case.variants.values():
        model = case.make(**options).double()
        x = case.images(model, 1, torch.float64)
        _, expected = case.by_hand(model, x, layer=LAYER, positions=positions)
        for block in model.blocks:
            block.attn.fused_attn = False
        insert_early_compressor(model, LAYER, positions=positions)
        assert_close(model.forward_features(x), expected, case.roundings)


@torch.no_grad()
def test_own_bias_beats_the_shared_one():
    model = make_relpos()
    model.shared_rel_pos = layers.RelPosBias((7, 7), num_heads=2).requires_grad_(False)
    model = model.double()
    x = random_images(model, 2, torch.float64)
    _, expected = by_hand(model, x, layer=LAYER)
    assert_close(insert_early_compressor(model, LAYER).forward_features(x), expected, 12 * 512)


@pytest.mark.parametrize("name", CASES)
def test_tables_behind_the_compressor_learn(name):
    case = CASES[name]
    model = insert_early_compressor(case.make(**next(iter(case.variants.values()))), LAYER)
    model.forward_features(case.images(model)).square().sum().backward()
    tables = [p for key, p in model.blocks[-1].attn.named_parameters() if "rel" in key]
    assert tables
    assert all(table.grad.any() for table in tables)


def test_compressors_table_does_not_decay():
    model = make_beit(use_shared_rel_pos_bias=True)
    before = model.no_weight_decay()
    own = {"blocks.1.compressor.attn.score_bias.table"}
    assert insert_early_compressor(model, LAYER).no_weight_decay() == before | own


@pytest.mark.parametrize(("positions", "reach"), [("center", 4), ("reindex", 8)])
@torch.no_grad()
def test_own_windows_behind_the_compressor(positions, reach):
    # 16 x 16 tokens in own windows of 4, so of 2 merged ones, or of 4 with twice the extent.
    model = make_sam(img_size=64, global_attn_indexes=(), neck_chans=None)
    insert_early_compressor(model, LAYER, positions=positions)
    x = random_images(model, 1)
    other = x.clone()
    other[..., :4, :4] += 1  # the first token
    *_, y = model.forward_intermediates(x, intermediates_only=True)
    *_, changed = model.forward_intermediates(other, intermediates_only=True)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[: reach // 2, : reach // 2] = True
    assert torch.equal((y != changed).any(1)[0], expected)
    assert model.blocks[-1].window_size == 4


def test_hooks_on_the_attention_still_run():
    model, seen = insert_early_compressor(make_sam(), LAYER), []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda attn, args, out: seen.append(out.shape))
    model(random_images(model))
    assert len(seen) == len(model.blocks)


# ---- what is refused ---------------------------------------------------------------------------


class Adapted(Attention):
    """May compute anything."""


def adapted(model):
    model.blocks[3].attn.__class__ = Adapted


def pruned(model):
    prune.random_unstructured(model.blocks[LAYER].attn, "relative_position_bias_table", 0.5)


def other_relative_positions(model):
    model.blocks[2].attn.rel_pos = layers.RelPosBiasTf((7, 7), num_heads=2)


def scaled(model):
    model.blocks[LAYER].attn.scale = 1.0


@pytest.mark.parametrize(
    ("make", "options", "change", "message"),
    [
        (make_beit, {}, adapted, r"vit.blocks.3.attn must be Attention, got Adapted"),
        (make_beit, {}, pruned, r"block.attn must hold its weight as a plain parameter"),
        (make_beit, {}, scaled, r"block.attn.scale must be head_dim \*\* -0.5"),
        (make_relpos, {}, other_relative_positions, r"rel_pos must be RelPosBias or RelPosMlp"),
        (make_sam, {"use_rel_pos": False, "use_rope": True}, None, r"block.attn.rope must be None"),
    ],
    ids=["adapted", "pruned", "scaled", "relative positions", "rope"],
)
def test_refusals(make, options, change, message):
    model = make(**options)
    if change is not None:
        change(model)
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=message):
        insert_early_compressor(model, LAYER)
    assert snapshot(model) == before


def test_blocks_refuse_maps_of_another_size():
    model = insert_early_compressor(make_sam(), LAYER)
    model.pos_drop = torch.nn.ZeroPad2d((0, 0, 0, 1))  # a column too many
    with pytest.raises(ValueError, match="x must be a map of 7 x 7 tokens"):
        model(random_images(model))


# timm gives torch tensors and indices in forms that it warns of.
@pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(
    ("old", "new"), [((7, 5), (3, 9)), ((2, 2), (16, 12)), ((1, 3), (4, 4)), ((5, 4), (1, 9))]
)
def test_tables_are_resized_as_timm_does_it(old, new, extra, dtype):
    length, wanted = ((2 * h - 1) * (2 * w - 1) + extra for h, w in (old, new))
    table = torch.randn(length, 3, dtype=dtype, requires_grad=True)
    expected = layers.resize_rel_pos_bias_table(table, new, (wanted, 3), old)
    for _ in range(2):  # the second time with what is kept
        actual = resize_table(table, old, new)
        assert actual.dtype == dtype
        assert_close(actual, expected, roundings=1)
    weight = torch.randn(wanted, 3, dtype=dtype)
    sums = ((resized * weight).sum() for resized in (actual, expected))
    grads = [torch.autograd.grad(total, table)[0].double() for total in sums]
    # Sums of float32 terms, one for each new offset at most, in another order.
    bound = wanted * torch.finfo(torch.float32).eps * weight.abs().max()
    bound = bound + torch.finfo(dtype).eps * grads[1].abs().max()
    assert (grads[0] - grads[1]).abs().max() <= bound
