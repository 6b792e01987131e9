# SPDX-License-Identifier: Apache-2.0
"""How a batch is made up whose samples have grids of their own, padded to one length."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from uhd_ops._cache import to_device
from uhd_ops.grids import PackedGrids
from uhd_ops.nn.positions import Frequencies, Rotary, merge_table


class PaddedLayout:
    """A sequence ``(B, P + L, C)``: prefix tokens, the patches of each sample's grid, padding.

    It has the methods of :class:`TokenLayout`.

    Args:
        grids: Grid of each sample.
        length: Places L for the patches of a sample.
        prefix: Tokens P in front of the patches.
        device: Where the tokens are.
        frequencies: Those of the rotary embeddings, where neighbours may differ by pi or more.
    """

    def __init__(
        self,
        grids: PackedGrids,
        length: int,
        prefix: int,
        device: torch.device | str,
        frequencies: Frequencies | None = None,
    ) -> None:
        self.grids, self.length, self.prefix = grids, length, prefix
        self.frequencies = frequencies
        valid = self._marks()
        self.full = bool(valid.all())
        self.valid = to_device(valid, device)
        self._rows = to_device(valid.flatten().nonzero()[:, 0].contiguous(), device)
        self._merged: dict[int, PaddedLayout] = {}

    @classmethod
    def of(
        cls,
        coordinates: torch.Tensor,
        valid: torch.Tensor | None,
        prefix: int,
        device: torch.device | str,
        frequencies: Frequencies | None = None,
    ) -> PaddedLayout:
        """Read the grids from the coordinates of the patches.

        Where these are on a CUDA device, the host waits for them, once.

        Args:
            coordinates: ``patch_coord (B, L, 2)``, row and column of each patch.
            valid: ``patch_valid (B, L)``, False for padding; None means that there is none.
            prefix: Tokens in front of the patches.
            device: As for the class, like the next.
            frequencies: Those of the rotary embeddings.

        Raises:
            TypeError: ``patch_coord`` holds no integers.
            ValueError: The valid patches of a sample are not those of one grid, row by row, in
                front of the padding.
        """
        if coordinates.dim() != 3 or coordinates.shape[1] < 1 or coordinates.shape[2] != 2:
            shape = tuple(coordinates.shape)
            raise ValueError(f"patch_coord must be (B, L, 2) with L >= 1, got shape {shape}")
        if coordinates.is_floating_point() or coordinates.is_complex():
            raise TypeError(f"patch_coord must hold integers, got {coordinates.dtype}")
        batch, length, _ = coordinates.shape
        if valid is None:
            valid = torch.ones((batch, length), dtype=torch.bool, device=coordinates.device)
        elif valid.shape != (batch, length):
            raise ValueError(
                f"patch_valid must have shape {(batch, length)}, that of patch_coord without its "
                f"last dimension, got {tuple(valid.shape)}"
            )
        grids = _read_grids(coordinates, valid.to(coordinates.device, torch.bool))
        return cls(grids, length, prefix, device, frequencies)

    def merged(self, window: int) -> PaddedLayout:
        """The layout after the compressor, as long as its longest sample needs."""
        if window == 1:  # not merged: the padding stays
            return self
        if window not in self._merged:
            self._merged[window] = self._behind(window)
        return self._merged[window]

    def _marks(self) -> torch.Tensor:
        """Where the patches are, ``(B, L)``, on the CPU."""
        counts = torch.tensor([h * w for h, w in self.grids], dtype=torch.int64)
        return torch.arange(self.length) < counts[:, None]

    def _behind(self, window: int) -> PaddedLayout:
        grids = self.grids.merged(window)
        device = self.valid.device
        return PaddedLayout(grids, grids.max_seqlen, self.prefix, device, self.frequencies)

    @property
    def places(self) -> tuple[Any, ...]:
        """What tells it from other layouts of the same model."""
        return self.grids, self.length, self.prefix

    def holds(self, x: torch.Tensor) -> bool:
        """Whether ``x`` has as many samples and tokens."""
        return x.shape[:2] == (len(self.grids), self.prefix + self.length)

    def check(self, x: torch.Tensor) -> None:
        """Refuse tokens of another number: something added or dropped some."""
        expected = len(self.grids), self.prefix + self.length
        if not self.holds(x):
            raise ValueError(
                f"x must be (B, P + L, C) with B = {expected[0]} samples, P = {self.prefix} prefix "
                f"tokens and L = {self.length} patches and padding, got shape {tuple(x.shape)}"
            )

    def merge(
        self, x: torch.Tensor, compressor: nn.Module, positions: Rotary | None = None
    ) -> torch.Tensor:
        """Run the compressor on the patches; prefix tokens pass unchanged, padding is zero."""
        merged = compressor(self.pack(x[:, self.prefix :]), self.grids, positions)
        merged = self.merged(compressor.window).unpack(merged)
        return torch.cat([x[:, : self.prefix], merged], dim=1) if self.prefix else merged

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Take the patches out of ``(B, L, ...)``: ``(N, ...)``."""
        x = x.flatten(0, 1)
        return x if self.full else x.index_select(0, self._rows)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Put ``(N, ...)`` in their places: ``(B, L, ...)``, zero in the padding."""
        places = len(self.grids), self.length
        if not self.full:
            empty = packed.new_zeros((places[0] * places[1], *packed.shape[1:]))
            packed = empty.index_copy(0, self._rows, packed)
        return packed.unflatten(0, places)

    def key_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What to add to the scores so that no padding is attended to: ``(B, 1, 1, P + L)``.

        Queries in the padding attend like any other: nothing reads what becomes of them.
        """
        if self.full:
            return None
        # Not minus infinity: a sample without any patch would become NaN.
        mask = torch.zeros_like(self.valid, dtype=dtype)
        mask.masked_fill_(~self.valid, torch.finfo(dtype).min)
        return nn.functional.pad(mask, (self.prefix, 0))[:, None, None]

    def merge_table(
        self, sin: torch.Tensor, cos: torch.Tensor, window: int, positions: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each merged token its sine and cosine; see ``nn.positions.merge_table``.

        Args:
            sin: ``(B, ..., L, D)``.
            cos: Likewise.
            window: Side of a window, in tokens.
            positions: ``"center"`` or ``"reindex"``.

        Returns:
            Those of the merged layout, zero in its padding.
        """
        merged = self.merged(window)
        tables = [x.new_zeros((*x.shape[:-2], merged.length, x.shape[-1])) for x in (sin, cos)]
        for grid in dict.fromkeys(self.grids):
            samples = [index for index, other in enumerate(self.grids) if other == grid]
            index = to_device(torch.tensor(samples, device="cpu"), sin.device)
            fine = (x.index_select(0, index)[..., : grid[0] * grid[1], :] for x in (sin, cos))
            parts = merge_table(*fine, grid, window, positions, self.frequencies)
            for table, part in zip(tables, parts, strict=True):
                table[..., : part.shape[-2], :].index_copy_(0, index, part)
        return tables[0], tables[1]


class FramedLayout(PaddedLayout):
    """A padded batch of images ``(B, H * W, C)``: each grid is the top-left corner of one frame.

    Behind the compressor the grids lie in the merged frame likewise, so that a connector which
    takes the tokens for a map is right. For models without rotary embeddings.

    Args:
        grids: Grid of each sample.
        frame: Rows H and columns W of all of them.
        device: Where the tokens are.
    """

    def __init__(
        self, grids: PackedGrids, frame: tuple[int, int], device: torch.device | str
    ) -> None:
        self.frame = frame
        super().__init__(grids, frame[0] * frame[1], 0, device)

    @classmethod
    def of_mask(cls, mask: torch.Tensor, device: torch.device | str) -> FramedLayout:
        """Read the grids from a mask; where it is on a CUDA device, the host waits for it, once.

        Args:
            mask: ``patch_attention_mask (B, H, W)``, False for padding.
            device: Where the tokens are.

        Raises:
            ValueError: The valid patches of a sample are not the top-left corner of the frame.
        """
        marked = mask.to("cpu", torch.bool)
        sides = torch.stack([marked.any(2).sum(1), marked.any(1).sum(1)], 1)
        layout = cls(PackedGrids.of(sides.tolist()), tuple(marked.shape[1:]), device)
        wrong = (layout._marks() != marked.flatten(1)).any(1).nonzero()[:, 0].tolist()
        if wrong:
            raise ValueError(
                "patch_attention_mask must mark a rectangle of patches in the top-left corner of "
                f"every image, which those of {wrong} do not"
            )
        return layout

    @property
    def places(self) -> tuple[Any, ...]:
        """As in the base class."""
        return self.grids, self.frame

    def _marks(self) -> torch.Tensor:
        sides = torch.tensor([*self.grids], dtype=torch.int64).view(-1, 2, 1)
        rows, cols = (torch.arange(n) < sides[:, dim] for dim, n in enumerate(self.frame))
        return (rows[:, :, None] & cols[:, None]).flatten(1)

    def _behind(self, window: int) -> FramedLayout:
        height, width = self.frame
        frame = -(-height // window), -(-width // window)
        return FramedLayout(self.grids.merged(window), frame, self.valid.device)


def refuse_maps(layout: Any, output_fmt: str) -> None:
    """Refuse to reshape the tokens of a padded batch to maps."""
    if isinstance(layout, PaddedLayout) and output_fmt == "NCHW":
        raise ValueError(
            'output_fmt must be "NLC" for a padded batch, whose samples have grids of their own, '
            'got "NCHW"'
        )


def eager_if_padded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.compile trace a method of a model for images, and call it eagerly otherwise.

    The grids of a padded batch are values of a tensor, which a traced forward pass does not know.
    """
    eager = torch.compiler.disable(method, reason="the grids are values of patch_coord")

    @functools.wraps(method)
    def either(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("x", kwargs.get("patches"))
        images = isinstance(x, torch.Tensor) and x.dim() == 4
        return (method if images else eager)(self, *args, **kwargs)

    return either


def _read_grids(coordinates: torch.Tensor, valid: torch.Tensor) -> PackedGrids:
    """Return the grid of each sample, in a single transfer from the device."""
    present = coordinates.masked_fill(~valid[..., None], -1)
    sides = present.amax(1) + 1
    slots = torch.arange(valid.shape[1], device=valid.device)
    in_grid = slots < sides.prod(1, keepdim=True)
    width = sides[:, 1:].clamp(min=1)
    expected = torch.stack([slots // width, slots % width], -1)
    ordered = (valid == in_grid).all(1) & ((present == expected) | ~valid[..., None]).all(2).all(1)
    grids = []
    for index, (height, width, fits) in enumerate(
        torch.cat([sides, ordered[:, None].to(sides.dtype)], 1).tolist()
    ):
        if not fits:
            raise ValueError(
                "patch_coord and patch_valid must describe one whole grid for each sample, row by "
                f"row, in front of the padding; those of sample {index}, with coordinates up to "
                f"({height - 1}, {width - 1}), do not"
            )
        grids.append((height, width))
    return PackedGrids.of(grids)
