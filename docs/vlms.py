# SPDX-License-Identifier: Apache-2.0
"""Write docs/vlms.md: which vision-language models of transformers take a compressor as a whole.

    python docs/vlms.py            # write the table
    python docs/vlms.py --check    # fail where it is out of date

Every image-text-to-text type that transformers has is made from its default config on the meta
device, without weights, and compressed.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import transformers
from _page import write_or_check
from transformers.models.auto import configuration_auto, modeling_auto

from uhd_ops.integrations.transformers import compress
from uhd_ops.integrations.transformers.vlm_models import entry_of, grid_side
from uhd_ops.retrofit.registry import takes_compressor

LAYER = 5  # VipLLaVA reads the states after block 5 of its tower
GEMMA3 = {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14}
# Where the default config makes no model, or one whose parts do not fit, as it is released.
MENDED = {
    "aya_vision": {"vision_config": {**GEMMA3, "image_size": 364}},
    "gemma3": {"vision_config": GEMMA3},
    "shieldgemma2": {"vision_config": GEMMA3},
    "t5gemma2": {"encoder": {"vision_config": GEMMA3}},
}
UNKNOWN = "its tower is not known here"
UNCOUNTED = "its tower takes a compressor, but where the model counts its tokens is not known here"
# What the structure of the others says.
REASONS = {
    "chameleon": "its images are codes of a quantiser, not features",
    "deepseek_ocr2": "its tower is SAM's, whose convolutions already reduce the tokens",
    "deepseek_vl_hybrid": "it adds the states of a second tower, SAM's, token by token",
    "emu3": "its images are codes of a quantiser, not features",
    "evolla": "it reads proteins, not images",
    "fast_vlm": "its tower has stages that reduce the resolution already",
    "florence2": "its tower has stages that reduce the resolution already",
    "fuyu": "it has no tower: its decoder reads the patches",
    "gemma3n": "its tower has stages that reduce the resolution already",
    "gemma4_unified": "it has no tower: its decoder reads the patches",
    "got_ocr2": "its tower is SAM's, whose convolutions already reduce the tokens",
    "lfm2_vl": "it cuts the tower's output by the patches of each image",
    "lighton_ocr": "its image processor makes sizes that merged tokens need not divide",
    "minicpmv4_6": "it holds a compressor: see uhd_ops.integrations.transformers.accelerate",
    "minicpmv4_7": "it holds a compressor: see uhd_ops.integrations.transformers.accelerate",
    "mistral4": "it reads text only",
    "pp_chart2table": "its tower is SAM's, whose convolutions already reduce the tokens",
    "pp_formulanet": "its tower is SAM's, whose convolutions already reduce the tokens",
    "udop": "it has no tower: its encoder reads the patches beside the text",
    "unlimited_ocr": "it joins two towers, of which one is SAM's",
    "vision-encoder-decoder": "nothing counts its image tokens: insert into its encoder, if known",
}


class Row(NamedTuple):
    """One type.

    Attributes:
        kind: As in ``config.json``.
        model: Class of the model.
        tower: Class of its vision tower, if that was found.
        grid: Tokens of one view after the tower, without and with a compressor.
        counts: What the processor counts with, likewise.
        reason: Why it is refused; empty where it is not.
    """

    kind: str
    model: str
    tower: str
    grid: str = ""
    counts: str = ""
    reason: str = ""


def make(kind: str, model: str) -> torch.nn.Module | None:
    """Make a model of a type from its default config; None where that makes none."""
    try:
        config = configuration_auto.CONFIG_MAPPING[kind](**MENDED.get(kind, {}))
        with torch.device("meta"):
            return getattr(transformers, model)(config)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def try_type(kind: str, model: str) -> Row:
    """Compress a model of one type."""
    vlm = make(kind, model)
    refused = Row(kind, model, tower_of(vlm), reason=REASONS.get(kind, UNKNOWN))
    if vlm is None:
        return refused
    try:
        compress(vlm, layer=LAYER)
    except NotImplementedError:
        known = any(takes_compressor(module) for module in vlm.modules())
        return refused._replace(reason=UNCOUNTED) if known and kind not in REASONS else refused
    if kind in REASONS:
        raise AssertionError(f"{kind} is supported, but REASONS says: {REASONS[kind]}")
    inner = next(module for module in vlm.modules() if entry_of(module))
    entry, vision = entry_of(inner), inner.config.vision_config
    tower = getattr(inner, entry.towers[0])
    grid = "any, to a quarter"
    if hasattr(vision, "image_size"):
        side, merged = grid_side(vision), grid_side(vision, tower.compression)
        grid = f"{side} x {side} → {merged} x {merged}"
    before, after = (entry.counts(inner.config, given) for given in (None, tower.compression))
    counts = (f"`{name}` {before[name]} → {after[name]}" for name in before)
    return Row(kind, model, type(tower).__name__, grid, ", ".join(counts))


def tower_of(vlm: torch.nn.Module | None) -> str:
    """Class of the first model inside a model that is one for images."""
    for name, module in vlm.named_modules() if vlm is not None else ():
        cls = type(module).__name__
        named = name.rpartition(".")[2].startswith(("vision", "visual", "image_tower"))
        if name and isinstance(module, transformers.PreTrainedModel) and named:
            return cls
    return ""


def table(rows: list[Row]) -> str:
    """Return the page."""
    known = [row for row in rows if not row.reason]
    lines = [
        "# Vision-language models of transformers that take a compressor as a whole",
        "",
        f"Written by `python docs/vlms.py` with transformers {transformers.__version__}: of "
        f"{len(rows)} image-text-to-text types,",
        f"`uhd_ops.integrations.transformers.compress(model, processor)` takes {len(known)}. The",
        "numbers are those of default configs, with a compressor after block 5 of the tower: a",
        "grid of n x n tokens becomes one of ceil(n / 2) x ceil(n / 2). What the processor counts",
        "with changes as the last column says, and is saved with it.",
        "",
        "| type | model | tower | tokens of a view | processor |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.kind} | `{row.model}` | `{row.tower}` | {row.grid} | {row.counts} |"
        for row in known
    ]
    lines += [
        "",
        "All others are refused with a `NotImplementedError`. Where the tower itself is known, the",
        "message says so: `uhd_ops.insert_early_compressor` takes it, and what counts its tokens",
        "has to be changed by hand. Own towers: [own_vit.md](own_vit.md).",
        "",
        "| type | tower | why not |",
        "|---|---|---|",
    ]
    for row in rows:
        if row.reason:
            tower = f"`{row.tower}`" if row.tower else ""
            lines.append(f"| {row.kind} | {tower} | {row.reason} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the page over all types."""
    types = sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items())
    return table([try_type(kind, model) for kind, model in types])


if __name__ == "__main__":
    sys.exit(write_or_check(__file__, __doc__, page))
