# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark compares: its cases, its predictions, and the maths of its rivals."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from specs import SPECS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu import (  # noqa: E402
    attention_rivals,
    measure,
    mlp_rivals,
    predictions,
    problems,
)
from gpu.cases import (  # noqa: E402
    ATTENTION,
    BACKWARD,
    BOTH,
    DENSE,
    FORWARD,
    MEAN,
    NORM,
    POOL,
    UNSHUFFLE,
    Case,
    all_cases,
)

CPU = torch.device("cpu")
TINY = {"dtype": "float64", "channels": 24, "heads": 2, "hidden": 20}
H100 = "NVIDIA H100 80GB HBM3"

# ---- cases


def test_the_most_important_cases_come_first():
    cases = all_cases()
    assert [case.name for case in cases[:2]] == [
        "window_attention 2x2 forward, bfloat16, 32768",
        "window_attention 2x2 backward, bfloat16, 32768",
    ]
    assert len({case.name for case in cases}) == len(cases)
    attention = {(c.dtype, c.tokens, c.window, c.direction) for c in cases if c.op == ATTENTION}
    for dtype in ("bfloat16", "float16", "float32"):
        for direction in (FORWARD, BACKWARD):
            for window in (2, 8, 16):
                middle = 4900 if window == 2 else 5120
                for tokens in (1024, middle, 16384, 32768):
                    assert (dtype, tokens, window, direction) in attention
    assert all(side % case.window == 0 for case in cases for side in case.grid)


@pytest.mark.parametrize("op", [ATTENTION, UNSHUFFLE, MEAN, POOL])
def test_work_is_what_the_definitions_say(op):
    case = Case(op, FORWARD, grid=(4, 6), **TINY)
    spec = SPECS[op]
    call = spec.make([case.grid], torch.float64)
    for position, x in enumerate(problems.inputs(case, CPU, 0)):
        call = call.put(position, x)
    assert case.bytes_moved == spec.bytes_moved(call)
    if op == ATTENTION:
        assert case.flops == spec.flops(call)


@pytest.mark.parametrize("op", [ATTENTION, NORM, UNSHUFFLE, MEAN, POOL])
def test_a_backward_pass_moves_its_tensors_once(op):
    # Results of the forward pass, whose gradients come in; inputs, where they are needed again; and
    # the gradients that go out.
    case = Case(op, BACKWARD, grid=(4, 6), **TINY)
    x = problems.inputs(case, CPU, 0)[: {ATTENTION: 3, POOL: 2}.get(op, 1)]
    y = measure.as_tuple(problems.definition(case)(*problems.inputs(case, CPU, 0)))
    again = 1 if op in (ATTENTION, NORM, POOL) else 0
    elements = sum(t.numel() for t in y) + (1 + again) * sum(t.numel() for t in x)
    assert case.bytes_moved == elements * 8


def test_predictions_are_for_cases_and_are_in_the_notes():
    cases = {(c.op, c.direction, c.window) for c in all_cases() if c.tokens == 32768}
    assert set(predictions.PREDICTED_US) <= cases
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    predicted = notes.partition("## Predictions")[2].partition("What a miss")[0]
    lines = [line.strip("| ").split(" | ") for line in predicted.splitlines() if "yet |" in line]
    expected = [tuple(map(str, pair)) for pair in predictions.PREDICTED_US.values()]
    expected += [(str(us), "-") for us in predictions.TILES_US.values()]
    assert [(line[2], line[3]) for line in lines] == expected
    assert all(line[-1] == "not measured yet" for line in lines)


def test_no_prediction_elsewhere():
    row = {"op": ATTENTION, "direction": FORWARD, "dtype": "bfloat16", "tokens": 32768, "window": 2}
    assert predictions.predicted_us(row, H100) == (115, "H100, computed")
    assert predictions.predicted_us(row, "NVIDIA H200") == (84, "H200, computed")
    assert predictions.predicted_us(row, "NVIDIA A100") is None
    assert predictions.predicted_us({**row, "dtype": "float16"}, H100) is None
    assert predictions.predicted_us({**row, "tokens": 1024}, H100) is None


# ---- rivals


def rivals_for_the_cpu():
    """Yield ``(op, rival, direction)`` for all that need neither a GPU nor a compiler.

    Two that do have a stand-in; what is compiled is compiled from one that is here.
    """
    stand_ins = {
        "flex_attention": attention_rivals.flex_uncompiled,
        "cuBLASLt epilogue": mlp_rivals.mlp_epilogue_emulated,
    }
    broadcast = problems.Rival("broadcast", lambda case, _: broadcast_of(case))
    several = [(op, rival) for op, rivals in problems.RIVALS.items() for rival in rivals]
    for op, rival in [*several, (ATTENTION, broadcast)]:
        needs_gpu = rival.compiled or "FA2" in rival.name or "Triton" in rival.name
        if rival.name in stand_ins:
            rival = replace(rival, make=stand_ins[rival.name])
        elif needs_gpu or not rival.same_function:
            continue
        yield op, rival, FORWARD
        if rival.name != "flex_attention":  # torch has its backward pass on GPUs only
            yield op, rival, BACKWARD


