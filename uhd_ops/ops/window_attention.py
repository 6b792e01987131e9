# SPDX-License-Identifier: Apache-2.0
"""Attention inside non-overlapping windows of packed views."""

from __future__ import annotations

import torch

from uhd_ops import _checks, _native, _sharding, reference, windows
from uhd_ops._plans import Checked, checked_once
from uhd_ops.grids import Grids
from uhd_ops.ops.view_attention import attend_by_length
from uhd_ops.windows import Permute, TokenOrder, Windows


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    scale: float | None = None,
    order: TokenOrder = "raster",
    order_in: TokenOrder = "raster",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotate_half: int = 1,
) -> torch.Tensor:
    """Attend inside each window only: ``softmax(scale * q kᵀ) v`` over the tokens of the window.

    The tokens of a view are grouped into non-overlapping ``window x window`` windows. At the right
    and bottom edge of a view whose side is not a multiple of ``window``, a window holds fewer
    tokens and attends among those. A window's result depends on its own tokens only, bit for bit.
    No copy of q, k or v is made as long as their last dimension is contiguous and, on CUDA, their
    rows are 16-byte aligned. The slices of a packed ``(N, 3, H, D)`` projection can be passed as
    they are, but their three gradients are joined by a copy then:
    :func:`uhd_ops.window_attention_qkvpacked` has one for all.

    On CUDA, half types in windows larger than 16 go to torch's ``scaled_dot_product_attention``
    instead, window by window: it copies the tokens into that order and back, and what it promises
    about determinism is what holds then. Under torch.compile, with PaddedGrids and with ``rotary``
    they do not.

    Args:
        q: Queries ``(N, H, D)`` for packed tokens, or ``(B, h*w, H, D)`` with one ``(h, w)`` grid.
            float32, float64, bfloat16 or float16; half types accumulate in float32 and round once,
            at the store. Under autocast, q, k and v are cast to the autocast dtype.
        k: Keys, like ``q``, or with fewer heads H_kv, a divisor of H: consecutive queries' heads
            share one, and its gradient is their sum.
        v: Values, like ``k``.
        grids: Patch grids of the views: PackedGrids, ``(h, w)`` pairs, a CPU tensor ``(S, 2)``, or
            one pair.
        window: Side of a window, in tokens.
        scale: Factor on the scores; None means ``D ** -0.5``.
        order: Order of the output tokens inside each view, whatever that of the input:
            ``"raster"``, ``"window"`` for window-major, ``"block"`` for 2 x 2 blocks one after the
            other, or sides of nested blocks; see :func:`uhd_ops.reorder_tokens`.
        order_in: Order of the tokens of q, k and v, likewise. Tokens that lie window by window,
            whatever the order inside a window, are read where they are; in other orders but raster
            order they are copied into raster order first.
        rotary: Cosines and sines of the rotary embedding that q and k get first, each ``(N, D)``
            for all heads, or ``(N, H, D)``, one row for each row of q; batched q share them, or
            ``(B, h*w, H, D)`` gives each its own. In float32 or the dtype of q. On the CPU the
            rotated numbers have the type that sums are computed in, on CUDA that of q. The tables
            get no gradient.
        rotate_half: How channels pair. 1: a channel of the first half with the one half a head
            further on; 2 or more: likewise in each of so many equal parts of a head; 0: neighbours.

    Returns:
        Tensor with the shape and dtype of ``q``, contiguous.

    Raises:
        TypeError: A tensor has another dtype than ``q`` or none of the four, or an argument has the
            wrong type.
        ValueError: Shapes, devices or grids do not fit, ``window < 1``, ``scale`` is not finite, or
            ``order`` or ``order_in`` is not a token order.
        NotImplementedError: A table in ``rotary`` requires a gradient.

    Source:
        LLaVA-UHD v4, section 3.2: the window attention of the intra-ViT compressor.

    Example:
        >>> qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8)
        >>> window_attention(*qkv.unbind(1), [(4, 6), (3, 5)]).shape
        torch.Size([39, 2, 8])
    """
    found, rest = _check((q, k, v), grids, (window, scale, order, order_in))
    if rest is not None and rotary is None:
        return _native.operators.window_attention.eager(q, k, v, *rest)
    where, scale, sides_in, sides = found
    tables = None
    if rotary is not None:
        tables = _check_rotary(rotary, rotate_half, q, k.shape[-2])
    q, k, v = _checks.autocast(q, k, v)
    if not _native.has_kernels(q.device):
        return reference.window_attention(
            q,
            k,
            v,
            grids,
            window,
            scale=scale,
            order=order,
            order_in=order_in,
            rotary=rotary,
            rotate_half=rotate_half,
        )
    packed = [where.pack(q), where.pack(k), where.pack(v)]
    if tables is not None:
        return _attend_rotated(packed, None, tables, rotate_half, where, scale, sides_in, sides)
    return _attend(packed, None, where, scale, sides_in, sides)


