# SPDX-License-Identifier: Apache-2.0
"""Count one forward pass of any module, operator by operator, without computing it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from uhd_ops.flops.count import FlopReport, LayerCount, compressor_names, window_pairs
from uhd_ops.grids import PackedGrids

_LISTS_OF_BLOCKS = ("blocks", "layers", "layer")
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default)


def count_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopReport:
    """Count the multiply-accumulates of one forward pass, whatever the module is.

    The pass runs on tensors without data, so it takes neither the time nor the memory of a real
    one, and the module may be on any device, the meta device included. What is counted is half of
    what torch's ``FlopCounterMode`` counts with :func:`register_formulas`: the matrix products and
    convolutions as they are executed. Code that decides by the values of integers, such as grids,
    works; code that decides by those of floating-point tensors does not.

    Args:
        forward: A module, or a method of one, such as ``vit.forward_features``.
        args: Its inputs; only shapes and dtypes of floating-point tensors matter.
        kwargs: Likewise.

    Returns:
        Rows ``patch_embed`` for what comes before the blocks, one for each block, by its name,
        ``compressor`` for what is called ``compressor`` inside a block (``compressors.0`` ... where
        there are several), and ``head`` for what comes after. The blocks are the items of the
        longest list called ``blocks``, ``layers`` or ``layer``; without one there is a single row,
        ``forward``. A product with a parameter is ``linear``, any other ``attention``.

    Raises:
        TypeError: ``forward`` is neither a module nor a method of one.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        >>> report = count_forward(vit, torch.empty(1, 3, 32, 32))
        >>> [layer.name for layer in report.layers], report["blocks.0"].tokens
        (['patch_embed', 'blocks.0', 'blocks.1', 'head'], 17)
    """
    module = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"forward must be a torch.nn.Module or a method of one, got {type(forward).__name__}"
        )
    register_formulas()
    # Tensors made in inference mode reach a dispatch mode as composite operators.
    with torch.inference_mode(False), torch.no_grad():
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        stand_in = _without_data(module, fake)
        args, kwargs = tree_map_only(torch.Tensor, lambda x: _stand_in(x, fake), (args, kwargs))
        method = stand_in if module is forward else getattr(stand_in, forward.__name__)
        trace = _Trace(stand_in, fake)
        # Attention as plain products, because not every fused kernel has a formula.
        with sdpa_kernel(SDPBackend.MATH), trace.following_modules(), trace:
            method(*args, **kwargs)
    return trace.report()


def _without_data(module: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """Copy a module; what its forward pass may keep for later, it keeps in the copy."""
    copies: dict[int, Any] = {}
    for parameter in module.parameters():
        copies[id(parameter)] = nn.Parameter(_empty_like(parameter, fake), requires_grad=False)
    for buffer in module.buffers():
        copies[id(buffer)] = _stand_in(buffer, fake)
    return copy.deepcopy(module, copies)


def _stand_in(x: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    """Return a tensor without data, or a copy with data where code may decide by it: integers."""
    if x.is_floating_point() or x.is_complex() or x.is_meta:
        return _empty_like(x, fake)
    return x.detach().cpu().clone()


def _empty_like(x: torch.Tensor, fake: FakeTensorMode) -> torch.Tensor:
    with fake:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


class _Trace(TorchDispatchMode):
    """Count operators by row.

    What depends on no tensor without data is computed: models decide by it, and may keep it.

    Args:
        module: A module whose tensors have no data.
        fake: Their mode.
    """

    def __init__(self, module: nn.Module, fake: FakeTensorMode) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.fake, self.formulas = fake, flop_registry
        self.rows, self.row_of, self.last_block = _rows(module)
        self.row = next(iter(self.rows))
        self.tokens: dict[str, int] = {}
        self.flops: dict[str, Counter] = {name: Counter() for name in self.rows}
        self.weights = WeakTensorKeyDictionary()  # parameters, and their views and casts
        self.weights.update(dict.fromkeys(module.parameters(), True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        with self.fake:
            out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            column = "linear" if any(x in self.weights for x in tensors) else "attention"
            self.flops[self.row][column] += formula(*args, **kwargs, out_val=out)
        elif all(x in self.weights for x in tensors):
            made = (x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            self.weights.update(dict.fromkeys(made, True))
        return out

    @contextlib.contextmanager
    def following_modules(self) -> Iterator[None]:
        """Keep ``row`` that of the module entered last; not all code between modules is in one."""
        handle = register_module_forward_pre_hook(self._enter)
        try:
            yield
        finally:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if module not in self.row_of:
            return
        row = self.row_of[module]
        if row is None:  # outside the blocks: in front of them, between them, or behind
            row = "head" if self.last_block in self.tokens else self.row
        self.row = row
        if row not in (*self.tokens, "patch_embed") and args and isinstance(args[0], torch.Tensor):
            x = args[0]
            self.tokens[row] = x.numel() // x.shape[-1]

    def report(self) -> FlopReport:
        """Return what was counted."""
        layers = []
        for row, name in self.rows.items():
            columns = (self.flops[row][column] // 2 for column in ("linear", "attention"))
            layers.append(LayerCount(name, self.tokens.get(row, 0), *columns))
        if len(layers) > 1:  # the patches that are embedded and the prefix tokens beside them
            layers[0] = dataclasses.replace(layers[0], tokens=layers[1].tokens)
        return FlopReport(tuple(layers), "macs")


def _without_masks(indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Replace masks by the indices that they stand for: without data their number is unknown."""
    replaced = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        replaced += index.nonzero().unbind(1) if mask else [index]
    return replaced


