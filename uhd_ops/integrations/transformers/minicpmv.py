# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 and 4.7 on our operators, and back.

Each class behind the two functions replaces methods of one class of transformers, whose attributes
it reads. What is not a matter of operators (position embeddings, encoder layers, placing features
among text tokens) stays with transformers: every method here is short or calls ``super()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.attention import gathered_window_attention
from uhd_ops.nn.mlp_forms import merge_windows
from uhd_ops.nn.modules import Mixed, is_mixed, mixed
from uhd_ops.ops.view_attention import view_attention
from uhd_ops.ops.window_attention import window_attention

WINDOW = 2  # the only side that the tower, which halves its grids, can handle


def accelerate(model: nn.Module) -> nn.Module:
    """Run the vision tower of MiniCPM-V 4.6 or 4.7 on our operators, in place.

    The compressor inside the tower, whose original calls attention once for each window, becomes
    :func:`uhd_ops.window_attention` and :func:`uhd_ops.pixel_unshuffle_mlp`; attention in the
    layers becomes :func:`uhd_ops.view_attention`, unless flash attention is configured, which stays
    (so does dropout of attention weights in training); the connector merges all views at once.

    Results are the same up to rounding. Parameters, their names, hooks, ``save_pretrained``,
    ``copy.deepcopy``, pickling, recorded outputs and gradient checkpointing are as before, and
    modules may be quantised or adapted afterwards. Only the classes of some modules change; their
    names do not. :func:`restore` undoes it.

    **Odd grids**, which the original refuses, are accepted: a ragged window attends among the
    tokens that it holds, the MLP repeats the nearest of them, and sides become ceil(side / 2). An
    image of ``(h, w)`` patches fills ``ceil(h / 4) * ceil(w / 4)`` tokens of the language model, or
    ``ceil(h / 2) * ceil(w / 2)`` in ``"4x"`` mode, with one stage of the connector. For grids with
    sides that are multiples of 4 (of 2 in ``"4x"`` mode), the only ones that the image processor of
    transformers makes, nothing changes. For others the caller writes the prompt: the processor
    counts ``h * w // 16`` placeholders (``h * w // 4``), and where that differs from the number
    above, the model raises the error that it always raises. The positions that 4.7 computes from
    ``target_sizes`` follow.

    Args:
        model: A model of transformers that contains such a tower: the tower itself
            (``MiniCPMV4_6VisionModel``), ``MiniCPMV4_6Model``, or
            ``MiniCPMV4_6ForConditionalGeneration``; the same of 4.7; or a module around them.

    Returns:
        ``model`` itself. What is accelerated already is left alone.

    Raises:
        NotImplementedError: There is no such tower in the model, its windows are not 2 x 2, or a
            subclass or an instance replaces a method that would be replaced. The model is as it
            was.
        TypeError: ``model`` is not a module.

    Source:
        LLaVA-UHD v4, section 3.2, as released in MiniCPM-V 4.6.

    Example:
        >>> from transformers import MiniCPMV4_6VisionConfig
        >>> from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
        >>> config = MiniCPMV4_6VisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ...     insert_layer_id=0, image_size=64, patch_size=8,
        ... )
        >>> tower = accelerate(MiniCPMV4_6VisionModel(config))
        >>> sizes = torch.tensor([[4, 6], [3, 5]])
        >>> pixels = torch.randn(1, 3, 8, 8 * (4 * 6 + 3 * 5))
        >>> tower(pixels, target_sizes=sizes).last_hidden_state.shape
        torch.Size([1, 12, 32])
    """
    parts = [found for found in _parts_of(model) if not isinstance(found[1], Accelerated)]
    for name, module, part, base in parts:
        _check(name, module, part, base)
    for _, module, part, _ in parts:
        module.__class__ = mixed(part, type(module))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`, in place.

    Args:
        model: A model that :func:`accelerate` returned, or a part of one.

    Returns:
        ``model`` itself, with the classes that its modules had.

    Raises:
        NotImplementedError: Something extended the class of an accelerated module since. The model
            is as it was.
        TypeError: ``model`` is not a module.
        ValueError: Nothing in the model is accelerated.

    Example:
        >>> from transformers import MiniCPMV4_6VisionConfig
        >>> from transformers.models.minicpmv4_6.modeling_minicpmv4_6 import MiniCPMV4_6VisionModel
        >>> config = MiniCPMV4_6VisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        ... )
        >>> tower = MiniCPMV4_6VisionModel(config)
        >>> type(restore(accelerate(tower))) is MiniCPMV4_6VisionModel
        True
    """
    _check_module(model)
    modules = {n: module for n, module in model.named_modules() if isinstance(module, Accelerated)}
    if not modules:
        raise ValueError(
            f"model holds no module that accelerate() changed, got {type(model).__name__}"
        )
    for name, module in modules.items():
        if not is_mixed(type(module)):
            raise NotImplementedError(
                f"{name or 'model'} must have the class that accelerate() gave it, got "
                f"{type(module).__qualname__}: undo what extended it (sharding, say) first"
            )
    for module in modules.values():
        module.__class__ = module.body_class
    return model


def _parts_of(
    model: nn.Module,
) -> list[tuple[str, nn.Module, type[Accelerated], type[nn.Module]]]:
    """Find the modules to accelerate: name, module, our class, and the class that it extends."""
    _check_module(model)
    found = []
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            part = PARTS.get(f"{base.__module__}.{base.__qualname__}")
            if part is not None and not is_mixed(base):
                found.append((name or "model", module, part, base))
                break
    if not any(part is VisionModel for _, _, part, _ in found):
        towers = " or ".join(name for name, part in PARTS.items() if part is VisionModel)
        raise NotImplementedError(f"model must contain {towers}, got {type(model).__name__}")
    return found


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check(name: str, module: nn.Module, part: type[Accelerated], base: type[nn.Module]) -> None:
    """Refuse a module whose methods are not those that ``part`` was written for."""
    cls = type(module)
    for method in part.replaced:
        if method in vars(module) or getattr(cls, method) is not getattr(base, method):
            where = "the module itself" if method in vars(module) else cls.__qualname__
            raise NotImplementedError(
                f"{name} must leave {base.__qualname__}.{method} as it is, but {where} replaces "
                "it; accelerate the model before it is changed or dispatched to several devices"
            )
    part.check(module, name)


class Accelerated(Mixed):
    """Base of the classes whose methods replace those of a class of transformers.

    Attributes:
        replaced: Names of the methods that this class replaces.
    """

    replaced: tuple[str, ...] = ()

    @staticmethod
    def check(module: nn.Module, name: str) -> None:
        """Raise NotImplementedError if the options of ``module`` are not supported."""

    def extra_repr(self) -> str:
        """Mark the module: its class has the name of the original."""
        return ", ".join(filter(None, ("uhd_ops", super().extra_repr())))


class VisionAttention(Accelerated):
    """``MiniCPMV4_6VisionAttention``: attention inside each view, or inside windows."""

    replaced = ("forward",)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        grids: PackedGrids | None = None,
        window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``(B, N, C)`` to ``(B, N, C)``, as in the original class.

        Args:
            hidden_states: Packed tokens.
            cu_seqlens: Where each view starts; not read where ``grids`` are given.
            max_seqlen: Read by flash attention only.
            attention_mask: Not read, as in the original: the views are told apart by their lengths.
            grids: Grids of the views, known on the host, so that no layer waits for the device.
            window: Side of the windows to attend in; None means the whole view.
            **kwargs: For the original method.
        """
        dropout = self.attention_dropout if self.training else 0.0
        # What the user chose explicitly, and dropout of attention weights, are the original's.
        if window is None and (dropout or "flash" in (self.config._attn_implementation or "")):
            return super().forward(hidden_states, cu_seqlens, max_seqlen, attention_mask, **kwargs)
        if grids is None:
            grids = PackedGrids([(1, length) for length in cu_seqlens.diff().tolist()])
        every = PackedGrids.of(grids, hidden_states.shape[0])
        heads = (-1, self.num_heads, self.head_dim)
        q, k, v = (p(hidden_states).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if window is None:
            out = view_attention(q, k, v, every)
        elif dropout:
            out = gathered_window_attention(q, k, v, every, window, dropout=dropout)
        else:
            out = window_attention(q, k, v, every, window)
        return self.out_proj(out.reshape(hidden_states.shape)), None


class WindowAttentionMerger(Accelerated):
    """``MiniCPMV4_6ViTWindowAttentionMerger``: the compressor inside the tower."""

    replaced = ("forward",)

    @staticmethod
    def check(module: nn.Module, name: str) -> None:
        """Refuse windows that the rest of the tower does not know."""
        _check_window(module.window_kernel_size, f"{name}.window_kernel_size")

    def forward(
        self,
        hidden_states: torch.Tensor,
        target_sizes: torch.Tensor,
        grids: PackedGrids | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``(1, N, C)`` to ``(1, M, C)``, as in the original class; odd grids are allowed."""
        if hidden_states.shape[0] != 1:
            raise ValueError(
                "hidden_states must be (1, N, C), all views packed into one sequence, got shape "
                f"{tuple(hidden_states.shape)}"
            )
        grids = grids_of(target_sizes) if grids is None else grids
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), grids=grids, window=WINDOW)
        return _merge(self, (hidden_states + attended)[0], grids, residual=True)[None]


def _merge(
    module: nn.Module, x: torch.Tensor, grids: PackedGrids, *, residual: bool
) -> torch.Tensor:
    """Merge windows with the layers of ``module``."""
    return merge_windows(
        x,
        grids,
        module.pre_norm,
        module.linear_1,
        module.linear_2,
        window=WINDOW,
        activation=module.act,
        residual=residual,
    )


class VisionModel(Accelerated):
    """``MiniCPMV4_6VisionModel``: the tower, with merged grids rounded up instead of down."""

    replaced = ("forward", "get_downsampled_inputs")

    def forward(
        self,
        pixel_values: torch.Tensor,
        target_sizes: torch.Tensor | None = None,
        use_vit_merger: bool = True,
        *,
        unrounded_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the original class; ``unrounded_sizes`` stand in for ``target_sizes``."""
        sizes = target_sizes if unrounded_sizes is None else unrounded_sizes
        return super().forward(
            pixel_values,
            target_sizes=sizes,
            use_vit_merger=use_vit_merger,
            grids=grids_of(sizes),  # reaches the layers among their keyword arguments
            **kwargs,
        )

    def get_downsampled_inputs(
        self,
        target_sizes: torch.Tensor,
        max_seqlens: int | None,
        device: torch.device,
        grids: PackedGrids,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
        """As in the original class, which halves ``target_sizes``: sides become ceil(side / 2)."""
        sizes = round_up(target_sizes, WINDOW)
        inputs, sizes, cu_seqlens = super().get_downsampled_inputs(
            sizes, max_seqlens, device, **kwargs
        )
        inputs["grids"] = merged(grids)
        if max_seqlens is not None:
            inputs["max_seqlen"] = inputs["grids"].max_seqlen
        return inputs, sizes, cu_seqlens


class Merger(Accelerated):
    """``MiniCPMV4_6Merger``: the connector; all views in one product of matrices."""

    replaced = ("forward",)

    @staticmethod
    def check(module: nn.Module, name: str) -> None:
        """Refuse other windows than the MLPs are made for."""
        _check_window(module.merge_kernel_size, f"{name}.merge_kernel_size")

    def forward(
        self, hidden_states: torch.Tensor, target_sizes: torch.Tensor | Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """``(1, N, C)`` to ``(M_i, D)`` for each view i; odd grids are allowed."""
        grids, x = grids_of(target_sizes), hidden_states[0]
        for mlp in self.mlp:
            x, grids = mlp(x, grids), merged(grids)
        return list(x.split([height * width for height, width in grids]))


class DownsampleMLP(Accelerated):
    """``MiniCPMV4_6DownsampleMLP``: one stage of the connector, with the pixel-unshuffle."""

    replaced = ("forward",)

    def forward(self, hidden_states: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
        """``(N, C)`` on ``grids`` to ``(M, D)``; the original takes ``(M, 4C)``."""
        return _merge(self, hidden_states, grids, residual=False)


class Model(Accelerated):
    """``MiniCPMV4_6Model``: hands the connector the grids that the tower returns."""

    replaced = ("get_image_features",)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        target_sizes: torch.Tensor,
        downsample_mode: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the original class, which hands the connector ``target_sizes // 2``."""
        if self._patches_per_side(downsample_mode) != WINDOW:
            kwargs["unrounded_sizes"] = target_sizes
            target_sizes = round_up(target_sizes, WINDOW)
        return super().get_image_features(
            pixel_values, target_sizes, downsample_mode=downsample_mode, **kwargs
        )

    def _patches_per_side(self, downsample_mode: str | None) -> int:
        """Side, in patches, of what a token of the language model stands for."""
        return WINDOW if (downsample_mode or self.config.downsample_mode) == "4x" else WINDOW**2


class CanvasModel(Model):
    """``MiniCPMV4_7Model``: its positions in the language model follow the merged grids too."""

    replaced = (*Model.replaced, "get_rope_index")

    def get_rope_index(
        self,
        input_ids: torch.Tensor,
        mm_token_type_ids: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        target_sizes_videos: torch.Tensor | None = None,
        downsample_mode: str | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the original class, which divides both sizes, rounding down."""
        side = self._patches_per_side(downsample_mode)
        sizes = (target_sizes, target_sizes_videos)
        images, videos = (None if size is None else round_up(size, side) for size in sizes)
        return super().get_rope_index(
            input_ids,
            mm_token_type_ids,
            target_sizes=images,
            target_sizes_videos=videos,
            downsample_mode=downsample_mode,
            **kwargs,
        )


@torch.compiler.disable  # it reads values, which ends a graph in the original too
def grids_of(target_sizes: torch.Tensor | Sequence[Sequence[int]]) -> PackedGrids:
    """Read the grids; like the original, it waits for the device if that is where they are."""
    if isinstance(target_sizes, torch.Tensor):
        target_sizes = target_sizes.tolist()
    return PackedGrids.of(target_sizes)


@torch.compiler.disable
def merged(grids: PackedGrids) -> PackedGrids:
    """Return the grids of the merged tokens."""
    return grids.merged(WINDOW)


def round_up(sizes: torch.Tensor, multiple: int) -> torch.Tensor:
    """The smallest multiples that are not below ``sizes``."""
    return (sizes + (multiple - 1)) // multiple * multiple


def _check_window(sides: tuple[int, int], name: str) -> None:
    if tuple(sides) != (WINDOW, WINDOW):
        raise NotImplementedError(
            f"{name} must be {(WINDOW, WINDOW)}, which is what the rest of the model is made for, "
            f"got {tuple(sides)}"
        )


# Class of transformers, as "module.name" -> what replaces its methods.
PARTS = {
    f"transformers.models.{family}.modeling_{family}.{name}{part}": ours
    for family, name, model in (
        ("minicpmv4_6", "MiniCPMV4_6", Model),
        ("minicpmv4_7", "MiniCPMV4_7", CanvasModel),
    )
    for part, ours in (
        ("VisionAttention", VisionAttention),
        ("ViTWindowAttentionMerger", WindowAttentionMerger),
        ("VisionModel", VisionModel),
        ("Merger", Merger),
        ("DownsampleMLP", DownsampleMLP),
        ("Model", model),
    )
}