@checked_once
def _check(q, k, v, grids, window, scale, order, order_in) -> Checked:
    _checks.check_tensor(q, "q")
    _checks.check_like(k, "k", q, "q")
    _checks.check_like(v, "v", q, "q")
    _check_heads(q, k)
    _checks.check_same_shape(v, "v", k, "k")
    window = _checks.check_positive_int(window, "window")
    sides_in = windows.check_order(order_in, "order_in", window)
    sides = windows.check_order(order, "order", window)
    where = windows.locate(q, "q", grids, window, ("H", "D"))
    scale = _scale(scale, q)
    direct = _checks.stay_as_they_are(q, k, v)
    rest = _direct(q, where, scale, sides_in, sides) if direct else None
    return (where, scale, sides_in, sides), rest


def _direct(q, where, scale, sides_in, sides) -> tuple | None:
    """What follows the tensors in a call of the operator that nothing precedes or follows."""
    window_order = sides == (where.window,)
    if sides_in or (sides and not window_order) or suits_torch(q, where.window):
        return None
    rest = where.direct(q)
    return None if rest is None else (*rest, scale, window_order)


def window_attention_qkvpacked(
    qkv: torch.Tensor,
    grids: Grids,
    window: int = 2,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    order: TokenOrder = "raster",
    order_in: TokenOrder = "raster",
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotate_half: int = 1,
) -> torch.Tensor:
    """:func:`uhd_ops.window_attention` of a packed projection, with one gradient for all of it.

    The results are those of the slices, bit for bit, and the gradient is what theirs would be
    joined to; the kernels write it once, where autograd would copy three gradients into a fourth.

    Args:
        qkv: Queries, keys and values, ``(N, 3, H, D)`` for packed tokens, or ``(B, h*w, 3, H, D)``
            with one ``(h, w)`` grid. With ``num_heads``, the heads of the queries, then those of
            the keys and of the values, side by side: ``(N, H + 2 * H_kv, D)``, or
            ``(B, h*w, H + 2 * H_kv, D)``. Dtypes and autocast as for
            :func:`uhd_ops.window_attention`.
        grids: Patch grids of the views, likewise.
        window: Side of a window, in tokens.
        num_heads: Heads H of the queries, a multiple of those of the keys; None for a tensor with a
            dimension of 3.
        scale: Factor on the scores; None means ``D ** -0.5``.
        order: Order of the output tokens inside each view, as for
            :func:`uhd_ops.window_attention`.
        order_in: Order of the tokens of qkv, likewise.
        rotary: Cosines and sines for queries and keys, as for :func:`uhd_ops.window_attention`.
        rotate_half: How channels pair, likewise.

    Returns:
        Tensor ``(N, H, D)`` or ``(B, h*w, H, D)`` with the dtype of ``qkv``, contiguous.

    Raises:
        TypeError: ``qkv`` has none of the four dtypes, or an argument has the wrong type.
        ValueError: Shape, number of heads or grids do not fit, ``window < 1``, ``scale`` is not
            finite, or ``order`` or ``order_in`` is not a token order.
        NotImplementedError: A table in ``rotary`` requires a gradient.

    Source:
        LLaVA-UHD v4, section 3.2: the window attention of the intra-ViT compressor.

    Example:
        >>> grids = [(4, 6), (3, 5)]
        >>> window_attention_qkvpacked(torch.randn(39, 3, 2, 8), grids).shape
        torch.Size([39, 2, 8])
        >>> window_attention_qkvpacked(torch.randn(39, 4 + 2 * 2, 8), grids, num_heads=4).shape
        torch.Size([39, 4, 8])
    """
    found, rest = _check_packed((qkv,), grids, (window, num_heads, scale, order, order_in))
    if rest is not None and rotary is None:
        packed = qkv.flatten(1, 2) if num_heads is None else qkv
        return _native.operators.window_attention_qkvpacked.eager(packed, *rest)
    where, heads, scale, sides_in, sides = found
    if type(qkv) not in _native.PLAIN_TENSORS and _sharding.is_sharded(qkv):
        # A rank has heads of all three, not a share of one after the other.
        others = (qkv.shape[-2] - heads) // 2
        sizes = [heads, others, others]
        parts = qkv.unbind(-3) if num_heads is None else qkv.split(sizes, -2)
        options = {"scale": scale, "order": order, "order_in": order_in}
        options |= {"rotary": rotary, "rotate_half": rotate_half}
        return window_attention(*parts, grids, window, **options)
    tables = None
    if rotary is not None:
        kv_heads = heads if num_heads is None else (qkv.shape[-2] - heads) // 2
        like = qkv[..., 0, :, :] if num_heads is None else qkv[..., :heads, :]
        tables = _check_rotary(rotary, rotate_half, like, kv_heads, "qkv")
    (qkv,) = _checks.autocast(qkv)
    if not _native.has_kernels(qkv.device):
        return reference.window_attention_qkvpacked(
            qkv,
            grids,
            window,
            num_heads=num_heads,
            scale=scale,
            order=order,
            order_in=order_in,
            rotary=rotary,
            rotate_half=rotate_half,
        )
    packed = where.pack(qkv)
    packed = packed.flatten(1, 2) if num_heads is None else packed
    if tables is not None:
        return _attend_rotated([packed], heads, tables, rotate_half, where, scale, sides_in, sides)
    return _attend([packed], heads, where, scale, sides_in, sides)


