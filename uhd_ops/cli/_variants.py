# SPDX-License-Identifier: Apache-2.0
"""Ways from a whole image to the first token of a language model: planned, counted and timed."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from uhd_ops import flops
from uhd_ops.cli._models import Encoder
from uhd_ops.cli._support import UserError, user_errors
from uhd_ops.grids import PackedGrids
from uhd_ops.nn import PixelUnshuffleConnector, SliceEncoder
from uhd_ops.retrofit import (
    insert_early_compressor,
    insert_progressive_compression,
    remove_early_compressor,
    remove_progressive_compression,
)
from uhd_ops.retrofit.registry import packed_of
from uhd_ops.slicing import SlicePlan, plan_native, plan_slices

PARTS = ("patch_embed", "before", "compressor", "behind", "connector", "prefill")
"""Parts of the way: the blocks in front of the first compressor and those behind it are apart."""


class Variant(NamedTuple):
    """A way to encode an image.

    Attributes:
        stages: 2 x 2 merges of the connector.
        inserted: What is inserted into the tower: ``"early"``, ``"progressive"`` or nothing.
        native: Whether the image is one view at its own resolution, instead of slices.
    """

    stages: int
    inserted: str = ""
    native: bool = False


VARIANTS = {
    "none": Variant(1),
    "early": Variant(1, inserted="early"),
    "post": Variant(2),
    "progressive": Variant(0, inserted="progressive"),
    "native": Variant(2, native=True),
}
"""All but ``none`` make one token of 4 x 4 patches; ``none`` makes four."""
MERGE = 4  # patches; sides of views are multiples, so that no window is ragged


class Options(NamedTuple):
    """What the variants may be told.

    Attributes:
        layer: Block after which the early compressor runs.
        form: Weight form of its MLP.
        layers: Blocks after which progressive compression pools.
        max_slices: An image is cut into at most so many slices.
        max_tokens: A native view has at most so many patches.
    """

    layer: int
    form: str
    layers: tuple[int, ...]
    max_slices: int
    max_tokens: int


def default_layers(depth: int) -> tuple[int, ...]:
    """The blocks of ViT-UHD, 4 and 18 of 27, in a tower of another depth; 0-based."""
    first, second = (max(round(depth * block / 27), 1) - 1 for block in (4, 18))
    return (first, second) if first < second else (first,)


def plan(
    variant: Variant, width: int, height: int, encoder: Encoder, options: Options
) -> SlicePlan:
    """Plan the views of an image of that size.

    Raises:
        ValueError: The planner takes no such image.
    """
    if variant.native:
        return plan_native(
            width,
            height,
            max_tokens=options.max_tokens,
            patch_size=encoder.patch_size,
            merge=MERGE,
        )
    return plan_slices(
        width,
        height,
        max_slices=options.max_slices,
        scale_resolution=encoder.scale_resolution,
        patch_size=encoder.patch_size,
        merge=MERGE,
    )


def merges(variant: Variant, options: Options) -> int:
    """How often the tower merges 2 x 2 tokens."""
    return {"early": 1, "progressive": len(options.layers)}.get(variant.inserted, 0)


def tokens_out(variant: Variant, options: Options, grids: PackedGrids) -> int:
    """Tokens that the language model gets of views on these patch grids."""
    for _ in range(merges(variant, options) + variant.stages):
        grids = grids.merged(2)
    return grids.num_tokens


@contextlib.contextmanager
def inserted(vit: nn.Module, variant: Variant, options: Options) -> Iterator[nn.Module]:
    """Insert what the variant needs; take it out again.

    Raises:
        NotImplementedError: The model takes no compressor.
        ValueError: It has no such blocks.
    """
    if variant.inserted == "early":
        insert_early_compressor(vit, options.layer, form=options.form)
    elif variant.inserted == "progressive":
        insert_progressive_compression(vit, options.layers)
    try:
        yield vit
    finally:
        if variant.inserted == "early":
            remove_early_compressor(vit)
        elif variant.inserted == "progressive":
            remove_progressive_compression(vit)


class TokenMlp(nn.Module):
    """A connector that merges nothing: norm and MLP of each token.

    Args:
        dim: Channels of a visual token.
        out_dim: Channels of a token of the language model.
        factory: Device and dtype of the parameters.
    """

    def __init__(self, dim: int, out_dim: int, **factory: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, **factory)
        self.fc1 = nn.Linear(dim, dim, **factory)
        self.fc2 = nn.Linear(dim, out_dim, **factory)

    def forward(self, x: torch.Tensor, grids: PackedGrids) -> torch.Tensor:
        """Map tokens ``(N, C)`` to ``(N, out_dim)``."""
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def make_connector(variant: Variant, dim: int, out_dim: int, **factory: Any) -> nn.Module:
    """Make the connector of a variant."""
    if variant.stages:
        return PixelUnshuffleConnector(dim, out_dim, merger_times=variant.stages, **factory)
    return TokenMlp(dim, out_dim, **factory)


# ---- the language model --------------------------------------------------------------------------


def read_llm_config(name: str) -> Any:
    """Read a config of transformers: a ``config.json``, a folder with one, or a model type.

    Raises:
        UserError: There is no such file or type, or it is not a config.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        errors = (OSError, ValueError, TypeError, KeyError)
        with user_errors(*errors, prefix=f"--llm {name}: no config of transformers: "):
            fields = json.loads(path.read_text())
            if not isinstance(fields, dict) or "model_type" not in fields:
                raise ValueError('it has no "model_type"')
            return AutoConfig.for_model(**fields)
    if name in CONFIG_MAPPING:
        return AutoConfig.for_model(name)
    similar = difflib.get_close_matches(name, list(CONFIG_MAPPING), 5) or ["qwen3", "llama"]
    raise UserError(
        f"--llm {name}: neither a config.json nor a model type of transformers; it has, for "
        f"example, {', '.join(similar)}"
    )


