# SPDX-License-Identifier: Apache-2.0
"""Models of transformers that pack images of several sizes, with a compressor."""

import copy
import pickle

import pytest
import torch
from families.case import assert_close, snapshot
from hf_packed import CASES, PATCH, RELATIVES, ROUNDINGS, exactly
from test_flops_families import counted
from transformers import vision_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.kimi_k25 import modeling_kimi_k25

from uhd_ops import (
    flops,
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
    remove_progressive_compression,
)
from uhd_ops.nn import EarlyCompressor, SliceEncoder

COMPRESSOR = ".compressor."
LAYER = 1
ALL = CASES | RELATIVES
EVERY = pytest.mark.parametrize("case", ALL.values(), ids=ALL)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def outputs(model, inputs, **options):
    """What the model returns, by name."""
    dtype = next(model.parameters()).dtype
    with exactly(dtype):
        return model(**inputs, **options)


def tensors(output):
    """All tensors of an output, one after the other."""
    found = []
    for value in output.values():
        found += value if isinstance(value, (list, tuple)) else [value]
    return found


def loss(output):
    return sum(value.square().sum() for value in tensors(output))


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(map(torch.equal, first, second))


OPTIONS = [
    *({"layer": layer} for layer in range(4)),
    {"attention": False},
    {"positions": "reindex"},
    {"form": "block"},
    {"form": "tied"},
]
OPTIONS = [(name, options) for name in CASES for options in OPTIONS] + [
    (name, {"window": window, "positions": positions})
    for name, case in CASES.items()
    for window in case.windows
    for positions in ("center", "reindex")
]
OPTIONS += [(name, {}) for name in RELATIVES]


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_definition(name, options):
    case = ALL[name]
    model = case.make().double()
    shapes = case.shapes_for(options.get("window", 2))
    inputs = case.inputs(shapes)
    described = {key: value for key, value in options.items() if key not in ("form", "layer")}
    described["layers"] = (options.get("layer", LAYER),)
    with exactly(torch.float64):
        states, others = case.by_hand(model, inputs, shapes, **described)
    insert_early_compressor(model, **({"layer": LAYER} | options))
    assert_as_by_hand(model, inputs, states, others)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["center", "reindex"])
def test_progressive_compression(case, positions):
    model = case.make().double()
    shapes = case.shapes_for(4)
    inputs, options = case.inputs(shapes), {"layers": (0, 2), "positions": positions}
    expected = outputs(model, inputs)
    with exactly(torch.float64):
        states, others = case.by_hand(model, inputs, shapes, **options, pool=True)
    insert_progressive_compression(model, **options, pool="mean")
    assert_as_by_hand(model, inputs, states, others)
    assert_same(tensors(outputs(remove_progressive_compression(model), inputs)), tensors(expected))


def assert_as_by_hand(model, inputs, states, others):
    output = outputs(model, inputs, output_hidden_states=True)
    assert_close(output.last_hidden_state.flatten(0, -2), states[-1], ROUNDINGS)
    assert len(output.hidden_states) == len(states)
    for actual, expected in zip(output.hidden_states, states, strict=True):
        assert_close(actual.flatten(0, -2), expected, ROUNDINGS)
    assert others.keys() == output.keys() - {"last_hidden_state", "hidden_states"}
    found = tensors({name: output[name] for name in others})
    for actual, expected in zip(found, tensors(others), strict=True):
        assert_close(actual, expected, ROUNDINGS)


@torch.no_grad()
def test_equal_tokens_become_what_the_block_makes_of_them(case):
    model = case.make().double()
    block = model.get_submodule(case.layers)[LAYER]
    compressor = EarlyCompressor.from_block(block)
    x = torch.randn(1, compressor.dim, dtype=torch.float64).expand(4, -1)
    with exactly(torch.float64):
        expected = case.run_block(model, LAYER, x)[:1]
        assert_close(compressor(x, [(2, 2)]), expected, ROUNDINGS)
        assert_close(compressor(x[:1], [(1, 1)]), expected, ROUNDINGS)


