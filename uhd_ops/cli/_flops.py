# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops flops``: what a vision transformer costs, and the numbers of two papers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from uhd_ops import flops, plot
from uhd_ops.cli import _paper
from uhd_ops.cli._models import make_without_weights
from uhd_ops.cli._support import (
    UserError,
    new_table,
    report,
    require,
    user_errors,
)
from uhd_ops.plot.figures import prefix_of, saved
from uhd_ops.retrofit import insert_early_compressor, insert_progressive_compression

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

_EARLY = {"layer": 6, "attention": "window", "mlp": "reuse", "form": "dense", "window": 2}
_PROGRESSIVE = {"progressive": None, "pool": "adaptive", "window": 2}


def run(arguments: argparse.Namespace) -> None:
    """Count and print.

    Raises:
        UserError: Arguments do not go together, the model or a package is missing or unsuitable, or
            the plot cannot be written.
    """
    if bool(arguments.paper) == bool(arguments.model):
        raise UserError("name one model, or pass --paper")
    require(*([] if arguments.json else ["rich"]), *(["matplotlib"] if arguments.plot else []))
    if arguments.paper:
        _refuse(arguments, (*_EARLY, *_PROGRESSIVE, "grid", "image"), "a model, not with --paper")
        numbers, show, draw = _paper.PAPERS[arguments.paper]
        result = numbers()
    else:
        require("timm")
        result, show, draw = _model(arguments), _show_model, _draw_model
    report(arguments, result, show, draw)


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is shown of one model."""
    name, options = arguments.model, _options(arguments)
    errors = (ValueError, NotImplementedError)
    vit = make_without_weights(name)
    with user_errors(*errors, prefix=f"model {name}: "):
        patch = flops.patch_size(vit)
        grid = _grid(arguments, vit, patch)
        try:
            without = flops.of_vit(vit, [grid])
        except ValueError:  # made for another size
            vit = make_without_weights(
                name, img_size=tuple(s * p for s, p in zip(grid, patch, strict=True))
            )
            without = flops.of_vit(vit, [grid])
        with_it = flops.of_vit(_insert(vit, **options), [grid])
    return {
        "model": name,
        "patch": list(patch),
        "grid": list(grid),
        "compressor": options,
        "without": without.to_dict(),
        "with": with_it.to_dict(),
    }


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What to insert, with the defaults filled in."""
    defaults = _PROGRESSIVE if arguments.progressive else _EARLY
    others = (_EARLY.keys() | _PROGRESSIVE.keys()) - defaults.keys()
    kind = "the early compressor, not with --progressive"
    _refuse(arguments, sorted(others), kind if arguments.progressive else "--progressive")
    given = {name: getattr(arguments, name) for name in defaults}
    return {name: defaults[name] if value is None else value for name, value in given.items()}


def _refuse(arguments: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Refuse arguments that would have no effect."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name} goes with {where}")


def _insert(vit: nn.Module, **options: Any) -> nn.Module:
    layers = options.pop("progressive", None)
    if layers is not None:
        return insert_progressive_compression(vit, layers, **options)
    return insert_early_compressor(vit, **options)


def _grid(arguments: argparse.Namespace, vit: nn.Module, patch: tuple[int, int]) -> tuple[int, int]:
    """The patch grid asked for, or that of the size that the model was made for."""
    if arguments.grid:
        return arguments.grid
    if arguments.image:
        width, height = arguments.image
    else:
        height, width = vit.pretrained_cfg["input_size"][1:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"an image of {width}x{height} px is not a whole number of patches of "
            f"{patch[1]}x{patch[0]} px"
        )
    return height // patch[0], width // patch[1]


# ---- tables --------------------------------------------------------------------------------------


def _show_model(result: dict[str, Any]) -> None:
    """Print the layers of one model with and without the compressor."""
    from rich.console import Console

    height, width = result["grid"]
    with_it, without = result["with"]["total"], result["without"]["total"]
    # The papers count in 1e9; what would be 0.000 of that gets a smaller unit.
    size, _ = prefix_of(min(without, 1e9))

    def cell(count: int | None) -> str:
        return "" if count is None else f"{count / size:.3f}"

    print(f"{result['model']}, {height}x{width} patches of {_pixels(result['patch'])} px")
    print(", ".join(f"{name} {_words(value)}" for name, value in result["compressor"].items()))
    table = new_table(
        "layer",
        numbers=("tokens", "linear", "attention", "total", "without"),
        title=f"{size:.0e} multiply-accumulates".replace("e+0", "e"),
    )
    before = {row["name"]: row["total"] for row in result["without"]["layers"]}
    for row in result["with"]["layers"]:
        counts = row["linear"], row["attention"], row["total"], before.get(row["name"])
        table.add_row(row["name"], str(row["tokens"]), *map(cell, counts))
    table.add_section()
    table.add_row("total", "", "", "", cell(with_it), cell(without))
    Console().print(table)
    print(saved(without, with_it))


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _pixels(patch: list[int]) -> str:
    return f"{patch[1]}x{patch[0]}"


# ---- plots ---------------------------------------------------------------------------------------


def _draw_model(result: dict[str, Any], figure: Figure) -> None:
    """Draw the layers of a model with and without compression."""
    with_it, without = (_report_of(result[key]) for key in ("with", "without"))
    figure.set_size_inches(max(6, 0.32 * len(with_it.layers)), 5)
    figure.set_layout_engine("constrained")
    plot.layers(with_it, without, axes=figure.subplots())
    height, width = result["grid"]
    figure.suptitle(f"{result['model']}, {height}x{width} patches")


def _report_of(printed: dict[str, Any]) -> flops.FlopReport:
    """Return the report that ``FlopReport.to_dict`` was called of."""
    rows = ({k: v for k, v in row.items() if k != "total"} for row in printed["layers"])
    return flops.FlopReport(tuple(flops.LayerCount(**row) for row in rows), printed["counting"])