def make_llm(config: Any, device: str, dtype: torch.dtype, name: str) -> nn.Module:
    """Make a language model with random weights, or on the meta device without any.

    Raises:
        UserError: The config is of no language model that transformers knows, or its weights do not
            fit into the memory of the device.
    """
    from transformers import AutoModelForCausalLM

    with user_errors(ValueError, TypeError, prefix=f"--llm {name}: "), torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config)
    llm = llm.to(dtype).eval().requires_grad_(False)
    if device == "meta":
        return llm
    needed = sum(p.numel() * p.element_size() for p in llm.parameters())
    if device == "cuda":
        memory = torch.cuda.mem_get_info()[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"--llm {name}: its weights take {needed / 1e9:.1f} GB, and the device has "
            f"{memory / 1e9:.1f} GB; use a smaller config, or leave out --run"
        )
    with user_errors(RuntimeError, prefix=f"--llm {name}: "), torch.device(device):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return llm.eval().requires_grad_(False)


def width(llm: nn.Module) -> int:
    """Channels of a token that enters the language model."""
    return llm.get_input_embeddings().embedding_dim


def first_token(llm: nn.Module, embeds: torch.Tensor) -> torch.Tensor:
    """Prefill: tokens ``(1, L, D)`` to the logits of the next one, and a cache for those after."""
    return llm(inputs_embeds=embeds, logits_to_keep=1, use_cache=True).logits


# ---- what it costs -------------------------------------------------------------------------------


