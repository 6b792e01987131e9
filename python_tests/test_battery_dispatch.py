# SPDX-License-Identifier: Apache-2.0
"""Every operator is a good citizen of torch's dispatcher: fakes, opcheck, autocast, errors."""

import re

import pytest
import torch
from battery import (
    GRIDDED,
    GRIDS,
    NATIVE,
    OPS,
    assert_close,
    assert_same_bits,
    expected,
    gradients,
    make_call,
    option_cases,
    parametrize,
    per_case,
    per_op,
    public,
    run,
)
from battery.calls import Recorder, batched
from battery.marks import native_only
from specs import SPECS
from torch._subclasses.fake_tensor import FakeTensorMode

from uhd_ops import PackedGrids, _native

kernels_only = native_only("without the native library nothing is registered")
_ROWS = torch.tensor([(4, 6), (3, 5), (0, 0)])
_HEADS = [torch.randn(39, 2, 8) for _ in range(4)]
_TABLE = torch.tensor([(0, 4, 6, 0), (24, 3, 5, 6), (39, 0, 0, 12)])
_ROTARY = (2, torch.randn(39, 1, 8), torch.randn(39, 1, 8), 1, _TABLE, 2, 12, 0.3, False)
HELPERS = {  # operators that no call of a SPEC reaches, with arguments to check them on
    "_view_attention": (*_HEADS[:3], _ROWS, None),
    "_view_attention_backward": (*_HEADS, _ROWS, 0.3),
    "_window_attention_rotary": (*_HEADS[:3], *_ROTARY),
    "_window_attention_rotary_backward": (*_HEADS, *_ROTARY),
    "_view_table": ([4, 6, 3, 5], 2, 2),
    "_view_table_from_rows": (_ROWS, 2),
}
BOTH = ("cpu", "cuda")
# No tensors: tested in test_native.py and test_build_info.py. The CUDA library alone has the last.
SETTINGS = {"_best_cpu_isa", "_cpu_isa", "_set_cpu_isa"}
if _native.status["cuda"] == "loaded":
    SETTINGS.add("_cublaslt_version")
# In Python, for graphs of SliceEncoder alone: tested in test_slice_encoder_compile.py.
TRACED = {"_model_part", "_model_part_backward"}


def recorded(name, device="cpu", **options):
    """Return the dispatcher calls of one forward and backward pass, one per operator."""
    call = make_call(name, device=device, **options)
    with Recorder() as recorder:
        gradients(public(name), call)
    return {
        function._schema.name.removeprefix("uhd_ops::"): (function, args, kwargs)
        for function, args, kwargs in recorder.calls
    }


def fresh(value, requires_grad):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().clone()
    return value.requires_grad_(requires_grad and value.is_floating_point())


@kernels_only
# opcheck itself reads .grad of its own intermediate tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@per_case(NATIVE)
def test_opcheck(name, options, device):
    calls = recorded(name, device, **options)
    assert calls
    for op, (function, args, kwargs) in calls.items():
        # A backward operator refuses to be differentiated, so it is not asked to.
        requires_grad = not op.endswith("_backward")
        torch.library.opcheck(
            function, tuple(fresh(x, requires_grad) for x in args), kwargs, atol=0, rtol=0
        )


@kernels_only
@pytest.mark.parametrize("op", HELPERS)
def test_opcheck_of_helpers(op):
    torch.library.opcheck(getattr(torch.ops.uhd_ops, op).default, HELPERS[op])


@kernels_only
def test_no_registered_operator_escapes():
    registered = {
        op.removeprefix("uhd_ops::")
        for op in torch._C._dispatch_get_all_op_names()
        if op.startswith("uhd_ops::")
    }
    checked = {
        op for name in NATIVE for case in option_cases(name) for op in recorded(name, **case)
    }
    assert registered == checked | set(HELPERS) | SETTINGS | TRACED


def converted(name, call, convert):
    """Return the call with every tensor argument but the grids converted."""
    grids = make_call(name).grids
    for key in (*range(len(call.args)), *call.kwargs):
        if key != grids and isinstance(call.get(key), torch.Tensor):
            call = call.put(key, convert(call.get(key)))
    return call


