# SPDX-License-Identifier: Apache-2.0
"""Token orders: what they are, what they cost, and the coordinates of tokens and windows."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from battery import assert_same_bits, gradients, make_call, public, run
from battery.allocations import Allocations, nbytes
from battery.marks import native_only
from hypothesis import given
from specs import SPECS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import uhd_ops
from uhd_ops import PackedGrids
from uhd_ops.ops import window_attention as attention

kernels_only = native_only("orders beside the definitions' own are the kernels' affair")
RAGGED = [(4, 6), (3, 5), (1, 7), (9, 2), (0, 3), (8, 8)]
SIDE = {"window_attention": "window", "window_mean": "window", "pixel_unshuffle": "factor"}
SIDE |= {"pixel_unshuffle_mlp": "factor", "window_pool": "window"}


def walk(top, left, height, width, sides):
    """Yield (row, col) of the tokens of a block, nested block after nested block."""
    if not sides:
        yield from ((top + r, left + c) for r in range(height) for c in range(width))
        return
    side, *inner = sides
    for r in range(0, height, side):
        for c in range(0, width, side):
            rows, cols = min(side, height - r), min(side, width - c)
            yield from walk(top + r, left + c, rows, cols, inner)


def tokens_in(grids, sides):
    """Return the packed raster index of the token at every place."""
    tokens = []
    for height, width in grids:
        start = len(tokens)
        tokens += [start + row * width + col for row, col in walk(0, 0, height, width, sides)]
    return tokens


SIDES = st.sets(st.integers(1, 9), max_size=3).map(lambda sides: tuple(sorted(sides, reverse=True)))
GRIDS = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=4)


@given(grids=GRIDS, order_in=SIDES, order=SIDES)
def test_is_the_walk_over_nested_blocks(grids, order_in, order):
    token = torch.tensor(tokens_in(grids, order_in), dtype=torch.float64)[:, None]
    out = uhd_ops.reorder_tokens(token, grids, order, order_in=order_in)
    assert out.flatten().tolist() == tokens_in(grids, order)


def test_block_is_what_the_processor_of_qwen_returns():
    height, width = 6, 10
    patches = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    image = np.kron(patches, np.ones((14, 14), np.uint8))[..., None].repeat(3, -1)
    processor = Qwen2VLImageProcessorPil(do_resize=False, do_rescale=False, do_normalize=False)
    processed = processor(images=[image], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [[1, height, width]]
    raster = torch.arange(float(height * width))[:, None]
    blocks = uhd_ops.reorder_tokens(raster, (height, width), "block")
    assert torch.equal(blocks[:, 0], processed["pixel_values"][:, 0])


@kernels_only
@pytest.mark.parametrize("grids", [RAGGED, [(4, 6), (8, 2)]], ids=["ragged", "full"])
@pytest.mark.parametrize("side", [2, 3])
@pytest.mark.parametrize("name", SIDE)
def test_window_major_tokens_give_the_same_bits(name, side, grids):
    # Other rows of the view table, the same tokens in the same slots of a window.
    call = make_call(name, torch.bfloat16, grids, **{SIDE[name]: side})
    ordered = call.put("order_in", "window")
    for position in call.per_token:
        x = call.get(position)
        moved = uhd_ops.reorder_tokens(x.flatten(1), grids, (side,)).view_as(x)
        ordered = ordered.put(position, moved)
    wanted, wanted_grads = gradients(public(name), call)
    out, grads = gradients(public(name), ordered)
    assert_same_bits(out, wanted)
    for key, grad in grads.items():
        if key in call.per_token:
            raster = uhd_ops.reorder_tokens(grad.flatten(1), grids, order_in=(side,))
            grad = raster.view_as(grad)
        assert_same_bits(grad, wanted_grads[key], f"gradient of {key!r}")


@kernels_only
@pytest.mark.parametrize("order", ["raster", "window", "block", (4, 2), (3,)], ids=str)
@pytest.mark.parametrize("on_torch", [False, True], ids=["kernels", "torch"])
def test_attention_does_not_mind_the_order_inside_a_window(order, on_torch, monkeypatch):
    monkeypatch.setattr(attention, "suits_torch", lambda q, window: on_torch)
    call = make_call("window_attention", torch.float64, RAGGED, window=4, order=order)
    exact = run(uhd_ops.reference.window_attention, call)
    ordered = call.put("order_in", (4, 2))
    for position in call.per_token:
        x = call.get(position)
        ordered = ordered.put(
            position, uhd_ops.reorder_tokens(x.flatten(1), RAGGED, (4, 2)).view_as(x)
        )
    out = run(uhd_ops.window_attention, ordered)
    # Both results are off by as much as the SPEC allows, in opposite directions at worst.
    assert (
        (out - exact).abs() <= 2 * SPECS["window_attention"].tolerance(call, torch.float64, exact)
    ).all()


@kernels_only
@pytest.mark.parametrize("name", sorted(set(SIDE) - {"pixel_unshuffle_mlp"}))
def test_window_major_tokens_are_not_copied(name):
    options = {"order": "block"} if name == "window_attention" else {}
    call = make_call(name, grids=[(32, 32), (31, 33)] * 4, order_in="block", **options)
    run(public(name), call)  # tables are made once
    with Allocations() as allocations:
        out = run(public(name), call)
    # The result, and scratch space of one thread.
    assert allocations.peak < nbytes([out]) + nbytes([call.args[0]]) / 2


def test_what_is_kept_serves_training_after_inference():
    call = make_call("pixel_unshuffle", torch.float64, [(7, 5)], order_in=(3, 2))
    call = call.put(call.grids, PackedGrids([(7, 5)]))
    with torch.inference_mode():
        wanted = run(uhd_ops.pixel_unshuffle, call)
    out, grads = gradients(uhd_ops.pixel_unshuffle, call)
    assert_same_bits(out, wanted.clone())
    assert grads[0].shape == (35, 8)


def test_coordinates():
    grids = PackedGrids(RAGGED)
    wanted = [(r, c) for h, w in RAGGED for r in range(h) for c in range(w)]
    coordinates = grids.coordinates()
    assert coordinates.dtype == torch.float32
    assert [tuple(pair) for pair in coordinates.tolist()] == wanted
    coordinates.zero_()  # the caller's own
    assert [tuple(pair) for pair in grids.coordinates().tolist()] == wanted
    assert PackedGrids([]).coordinates().shape == (0, 2)


@pytest.mark.parametrize("window", [2, 3])
def test_coordinates_of_merged_tokens(window):
    grids = PackedGrids(RAGGED)
    centers = uhd_ops.window_mean(grids.coordinates(), grids, window).tolist()
    anew = grids.merged(window).coordinates().tolist()
    wanted = []
    for height, width in RAGGED:
        for top in range(0, height, window):
            for left in range(0, width, window):
                last_row, last_col = min(top + window, height) - 1, min(left + window, width) - 1
                wanted.append(((top + last_row) / 2, (left + last_col) / 2))
                assert anew[len(wanted) - 1] == [top // window, left // window]
    # Small integers and halves, thirds of sums that three divides: nothing is rounded.
    assert [tuple(pair) for pair in centers] == wanted
    assert len(anew) == len(wanted)