class Costs:
    """Multiply-accumulates of one model in every variant; each grid is counted once.

    Args:
        encoder: A model; no weight is read.
        options: Those of the variants.
        out_dim: Channels of a token of the language model.
    """

    def __init__(self, encoder: Encoder, options: Options, out_dim: int) -> None:
        self.encoder, self.options, self.out_dim = encoder, options, out_dim
        self._known: dict[tuple[str, tuple[int, int]], dict[str, int]] = {}

    def of(self, name: str, grids: PackedGrids) -> dict[str, int]:
        """Count a variant on the views of an image, part by part, without the language model.

        Views do not see each other, so each costs what it costs alone.
        """
        parts = dict.fromkeys(PARTS[:-1], 0)
        for grid, number in Counter(grids).items():
            if (name, grid) not in self._known:
                self._known[name, grid] = self._count(VARIANTS[name], PackedGrids([grid]))
            for part, macs in self._known[name, grid].items():
                parts[part] += number * macs
        return parts

    def _count(self, variant: Variant, grids: PackedGrids) -> dict[str, int]:
        vit, dim = self.encoder.vit, self.encoder.vit.num_features
        parts: Counter[str] = Counter()
        with inserted(vit, variant, self.options):
            for part, row in _parts(_report(vit, grids)):
                parts[part] += row.total
        for _ in range(merges(variant, self.options)):
            grids = grids.merged(2)
        connector = make_connector(variant, dim, self.out_dim, device="meta")
        tokens = torch.empty(grids.num_tokens, dim, device="meta")
        parts["connector"] = flops.count_forward(connector, tokens, grids).total
        return parts


def _report(vit: nn.Module, grids: PackedGrids) -> flops.FlopReport:
    """Count from sizes where they tell, or trace what the slice encoder does."""
    try:
        flops.vit_config(vit)
    except NotImplementedError:
        transformer, packed = packed_of(vit)
        patch, channels = packed.patch_size(transformer), packed.channels(transformer)
        pixels = torch.empty(grids.num_tokens, channels, *patch, device="meta")
        return flops.count_forward(SliceEncoder(vit), pixels, grids)
    return flops.of_vit(vit, grids)


def _parts(report: flops.FlopReport) -> Iterator[tuple[str, flops.LayerCount]]:
    """Say to which part each row belongs."""
    blocks = "before"
    for row in report.layers:
        if row.name == "patch_embed":
            yield "patch_embed", row
        elif row.name.startswith("compressor"):
            yield "compressor", row
            blocks = "behind"
        else:
            yield blocks, row


class PrefillCosts:
    """Multiply-accumulates until a language model has the logits of the first token.

    They are traced once: products with weights grow with the number of tokens, those of attention
    with its square. Another trace says whether that holds, and where it does not, as with
    attention in sliding windows, every number of tokens is traced.

    Args:
        llm: The model, on the meta device.
        name: For messages.
    """

    _SHORT, _LONG = 16, 48

    def __init__(self, llm: nn.Module, name: str) -> None:
        self._llm, self._name = llm, name
        self._known: dict[int, int] = {}
        short = self._trace(self._SHORT)
        blocks = [row for row in short.layers if row.name not in ("patch_embed", "head")]
        self._head = sum(row.linear for row in short.layers if row.name == "head")
        self._attention = sum(row.attention for row in blocks)
        # Outside the blocks, angles of rotary embeddings are a product without a weight.
        self._linear = short.total - self._head - self._attention
        self._grows = self._predict(self._LONG) == self._trace(self._LONG).total

    def of(self, tokens: int) -> int:
        """Count a prefill of so many tokens; a causal mask saves nothing in this count."""
        if self._grows:
            return self._predict(tokens)
        if tokens not in self._known:
            self._known[tokens] = self._trace(tokens).total
        return self._known[tokens]

    def _predict(self, tokens: int) -> int:
        linear = self._linear * tokens // self._SHORT
        return self._head + linear + self._attention * tokens**2 // self._SHORT**2

    def _trace(self, tokens: int) -> flops.FlopReport:
        embeds = torch.empty(1, tokens, width(self._llm), device="meta")
        errors = (TypeError, ValueError, RuntimeError, NotImplementedError)
        with user_errors(*errors, prefix=f"--llm {self._name}: cannot be counted: "):
            return flops.count_forward(
                self._llm, inputs_embeds=embeds, logits_to_keep=1, use_cache=False
            )


# ---- what it takes -------------------------------------------------------------------------------


