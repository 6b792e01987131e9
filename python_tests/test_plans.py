# SPDX-License-Identifier: Apache-2.0
"""A call like an earlier one: what it goes through, and what it must not take for granted."""

import gc
import sys
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from battery import assert_same_bits
from battery.marks import native_only
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

import uhd_ops
from uhd_ops import PackedGrids, _native, _plans

PAIRS = [(4, 6), (3, 5)]
TOKENS, HEADS, CHANNELS = 39, 2, 16
OPS = {
    "window_attention": (3, (HEADS, 8)),
    "window_attention_qkvpacked": (1, (3, HEADS, 8)),
    "window_mean": (1, (CHANNELS,)),
    "window_pool": (2, (CHANNELS,)),
    "pixel_unshuffle": (1, (CHANNELS,)),
}
every_op = pytest.mark.parametrize("name", OPS)
pytestmark = native_only("definitions keep nothing")


@pytest.fixture(autouse=True)
def nothing_kept():
    uhd_ops.clear_caches()
    yield
    uhd_ops.clear_caches()


def tensors_of(name, requires_grad=False):
    count, trailing = OPS[name]
    return [torch.randn(TOKENS, *trailing, requires_grad=requires_grad) for _ in range(count)]


def called(function):
    """The functions of this package that a call goes through, and the operators it runs."""
    frames, package = [], str(Path(uhd_ops.__file__).parent)

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            frames.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as watched:
        function()
    return frames, [event.name for event in watched.events() if "::" in event.name]


@every_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_second_call_goes_straight_to_its_operator(name, requires_grad):
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    tensors = tensors_of(name, requires_grad)
    for _ in range(2):
        expected = function(*tensors, grids)
    frames, operators = called(lambda: function(*tensors, grids))
    below = ["forward", frames[-1]] if requires_grad else []
    assert frames == [name, "find", "is_eager", "eager", *below]
    assert frames[-1].endswith("setup_context") == requires_grad
    # Memory for results and for the threads' sums, and another view; nothing is copied or cast.
    others = ("aten::new_empty", "aten::empty", "aten::flatten", "aten::view")
    assert [each for each in operators if each not in others] == [f"uhd_ops::{name}"]
    assert_same_bits(function(*tensors, grids), expected)


