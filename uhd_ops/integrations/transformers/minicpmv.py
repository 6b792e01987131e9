# SPDX-License-Identifier: Apache-2.0
"""The parts of MiniCPM-V 4.6 and 4.7 that run on our operators.

Each class below replaces methods of one class of transformers, whose attributes it reads. What is
not a matter of operators (position embeddings, encoder layers, placing features among text tokens)
stays with transformers: every method here is short or calls ``super()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from uhd_ops.grids import PackedGrids
from uhd_ops.nn.attention import gathered_window_attention
from uhd_ops.nn.mlp_forms import merge_windows
from uhd_ops.nn.modules import Mixed
from uhd_ops.ops.view_attention import view_attention
from uhd_ops.ops.window_attention import window_attention

WINDOW = 2  # the only side that the tower, which halves its grids, can handle


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