def _rows(module: nn.Module) -> tuple[dict[str, str], dict[nn.Module, str | None], str | None]:
    """Find the rows of a module.

    Returns:
        The rows by unique names, with the names to show; the row of each submodule, None for those
        outside the blocks; and the row of the last block, None where there are no blocks.
    """
    path, blocks = _find_blocks(module)
    if not len(blocks):
        return {"forward": "forward"}, dict.fromkeys(module.modules(), "forward"), None
    row, rows, row_of = None, ["patch_embed"], dict.fromkeys(module.modules())
    for name, block in blocks.named_children():
        row = f"{path}.{name}" if path else name
        rows.append(row)
        row_of.update(dict.fromkeys(block.modules(), row))
        for inner, part in block.named_modules():
            if inner.rpartition(".")[2] == "compressor":
                rows.append(f"{row}.{inner}")
                row_of.update(dict.fromkeys(part.modules(), rows[-1]))
    shown = dict(zip(rows, rows, strict=True))
    inserted = [row for row in rows if row.rpartition(".")[2] == "compressor"]
    shown.update(zip(inserted, compressor_names(len(inserted)), strict=True))
    return {**shown, "head": "head"}, row_of, row


def _find_blocks(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the longest list of blocks and its name; an empty list where there is none."""
    found = [
        (name, part)
        for name, part in module.named_modules()
        if name.rpartition(".")[2] in _LISTS_OF_BLOCKS
        and isinstance(part, (nn.ModuleList, nn.Sequential))
    ]
    return max(found, key=lambda item: len(item[1]), default=("", nn.ModuleList()))


# ---- formulas by which torch's FlopCounterMode sees fused operators ------------------------------


def register_formulas() -> None:
    """Make torch's ``FlopCounterMode`` count the operators of this library.

    It counts what it has formulas for. Without this call it misses the attention inside windows and
    the first layer of :func:`uhd_ops.pixel_unshuffle_mlp`, which run in native code, and torch's
    own fused attention on the CPU; everything else has a formula in torch. With it, the counter
    sees twice what :func:`of_vit` counts of a forward pass. Counters made before the call do not
    know the formulas. Calling it again does nothing.

    It is no part of ``import uhd_ops`` because torch's module imports Triton, which takes longer
    than all the rest.

    Example:
        >>> register_formulas()
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> qkv = torch.randn(3, 4 * 6, 2, 8)  # 6 windows of 4 tokens, 2 heads of 8 channels
        >>> with FlopCounterMode(display=False) as counter:
        ...     _ = uhd_ops.window_attention(*qkv, [(4, 6)])
        >>> counter.get_total_flops() == 2 * 2 * 6 * 4 * 4 * 2 * 8
        True
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for operators, formulas in ((torch.ops.uhd_ops, _FORMULAS), (torch.ops.aten, _OF_TORCH)):
        for name, formula in formulas.items():
            # Without the native library there is no such operator of ours, and the definitions are
            # counted; a formula that torch has by now is left alone.
            operator = getattr(operators, name, None)
            if operator is not None and operator not in flop_registry:
                register_flop_formula(operator, get_raw=True)(formula)


def _window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    views: torch.Tensor,
    window: int,
    num_windows: int,
    *args: Any,
    out_val: Any = None,
) -> int:
    tokens, heads, head_dim = q.shape
    return 2 * 2 * _pairs(views, tokens, window, num_windows) * heads * head_dim