def assert_refused(name, call, error, message):
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    for convert in (lambda x: x, lambda x: x.to("meta")):
        with pytest.raises(error) as caught:
            run(public(name), converted(name, call, convert))
        assert caught.type is error
        assert re.fullmatch(pattern, str(caught.value), re.DOTALL), str(caught.value)
    with FakeTensorMode() as mode, pytest.raises(error) as caught:
        run(public(name), converted(name, call, mode.from_tensor))
    assert caught.type is error
    assert re.fullmatch(pattern, str(caught.value), re.DOTALL), f"fake: {caught.value}"


@parametrize(
    ("name", "bad", "device"),
    [(name, bad, device) for name in OPS for bad in SPECS[name].bad_inputs for device in BOTH],
)
def test_bad_input(name, bad, device):
    assert_refused(name, bad.spoil(make_call(name, device=device)), bad.error, bad.message)


@pytest.mark.parametrize("name", OPS)
def test_bad_inputs_are_listed(name):
    labels = [bad.label for bad in SPECS[name].bad_inputs]
    assert len(labels) >= 3
    assert len(set(labels)) == len(labels)


_OF_FRAMES = (
    "; if this is Qwen's grid_thw, whose first column counts frames, pass its columns of height "
    "and width, grid_thw[:, 1:], one row for each frame"
)
_FORMS = (
    "grids must be a PackedGrids, a sequence of (h, w) pairs, one (h, w) pair, "
    "or a CPU integer tensor or array of shape (S, 2); got "
)
_ON_DEVICE = (
    "grids must be on the CPU, got a tensor on {}: reading it there would stop the host until the "
    "device is idle. Keep the preprocessor's grids as Python integers."
)
BAD_GRIDS = {
    "None": (None, TypeError, _FORMS + "NoneType"),
    "number": (4, TypeError, _FORMS + "int"),
    "text": ("4x6", TypeError, _FORMS + "str"),
    "set": ({(4, 6)}, TypeError, _FORMS + "set"),
    "float sides": ([(4.0, 6)], TypeError, _FORMS + "the entry (4.0, 6)"),
    "bool sides": ([(True, 6)], TypeError, _FORMS + "the entry (True, 6)"),
    "three numbers": ([(4, 6, 1)], TypeError, _FORMS + "the entry (4, 6, 1)" + _OF_FRAMES),
    "text entry": (["46", "35"], TypeError, _FORMS + "the entry '46'"),
    "negative": (
        [(4, 6), (3, -5)],
        ValueError,
        "grids must not have negative sides, got (3, -5)",
    ),
    "both negative": (
        [(-4, -6), (3, 5)],  # as many tokens as the good grids
        ValueError,
        "grids must not have negative sides, got (-4, -6)",
    ),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
@per_op(GRIDDED, cuda=GRIDDED)
def test_bad_grids(name, device, case):
    grids, error, message = BAD_GRIDS[case]
    call = make_call(name, device=device)
    assert_refused(name, call.put(call.grids, grids), error, message)


def on_cuda(grids):
    """Return grids on a CUDA device that need not exist."""
    with FakeTensorMode():
        return torch.empty(len(grids), 2, dtype=torch.int64, device="cuda")


BAD_GRID_TENSORS = {
    "floats": (lambda g: torch.tensor(g, dtype=torch.float32), TypeError, _FORMS + "the entry ..."),
    "vector": (
        lambda g: torch.tensor(g[0]),
        ValueError,
        "grids must have shape (S, 2), got (2,)",
    ),
    "triples": (
        lambda g: torch.ones(2, 3, dtype=torch.int64),
        ValueError,
        "grids must have shape (S, 2), got (2, 3)" + _OF_FRAMES,
    ),
    "meta": (lambda g: torch.tensor(g, device="meta"), ValueError, _ON_DEVICE.format("meta")),
    "cuda": (on_cuda, ValueError, _ON_DEVICE.format("cuda:0")),
}


@pytest.mark.parametrize("case", BAD_GRID_TENSORS)
@per_op(GRIDDED, cuda=GRIDDED)
def test_bad_grid_tensors(name, device, case):
    make, error, message = BAD_GRID_TENSORS[case]
    call = make_call(name, device=device)
    pattern = re.escape(message).replace(re.escape("..."), ".*")
    with pytest.raises(error) as caught:
        run(public(name), call.put(call.grids, make(GRIDS)))
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)