def broadcast_of(case):
    return lambda q, k, v: attention_rivals.eager.attention_broadcast(
        q, k, v, case.grid, case.window
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("op", "rival", "direction"),
    [
        pytest.param(op, rival, direction, id=f"{op}-{rival.name}-{direction}")
        for op, rival, direction in rivals_for_the_cpu()
    ],
)
def test_rivals_compute_the_definition(op, rival, direction):
    for window, grid in ((2, (4, 6)), (8, (8, 16)), (16, (16, 32))):
        if window > 2 and op != ATTENTION:
            continue
        case = Case(op, direction, grid=grid, window=window, **TINY)
        tensors = problems.inputs(case, CPU, seed=1)
        results = measure.call_of(case, rival.make(case, CPU), tensors, seed=0)()
        assert measure.relative_error(results, measure.expected_of(case, tensors)) < 1e-12


@pytest.mark.parametrize(
    ("grid", "window"), [((4, 6), 2), ((16, 18), 2), ((16, 24), 8), ((16, 32), 16), ((48, 16), 16)]
)
def test_blocks_of_flex_attention(grid, window):
    case = Case(ATTENTION, FORWARD, grid=grid, window=window, **TINY)
    mask, size = attention_rivals._block_mask(case, CPU), attention_rivals.FLEX_BLOCK
    token = torch.arange(-(-case.tokens // size) * size)
    same = token[:, None] // window**2 == token // window**2
    # A block is listed if any pair of its tokens is in one window.
    blocks = same.unflatten(0, (-1, size)).unflatten(2, (-1, size)).any(3).any(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)


@pytest.mark.parametrize("op", list(problems.RIVALS))
@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
def test_ours_is_called_right(op, direction):
    case = Case(op, direction, grid=(4, 6), **TINY)
    tensors = problems.inputs(case, CPU, seed=1)
    results = measure.call_of(case, problems.ours(case, CPU), tensors, seed=0)()
    assert measure.relative_error(results, measure.expected_of(case, tensors)) < 1e-12


def test_merger_is_norm_and_two_layers():
    case = Case(DENSE, BOTH, grid=(4, 6), **TINY)
    merger = mlp_rivals.merger(case, CPU)
    (x, *_), inner = problems.inputs(case, CPU, seed=1), merger.merger
    norm = F.layer_norm(x, (24,), inner.ln_q.weight, inner.ln_q.bias, 1e-6).view(-1, 96)
    hidden = F.gelu(F.linear(norm, inner.mlp[0].weight, inner.mlp[0].bias))
    expected = F.linear(hidden, inner.mlp[2].weight, inner.mlp[2].bias)
    torch.testing.assert_close(merger(x), expected, rtol=1e-12, atol=1e-12)
    # Forward and backward include the gradients of the weights that are its own.
    grads = measure.call_of(case, merger, (x,), seed=0)()
    assert len(grads) == 1 + len(list(merger.parameters()))


TRITON = """
import sys
sys.path.insert(0, "benchmarks")
import torch
from gpu import triton_attention
from uhd_ops.cli import rivals
torch.manual_seed(0)
for grid, heads, dim in (((2, 14), 2, 72), ((6, 4), 1, 64)):
    qkv = torch.randn(grid[0] * grid[1], 3, heads, dim)
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(1)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out = triton_attention.window_attention(*leaves, grid)
    expected = rivals.attention_einsum(*wide, grid)
    grad = torch.randn_like(out)
    pairs = [(out, expected), *zip(torch.autograd.grad(out, leaves, grad),
                                   torch.autograd.grad(expected, wide, grad.double()))]
    print(max(float((a.double() - b).norm() / b.norm()) for a, b in pairs))
try:
    triton_attention.window_attention(leaves[0], leaves[1].clone(), leaves[2], grid)
except ValueError as error:
    print(error)
"""


def test_triton_rival_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *errors, refused = done.stdout.splitlines()
    assert len(errors) == 2
    # Sums of 72 products in float32: at most 72 roundings of half an epsilon.
    assert all(float(error) < 72 * torch.finfo(torch.float32).eps / 2 for error in errors)
    assert refused.startswith("strides of q, k and v must agree")