class Timer:
    """Milliseconds of the parts of one model in every variant.

    Args:
        encoder: A model with weights, on its device.
        options: Those of the variants.
        llm: The language model on the same device, or None.
        out_dim: Channels of its tokens.
    """

    def __init__(
        self, encoder: Encoder, options: Options, out_dim: int, llm: nn.Module | None
    ) -> None:
        self.encoder, self.options, self.llm = encoder, options, llm
        transformer, packed = packed_of(encoder.vit)
        self.blocks = transformer.get_submodule(packed.blocks_name)
        like = packed.like(transformer)
        self.patch = packed.channels(transformer), *packed.patch_size(transformer)
        self.factory = {"device": like.device, "dtype": like.dtype}
        self.connectors = {
            variant.stages: make_connector(
                variant, encoder.vit.num_features, out_dim, **self.factory
            ).requires_grad_(False)
            for variant in VARIANTS.values()
        }

    def time(
        self, names: list[str], grids: dict[str, PackedGrids], text: int, rounds: int
    ) -> dict[str, dict[str, float]]:
        """Time the variants in turn, so that a slow moment of the machine falls on all of them.

        Args:
            names: The variants.
            grids: Patch grids of their views.
            text: Tokens of text beside the visual ones.
            rounds: Timed rounds, behind one that is not.

        Returns:
            Of each variant, the parts of the round whose sum is the median.
        """
        pixels = {
            name: torch.randn(grids[name].num_tokens, *self.patch, **self.factory) for name in names
        }
        passes: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name in names:
                with inserted(self.encoder.vit, VARIANTS[name], self.options):
                    passes[name].append(self._pass(name, pixels[name], grids[name], text))
        return {
            name: sorted(found[1:], key=lambda parts: sum(parts.values()))[(rounds - 1) // 2]
            for name, found in passes.items()
        }

    @torch.inference_mode()
    def _pass(
        self, name: str, pixels: torch.Tensor, grids: PackedGrids, text: int
    ) -> dict[str, float]:
        clock = _Clock(pixels.device)
        encoder, connector = SliceEncoder(self.encoder.vit), self.connectors[VARIANTS[name].stages]
        with _following(clock, self.blocks):
            clock.enter("patch_embed")
            result = encoder(pixels, grids)
            clock.enter("connector")
            tokens = connector(result.tokens, result.grids)
        if self.llm is not None:
            embeds = torch.cat([tokens, tokens.new_zeros(text, tokens.shape[1])])[None]
            clock.enter("prefill")
            first_token(self.llm, embeds)
        clock.stop()
        if "before" not in clock.milliseconds:
            raise NotImplementedError("its blocks run without hooks, so the parts cannot be told")
        return {part: clock.milliseconds[part] for part in PARTS if part in clock.milliseconds}


class _Clock:
    """Adds up the time of the part that runs, on a GPU too."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.part, self.since = device, "", 0.0
        self.milliseconds: dict[str, float] = {}

    def enter(self, part: str) -> None:
        """Say what runs from now on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.part:
            spent = 1e3 * (now - self.since)
            self.milliseconds[self.part] = self.milliseconds.get(self.part, 0.0) + spent
        self.part, self.since = part, now

    def stop(self) -> None:
        """Say that nothing runs."""
        self.enter("")


@contextlib.contextmanager
def _following(clock: _Clock, blocks: nn.Module) -> Iterator[None]:
    """Switch the clock where the first block begins, and around every compressor."""

    def begin(*_: object) -> None:
        if clock.part == "patch_embed":
            clock.enter("before")

    # On all parts: the slice encoder runs those of a block, not the block itself.
    hooks = [part.register_forward_pre_hook(begin) for part in blocks[0].modules()]
    for block in blocks:
        if hasattr(block, "compressor"):
            enter = functools.partial(_switch, clock, "compressor")
            leave = functools.partial(_switch, clock, "behind")
            hooks.append(block.compressor.register_forward_pre_hook(enter))
            hooks.append(block.compressor.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _switch(clock: _Clock, part: str, *_: object) -> None:
    clock.enter(part)
