# SPDX-License-Identifier: Apache-2.0
"""Run one model over packed views with the compressor, and without it, and time that."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from uhd_ops import flops
from uhd_ops.grids import PackedGrids
from uhd_ops.nn import SliceEncoder
from uhd_ops.retrofit import insert_early_compressor, remove_early_compressor
from uhd_ops.retrofit.registry import packed_of

PASSES = 2


class Run(NamedTuple):
    """One timed pass of the encoder."""

    tokens: torch.Tensor  # (M, C), without prefix tokens
    grids: PackedGrids
    seconds: float
    giga_macs: float


class Runs(NamedTuple):
    """Views through a model with the compressor and, if asked for, without it.

    Attributes:
        without: The pass without it, if there was one.
        giga_macs_without: What that costs, or would.
        compressed: The pass with it.
        norms_before: Norms ``(N,)`` of the tokens that entered the compressor.
        norms_after: Norms ``(M,)`` of the tokens that left it.
    """

    without: Run | None
    giga_macs_without: float
    compressed: Run
    norms_before: torch.Tensor
    norms_after: torch.Tensor


def check_compressor(vit: nn.Module, layer: int, form: str) -> None:
    """Try what :func:`compare` will do to a model, so that a wrong layer costs no minutes later.

    Raises:
        NotImplementedError: The model is of a kind that takes no compressor.
        ValueError: It has no such layer.
    """
    SliceEncoder(vit)
    remove_early_compressor(insert_early_compressor(vit, layer, form=form))


def measure(
    vit: nn.Module,
    pixels: torch.Tensor,
    grids: PackedGrids,
    *,
    layer: int,
    form: str,
    compare: bool,
    title: str,
) -> Runs:
    """Encode the views with the compressor, and without it too if asked, with the same weights.

    The two take turns, each after a warm-up on the thumbnail, and the faster pass of each counts:
    the first pass of a process also pays for memory that later ones find mapped. Without a
    comparison there is one pass.

    Args:
        vit: A model without a compressor; it is handed back without one.
        pixels: Patches of all views, (N, 3, p, p), on the device of the model.
        grids: Patch grids of the views, thumbnail first.
        layer: Block after which the compressor runs.
        form: Weight form of its MLP.
        compare: Whether to run the model without it.
        title: What the progress on the terminal is called.
    """
    without, compressed, passed, blocks = [], [], {}, _blocks(vit)
    macs = _giga_macs(vit, pixels, grids)
    insert_early_compressor(vit, layer, form=form)
    try:
        fewer_macs = _giga_macs(vit, pixels, grids)
    finally:
        remove_early_compressor(vit)
    passes = PASSES if compare else 1
    timed = 2 * passes if compare else passes
    with torch.inference_mode(), _progress(blocks, title, 2 * timed) as begin:
        for number in range(1, passes + 1):
            if compare:
                name = f"without compressor, pass {number}"
                without.append(Run(*_timed(vit, pixels, grids, begin, name), macs))
            insert_early_compressor(vit, layer, form=form)
            # Tokens are only kept here; their norms are taken later, outside the timed pass.
            blocks[layer].compressor.register_forward_hook(
                lambda module, inputs, output: passed.update(before=inputs[0], after=output)
            )
            name = f"with compressor, pass {number}" if compare else "with compressor"
            try:
                compressed.append(Run(*_timed(vit, pixels, grids, begin, name), fewer_macs))
            finally:
                remove_early_compressor(vit)
        norms = [passed[when].float().norm(dim=-1).cpu() for when in ("before", "after")]
    fastest = (
        min(runs, key=lambda run: run.seconds, default=None) for runs in (without, compressed)
    )
    before, after = fastest
    return Runs(before, macs, after, *norms)


def _timed(
    vit: nn.Module,
    pixels: torch.Tensor,
    grids: PackedGrids,
    begin: Callable[[str], None],
    name: str,
) -> tuple[torch.Tensor, PackedGrids, float]:
    encoder = SliceEncoder(vit)
    thumbnail = PackedGrids([grids[0]])
    begin(f"{name}, warm-up")
    encoder(pixels[: thumbnail.num_tokens], thumbnail)
    begin(name)
    _wait_for(pixels.device)
    start = time.perf_counter()
    result = encoder(pixels, grids)
    _wait_for(pixels.device)
    seconds = time.perf_counter() - start
    return result.tokens, result.grids, seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _giga_macs(vit: nn.Module, pixels: torch.Tensor, grids: PackedGrids) -> float:
    """Count what the slice encoder computes: from sizes where they tell, or from a trace."""
    try:
        flops.vit_config(vit)
    except NotImplementedError:
        return flops.count_forward(SliceEncoder(vit), pixels, grids).giga
    return flops.of_vit(vit, grids).giga


def _blocks(vit: nn.Module) -> nn.Module:
    transformer, packed = packed_of(vit)
    return transformer.get_submodule(packed.blocks_name)


@contextlib.contextmanager
def _progress(blocks: nn.Module, title: str, passes: int) -> Iterator[Callable[[str], None]]:
    """Show one bar for all passes of an image while they run; it moves with every block."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:  # rich would write empty lines
        yield lambda name: None
        return
    with Progress(*columns, console=console, transient=True) as progress:
        task, begun = progress.add_task(escape(title), total=passes * len(blocks)), 0

        def begin(name: str) -> None:
            nonlocal begun
            progress.update(task, description=f"{escape(title)}: {name}")
            begun += 1

        def enter(number: int, *_: object) -> None:
            progress.update(task, completed=(begun - 1) * len(blocks) + number)

        # On all parts: the slice encoder runs those of a block, not the block itself.
        hooks = [
            part.register_forward_pre_hook(functools.partial(enter, number))
            for number, block in enumerate(blocks, 1)
            for part in block.modules()
        ]
        try:
            yield begin
        finally:
            for hook in hooks:
                hook.remove()
