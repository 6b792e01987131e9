# SPDX-License-Identifier: Apache-2.0
"""nn.SliceEncoder under torch.compile: one graph for all grids, parts of it by one operator."""

import copy
import gc

import pytest
import torch
from test_slice_encoder_families import BOUND, VARIANTS, make
from test_view_attention import TWELVE
from torch._dynamo.testing import CompileCounterWithBackend
from views_alone import GRIDS, assert_close, exact

from uhd_ops import PackedGrids, insert_early_compressor
from uhd_ops.nn import SliceEncoder, ViewRatios
from uhd_ops.retrofit.registry import packed_of


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed_patches(encoder, grids):
    own = encoder.packed(grids)
    shape = own.channels(own.vit), *own.patch_size(own.vit)
    return torch.rand(grids.num_tokens, *shape, dtype=own.like(own.vit).dtype)


def short(name, positions="resample", **options):
    """An encoder with one block, or with one on either side of a compressor with these options."""
    model = exact(make(name))
    vit, packed = packed_of(model)
    del vit.get_submodule(packed.blocks_name)[2 if options else 1 :]  # most of a test is tracing
    return SliceEncoder(insert_early_compressor(model, **options) if options else model, positions)


def gradients_of(encoder, encode, patches, grids, **options):
    """Gradients of every parameter by name, and what was returned."""
    encoder.zero_grad()
    result = encode(patches, grids, **options)
    (result.tokens.square().mean() + result.prefix.square().sum()).backward()
    return {name: p.grad for name, p in encoder.named_parameters()}, result


def assert_same_gradients(found, expected):
    largest = {n: g.abs().max() for n, g in expected.items() if g is not None and g.numel()}
    # A softmax does not see the bias of its keys, whose gradient is rounding of larger ones.
    least = max(largest.values()) / 100
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if name in largest:
            # Tables of offsets are resized in float32, in float64 models too.
            bound = BOUND[torch.float32] * largest[name].clamp(min=least)
            assert (found[name] - grad).abs().max() <= bound, name