@torch.no_grad()
@EVERY
def test_removal_restores_everything(case):
    model = case.make()
    inputs = case.inputs(case.shapes, torch.float32)
    before, config, expected = snapshot(model), model.config.to_dict(), outputs(model, inputs)
    insert_early_compressor(model, LAYER)
    assert insert_early_compressor(model, LAYER) is model
    assert outputs(model, inputs).last_hidden_state.shape != expected.last_hidden_state.shape
    assert model.config.to_dict() == config
    assert remove_early_compressor(model) is model
    assert snapshot(model) == before
    assert model.config.to_dict() == config
    assert_same(tensors(outputs(model, inputs)), tensors(expected))


@torch.no_grad()
def test_copies_are_their_own(case):
    model = insert_early_compressor(case.make(), LAYER)
    inputs = case.inputs(case.shapes, torch.float32)
    expected = tensors(outputs(model, inputs))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(tensors(outputs(clone, inputs)), expected)
        for name, parameter in clone.named_parameters():
            if COMPRESSOR in name:
                parameter.zero_()
        assert not torch.equal(outputs(clone, inputs).last_hidden_state, expected[0])
        assert type(remove_early_compressor(clone)) is type(model).body_class
    assert_same(tensors(outputs(model, inputs)), expected)


@torch.no_grad()
@EVERY
def test_checkpoints(case, tmp_path):
    window = case.windows[0]
    options = {"form": "tied", "window": window, "attention": False, "positions": "reindex"}
    model = insert_early_compressor(case.make(), LAYER, **options)
    for name, parameter in model.named_parameters():
        if COMPRESSOR in name:
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = type(model).body_class.from_pretrained(tmp_path)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]
    assert loaded.compression == model.compression
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert_same(list(loaded.state_dict().values()), list(model.state_dict().values()))
    # A loaded weight lies wherever the file has it, and products may round by alignment.
    inputs = case.inputs(case.shapes_for(window))
    results = (tensors(outputs(m.double(), inputs)) for m in (loaded, model))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, ROUNDINGS)


def test_gradient_checkpointing_and_what_learns(case):
    model = case.make().train()
    inputs, others = (case.inputs(s, torch.float32) for s in (case.shapes, case.shapes[::-1]))
    loss(outputs(model, inputs)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    insert_early_compressor(model, LAYER)
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options:
            model.activation_checkpointing_enable(options)
            for given in (inputs, others):
                next(iter(given.values())).requires_grad_()
        model.zero_grad()
        out = outputs(model, inputs)
        outputs(model, others)  # must not leave their layout
        loss(out).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert model.state_dict().keys() - gradients[0].keys() == without
    assert all(grad.isfinite().all() and grad.any() for grad in gradients[0].values())
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, grad in other.items():
            if "patch" in name:  # torch's convolution may add in another order
                assert_close(grad, gradients[0][name], ROUNDINGS)
            else:
                assert torch.equal(grad, gradients[0][name]), name


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype):
    late = case.make()
    early = insert_early_compressor(copy.deepcopy(late), LAYER).to(dtype)
    late = insert_early_compressor(late.to(dtype), LAYER)
    inputs = case.inputs(case.shapes, dtype)
    results = [tensors(outputs(model, inputs)) for model in (late, early)]
    assert all(out.dtype == dtype and out.isfinite().all() for out in results[0])
    assert_same(*results)


def test_autocast(case):
    model = insert_early_compressor(case.make(), LAYER).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss(outputs(model, case.inputs(case.shapes, torch.float32))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_pixtral_compiles_in_one_graph_where_images_have_one_size():
    model = insert_early_compressor(CASES["Pixtral"].make(num_layers=2), 0)
    images = torch.randn(2, 3, 28, 20)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images).last_hidden_state, model(images).last_hidden_state)


@torch.no_grad()
def test_flops(case):
    model = insert_early_compressor(case.make(), LAYER).requires_grad_(False)
    inputs = case.inputs(case.shapes, torch.float32)
    total, _ = counted(model, model.get_submodule(case.layers), **inputs)
    assert flops.count_forward(model, **inputs).total == total


