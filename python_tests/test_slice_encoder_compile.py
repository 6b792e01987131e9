# SPDX-License-Identifier: Apache-2.0
"""nn.SliceEncoder under torch.compile: one graph for all grids, positions by one operator."""

import copy
import gc

import pytest
import torch
from test_slice_encoder_families import BOUND, VARIANTS, make
from test_view_attention import TWELVE
from torch._dynamo.testing import CompileCounterWithBackend
from views_alone import GRIDS, assert_close

from uhd_ops import PackedGrids, insert_early_compressor
from uhd_ops.nn import SliceEncoder


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed_patches(encoder, grids):
    own = encoder.packed(grids)
    shape = own.channels(own.vit), *own.patch_size(own.vit)
    return torch.rand(grids.num_tokens, *shape, dtype=own.like(own.vit).dtype)


@pytest.mark.parametrize(
    ("name", "layer", "positions"),
    [
        ("VisionTransformer, odd", None, "nearest"),
        ("transformers: SigLIP", 1, "resample"),
        ("Eva, rotary, axial", 1, "resample"),
        ("Eva, mixed, any size, default", None, "resample"),
    ],
)
@torch.no_grad()
def test_three_graphs_serve_all_grids(name, layer, positions):
    model = make(name) if layer is None else insert_early_compressor(make(name), layer)
    encoder = SliceEncoder(model, positions)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for pairs in TWELVE:
        grids = PackedGrids(pairs)
        patches = packed_patches(encoder, grids)
        result, expected = compiled(patches, grids), encoder(patches, grids)
        assert_close(result.tokens, expected.tokens, BOUND[torch.float32])
        assert result.grids == expected.grids
        assert result.views_per_image == expected.views_per_image
        assert [len(x) for x in result.per_view()] == [len(x) for x in expected.per_view()]
    assert backend.frame_count <= 3


def test_compiled_gradients():
    encoder = SliceEncoder(insert_early_compressor(make("VisionTransformer, odd"), 1))
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for pairs in ([(4, 6), (3, 5)], [(2, 2), (9, 7), (2, 2)]):
        grids, grads = PackedGrids(pairs), []
        patches = packed_patches(encoder, grids)
        for encode in (compiled, encoder):
            encoder.zero_grad()
            encode(patches, grids).tokens.square().mean().backward()
            grads.append({name: p.grad for name, p in encoder.named_parameters()})
        for name, expected in grads[1].items():
            assert (grads[0][name] is None) == (expected is None), name
            if expected is not None and expected.numel():  # no registers have no numbers
                assert_close(grads[0][name], expected, BOUND[torch.float32])


@torch.no_grad()
def test_drawn_positions_are_part_of_the_graph():
    encoder = SliceEncoder(make("Eva, rotary, Sapiens2")).train()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    grids, tokens = PackedGrids(GRIDS), []
    patches = packed_patches(encoder, grids)
    for encode, seed in ((compiled, 0), (encoder, 0), (encoder, 1)):
        torch.manual_seed(seed)
        tokens.append(encode(patches, grids).tokens)
    assert_close(tokens[0], tokens[1], BOUND[torch.float32])
    assert not torch.allclose(tokens[1], tokens[2])


class Tokens(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, patches, grids):
        result = self.encoder(patches, grids)
        return result.tokens, result.prefix, result.grids


@torch.no_grad()
def test_one_exported_program_takes_all_numbers_of_views_from_two():
    encoder = SliceEncoder(insert_early_compressor(make("Eva, rotary, axial"), 1))
    grids, dynamic = PackedGrids(TWELVE[3]), {0: torch.export.Dim.DYNAMIC}
    example = packed_patches(encoder, grids), grids
    program = torch.export.export(Tokens(encoder), example, dynamic_shapes=(dynamic, [dynamic]))
    program = program.module()
    for pairs in TWELVE:
        if len(pairs) > 1:  # torch takes a size of one for another program
            grids = PackedGrids(pairs)
            patches = packed_patches(encoder, grids)
            *tensors, merged = program(patches, grids)
            *expected, wanted = Tokens(encoder)(patches, grids)
            assert merged is wanted
            for actual, value in zip(tensors, expected, strict=True):
                assert_close(actual, value, BOUND[torch.float32])


CALLS = (("absolute", 0, [1], []), ("rotary", 3, [1], []), ("rotary", 0, [2], []))
CALLS += (("rotary", 1, [1, 2, 2, 1], [0, 2]),)


def gradients(tables, parameters):
    """Gradients of a sum in which every entry has a weight of its own, zero where there is none."""
    total = sum((x.flatten() @ torch.linspace(-1, 1, x.numel(), dtype=x.dtype)) for x in tables)
    if not (isinstance(total, torch.Tensor) and total.requires_grad):
        return [torch.zeros_like(p) for p in parameters]
    return torch.autograd.grad(total, parameters, materialize_grads=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_operator_makes_the_tables_of_the_model(name):
    encoder = SliceEncoder(make(name))
    parameters = list(encoder.parameters())
    for call in CALLS:
        own = encoder.packed(PackedGrids(GRIDS))
        expected = own.make_tables(*call)
        tokens = len(expected[0]) if expected else 0
        given = own.position_tensors(), own.grids.rows, tokens, encoder._number
        found = torch.ops.uhd_ops._view_tables(*given, *call)
        for table, wanted in zip(found, expected, strict=True):
            assert_close(table, wanted, BOUND[torch.float32])
        grads = gradients(found, parameters), gradients(expected, parameters)
        for grad, wanted in zip(*grads, strict=True):
            if grad.numel():  # no registers have no numbers
                assert_close(grad, wanted, BOUND[torch.float32])


# opcheck itself reads .grad of its own intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_does_what_it_declares():
    encoder = SliceEncoder(make("Eva, mixed, any size, default"))
    own = encoder.packed(PackedGrids(GRIDS))
    for call in CALLS:
        tokens = len(own.make_tables(*call)[0])
        given = own.position_tensors(), own.grids.rows, tokens, encoder._number
        torch.library.opcheck(torch.ops.uhd_ops._view_tables.default, (*given, *call))


@torch.no_grad()
def test_a_copy_has_its_own_positions():
    encoder = SliceEncoder(make("VisionTransformer, odd"))
    other = copy.deepcopy(encoder)
    other.vit.pos_embed.neg_()
    grids = PackedGrids(GRIDS)
    patches = packed_patches(encoder, grids)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    assert_close(
        compiled(patches, grids).tokens, other(patches, grids).tokens, BOUND[torch.float32]
    )


def test_a_graph_without_its_model_is_refused():
    encoder = SliceEncoder(make("VisionTransformer, odd"))
    own = encoder.packed(PackedGrids(GRIDS))
    call = own.position_tensors(), own.grids.rows, own.grids.num_tokens, encoder._number, *CALLS[0]
    with pytest.raises(RuntimeError, match="must be those that the graph was given"):
        torch.ops.uhd_ops._view_tables([call[0][0] + 1], *call[1:])
    del encoder, own
    gc.collect()
    with pytest.raises(RuntimeError, match="that a compiled graph was made of is gone"):
        torch.ops.uhd_ops._view_tables(*call)