@checked_once
def _check_packed(qkv, grids, window, num_heads, scale, order, order_in) -> Checked:
    _checks.check_tensor(qkv, "qkv")
    window = _checks.check_positive_int(window, "window")
    sides_in = windows.check_order(order_in, "order_in", window)
    sides = windows.check_order(order, "order", window)
    form = ("3", "H", "D")
    if num_heads is not None:
        num_heads, form = _checks.check_positive_int(num_heads, "num_heads"), ("H + 2 * H_kv", "D")
    where = windows.locate(qkv, "qkv", grids, window, form)
    heads = _check_packed_heads(qkv, num_heads)
    scale = _scale(scale, qkv)
    direct = _checks.stay_as_they_are(qkv)
    rest = _direct(qkv, where, scale, sides_in, sides) if direct else None
    found = where, heads, scale, sides_in, sides
    return found, None if rest is None else (heads, *rest)


def _scale(scale: float | None, q: torch.Tensor) -> float:
    return _checks.check_finite((q.shape[-1] or 1) ** -0.5 if scale is None else scale, "scale")


def _check_heads(q: torch.Tensor, k: torch.Tensor) -> None:
    """``k`` has the shape of ``q``, or a divisor of its heads."""
    if k.shape == q.shape:
        return
    same = k.dim() == q.dim() >= 2 and k.shape[:-2] == q.shape[:-2] and k.shape[-1] == q.shape[-1]
    if not same or not _can_share(q.shape[-2], k.shape[-2]):
        raise ValueError(
            f"k must have the shape of q, {tuple(q.shape)}, or with a divisor of its heads, "
            f"got {tuple(k.shape)}"
        )