# One of each kind of attention and of each part that the operator runs.
ENCODERS = {
    "plain": ("VisionTransformer, odd", {"positions": "nearest"}),
    "transformers": ("transformers: SigLIP", {"layer": 0}),
    "rotary": ("Eva, rotary, axial", {"layer": 0, "window": 3}),
    "rotary of each block": ("Eva, mixed, any size, default", {}),
    "biases, shared and of each block": ("Beit, both", {}),
    "maps, neck": ("VisionTransformerSAM, own windows", {"layer": 0}),
    "talking heads, class attention": ("Cait, odd", {"layer": 0}),
    "differential, branches": ("ParallelThingsBlock, differential", {}),
    "backbone": ("ViTamin, odd", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_three_graphs_serve_all_grids(name):
    vit, options = ENCODERS[name]
    encoder = short(vit, **options)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for pairs in TWELVE if options else TWELVE[::-1]:
        grids = PackedGrids(pairs)
        patches = packed_patches(encoder, grids)
        grads, result = gradients_of(encoder, compiled, patches, grids)
        wanted, expected = gradients_of(encoder, encoder, patches, grids)
        assert_close(result.tokens, expected.tokens, BOUND[torch.float64])
        if expected.prefix.numel():
            assert_close(result.prefix, expected.prefix, BOUND[torch.float64])
        assert_same_gradients(grads, wanted)
        assert result.grids == expected.grids
        assert result.views_per_image == expected.views_per_image
        assert [len(x) for x in result.per_view()] == [len(x) for x in expected.per_view()]
    assert backend.frame_count <= 3


def test_three_graphs_serve_all_ratios():
    encoder = short("Eva, rotary, axial", layer=0)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    for shift, pairs in enumerate(TWELVE):
        grids = PackedGrids(pairs)
        patches = packed_patches(encoder, grids)
        ratios = [(4, 1, 16)[(shift + view) % 3] for view in range(len(grids))]
        options = {"ratios": ViewRatios(ratios, grids)}
        grads, result = gradients_of(encoder, compiled, patches, grids, **options)
        wanted, expected = gradients_of(encoder, encoder, patches, grids, ratios=ratios)
        assert_close(result.tokens, expected.tokens, BOUND[torch.float64])
        assert result.grids == expected.grids
        if any(ratio > 1 for ratio in ratios):  # else the compressor is in the graph only
            assert_same_gradients(grads, wanted)
    assert backend.frame_count <= 3
    with pytest.raises(RuntimeError, match="'merge' of a compiled SliceEncoder must return"):
        compiled(patches, grids, ratios=ViewRatios([1, 1], [(12, 12), (7, 7)]))
    with pytest.raises(ValueError, match=r"must be for the grids .*\(12, 12\).*, got those for"):
        encoder(patches, grids, ratios=ViewRatios([1, 1], [(12, 12), (7, 7)]))
    with pytest.raises(ValueError, match="must be for windows of side 2, got 3"):
        encoder(patches, grids, ratios=ViewRatios([1, 9], grids, window=3))


def test_a_list_of_ratios_is_part_of_its_graph():
    """Which nn.ViewRatios is there to avoid."""
    encoder = short("VisionTransformer, odd", layer=0)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)
    grids = PackedGrids([(4, 6), (3, 5)])
    patches = packed_patches(encoder, grids)
    for graphs, ratios in enumerate(([4, 1], [1, 4]), 1):
        result, expected = (e(patches, grids, ratios=ratios) for e in (compiled, encoder))
        assert_close(result.tokens, expected.tokens, BOUND[torch.float64])
        assert backend.frame_count == graphs


@pytest.mark.parametrize(
    ("name", "options", "autocast"),
    [
        ("VisionTransformerRelPos, mlp, class token", {}, False),
        ("DiffParallelScalingBlock, odd", {}, False),
        ("VisionTransformerSAM, own windows", {"layer": 0}, True),
    ],
)
def test_ahead_of_time(name, options, autocast):
    """AOTAutograd traces the operator's backward pass, and casts as autocast says."""
    encoder = short(name, **options)
    encoder = encoder.float() if autocast else encoder
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    for pairs in ([(4, 6), (3, 5)], [(2, 2), (9, 7), (2, 2)])[: 1 if autocast else 2]:
        grids = PackedGrids(pairs)
        patches = packed_patches(encoder, grids)
        with torch.autocast("cpu", enabled=autocast):
            grads, result = gradients_of(encoder, compiled, patches, grids)
            wanted, expected = gradients_of(encoder, encoder, patches, grids)
        assert result.tokens.dtype == expected.tokens.dtype
        bound = 2.0**-6 if autocast else BOUND[torch.float64]
        assert_close(result.tokens, expected.tokens, bound)
        if not autocast:
            assert_same_gradients(grads, wanted)


@torch.no_grad()
def test_random_numbers_of_a_graph():
    """Drawn positions and dropout inside a module: as the seed says, and other ones each time."""
    # One for the positions of all blocks; one each for the attention and the class attention.
    for name, options, draws in (("Eva, rotary, Sapiens2", {"layer": 0}, 1), ("Cait, odd", {}, 2)):
        encoder, seeds = short(name, **options), []
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout) and name == "Cait, odd":
                module.p = 0.3

        def backend(graph, _, seeds=seeds):
            seeds += [node for node in graph.graph.nodes if node.target is torch.randint]
            return graph.forward

        compiled = torch.compile(encoder.train(), fullgraph=True, backend=backend)
        grids, tokens = PackedGrids(GRIDS), []
        patches = packed_patches(encoder, grids)
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            tokens.append(compiled(patches, grids).tokens)
        assert_close(tokens[0], tokens[1], BOUND[torch.float32])
        assert not torch.allclose(tokens[1], tokens[2])
        assert len(seeds) == draws


class Half(torch.nn.Module):
    def forward(self, x):
        return x / 2


def test_what_tables_are_computed_from_gets_its_gradient():
    """The operator knows parameters only, so such a table is made by the graph itself."""
    encoder = short("VisionTransformer, odd")
    torch.nn.utils.parametrize.register_parametrization(encoder.vit, "pos_embed", Half())
    compiled, grids = torch.compile(encoder, backend="eager"), PackedGrids(GRIDS)
    patches = packed_patches(encoder, grids)
    grads, _ = gradients_of(encoder, compiled, patches, grids)
    wanted, _ = gradients_of(encoder, encoder, patches, grids)
    assert wanted["vit.parametrizations.pos_embed.original"].any()
    assert_same_gradients(grads, wanted)


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


def part(encoder, name, *, sides=(1,), inputs=(), call=(), numbers=(), seed=None):
    """Arguments of the operator, and what it must return."""
    own = encoder.packed(PackedGrids(GRIDS))
    with torch.no_grad():
        made = own.run_part(name, list(inputs), list(sides), call, numbers)
    rows = [len(x) for x in made[:2]] or [0]
    given = own.part_tensors(name, call), list(inputs), own.grids.rows, torch.tensor(sides), seed
    prefix = call[0] if name in ("attend", "module") else 0
    of_one = [1, 2] if name == "merge" else [1 + prefix] * len(inputs)
    last = name, list(call), list(numbers), None
    return *given, rows, of_one, encoder._number, *last