BAD = {
    "a float for a window": lambda t: (t, {"window": 2.0}, TypeError),
    "a bool for a window": lambda t: (t, {"window": True}, TypeError),
    "no order": lambda t: (t, {"order_in": "columns"}, ValueError),
    "a side that is no int": lambda t: (t, {"order_in": (4.0, 2)}, TypeError),
    "fewer tokens": lambda t: ([x[1:] for x in t], {}, ValueError),
    "more dimensions": lambda t: ([x[None, None] for x in t], {}, ValueError),
    "integers": lambda t: ([x.int() for x in t], {}, TypeError),
    "another dtype": lambda t: ([*t[:-1], t[-1].double()], {}, TypeError),
    "another device": lambda t: ([*t[:-1], t[-1].to("meta")], {}, ValueError),
    "a sparse tensor": lambda t: ([*t[:-1], t[-1].to_sparse()], {}, NotImplementedError),
    "a list": lambda t: ([*t[:-1], t[-1].tolist()], {}, TypeError),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", ["window_attention", "window_pool"])
def test_what_equals_an_accepted_call_is_refused_as_ever(name, case):
    function, good = getattr(uhd_ops, name), tensors_of(name)
    window = {"a bool for a window": 1}.get(case, 2)
    order_in = (4, 2) if case == "a side that is no int" else "raster"
    tensors, options, error = BAD[case](good)
    messages = []
    for _ in range(2):
        with pytest.raises(error) as raised:
            function(*tensors, PackedGrids(PAIRS), **options)
        messages.append(str(raised.value))
        for _ in range(2):
            function(*good, PackedGrids(PAIRS), window, order_in=order_in)
    assert messages[0] == messages[1]


@every_op
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")  # of forward mode itself
def test_transformations_and_modes_are_seen(name):
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    tensors = tensors_of(name)
    for _ in range(2):
        expected = function(*tensors, grids)
    with pytest.raises(NotImplementedError, match=r"uhd_ops\.reference"):
        torch.func.grad(lambda x: function(x, *tensors[1:], grids).sum())(tensors[0])
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(*(forward_ad.make_dual(x, x) for x in tensors), grids)
    batched = torch.vmap(lambda *x: function(*x, grids))(*(x[None] for x in tensors))
    assert_same_bits(batched[0], expected)
    with uhd_ops.definitions():
        assert called(lambda: function(*tensors, grids))[1][0].startswith("aten::")
    with Seen() as mode:
        assert_same_bits(function(*tensors, grids), expected)
    assert f"uhd_ops.{name}.default" in mode.names


class Seen(TorchFunctionMode):
    """What is called while this is on."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Watched(torch.Tensor):
    """A subclass that sees what is called with it."""

    names: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@every_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_subclass_sees_every_call(name, requires_grad):
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    tensors = tensors_of(name, requires_grad)
    watched = [x.as_subclass(Watched) for x in tensors]
    for _ in range(4):  # beginning with the second, a call of plain tensors finds its plan
        expected = function(*tensors, grids)
        Watched.names.clear()
        out = function(*watched, grids)
        assert f"uhd_ops.{name}.default" in Watched.names
        assert_same_bits(out.as_subclass(torch.Tensor), expected)


def test_a_default_device_changes_nothing():
    with torch.device("meta"):
        assert _native.is_eager()
        with Seen():
            assert not _native.is_eager()
    assert _native.is_eager()


@every_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_that_are_only_marked(name, requires_grad):
    """Their memory holds something else, or there is none."""
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    tensors = tensors_of(name, requires_grad)
    for _ in range(2):
        expected = function(*tensors, grids)

    def result(place, x):
        return function(*tensors[:place], x, *tensors[place + 1 :], grids)

    for place, x in enumerate(tensors):
        negated, nothing = torch._neg_view(-x), torch._efficientzerotensor(x.shape)
        assert negated.is_neg()
        assert_same_bits(result(place, negated), expected)
        assert_same_bits(result(place, nothing), result(place, torch.zeros_like(x)))


@pytest.mark.filterwarnings("ignore")  # of torch.jit: it is deprecated, and sizes are tensors
def test_jit_trace_sees_the_operator():
    grids, x = PackedGrids(PAIRS), torch.randn(TOKENS, CHANNELS, requires_grad=True)
    for _ in range(2):
        uhd_ops.window_mean(x, grids)
    traced = torch.jit.trace(lambda x: uhd_ops.window_mean(x, grids), x, check_trace=False)
    assert "uhd_ops::window_mean" in str(traced.graph)
    assert "PythonOp" not in str(traced.graph)


def test_autocast_casts_what_was_taken_as_it_is():
    grids, tensors = PackedGrids(PAIRS), tensors_of("window_attention")
    mixed = [tensors[0], tensors[1].bfloat16(), tensors[2]]
    for _ in range(2):
        assert uhd_ops.window_attention(*tensors, grids).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert uhd_ops.window_attention(*tensors, grids).dtype == torch.bfloat16
            assert uhd_ops.window_attention(*mixed, grids).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.float16):
            assert uhd_ops.window_attention(*tensors, grids).dtype == torch.float16
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            uhd_ops.window_attention(*mixed, grids)


@every_op
def test_a_call_under_inference_mode_serves_one_with_gradients(name):
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    with torch.inference_mode():
        for _ in range(2):
            function(*tensors_of(name), grids)
    tensors = tensors_of(name, requires_grad=True)
    function(*tensors, grids).sum().backward()
    assert all(x.grad is not None for x in tensors)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", [*OPS, "pixel_unshuffle_mlp"])
def test_a_table_that_changes_before_the_backward_pass_is_an_error(name, eager, monkeypatch):
    """On CUDA, ``PaddedGrids.update`` changes tables in place."""
    if not eager:  # what torch.compile sees
        monkeypatch.setattr(_native, "is_eager", lambda: False)
        monkeypatch.setattr(_plans, "is_eager", lambda: False)
    grids, function = PackedGrids(PAIRS), getattr(uhd_ops, name)
    if name in OPS:
        arguments = *tensors_of(name, requires_grad=True), grids
    else:
        x = torch.randn(TOKENS, CHANNELS, requires_grad=True)
        arguments = x, grids, torch.randn(5, CHANNELS), None, torch.randn(CHANNELS, 5), None
    views = grids.view_table(2, torch.device("cpu"))
    for _ in range(3):
        function(*arguments).sum().backward()
        out = function(*arguments)
        assert out.grad_fn is not None
        views.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.parametrize("biases", [False, True])
def test_a_second_mlp_checks_nothing(biases):
    grids, x = PackedGrids(PAIRS), torch.randn(TOKENS, CHANNELS)
    fc1, fc2 = torch.randn(5, CHANNELS), torch.randn(CHANNELS, 5)
    vectors = (torch.randn(5), torch.randn(CHANNELS)) if biases else (None, None)
    mlp = fc1, vectors[0], fc2, vectors[1]
    for _ in range(2):
        uhd_ops.pixel_unshuffle_mlp(x, grids, *mlp)
    frames, operators = called(lambda: uhd_ops.pixel_unshuffle_mlp(x, grids, *mlp))
    assert not [name for name in frames if name.startswith(("check", "_check"))]
    named = [name for name in operators if name.startswith("uhd_ops::")]
    assert named == ["uhd_ops::_unshuffle_norm", "uhd_ops::_linear_activation"]
    assert not {"aten::to", "aten::contiguous", "aten::clone"} & {*operators}
    for bad in (x.double(), x[1:], x.int()):
        with pytest.raises((TypeError, ValueError)):
            uhd_ops.pixel_unshuffle_mlp(bad, grids, *mlp)
    for options in ({"residual": 1}, {"factor": 2.0}, {"eps": True}, {"activation": "none"}):
        with pytest.raises((TypeError, ValueError)):
            uhd_ops.pixel_unshuffle_mlp(x, grids, *mlp, **options)


def names_of(node):
    """The nodes of a backward pass, from this one on."""
    after = [edge for edge, _ in node.next_functions if edge is not None]
    return {type(node).__name__}.union(*map(names_of, after))


PARTS = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "norm_weight", "norm_bias")


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pairs", [PAIRS, []], ids=["two views", "no view"])
def test_an_mlp_has_the_gradients_of_its_operators(pairs, form, residual, dtype, monkeypatch):
    """Whatever requires one; what torch.compile sees has a node for each operator."""
    blocks, width = ((4,), CHANNELS) if form == "block" else ((), CHANNELS)
    width = 4 * CHANNELS if form == "dense" else width
    shapes = (
        (TOKENS if pairs else 0, CHANNELS),
        (*blocks, 5, width),
        (*blocks, 5),
        (*blocks, CHANNELS, 5),
    )
    shapes += (CHANNELS,), (4 * CHANNELS,), (4 * CHANNELS,)
    values = {k: torch.randn(shape).to(dtype) for k, shape in zip(PARTS, shapes, strict=True)}
    grids = PackedGrids(pairs)

    def gradients(*chosen):
        leaves = {name: x.detach().requires_grad_(name in chosen) for name, x in values.items()}
        out = uhd_ops.pixel_unshuffle_mlp(grids=grids, residual=residual, **leaves)
        nodes = names_of(out.grad_fn)
        out.backward(torch.ones_like(out), retain_graph=True)
        out.backward(torch.ones_like(out))
        assert [name for name, x in leaves.items() if x.grad is not None] == [*chosen]
        return nodes, out, *(leaves[name].grad for name in chosen)

    # All, each alone, and those that leave out a part of the node.
    for chosen in (PARTS, *((name,) for name in PARTS), PARTS[1:3], ("x", "norm_bias")):
        for _ in range(2):
            gradients(*chosen)
        nodes, *found = gradients(*chosen)
        joined = form != "block" and not {*chosen} <= {"fc2_weight", "fc2_bias"}
        assert ("_NormAndLayerBackward" in nodes) == joined
        with monkeypatch.context() as patched:
            patched.setattr(_native, "is_eager", lambda: False)
            patched.setattr(_plans, "is_eager", lambda: False)
            for got, wanted in zip(found, gradients(*chosen)[1:], strict=True):
                assert_same_bits(got, wanted)


def test_an_mlp_has_no_second_derivative():
    x, fc1, fc2 = (torch.randn(s, requires_grad=True) for s in ((TOKENS, 4), (5, 4), (4, 5)))
    for _ in range(3):
        out = uhd_ops.pixel_unshuffle_mlp(x, PackedGrids(PAIRS), fc1, None, fc2, None)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"reference\.pixel_unshuffle_mlp has one"):
            grad.sum().backward()


def test_sizes_take_turns():
    grids = PackedGrids(PAIRS)
    for channels in (3, 5, 3, 5):
        x = torch.randn(TOKENS, channels)
        assert_same_bits(uhd_ops.window_mean(x, grids), uhd_ops.window_mean(x, PAIRS))
    assert {key[0].__name__ for key in grids._tables if len(key) == 2} == {"_check"}


def test_no_tensor_is_kept_and_nothing_outlives_its_grids():
    grids = PackedGrids(PAIRS)
    tensors = tensors_of("window_attention")
    for _ in range(2):
        uhd_ops.window_attention(*tensors, grids)
    watched = [weakref.ref(x) for x in (*tensors, grids.view_table(2, torch.device("cpu")))]
    del tensors
    assert [x() is None for x in watched] == [True, True, True, False]
    uhd_ops.clear_caches()
    assert not grids._tables
    assert not grids._tables.last
    gc.collect()
    assert watched[-1]() is None


def test_what_does_nothing_is_left_out_until_somebody_looks():
    compressor = uhd_ops.nn.EarlyCompressor(CHANNELS, HEADS, form="tied").eval()
    grids, x = PackedGrids(PAIRS), torch.randn(TOKENS, CHANNELS)
    with torch.no_grad():
        for _ in range(2):
            expected = compressor(x, grids)
        frames, operators = called(lambda: compressor(x, grids))
    assert len(frames) <= 61
    assert "aten::unbind" not in operators
    seen = []
    for part in (compressor.attn.q_norm, compressor.attn.inner_norm, compressor.attn.post):
        assert type(part) is torch.nn.Identity
        part.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert torch.allclose(compressor(x, grids), expected)
    assert seen == [(TOKENS, HEADS, 8), (TOKENS, CHANNELS), (TOKENS, CHANNELS)]