@per_op(GRIDDED, cuda=GRIDDED)
def test_tokens_must_fit_the_grids(name, device):
    call = make_call(name, device=device)
    first = call.per_token[0]
    for grids in ([], [(4, 6)], [(4, 6), (3, 6)], (39, 2)):
        tokens = sum(h * w for h, w in (grids if isinstance(grids, list) else [grids]))
        message = (
            f"... must be (N, ...) with N = {tokens} tokens (sum of h*w over grids), got shape "
            f"{tuple(call.get(first).shape)}"
        )
        assert_refused(name, call.put(call.grids, grids), ValueError, message)


@per_op(GRIDDED, cuda=GRIDDED)
def test_batched_tokens_take_one_pair(name, device):
    call = batched(make_call(name, grids=[(3, 5)] * 2, device=device), 2)
    several = "... is batched, so grids must be one (h, w) pair; ..."
    for grids in ([(3, 5), (3, 5)], [(3, 5)], torch.tensor([(3, 5)])):
        assert_refused(name, call.put(call.grids, grids), ValueError, several)
    packed = call.put(call.grids, PackedGrids([(3, 5)]))  # what a module parsed for several calls
    one_pair = run(public(name), call.put(call.grids, (3, 5)))
    torch.testing.assert_close(run(public(name), packed), one_pair)
    assert_refused(name, call.put(call.grids, PackedGrids([(3, 5)] * 2)), ValueError, several)
    count = "... must be (B, h*w, ...) with h*w = 14 tokens (sum of h*w over grids), got shape ..."
    assert_refused(name, call.put(call.grids, (2, 7)), ValueError, count)


@per_case()
def test_fake_and_meta_results_have_the_real_shape(name, options, device):
    call = make_call(name, device=device, **options)
    wanted = run(public(name), call)
    on_meta = run(public(name), converted(name, call, lambda x: x.to("meta")))
    with FakeTensorMode() as mode:
        fake = run(public(name), converted(name, call, mode.from_tensor))
    for result, where in ((on_meta, "meta"), (fake, device)):
        assert result.shape == wanted.shape
        assert result.dtype == wanted.dtype
        assert result.stride() == wanted.stride()
        assert result.device.type == where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@per_case()
def test_autocast(name, options, device, dtype):
    spec = SPECS[name]
    call = make_call(name, device=device, **options)
    plain = run(public(name), call)
    with torch.autocast(device, dtype=dtype):
        out, grads = gradients(public(name), call)
        wide = run(public(name), call.map_tensors(torch.Tensor.double))
    assert wide.dtype == torch.float64  # autocast leaves float64 alone
    for key, grad in grads.items():
        assert grad.dtype == call.get(key).dtype
    if spec.autocast == "ignore":
        assert_same_bits(out, plain)
    elif spec.autocast == "cast":
        assert_same_bits(out, run(public(name), call.map_tensors(lambda x: x.to(dtype))))
    else:
        assert spec.autocast == "mixed"
        assert out.dtype in (dtype, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            assert out.dtype == run(public(name), call.to("cpu")).dtype
        exact = run(expected(name), call.exact())
        # At worst every operation rounds to the autocast dtype, instead of to float32.
        error = (out.cpu().double() - exact).abs().max()
        assert error <= spec.roundings(call) * torch.finfo(dtype).eps * exact.abs().max()


@per_op()
def test_autocast_off_by_default_and_restored(name, device):
    call = make_call(name, device=device)
    with torch.autocast(device, enabled=False):
        off = run(public(name), call)
    assert off.dtype == torch.float32
    assert_same_bits(run(public(name), call), off)
    assert_close(SPECS[name], call, off, run(expected(name), call.exact()))
