# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: which vision transformers of timm take a compressor, and why others do not.

    python docs/models.py            # write the table
    python docs/models.py --check    # fail where it is out of date

Every entry point is made on the meta device, without weights. A slice encoder is made of it, a
compressor is inserted in its middle, and a slice encoder is made of the two.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import NamedTuple

import timm
import torch
from _page import write_or_check
from timm.layers import weight_init

from uhd_ops import insert_early_compressor
from uhd_ops.nn import SliceEncoder

# The files of timm with models of one resolution throughout. All other classes are refused.
MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "vitamin", "deit", "eva", "beit"),
    *("naflexvit", "vision_transformer_relpos", "vision_transformer_sam", "qwen3_vit"),
    *("deepseek_vit", "gemma4_vit", "cait", "xcit", "convit", "tnt", "mlp_mixer", "crossvit"),
    *("volo", "pit"),
)


class Row(NamedTuple):
    """One entry point.

    Attributes:
        name: As ``timm.create_model`` takes it.
        kind: Class of the model.
        reason: Why it is refused; empty where it is supported.
        packed: Whether ``nn.SliceEncoder`` takes it, with and without a compressor.
    """

    name: str
    kind: str
    reason: str
    packed: bool


def try_model(name: str) -> Row:
    """Make one model without weights, encode packed views, and insert a compressor."""
    with torch.device("meta"):
        model = timm.create_model(name)
    kind = type(model).__name__
    packed = takes_packed_views(model)
    try:
        insert_early_compressor(model, layer=middle(model))
    except NotImplementedError as error:
        return Row(name, kind, str(error).partition(", so vit takes no")[0], packed)
    return Row(name, kind, "", packed and takes_packed_views(model))


def takes_packed_views(model: torch.nn.Module) -> bool:
    """Whether a slice encoder can be made of a model."""
    try:
        SliceEncoder(model)
    except NotImplementedError:
        return False
    return True


def middle(model: torch.nn.Module) -> int:
    """Half of the number of blocks; 0 where a model has no list of that name."""
    inner = getattr(model, "encoder", model)
    return len(getattr(inner, "blocks", ())) // 2


def names() -> list[str]:
    """All entry points of the files above."""
    return [name for module in MODULES for name in timm.list_models(module=module)]


def table(rows: list[Row]) -> str:
    """Return the page."""
    classes = defaultdict(list)
    for row in rows:
        classes[row.kind].append(row)
    supported = sum(not row.reason for row in rows)
    packed = sum(row.packed for row in rows)
    lines = [
        "# Vision transformers of timm that take a compressor",
        "",
        f"Written by `python docs/models.py` with timm {timm.__version__}: {supported} of "
        f"{len(rows)} entry points are supported,",
        f"and `nn.SliceEncoder` runs {packed} of them on packed views of different sizes.",
        "All other classes of timm reduce the resolution in stages or are not transformers, and",
        "are refused by name.",
        "",
        "| class | entry points | supported | packed | refused, and why |",
        "|---|---:|---:|---:|---|",
    ]
    for kind, found in classes.items():
        refused = [row for row in found if row.reason]
        reasons = "; ".join(sorted({row.reason for row in refused})).replace("|", "\\|")
        counts = len(found), len(found) - len(refused), sum(row.packed for row in found)
        lines.append(f"| `{kind}` | {' | '.join(map(str, counts))} | {reasons} |")
    for kind, found in classes.items():
        listed = [f"`{row.name}`" for row in found if not row.reason]
        if listed:
            lines += ["", f"## {kind}", "", ", ".join(listed)]
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the page over all entry points."""
    # On the meta device there is nothing to draw, which took most of the time.
    weight_init._trunc_normal_ = lambda tensor, *args: tensor
    return table([try_model(name) for name in names()])


if __name__ == "__main__":
    sys.exit(write_or_check(__file__, __doc__, page))