TABLES = (
    {"name": "absolute"},
    {"name": "rotary", "call": [3]},
    {"name": "rotary", "call": [0], "sides": [2]},
    {"name": "rotary", "call": [1], "sides": [1, 2, 2, 1, 1]},
)


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
    for options in TABLES:
        own, call = encoder.packed(PackedGrids(GRIDS)), options.get("call", ())
        expected = own.run_part(options["name"], [], options.get("sides", [1]), call, ())
        found = torch.ops.uhd_ops._model_part(*part(encoder, **options))
        for table, wanted in zip(found, expected, strict=True):
            assert_close(table, wanted, BOUND[torch.float32])
        grads = gradients(found, parameters), gradients(expected, parameters)
        for grad, wanted in zip(*grads, strict=True):
            if grad.numel():  # no registers have no numbers
                assert_close(grad, wanted, BOUND[torch.float32])


TOKENS = sum(height * width for height, width in GRIDS)


def part_of(name):
    """Arguments of the operator for each part, with dropout where a part may have it."""
    seed = torch.tensor(3)

    def tokens(*shape, prefix=0):
        return torch.randn(TOKENS + len(GRIDS) * prefix, *shape).double().requires_grad_()

    if name in ("absolute", "rotary"):
        encoder = short("Eva, mixed, any size, default")
        encoder.double()
        return encoder, part(encoder, name, call=[1] if name == "rotary" else ())
    if name == "attend":
        encoder = SliceEncoder(exact(make("Beit, both")))
        qkv = [tokens(2, 16, prefix=1) for _ in range(3)]
        call = {"call": [1, 0, 0], "numbers": [0.3, 0.25], "seed": seed}
        return encoder, part(encoder, name, inputs=qkv, **call)
    if name == "patches":
        encoder = SliceEncoder(exact(make("ViTamin, odd")))
        patches = packed_patches(encoder, PackedGrids(GRIDS)).requires_grad_()
        return encoder, part(encoder, name, inputs=[patches])
    encoder = SliceEncoder(insert_early_compressor(exact(make("Cait, odd")), 1)).train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    if name == "finish":
        prefix = torch.zeros(len(GRIDS), 0, 32).double()
        return encoder, part(encoder, name, inputs=[prefix, tokens(32)], seed=seed)
    if name == "merge":
        times = torch.tensor([1, 0, 2, 1, 0])  # and a last row that does not matter
        return encoder, part(encoder, name, inputs=[tokens(32), times], call=[1], seed=seed)
    return encoder, part(encoder, name, inputs=[tokens(32)], call=[0, 0, 0], seed=seed)


PARTS = ("absolute", "rotary", "attend", "patches", "finish", "merge", "module")


# opcheck itself reads .grad of its own intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", PARTS)
def test_the_operator_does_what_it_declares(name):
    _encoder, call = part_of(name)  # which must be there
    torch.library.opcheck(torch.ops.uhd_ops._model_part.default, call)


@pytest.mark.parametrize("name", ["attend", "finish", "merge", "module"])
def test_the_backward_pass_draws_what_the_forward_pass_drew(name):
    _encoder, call = part_of(name)  # which must be there
    leaves = [x for x in call[1] if x.requires_grad]
    weights, ends = None, []
    direction = [torch.randn_like(x) for x in leaves]

    def value(step):
        nonlocal weights
        moved = iter(x.detach() + step * d for x, d in zip(leaves, direction, strict=True))
        inputs = [next(moved) if x.requires_grad else x for x in call[1]]
        made = torch.ops.uhd_ops._model_part(call[0], inputs, *call[2:])[-1]
        weights = torch.randn_like(made) if weights is None else weights
        return (made * weights).sum()

    with torch.no_grad():
        ends = [value(step) for step in (1e-6, -1e-6)]
    total = (torch.ops.uhd_ops._model_part(*call)[-1] * weights).sum()
    grads = torch.autograd.grad(total, leaves)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    # The error of a central difference: a third derivative times 1e-12, and eps / 1e-6.
    assert (slope - (ends[0] - ends[1]) / 2e-6).abs() <= 1e-7 * slope.abs().clamp(min=1)


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
    given, *call = part(encoder, "absolute")
    with pytest.raises(RuntimeError, match="must be those that the graph was given"):
        torch.ops.uhd_ops._model_part([given[0] + 1], *call)
    del encoder
    gc.collect()
    with pytest.raises(RuntimeError, match="that a compiled graph was made of is gone"):
        torch.ops.uhd_ops._model_part(given, *call)
