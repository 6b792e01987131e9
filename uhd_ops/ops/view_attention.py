# SPDX-License-Identifier: Apache-2.0
"""Full attention inside each view of a packed sequence, on torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch.nn import functional

from uhd_ops import _checks, _native, _sharding, windows
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.padded_grids import PaddedGrids


def view_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grids: Grids) -> torch.Tensor:
    """Attend inside each view only: ``softmax(D ** -0.5 * q kᵀ) v`` over all tokens of the view.

    Views with the same number of tokens share one call of torch's ``scaled_dot_product_attention``,
    whichever backend torch chooses for it; no mask is built and no token is padded. Views of equal
    length that follow each other, such as the slices of one image, are passed without a copy. On
    CUDA, half types go to torch's variable-length attention, ``varlen_attn``, where that takes
    them and no deterministic algorithms are asked for. While torch.compile traces, all of it is one
    operator, whose backward pass computes the scores again.

    Args:
        q: Queries ``(N, H, D)`` for packed tokens, or ``(B, h*w, H, D)`` with one ``(h, w)`` grid.
            float32, float64, bfloat16 or float16. Under autocast, q, k and v are cast to the
            autocast dtype.
        k: Keys, like ``q``.
        v: Values, like ``q``.
        grids: Grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or one
            pair. Only the number of tokens ``h*w`` matters: a view with class or register tokens
            in front is ``(1, length)``.

    Returns:
        Tensor with the shape and dtype of ``q``.

    Raises:
        TypeError: A tensor has another dtype than ``q`` or none of the four, or an argument has
            the wrong type.
        ValueError: Shapes, devices or grids do not fit.

    Source:
        LLaVA-UHD v4, section 3.1: slices are encoded independently of each other.

    Example:
        >>> qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8)
        >>> view_attention(*qkv.unbind(1), [(4, 6), (3, 5)]).shape
        torch.Size([39, 2, 8])
    """
    _checks.check_tensor(q, "q")
    for name, x in (("k", k), ("v", v)):
        _checks.check_like(x, name, q, "q")
        _checks.check_same_shape(x, name, q, "q")
    if isinstance(grids, PaddedGrids):
        raise NotImplementedError(
            "grids of view_attention must not be PaddedGrids: torch's kernels need the lengths as "
            "Python integers; pass grids.cu_seqlens to a variable-length attention instead"
        )
    where = windows.locate(q, "q", grids, 1, ("H", "D"))
    q, k, v = _checks.autocast(q, k, v)
    if where.batch is not None:
        if _sharding.is_sharded(q):  # our operator has rules, torch's not on every device
            packed = (where.pack(x) for x in (q, k, v))
            return where.unpack_tokens(attend_views(*packed, where.grids))
        return _attend(q, k, v)
    return attend_views(q, k, v, PackedGrids.of(grids))


def attend_views(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: PackedGrids,
    scale: float | None = None,
) -> torch.Tensor:
    """:func:`view_attention` of packed tokens that are checked already, with any scale.

    Half types on CUDA go to torch's variable-length attention, where it can take them. While
    torch.compile or torch.export traces, the rest is one operator that reads the grids when it
    runs, so that a graph does not depend on them.
    """
    if _suits_varlen(q, grids):
        cu_seqlens, longest = grids.cu_seqlens(q.device), grids.max_seqlen
        options = {} if scale is None else {"scale": scale}
        return _varlen_attn()(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    if torch.compiler.is_compiling() or _sharding.is_sharded(q):
        return _native.operators._view_attention(q, k, v, grids.rows, scale)
    return attend_by_length(q, k, v, [height * width for height, width in grids], scale)


def _suits_varlen(q: torch.Tensor, grids: PackedGrids) -> bool:
    """Whether torch's variable-length attention takes the call."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and 0 < q.shape[-1] <= 256
        and q.shape[-2] > 0
        and _native.has_kernels(q.device)  # the same GPUs as for our kernels
        and not torch.are_deterministic_algorithms_enabled()  # its backward pass adds up atomically
        and grids.is_known
        and grids.num_tokens > 0
        and _varlen_attn() is not None
    )


def _varlen_attn() -> Callable[..., torch.Tensor] | None:
    """Torch's ``varlen_attn``, which there is since 2.10, or None.

    It is imported where it is needed, because Triton comes with it.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Attention of equally long views, ``(S, L, H, D)`` to ``(S, L, H, D)``."""
    if q.numel() == 0:  # some backends refuse empty tensors
        return q * k * v
    heads_first = (_without_overlap(x).transpose(-2, -3) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*heads_first, scale=scale).transpose(-2, -3)


def _without_overlap(x: torch.Tensor) -> torch.Tensor:
    """Tokens that share memory, copied: torch's attention on the CPU reads others for them."""
    return x if x.stride(-3) >= x.shape[-1] or x.shape[-3] == 1 else x.contiguous()