def by_segments(module, q, k, v, attention_mask, scaling, **kwargs):
    """Flash attention's interface: ``cu_seq_lens_q`` says where segments start."""
    assert attention_mask is None
    starts = kwargs["cu_seq_lens_q"]
    assert torch.equal(kwargs["cu_seq_lens_k"], starts)
    lengths = starts.diff()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == lengths.max()
    parts = (x.split(lengths.tolist(), 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    out = [attend(*part, scale=scaling) for part in zip(*parts, strict=True)]
    return torch.cat(out, 2).transpose(1, 2), None


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "flash_by_segments"])
def test_other_attention_functions(case, implementation, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_by_segments", by_segments)
    model = insert_early_compressor(case.make(), LAYER)
    inputs = case.inputs(case.shapes, torch.float32)
    expected = tensors(outputs(model, inputs))
    model.config._attn_implementation = implementation
    for actual, wanted in zip(tensors(outputs(model, inputs)), expected, strict=True):
        assert_close(actual, wanted, ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["MoonViT", "Qwen2.5-VL"])
def test_what_is_computed_beforehand_is_that_of_the_patches(name):
    """As transformers does it for graphs: by the caller, who knows of no compressor."""
    case = CASES[name]
    model = insert_early_compressor(case.make(), LAYER)
    inputs = case.inputs(case.shapes, torch.float32)
    expected, grids, options = tensors(outputs(model, inputs)), inputs["grid_thw"], {}
    if name == "MoonViT":
        options["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grids, merge_temporal=True)
        options["position_ids"] = vision_utils.get_vision_position_ids(grids, 1)
        index = modeling_kimi_k25.get_vision_temporal_merge_index(grids, 2, 2)
        options["temporal_merge_index"] = index
    else:
        options["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grids)
        options["position_ids"] = vision_utils.get_vision_position_ids(grids, 2)
        windows = vision_utils.get_vision_window_index(grids, 2, model.window_size, PATCH)
        options["window_index"], options["cu_window_seqlens"] = windows
    assert_same(tensors(outputs(model, inputs, **options)), expected)


@torch.no_grad()
def test_tuples(case):
    model = insert_early_compressor(case.make(), LAYER)
    inputs = case.inputs(case.shapes, torch.float32)
    expected = outputs(model, inputs, output_hidden_states=True)
    values = outputs(model, inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(values, tuple)
    assert_same(tensors(dict(enumerate(values))), tensors(expected))


def test_slice_encoder_is_refused(case):
    for model in (case.make(), insert_early_compressor(case.make(), LAYER)):
        with pytest.raises(NotImplementedError, match="takes images of several sizes itself"):
            SliceEncoder(model)


def test_other_blocks_are_refused(case):
    model = case.make()
    layers = model.get_submodule(case.layers)
    layers[2] = torch.nn.Sequential(layers[2])
    before = snapshot(model)
    with pytest.raises(NotImplementedError, match=rf"vit\.{case.layers}\.2 must be .*, got Sequ"):
        insert_early_compressor(model, LAYER)
    assert snapshot(model) == before


GRIDS = [name for name in CASES if name != "Pixtral"]


@pytest.mark.parametrize("name", GRIDS)
def test_sides_that_do_not_divide_are_refused(name):
    """Without a compressor they are right; with one, the error says what would be."""
    case, model = CASES[name], CASES[name].make()
    inputs = case.inputs([(1, 4, 8), (1, 4, 6)], torch.float32)
    expected = tensors(outputs(model, inputs))
    insert_early_compressor(model, LAYER)
    message = "must have rows and columns that are multiples of 4 x 4 patches, 16 x 16 px, .*; "
    with pytest.raises(ValueError, match=message + "entry 1 has 4 x 6 patches"):
        outputs(model, inputs)
    assert_same(tensors(outputs(remove_early_compressor(model), inputs)), expected)


def test_windows_of_attention_must_hold_whole_ones():
    model = CASES["Qwen2.5-VL"].make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"window must divide 4, .* \(32 px\) .*, got 3"):
        insert_early_compressor(model, LAYER, window=3)
    with pytest.raises(
        ValueError, match=r"window to the power of 3 merges must divide 4, .*, got 2"
    ):
        insert_progressive_compression(model, (0, 1, 2))
    assert snapshot(model) == before


@torch.no_grad()
def test_compile():
    model = insert_early_compressor(CASES["Qwen2-VL"].make(num_layers=2), 0)
    inputs = CASES["Qwen2-VL"].inputs([(1, 4, 8)], torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")  # reading the grids breaks the graph
    assert_same(tensors(compiled(**inputs)), tensors(outputs(model, inputs)))
