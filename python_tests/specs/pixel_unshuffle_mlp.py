# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.pixel_unshuffle_mlp`."""

from __future__ import annotations

import torch

from specs._bad_inputs import bad, bad_count, bad_order, bad_tensor
from specs._spec import ORDERS, BadInput, Call, OpSpec, random_tensor
from uhd_ops import reference
from uhd_ops.reference._windows import window_tokens


def _weights(form, patches, channels, hidden, bias, rand):
    """Draw weights that shrink what passes through them: all 30 times larger it fits float16."""
    if form == "dense":
        shapes = ((patches * hidden, patches * channels), (channels, patches * hidden))
    elif form == "block":
        shapes = ((patches, hidden, channels), (patches, channels, hidden))
    else:
        shapes = ((hidden, channels), (channels, hidden))
    fc1_weight, fc2_weight = (rand(shape, 0.5 * shape[-1] ** -0.5) for shape in shapes)
    if not bias:
        return fc1_weight, None, fc2_weight, None
    return fc1_weight, rand(shapes[0][:-1], 0.25), fc2_weight, rand((channels,), 0.25)


def _make(
    grids,
    dtype,
    *,
    form="dense",
    channels=6,
    hidden=10,
    factor=2,
    activation="gelu_tanh",
    residual=True,
    norm=True,
    bias=True,
    order_in="raster",
    generator=None,
):
    def rand(shape, scale):
        return (random_tensor(shape, torch.float64, generator) * scale).to(dtype)

    patches = factor**2
    x = rand((sum(h * w for h, w in grids), channels), 1.0)
    kwargs = {"factor": factor, "activation": activation, "residual": residual}
    kwargs["order_in"] = order_in
    weights = _weights(form, patches, channels, hidden, bias, rand)
    differentiable = [0, 2, 4, *((3, 5) if bias else ())]
    if norm:
        kwargs["norm_weight"] = (1 + rand((patches * channels,), 0.25).double()).to(dtype)
        kwargs["norm_bias"] = rand((patches * channels,), 0.25)
        differentiable += ["norm_weight", "norm_bias"]
    return Call((x, grids, *weights), kwargs, differentiable=tuple(differentiable))


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    A sum of n products takes n roundings, each of a partial sum no larger than about the largest
    result. In the forward pass n is the K = f²C channels of the LayerNorm and of fc1, and the
    hidden width; mean, variance, normalisation, activation (eight), bias and residual add 20. The
    backward pass makes the same sums once more, and sums over the M f² rows for the weights.

    Half types also round what is stored on the way: z, u, h, the f² partial sums of y in the block
    form, the mean, and their gradients. Each rounding is half an epsilon of its element, and
    errors that are independent do not grow relative to the sums they enter.
    """
    x, fc1_weight, fc2_weight = call.args[0], call.args[2], call.args[4]
    patches = call.kwargs["factor"] ** 2
    rows = window_tokens(call.args[1], call.kwargs["factor"])[0].numel()
    wide = patches * x.shape[-1] + fc1_weight.shape[-1] + patches * fc2_weight.shape[-1]
    count = 2.0 * (wide + 20) + rows
    if x.dtype in (torch.bfloat16, torch.float16):
        stored = 2 * (5 + patches)
        count += stored * 0.5 * torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps
    return count


def _scale(call: Call) -> float:
    """Bound what the sums over the rows add up, where there are so few that all may cancel.

    With few hidden units or channels, gradients are multiples of few such sums. The gradient of a
    hidden unit is standard normal numbers times a column of fc2, and slopes of about one; a sum of
    n of them is about sqrt(n) times larger than one.
    """
    x, grids, fc1_weight, _, fc2_weight, _ = call.args
    if min(fc1_weight.shape[:-1].numel(), call.kwargs["factor"] ** 2 * x.shape[-1]) >= 8:
        return 0.0
    rows = window_tokens(grids, call.kwargs["factor"])[0].numel()
    return rows**0.5 * fc2_weight.double().norm(dim=-2).max().item()


_ACTIVATIONS = '"gelu_tanh", "gelu", "quick_gelu", "silu", "relu"'
_VALUES = {
    "x must be (N, C), or (B, h*w, C) with one (h, w) grid, got shape (6,)": (0, lambda x: x[0]),
    "x must have at least one channel, got shape (39, 0)": (0, lambda x: x[:, :0]),
    "fc1_weight must be dense (J, 24), block (4, I, 6) or tied (I, 6) for C = 6 and factor = 2, "
    "got shape (40, 23)": (2, lambda w: w[:, 1:]),
    "fc1_bias must have shape (40,), got shape (10,)": (3, lambda b: b[:10]),
    "fc2_weight must have shape (6, 40) to follow fc1_weight of shape (40, 24), got shape "
    "(6, 39)": (4, lambda w: w[:, :-1]),
    "fc2_bias must have shape (6,), got shape (1, 6)": (5, lambda b: b[None]),
    "norm_weight must have shape (24,), got shape (6,)": ("norm_weight", lambda w: w[:6]),
    f"activation must be one of {_ACTIVATIONS}, got 'tanh'": ("activation", lambda _: "tanh"),
}
_TYPES = {
    "fc1_weight must have the dtype of x, torch.float32, got torch.float64": (
        2,
        torch.Tensor.double,
    ),
    "fc2_weight must be a torch.Tensor, got NoneType": (4, lambda _: None),
    "residual must be a bool, got int": ("residual", lambda _: 1),
}
_BAD_INPUTS = (
    *bad_tensor("x"),
    *bad(_VALUES),
    *bad(_TYPES, TypeError),
    *bad_count("factor"),
    *bad_order("order_in"),
    BadInput(
        "eps",
        lambda call: Call(call.args, {**call.kwargs, "eps": -1e-6}),
        ValueError,
        "eps must not be negative, got -1e-06",
    ),
)


SPEC = OpSpec(
    name="pixel_unshuffle_mlp",
    reference=reference.pixel_unshuffle_mlp,
    make=_make,
    options={
        "form": ("dense", "block", "tied"),
        # Not relu: at its kink a rounding of the input turns the whole gradient on or off.
        "activation": ("gelu_tanh", "gelu", "quick_gelu", "silu"),
        "channels": (6, 3, 33, 72),
        "hidden": (10, 1, 32),
        "factor": (2, 1, 3),
        "residual": (True, False),
        "norm": (True, False),
        "bias": (True, False),
        "order_in": ORDERS,
    },
    bad_inputs=_BAD_INPUTS,
    roundings=_roundings,
    scale=_scale,
    output="windows",
    autocast="mixed",
    exempt={
        "batch_invariance": "torch's GEMM may add in another order for another number of rows",
        "threads": "torch's GEMM may add in another order for another number of threads",
        "strides": "torch's GEMM may add in another order for other strides",
        "memory": "the hidden layer is wider than the input",
    },
)
