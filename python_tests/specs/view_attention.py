# SPDX-License-Identifier: Apache-2.0
"""The SPEC of :func:`uhd_ops.view_attention`."""

from __future__ import annotations

import torch

from specs._bad_inputs import bad_attention
from specs._spec import Call, OpSpec, random_tensor
from uhd_ops import reference
from uhd_ops.reference._windows import as_pairs


def _make(grids, dtype, *, heads=2, head_dim=8, generator=None):
    tokens = sum(h * w for h, w in grids)
    q, k, v = (random_tensor((tokens, heads, head_dim), dtype, generator) for _ in range(3))
    return Call((q, k, v, grids), differentiable=(0, 1, 2), per_token=(0, 1, 2), grids=3)


def _roundings(call: Call) -> float:
    """Count the roundings in the accumulation type.

    As for window attention, with the L tokens of the longest view in place of the window's: a score
    is a sum of D products and the exponent of the softmax, (D + 1) sqrt(D); the softmax and the
    mixture add L + 4; the backward pass doubles it. A result may be the mean of L values, sqrt(L)
    times smaller than they are, hence the last factor. torch's kernels round the probabilities and,
    backward, their gradients and the scores of half types to that type: 4 roundings, as many
    epsilons of float32 as the types differ, times sqrt(D) for a gradient that sums D products.
    """
    q = call.args[0]
    dim = q.shape[-1]
    longest = max((h * w for h, w in as_pairs(call.args[3])), default=0) or 1
    ratio = torch.finfo(q.dtype).eps / torch.finfo(torch.float32).eps
    in_half = 4 * (dim**0.5 + 1) * ratio if ratio > 1 else 0.0
    return (2 * ((dim + 1) * dim**0.5 + longest + 4) + in_half) * longest**0.5


# Properties of torch's scaled_dot_product_attention on CPU, measured with torch 2.14.
_TORCH_KERNELS = {
    "native": "it has no kernels of its own but calls scaled_dot_product_attention",
    "batch_invariance": "torch splits its work by the number of views and tokens of a call",
    "threads": "likewise by the number of threads",
    "memory": "several lengths are gathered and concatenated",
    "strides": "gradients of inputs with other strides differ in the last bit",
    "non_finite": "a row of scores that holds a NaN gives zeros",
    "second_derivative": "torch refuses it with its own RuntimeError",
}

SPEC = OpSpec(
    name="view_attention",
    reference=reference.view_attention,
    make=_make,
    options={"head_dim": (8, 1, 7, 64, 72), "heads": (2, 1, 3)},
    bad_inputs=bad_attention(),
    roundings=_roundings,
    # The gradient of a score that the softmax ignores is a rounding error, not zero.
    scale=lambda call: 1.0,
    output="tokens",
    autocast="cast",
    exempt=_TORCH_KERNELS,
)
