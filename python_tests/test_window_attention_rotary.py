# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings inside window_attention and window_attention_qkvpacked."""

import pytest
import torch
from battery import ISAS, assert_same_bits, using_isa
from battery.allocations import Allocations
from battery.marks import native_only
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import uhd_ops
from uhd_ops import PaddedGrids, window_attention, window_attention_qkvpacked
from uhd_ops.nn.attention import WindowScope
from uhd_ops.nn.positions import Rotary, rotate

GRIDS = [(4, 6), (0, 3), (3, 5), (1, 1), (7, 2)]
TOKENS = 24 + 15 + 1 + 14
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tables(*shape, dtype=torch.float64):
    """Cosines and sines in which no two channels of a token have the same angle."""
    angles = 3 * torch.randn(shape, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads(dtype, heads=2, kv_heads=2, dim=8, tokens=TOKENS):
    counts = (heads, kv_heads, kv_heads)
    return [torch.randn(tokens, n, dim, dtype=torch.float64).to(dtype) for n in counts]


def by_hand(q, k, v, grids, window, rotary, rotate_half, **options):
    """What a host does: rotate, then attend; in float64."""
    cos, sin = (table.double() for table in rotary)
    if cos.dim() == 2:
        cos, sin = cos[:, None], sin[:, None]
    q, k = (rotate(x.double(), Rotary(sin, cos), rotate_half) for x in (q, k))
    return uhd_ops.reference.window_attention(q, k, v.double(), grids, window, **options)


def passes(function, tensors, grad_out):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out))