def _check_packed_heads(qkv: torch.Tensor, num_heads: int | None) -> int:
    """Return the heads of the queries in a packed tensor."""
    if num_heads is None:
        if qkv.shape[-3] != 3:
            raise ValueError(
                f"qkv must be (..., 3, H, D) where num_heads is None, got shape {tuple(qkv.shape)}"
            )
        return qkv.shape[-2]
    others = qkv.shape[-2] - num_heads
    if others % 2 or not _can_share(num_heads, others // 2):
        raise ValueError(
            f"qkv must have num_heads + 2 * H_kv heads, where H_kv divides num_heads = {num_heads}"
            f", got shape {tuple(qkv.shape)}"
        )
    return num_heads


def _can_share(heads: int, kv_heads: int) -> bool:
    return heads == kv_heads or (heads > 0 and kv_heads > 0 and heads % kv_heads == 0)


def _check_rotary(
    rotary: object, rotate_half: object, q: torch.Tensor, kv_heads: int, name: str = "q"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables as ``(N, 1 or H, D)`` for packed tokens."""
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TypeError(f"rotary must be a tuple of cosines and sines, got {type(rotary).__name__}")
    parts = _checks.check_int(rotate_half, "rotate_half", 0)
    heads, dim = q.shape[-2:]
    if dim % (2 * parts or 2):
        raise ValueError(
            f"D must be a multiple of {2 * parts or 2} for rotate_half = {parts}, "
            f"got shape {tuple(q.shape)}"
        )
    tables = []
    for label, table in zip(("cosines", "sines"), rotary, strict=True):
        what = f"the {label} in rotary"
        _checks.check_tensor(table, what)
        if table.dtype not in (torch.float32, q.dtype):
            raise TypeError(f"{what} must be float32 or {q.dtype} like {name}, got {table.dtype}")
        if table.device != q.device:
            raise ValueError(
                f"{what} must be on the device of {name}, {q.device}, got {table.device}"
            )
        if table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{what} must not require a gradient: rotate q and k before the call"
            )
        whole = table.unsqueeze(-2) if table.dim() == 2 else table
        rows, missing = whole.shape[:-2], q.dim() - whole.dim()
        fits = (
            0 <= missing < q.dim() - 2
            and whole.shape[-1] == dim
            and (whole.shape[-2] == 1 or (whole.shape[-2] == heads == kv_heads))
            and rows[-1] == q.shape[-3]
            and all(
                size in (1, batch)
                for size, batch in zip(rows[:-1], q.shape[missing:-3], strict=True)
            )
            and (not tables or whole.shape[-2] == tables[0].shape[-2])
        )
        if not fits:
            raise ValueError(
                f"{what} must be (N, D), or (N, H, D) where keys have H heads, for {name} with "
                f"(..., N, H, D) = {tuple(q.shape)}, got shape {tuple(table.shape)}"
            )
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        shape = (*q.shape[:-2], *whole.shape[-2:])
        tables.append(whole.detach().to(wide).expand(shape).reshape(-1, *shape[-2:]))
    return tables[0], tables[1]


def _attend_rotated(
    packed: list[torch.Tensor],
    num_heads: int | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    parts: int,
    where: Windows,
    scale: float,
    sides_in: tuple[int, ...],
    sides: tuple[int, ...],
) -> torch.Tensor:
    """:func:`_attend` with rotary tables ``(N, 1 or H, D)``."""
    if sides_in:
        *packed, cos, sin = (windows.reorder(x, where, sides_in, ()) for x in (*packed, *tables))
        tables = cos, sin
    q, k, v = packed if num_heads is None else (*packed, None, None)
    window_order = sides == (where.window,)
    heads = q.shape[1] if num_heads is None else num_heads
    out = _native.operators._window_attention_rotary(
        q,
        k,
        v,
        heads,
        *tables,
        int(parts),
        where.views,
        where.window,
        where.all_windows,
        scale,
        window_order,
    )
    if sides and not window_order:
        out = windows.reorder(out, where, (), sides)
    return where.unpack_tokens(out)


def _attend(
    packed: list[torch.Tensor],
    num_heads: int | None,
    where: Windows,
    scale: float,
    sides_in: tuple[int, ...],
    sides: tuple[int, ...],
) -> torch.Tensor:
    """Attend among packed tokens: q, k and v, or one tensor of all with ``num_heads``."""
    window, window_order = where.window, sides == (where.window,)
    on_torch = suits_torch(packed[0], window) and where.keeps
    sides_out = sides if window_order else ()  # the order the result is in, where it is free
    if sides_in[:1] == (window,) and not on_torch:  # the order inside a window does not matter
        views, window_order, sides_out = where.window_major().views, False, sides_in
    else:
        views = where.views
        if sides_in:
            packed = [windows.reorder(x, where, sides_in, ()) for x in packed]
    if on_torch:
        if num_heads is not None:
            others = (packed[0].shape[1] - num_heads) // 2
            packed = packed[0].split([num_heads, others, others], 1)
        out = _attend_on_torch(*packed, where, scale, window_order)
    elif num_heads is None:
        out = _native.operators.window_attention(
            *packed, views, window, where.all_windows, scale, window_order
        )
    else:
        out = _native.operators.window_attention_qkvpacked(
            *packed, num_heads, views, window, where.all_windows, scale, window_order
        )
    if sides_out != sides:
        out = windows.reorder(out, where, sides_out, sides)
    return where.unpack_tokens(out)


# The largest window that our kernels on tensor cores hold.
LARGEST_OWN = 16


def suits_torch(q: torch.Tensor, window: int) -> bool:
    """Whether torch's kernels for whole sequences are the ones to use.

    The sides of the views have no say: what is computed for one must not depend on the others.
    """
    halves = (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and q.dtype in halves and window > LARGEST_OWN


def _attend_on_torch(q, k, v, where: Windows, scale: float, window_order: bool) -> torch.Tensor:
    """Attend inside windows of tokens that are gathered first, windows of equal size together.

    torch's kernels take sequences of one length that lie in one piece.
    """
    lengths, grouped, raster, window_major = where.by_length()
    q, k, v = (Permute.apply(x, *grouped) for x in (q, k, v))
    if k.shape[1] != q.shape[1]:  # a few of torch's kernels take fewer heads, not all
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = attend_by_length(q, k, v, lengths, scale)
    return Permute.apply(out, *(window_major if window_order else raster))


def _fake(q, k, v, views, window, num_windows, scale, window_order):
    return q.new_empty(q.shape)


def _backward_fake(grad_out, q, k, v, views, window, num_windows, scale, window_order):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx, grad_out):
    derivative = _native.operators._window_attention_backward
    grads = derivative(grad_out, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None, None


def _by_heads(q, k, v, *tables) -> dict[str, int]:
    """The sides of a call in which each rank has whole groups: heads, and those that they share."""
    if k is None:  # all in one tensor: a rank's share of that is not a share of each
        return {}
    ranks = q.mesh.size()
    if k.shape != q.shape and (q.shape[1] % ranks or k.shape[1] % ranks):
        return {}
    sides = dict.fromkeys(("q", "k", "v"), 1)
    own = tables and tables[0].shape[1] == q.shape[1]  # else all heads turn by the same angles
    return sides | dict.fromkeys(("cos", "sin"), 1) if own else sides


def _rules(q, k, v, *_):
    sides = _by_heads(q, k, v)
    return [(sides, [1])] if sides else []


def _backward_rules(grad_out, q, k, v, *_):
    sides = _by_heads(q, k, v)
    return [(sides | {"grad_out": 1}, [1, 1, 1])] if sides else []


_native.register(
    "window_attention",
    _fake,
    _backward_fake,
    _backward,
    _setup_context,
    sharding=(_rules, _backward_rules),
)


def _packed_fake(qkv, num_heads, views, window, num_windows, scale, window_order):
    return qkv.new_empty((qkv.shape[0], num_heads, qkv.shape[2]))


def _packed_backward_fake(grad_out, qkv, *sizes):
    return qkv.new_empty(qkv.shape)


def _packed_setup_context(ctx, inputs, output):
    qkv, ctx.num_heads, views, *ctx.options = inputs
    ctx.save_for_backward(qkv, views)


def _packed_backward(ctx, grad_out):
    qkv, views = ctx.saved_tensors
    derivative = _native.operators._window_attention_qkvpacked_backward
    return derivative(grad_out, qkv, ctx.num_heads, views, *ctx.options), *[None] * 6


_native.register(
    "window_attention_qkvpacked",
    _packed_fake,
    _packed_backward_fake,
    _packed_backward,
    _packed_setup_context,
)


def _rotary_fake(q, k, v, num_heads, cos, sin, parts, views, *sizes):
    return q.new_empty((q.shape[0], num_heads, q.shape[2]))


def _rotary_backward_fake(grad_out, q, k, v, *options):
    nothing = (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(nothing if k is None else k.shape),
        q.new_empty(nothing if v is None else v.shape),
    )


def _rotary_setup_context(ctx, inputs, output):
    q, k, v, ctx.num_heads, cos, sin, ctx.parts, views, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cos, sin, views)


def _rotary_backward(ctx, grad_out):
    q, k, v, cos, sin, views = ctx.saved_tensors
    grads = _native.operators._window_attention_rotary_backward(
        grad_out, q, k, v, ctx.num_heads, cos, sin, ctx.parts, views, *ctx.options
    )
    return grads[0], *((None, None) if k is None else grads[1:]), *[None] * 9


def _rotary_rules(q, k, v, num_heads, cos, *_):
    sides = _by_heads(q, k, v, cos)
    return [(sides, [1])] if sides else []


def _rotary_backward_rules(grad_out, q, k, v, num_heads, cos, *_):
    sides = _by_heads(q, k, v, cos)
    return [(sides | {"grad_out": 1}, [1, 1, 1])] if sides else []


_native.register(
    "_window_attention_rotary",
    _rotary_fake,
    _rotary_backward_fake,
    _rotary_backward,
    _rotary_setup_context,
    public="window_attention",
    sharding=(_rotary_rules, _rotary_backward_rules),
)