def attend_by_length(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of packed views of these lengths, one call for each distinct length."""
    if q.shape[0] == 0:
        return q * k * v
    return by_group(lambda views, _: _attend(*views, scale), (q, k, v), lengths)


def by_group(
    function: Callable[[list[torch.Tensor], int], torch.Tensor],
    tensors: Sequence[torch.Tensor],
    lengths: Sequence[int],
    keys: Sequence[Hashable] | None = None,
) -> torch.Tensor:
    """Run a function on the views of each kind as one batch; neighbours are passed without a copy.

    Args:
        function: ``function([(n, L, ...), ...], first)`` gets the views of one kind of each tensor,
            and the index of the first of them; it returns ``(n, L', ...)``.
        tensors: Packed, each ``(T, ...)``.
        lengths: Rows of each view. A view without rows stays as it is in the first tensor.
        keys: Kind of each view; those of one kind have one length. None means its length.

    Returns:
        What the function returns, packed in the order of the views.
    """
    runs, members, last = [], {}, None  # neighbours: [count, length]; kind -> runs, first view
    for view, (length, key) in enumerate(zip(lengths, keys or lengths, strict=True)):
        if view and key == last:
            runs[-1][0] += 1
            continue
        if length:
            members.setdefault(key, ([], view))[0].append(len(runs))
        runs.append([1, length])
        last = key
    # One split, not a slice for each view: the gradient of a slice is as large as all tokens, so
    # the backward pass would be quadratic in the number of views.
    pieces = [x.split([count * length for count, length in runs]) for x in tensors]
    done = list(pieces[0])
    for chosen, first in members.values():
        views = [[x[run].unflatten(0, runs[run]) for run in chosen] for x in pieces]
        batch = function([x[0] if len(x) == 1 else torch.cat(x) for x in views], first)
        results = batch.split([runs[run][0] for run in chosen])
        for run, result in zip(chosen, results, strict=True):
            done[run] = result.flatten(0, 1)
    return torch.cat(done) if done else tensors[0]


torch.library.define(
    "uhd_ops::_view_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor rows, float? scale) -> Tensor",
)
torch.library.define(
    "uhd_ops::_view_attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor rows, float? scale)"
    " -> (Tensor, Tensor, Tensor)",
)


def _lengths(rows: torch.Tensor) -> list[int]:
    return rows[:-1].prod(1).tolist()


@torch.library.impl("uhd_ops::_view_attention", "default")
def _forward(q, k, v, rows, scale):
    return attend_by_length(q, k, v, _lengths(rows), scale).contiguous()


# Scores of one block of queries, so that memory grows with the tokens and not with their square.
_BLOCK = 2**22


@torch.library.impl("uhd_ops::_view_attention_backward", "default")
def _backward_kernel(grad_out, q, k, v, rows, scale):
    # What torch's kernels keep for their backward pass differs from backend to backend, so the
    # scores are computed again, view by view.
    scale = (q.shape[-1] or 1) ** -0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lengths = _lengths(rows)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    views = zip(*(x.split(lengths) for x in (grad_out, q, k, v, *grads)), strict=True)
    for *tensors, grad_q, grad_k, grad_v in views:
        heads_first = (x.transpose(0, 1).to(wide) for x in tensors)  # (H, L, D)
        for grad, out in zip(
            _gradients(*heads_first, scale), (grad_q, grad_k, grad_v), strict=True
        ):
            out.copy_(grad.transpose(0, 1))
    return grads


def _gradients(
    grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one view, ``(H, L, D)`` each."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads, length, _ = q.shape
    count = max(1, _BLOCK // max(heads * length, 1))
    for some in (slice(first, first + count) for first in range(0, length, count)):
        weights = (scale * q[:, some] @ k.mT).softmax(-1)
        grad_v += weights.mT @ grad_out[:, some]
        grad_scores = grad_out[:, some] @ v.mT
        grad_scores -= (grad_scores * weights).sum(-1, keepdim=True)
        grad_scores *= weights * scale
        grad_q[:, some] = grad_scores @ k
        grad_k += grad_scores.mT @ q[:, some]
    return grad_q, grad_k, grad_v


def _fake(q, k, v, rows, scale):
    return q.new_empty(q.shape)


def _backward_fake(grad_out, q, k, v, rows, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out):
    grads = _native.operators._view_attention_backward(grad_out, *ctx.saved_tensors, ctx.scale)
    return *grads, None, None


_HEADS = {"q": 1, "k": 1, "v": 1}
_native.register(
    "_view_attention",
    _fake,
    _backward_fake,
    _backward,
    _setup_context,
    public="view_attention",
    sharding=([(_HEADS, [1])], [({"grad_out": 1, **_HEADS}, [1, 1, 1])]),
)