def error_of(dtype, *, rounded):
    """A bound, in units of the largest number of a tensor.

    Sums are as for the operator without rotation: 2 ((D + 1) sqrt(D) + H T + 4) roundings in the
    accumulation type, four more for the rotation, and half an epsilon at the store. CUDA kernels
    round rotated queries and keys to the tensors' own type: the score, a sum of D products that
    come to sqrt(D) with the scale, is off by twice that of its products' sizes, and so is the
    probability; gradients are rounded before they are rotated back, too.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dim, sums = 72, 2 * (73 * 72**0.5 + 4 * 25 + 8)
    half = torch.finfo(dtype).eps / 2
    error = sums * torch.finfo(wide).eps + half
    return error + (2 * dim**0.5 + 2) * half if rounded else error


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rotate_half", [0, 1, 2])
def test_values_and_gradients(isa, dtype, rotate_half):
    rounded = isa == "emulated"
    for window in (2, 3, 5):
        for dim in (8, 72):
            for count, kv_count, per_head in ((5, 5, True), (2, 2, False), (4, 2, False)):
                q, k, v = heads(dtype, count, kv_count, dim)
                shape = (TOKENS, count, dim) if per_head else (TOKENS, dim)
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                rotary = tables(*shape, dtype=wide)
                grad_out = torch.randn(TOKENS, count, dim, dtype=torch.float64).to(dtype)
                options = {"order": "window" if per_head else "raster"}
                arguments = (GRIDS, window)
                exact = passes(
                    lambda *x: by_hand(*x, *arguments, rotary, rotate_half, **options),  # noqa: B023
                    [x.double() for x in (q, k, v)],
                    grad_out,
                )
                options.update(rotary=rotary, rotate_half=rotate_half)
                with using_isa(isa):
                    actual = passes(
                        lambda *x: window_attention(*x, *arguments, **options),  # noqa: B023
                        (q, k, v),
                        grad_out,
                    )
                for got, wanted in zip(actual, exact, strict=True):
                    assert got.dtype == dtype
                    allowed = error_of(dtype, rounded=rounded) * wanted.abs().max()
                    assert (got.double() - wanted).abs().max() <= allowed


# Ragged, whole, and without tokens.
MANY_GRIDS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=4)


@st.composite
def rotated_calls(draw):
    """Grids, tensors and options of a call that window_attention takes, whatever they are."""
    grids = draw(MANY_GRIDS)
    tokens = sum(height * width for height, width in grids)
    dtype, rotate_half = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dim = (2 * rotate_half or 2) * draw(st.integers(1, 12))
    count = kv_heads * group
    per_head = draw(st.sampled_from([(), (1,)] if group > 1 else [(), (1,), (count,)]))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(draw(st.integers(0, 100)))
    options = {
        "window": draw(st.integers(1, 5)),
        "order": draw(st.sampled_from(["raster", "window", "block"])),
        "rotary": tables(tokens, *per_head, dim, dtype=draw(st.sampled_from([wide, dtype]))),
        "rotate_half": rotate_half,
    }
    return grids, heads(dtype, count, kv_heads, dim, tokens), options


@example(([], heads(torch.float32, tokens=0), {"rotary": tables(0, 8, dtype=torch.float32)}))
@given(rotated_calls())
def test_any_grids_heads_and_pairs_of_channels(call):
    grids, (q, k, v), options = call
    grad_out = torch.randn(q.shape, dtype=torch.float64).to(q.dtype)
    actual = passes(lambda *x: window_attention(*x, grids, **options), (q, k, v), grad_out)
    packed, joined = passes(
        lambda x: window_attention_qkvpacked(x, grids, num_heads=q.shape[1], **options),
        [torch.cat([q, k, v], 1)],
        grad_out,
    )
    assert_same_bits(packed, actual[0])
    assert_same_bits(joined, torch.cat(actual[1:], 1), "gradient")
    options = {"window": 2, "rotate_half": 1} | options
    exact = passes(
        lambda *x: by_hand(*x, grids, **options), [x.double() for x in (q, k, v)], grad_out
    )
    allowed = error_of(q.dtype, rounded="emulated" in ISAS)
    for got, wanted in zip(actual, exact, strict=True):
        assert got.shape == wanted.shape
        if wanted.numel():
            assert (got.double() - wanted).abs().max() <= allowed * wanted.abs().max()


# The CPU kernels round nothing on the way but the result: not rotated queries, as CUDA kernels do,
# and not sums.
if "emulated" not in ISAS:

    @native_only("the definition rounds its results as it likes")
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("window", [2, 5])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_types_are_float32_inside(isa, window, dtype):
        tensors, grad_out = heads(dtype, 6, 2, 72), torch.randn(TOKENS, 6, 72).to(dtype)
        options = {"rotary": tables(TOKENS, 72, dtype=torch.float32)}
        with using_isa(isa):
            half, single = (
                passes(lambda *x: window_attention(*x, GRIDS, window, **options), inputs, grad_out)
                for inputs in (tensors, [x.float() for x in tensors])
            )
        for got, wanted in zip(half, single, strict=True):
            assert_same_bits(got, wanted.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("order_in", ["raster", "block", (3, 2)])
def test_a_packed_tensor_gives_the_bits_of_its_slices(isa, kv_heads, order_in):
    q, k, v = heads(torch.float32, 4, kv_heads)
    options = {"rotary": tables(TOKENS, 8, dtype=torch.float32), "order_in": order_in}
    grad_out = torch.randn(TOKENS, 4, 8)
    with using_isa(isa):
        out, *grads = passes(
            lambda *x: window_attention(*x, GRIDS, 3, **options), (q, k, v), grad_out
        )
        packed, grad = passes(
            lambda qkv: window_attention_qkvpacked(qkv, GRIDS, 3, num_heads=4, **options),
            [torch.cat([q, k, v], 1)],
            grad_out,
        )
        assert_same_bits(packed, out)
        assert_same_bits(grad, torch.cat(grads, 1), "gradient")
        if kv_heads == 4:
            three = torch.stack([q, k, v], 1)
            assert_same_bits(window_attention_qkvpacked(three, GRIDS, 3, **options), out)


def test_angles_of_zero_change_no_bit():
    q, k, v = heads(torch.float32)
    rotary = torch.ones(TOKENS, 8), torch.zeros(TOKENS, 8)
    assert_same_bits(
        window_attention(q, k, v, GRIDS, rotary=rotary), window_attention(q, k, v, GRIDS)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_orders_and_tables_move_together(dtype):
    q, k, v = heads(dtype)
    rotary = tables(TOKENS, 2, 8, dtype=torch.float32)
    wanted = window_attention(q, k, v, GRIDS, 3, rotary=rotary, order=(3, 2))
    moved = [
        uhd_ops.reorder_tokens(x.flatten(1), GRIDS, "block").unflatten(1, (2, 8))
        for x in (q, k, v, *rotary)
    ]
    out = window_attention(
        *moved[:3], GRIDS, 3, rotary=tuple(moved[3:]), order_in="block", order=(3, 2)
    )
    assert_same_bits(out, wanted)


@pytest.mark.parametrize("window", [2, 5])
def test_a_view_alone_has_the_same_bits(window):
    q, k, v = heads(torch.float32)
    cos, sin = tables(TOKENS, 8, dtype=torch.float32)
    grad_out, start = torch.randn(TOKENS, 2, 8), 0
    whole = passes(
        lambda *x: window_attention(*x, GRIDS, window, rotary=(cos, sin)), (q, k, v), grad_out
    )
    for height, width in GRIDS:
        rows = slice(start, start := start + height * width)
        alone = passes(
            lambda *x: window_attention(
                *x,
                [(height, width)],  # noqa: B023
                window,
                rotary=(cos[rows], sin[rows]),  # noqa: B023
            ),
            (q[rows], k[rows], v[rows]),
            grad_out[rows],
        )
        for got, wanted in zip(alone, whole, strict=True):
            assert_same_bits(got, wanted[rows])


def test_batched_tokens_share_tables_or_have_their_own():
    q, k, v = heads(torch.float32, tokens=3 * 20)
    own = tables(3, 20, 1, 8, dtype=torch.float32)
    shared = tables(20, 8, dtype=torch.float32)
    batched = [x.unflatten(0, (3, 20)) for x in (q, k, v)]
    for rotary, packed in (
        (own, [x.flatten(0, 1) for x in own]),
        (shared, [x.repeat(3, 1) for x in shared]),
        ([x[:, None] for x in shared], [x.repeat(3, 1) for x in shared]),
    ):
        out = window_attention(*batched, (4, 5), 3, rotary=tuple(rotary))
        wanted = window_attention(q, k, v, [(4, 5)] * 3, 3, rotary=tuple(packed))
        assert_same_bits(out.flatten(0, 1), wanted)


def test_gradcheck():
    rotary = tables(8, 4)
    q, k, v = (x.requires_grad_() for x in heads(torch.float64, 2, 1, 4, 8))
    for half in (0, 1):
        for window in (2, 3):
            assert torch.autograd.gradcheck(
                lambda *x: window_attention(*x, (2, 4), window, rotary=rotary, rotate_half=half),  # noqa: B023
                (q, k, v),
            )


@native_only("without kernels the definition is called, which has a second derivative")
@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_are_refused(packed):
    tensors = [x.requires_grad_() for x in heads(torch.float64, tokens=8)]
    rotary = tables(8, 8)
    if packed:
        out = window_attention_qkvpacked(torch.stack(tensors, 1), (2, 4), rotary=rotary)
    else:
        out = window_attention(*tensors, (2, 4), rotary=rotary)
    (grad,) = torch.autograd.grad(out.sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="window_attention has no second derivative"):
        grad.sum().backward()


@native_only("the definition makes its own tables")
@pytest.mark.parametrize("packed", [False, True])
def test_a_table_that_changes_before_the_backward_pass_is_an_error(packed):
    # PaddedGrids change theirs in place on CUDA.
    grids, rotary = uhd_ops.PackedGrids([(2, 4)]), tables(8, 8)
    tensors = [x.requires_grad_() for x in heads(torch.float64, tokens=8)]
    if packed:
        out = window_attention_qkvpacked(torch.stack(tensors, 1), grids, rotary=rotary)
    else:
        out = window_attention(*tensors, grids, rotary=rotary)
    grids.view_table(2, torch.device("cpu")).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@native_only("PaddedGrids need the kernels")
def test_padded_grids_leave_zeros():
    padded = PaddedGrids(TOKENS + 6, 8, windows=(2,), device="cpu")
    padded.update(GRIDS)
    q, k, v = heads(torch.float32, tokens=TOKENS + 6)
    cos, sin = tables(TOKENS + 6, 8, dtype=torch.float32)
    for x in (q, k, v, cos, sin):
        x[TOKENS:] = float("nan")
    qkv, grad_out = torch.stack([q, k, v], 1), torch.randn(TOKENS + 6, 2, 8)
    out, grad = passes(
        lambda x: window_attention_qkvpacked(x, padded, rotary=(cos, sin)), [qkv], grad_out
    )
    wanted, wanted_grad = passes(
        lambda x: window_attention_qkvpacked(x, GRIDS, rotary=(cos[:TOKENS], sin[:TOKENS])),
        [qkv[:TOKENS]],
        grad_out[:TOKENS],
    )
    assert_same_bits(out[:TOKENS], wanted)
    assert_same_bits(grad[:TOKENS], wanted_grad)
    assert not out[TOKENS:].any()
    assert not grad[TOKENS:].any()


@native_only("the definition is compiled for each list of grids")
def test_compiles_once():
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(window_attention_qkvpacked, fullgraph=True, backend=backend)
    for grids in ([(4, 6), (3, 5)], [(8, 8)], [(2, 2)] * 5):
        tokens = sum(h * w for h, w in grids)
        qkv = torch.randn(tokens, 3, 2, 8)
        options = {"rotary": tables(tokens, 8, dtype=torch.float32)}
        grad_out = torch.randn(tokens, 2, 8)
        grids = uhd_ops.PackedGrids(grids)
        got, wanted = (
            passes(lambda x: function(x, grids, **options), [qkv], grad_out)  # noqa: B023
            for function in (compiled, window_attention_qkvpacked)
        )
        for a, b in zip(got, wanted, strict=True):
            assert_same_bits(a, b)
    assert backend.frame_count <= 2  # the first number of views may be taken for a constant


@native_only("autocast reaches into the definition")
def test_autocast_keeps_the_tables():
    q, k, v = heads(torch.float32)
    options = {"rotary": tables(TOKENS, 8, dtype=torch.float32)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(q, k, v, GRIDS, **options)
    wanted = window_attention(*(x.bfloat16() for x in (q, k, v)), GRIDS, **options)
    assert_same_bits(out, wanted)


def test_tokens_without_data():
    """On a device that autocast does not know."""
    meta = tuple(table.to("meta") for table in tables(TOKENS, 8, dtype=torch.float32))
    x = torch.empty(TOKENS, 2, 8, device="meta")
    assert WindowScope(GRIDS, 2).rotates(Rotary(*meta), x, 0.0)
    assert window_attention(x, x, x, GRIDS, rotary=meta).shape == x.shape


@native_only("the definition rotates in new memory")
def test_nothing_else_of_the_size_of_the_tokens_is_made():
    # CUDA kernels read queries and keys that another kernel has rotated.
    results = 3 if "emulated" in ISAS else 1
    qkv, rotary = torch.randn(1024, 3, 4, 64), tables(1024, 64, dtype=torch.float32)
    with Allocations() as allocations:
        window_attention_qkvpacked(qkv, (32, 32), rotary=rotary)
    one = 1024 * 4 * 64 * 4
    assert [size for size in allocations.sizes if size >= one] == [one] * results


GOOD = tables(TOKENS, 8, dtype=torch.float32)
REFUSED = {
    "a list": ([*GOOD], 1, TypeError, "rotary must be a tuple of cosines and sines, got list"),
    "three": ((*GOOD, GOOD[0]), 1, TypeError, "rotary must be a tuple"),
    "dtype": (
        (GOOD[0].double(), GOOD[1]),
        1,
        TypeError,
        r"the cosines in rotary must be float32 or torch.float32 like \w+, got torch.float64",
    ),
    "rows": (
        tuple(x[1:] for x in GOOD),
        1,
        ValueError,
        r"the cosines in rotary must be \(N, D\), or .*, got shape \(53, 8\)",
    ),
    "channels": ((GOOD[0], GOOD[1][:, 1:]), 1, ValueError, r"the sines in rotary .*\(54, 7\)"),
    "one dimension": ((GOOD[0][:, 0],) * 2, 1, ValueError, r"got shape \(54,\)"),
    "a head less": (tuple(x[:, None].expand(-1, 3, -1) for x in GOOD), 1, ValueError, "must be"),
    "parts": (GOOD, 3, ValueError, r"D must be a multiple of 6 for rotate_half = 3, got shape"),
    "no number": (GOOD, True, TypeError, "rotate_half must be an int, got bool"),
    "negative": (GOOD, -1, ValueError, "rotate_half must be at least 0, got -1"),
    "learned": (
        (GOOD[0].clone().requires_grad_(), GOOD[1]),
        1,
        NotImplementedError,
        "the cosines in rotary must not require a gradient: rotate q and k before the call",
    ),
}


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, fake):
    rotary, rotate_half, error, message = REFUSED[case]
    tensors = heads(torch.float32)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) for x in tensors]
        fake_rotary = type(rotary)(mode.from_tensor(x) for x in rotary)
        if fake:
            with pytest.raises(error, match=message):
                window_attention(*faked, GRIDS, rotary=fake_rotary, rotate_half=rotate_half)
            return
    for function, arguments in (
        (window_attention, tensors),
        (window_attention_qkvpacked, [torch.stack(tensors, 1)]),
    ):
        with pytest.raises(error, match=message):
            function(*arguments, GRIDS, rotary=rotary, rotate_half=rotate_half)


def test_tables_per_head_need_keys_of_their_own():
    q, k, v = heads(torch.float32, 4, 2)
    rotary = tables(TOKENS, 4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"or \(N, H, D\) where keys have H heads"):
        window_attention(q, k, v, GRIDS, rotary=rotary)