def _window_attention_backward(grad_out: torch.Tensor, *args: Any, out_val: Any = None) -> int:
    # Scores again, and the gradients of probabilities, queries, keys and values: five products
    # where the forward pass has two.
    return _window_attention(*args) // 2 * 5


def _window_attention_qkvpacked(
    qkv: torch.Tensor,
    num_heads: int,
    views: torch.Tensor,
    window: int,
    num_windows: int,
    *args: Any,
    out_val: Any = None,
) -> int:
    q = qkv[:, :num_heads]
    return _window_attention(q, q, q, views, window, num_windows)


def _window_attention_qkvpacked_backward(
    grad_out: torch.Tensor, *args: Any, out_val: Any = None
) -> int:
    return _window_attention_qkvpacked(*args) // 2 * 5


def _window_attention_rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    parts: int,
    *args: Any,
    out_val: Any = None,
) -> int:
    # The products of the attention; as for any elementwise operation, the rotation counts nothing.
    return _window_attention_qkvpacked(q, num_heads, *args)


def _window_attention_rotary_backward(
    grad_out: torch.Tensor, *args: Any, out_val: Any = None
) -> int:
    return _window_attention_rotary(*args) // 2 * 5


def _linear_activation(
    z: torch.Tensor, weight: torch.Tensor, *args: Any, out_val: Any = None
) -> int:
    return 2 * z.shape[0] * weight.numel()


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    batch, heads, queries, dim = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (dim + value.shape[-1])


def _attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    # As torch counts its fused attention on CUDA: the scores again, then the gradients of values,
    # probabilities, queries and keys.
    batch, heads, queries, dim = query.shape
    return 2 * batch * heads * queries * key.shape[-2] * (3 * dim + 2 * value.shape[-1])


_OF_TORCH = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
_FORMULAS = {
    "window_attention": _window_attention,
    "_window_attention_backward": _window_attention_backward,
    "window_attention_qkvpacked": _window_attention_qkvpacked,
    "_window_attention_qkvpacked_backward": _window_attention_qkvpacked_backward,
    "_window_attention_rotary": _window_attention_rotary,
    "_window_attention_rotary_backward": _window_attention_rotary_backward,
    "_linear_activation": _linear_activation,
}


def _pairs(views: torch.Tensor, tokens: int, window: int, num_windows: int) -> int:
    """Pairs of query and key; ``views`` is the kernels' table, see ``PackedGrids.view_table``."""
    if isinstance(views, FakeTensor) or views.is_meta:  # it holds no numbers
        if tokens != num_windows * window**2:
            raise NotImplementedError(
                f"tensors without data do not tell how the {num_windows} windows share "
                f"{tokens} tokens: use grids with sides divisible by {window}, tensors with data, "
                "or uhd_ops.flops.count_forward"
            )
        return num_windows * window**4
    return window_pairs(PackedGrids.of([row[1:3] for row in views[:-1].tolist()]), window)
