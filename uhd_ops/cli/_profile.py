# SPDX-License-Identifier: Apache-2.0
"""``uhd-ops profile``: what whole images cost in several ways to encode them, up to the LLM."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

import torch

from uhd_ops import plot
from uhd_ops.cli._models import (
    DTYPES,
    find_device,
    load_encoder,
    planned_encoder,
)
from uhd_ops.cli._support import (
    UserError,
    new_table,
    report,
    require,
    user_errors,
)
from uhd_ops.grids import PackedGrids

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from uhd_ops.cli._models import Encoder
    from uhd_ops.cli._variants import Options

# Only what is run has them.
_OF_RUN = {"dtype": "float32", "device": "auto", "rounds": 3, "threads": None}


def run(arguments: argparse.Namespace) -> None:
    """Plan and count, run and time if asked for, and print.

    Raises:
        UserError: Arguments do not go together, a model, a config or a package is missing or
            unsuitable, or the plot cannot be written.
    """
    packages = ["timm", *([] if arguments.json else ["rich"])]
    require(*packages, *(["matplotlib"] if arguments.plot else []))
    _check(arguments)
    result = _result(arguments)
    report(arguments, result, _show, _draw)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would have no effect; fill in the defaults of the rest."""
    for name, default in _OF_RUN.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif not arguments.measure:
            raise UserError(f"--{name} goes with --run")
    if arguments.llm is None and arguments.prompt is not None:
        raise UserError("--prompt goes with --llm")
    if arguments.llm is not None and arguments.out_dim is not None:
        raise UserError("--out-dim goes without --llm, which has a width of its own")
    if arguments.llm is not None:
        require("transformers", extra="transformers")


def _result(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is shown."""
    from uhd_ops.cli import _variants as ways

    device = find_device(arguments.device) if arguments.measure else None
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config, llm, prefill, out_dim, text = None, None, None, arguments.out_dim or 4096, 0
    if arguments.llm is not None:
        config = ways.read_llm_config(arguments.llm)
        planned = ways.make_llm(config, "meta", torch.float32, arguments.llm)
        prefill = ways.PrefillCosts(planned, arguments.llm)
        out_dim, text = ways.width(planned), 32 if arguments.prompt is None else arguments.prompt
    planned_models = []
    for name in arguments.models:  # what can be wrong is tried before anything is run
        encoder = planned_encoder(name)
        if arguments.scale_resolution:
            encoder = encoder._replace(scale_resolution=arguments.scale_resolution)
        layers = arguments.progressive or ways.default_layers(encoder.depth)
        options = ways.Options(
            arguments.layer, arguments.form, layers, arguments.max_slices, arguments.max_tokens
        )
        costs = ways.Costs(encoder, options, out_dim)
        with user_errors(ValueError, NotImplementedError, prefix=f"model {name}: "):
            rows = [
                _row(encoder, costs, options, size, variant, prefill, text)
                for size in arguments.sizes
                for variant in arguments.variants
            ]
        planned_models.append((name, options, rows))
    if arguments.measure and config is not None:
        llm = ways.make_llm(config, device, DTYPES[arguments.dtype], arguments.llm)
    models = []
    for name, options, rows in planned_models:
        if arguments.measure:
            _time(name, options, rows, out_dim, llm, text, device, arguments)
        compared = "milliseconds" if arguments.measure else "giga_macs"
        models.append(
            {
                "model": name,
                "layer": options.layer,
                "form": options.form,
                "progressive": list(options.layers),
                "rows": rows,
                "crossings": crossings(rows, compared),
            }
        )
    return {
        "llm": arguments.llm,
        "out_dim": out_dim,
        "prompt": text,
        "compared": "milliseconds" if arguments.measure else "giga_macs",
        "run": {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "dtype": arguments.dtype,
            "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
        }
        if arguments.measure
        else None,
        "models": models,
    }


def _row(
    encoder: Encoder,
    costs: Any,
    options: Options,
    size: tuple[int, int],
    variant: str,
    prefill: Any,
    text: int,
) -> dict[str, Any]:
    """Plan and count one image in one variant."""
    from uhd_ops.cli._variants import VARIANTS, plan, tokens_out

    grids = PackedGrids(plan(VARIANTS[variant], *size, encoder, options).grids)
    tokens, parts = tokens_out(VARIANTS[variant], options, grids), costs.of(variant, grids)
    if prefill is not None:
        parts["prefill"] = prefill.of(tokens + text)
    return {
        "size": list(size),
        "variant": variant,
        "views": grids.num_views,
        "grids": [list(grid) for grid in grids],
        "tokens_vit": grids.num_tokens,
        "tokens_llm": tokens,
        "giga_macs": _totals({part: macs / 1e9 for part, macs in parts.items()}),
        "milliseconds": None,
    }


def _totals(parts: dict[str, float]) -> dict[str, float]:
    """Add what encoding takes, and all of it, which is the time to first token."""
    encode = sum(value for part, value in parts.items() if part != "prefill")
    return {**parts, "encode": encode, "total": encode + parts.get("prefill", 0.0)}


def _time(
    name: str,
    options: Options,
    rows: list[dict[str, Any]],
    out_dim: int,
    llm: Any,
    text: int,
    device: str,
    arguments: argparse.Namespace,
) -> None:
    """Run a model on every image and fill in the milliseconds."""
    from uhd_ops.cli import _variants as ways

    dtype = DTYPES[arguments.dtype]
    encoder = load_encoder(name, pretrained=False, seed=0, dtype=dtype)
    encoder.vit.to(device)
    with user_errors(ValueError, NotImplementedError, RuntimeError, prefix=f"model {name}: "):
        timer = ways.Timer(encoder, options, out_dim, llm)
        for size in arguments.sizes:
            found = {row["variant"]: row for row in rows if row["size"] == list(size)}
            grids = {way: PackedGrids(row["grids"]) for way, row in found.items()}
            times = timer.time(list(found), grids, text, arguments.rounds)
            for way, parts in times.items():
                found[way]["milliseconds"] = _totals(parts)


def crossings(rows: list[dict[str, Any]], compared: str) -> list[dict[str, Any]]:
    """Find where one variant becomes cheaper than another as images grow.

    Args:
        rows: What was planned or run.
        compared: ``"giga_macs"`` or ``"milliseconds"``, whose totals are compared.

    Returns:
        For each pair of variants and each change of order: which was cheaper below and is above,
        the sizes between which that changes, and where straight lines between their totals over
        the square root of the area cross.
    """
    totals: dict[str, list[tuple[float, float, list[int]]]] = {}
    for row in sorted(rows, key=_side):
        point = _side(row), row[compared]["total"], row["size"]
        totals.setdefault(row["variant"], []).append(point)
    names, found = list(totals), []
    for first, a in enumerate(names):
        for b in names[first + 1 :]:
            last = None  # the last point at which they differed
            for (side, cost, size), (_, other, _) in zip(totals[a], totals[b], strict=True):
                gap = cost - other
                if gap and last is not None and (gap > 0) != (last[0] > 0):
                    share = last[0] / (last[0] - gap)
                    found.append(
                        {
                            "below": a if last[0] < 0 else b,
                            "above": b if last[0] < 0 else a,
                            "between": [last[3], size],
                            "side": last[1] + share * (side - last[1]),
                            "total": last[2] + share * (cost - last[2]),
                        }
                    )
                if gap:
                    last = gap, side, cost, size
    return sorted(found, key=lambda crossing: crossing["side"])


def _side(row: dict[str, Any]) -> float:
    """Side in px of the square with the area of the image."""
    return math.sqrt(row["size"][0] * row["size"][1])


# ---- arguments -----------------------------------------------------------------------------------


# ---- tables --------------------------------------------------------------------------------------

_NARROW = (0, 1, 0, 0)  # nine columns within 80 characters
_TITLES = {
    "patch_embed": "embed",
    "before": "blocks",
    "compressor": "merge",
    "behind": "behind",
    "connector": "conn.",
    "prefill": "prefill",
    "total": "total",
}


def _show(result: dict[str, Any]) -> None:
    """Print tables of each model."""
    from rich.console import Console

    console = Console()
    for model in result["models"]:
        print(
            f"{model['model']}; early: after layer {model['layer']}, {model['form']} MLP; "
            f"progressive: after layers {', '.join(map(str, model['progressive']))}"
        )
        if result["llm"] is not None:
            print(f"prefill: {result['llm']}, {result['prompt']} tokens of text")
        console.print(_overview(result, model["rows"]))
        console.print(_by_part(model["rows"], "giga_macs", "GMACs by part"))
        if result["run"] is not None:
            facts = result["run"]
            where = f"{facts['device']}, {facts['dtype']}, {facts['threads']} threads"
            title = f"milliseconds by part, {where}, median of {facts['rounds']}"
            console.print(_by_part(model["rows"], "milliseconds", title))
        for crossing in model["crossings"]:
            console.print(_sentence(crossing, result["compared"]), highlight=False)


def _sentence(crossing: dict[str, Any], compared: str) -> str:
    low, high = (f"{width}x{height}" for width, height in crossing["between"])
    unit = "ms" if compared == "milliseconds" else "GMACs"
    return (
        f"{crossing['below']} is cheaper than {crossing['above']} up to about "
        f"{crossing['side']:.0f}x{crossing['side']:.0f} px (between {low} and {high}, at "
        f"{_number(crossing['total'])} {unit})"
    )


def _overview(result: dict[str, Any], rows: list[dict[str, Any]]) -> Any:
    timed = result["run"] is not None
    numbers = ["views", "tokens in", "to the LLM", "GMACs"]
    if timed:
        numbers.append("ms" if result["llm"] is None else "ms to first token")
    table = new_table("image, px", "variant", numbers=tuple(numbers), title="whole images")
    table.padding = _NARROW
    for row in _sectioned(table, rows):
        values = [str(row[key]) for key in ("views", "tokens_vit", "tokens_llm")]
        values.append(_number(row["giga_macs"]["total"]))
        if timed:
            values.append(_number(row["milliseconds"]["total"]))
        table.add_row(_label(row), row["variant"], *values)
    return table


def _by_part(rows: list[dict[str, Any]], key: str, title: str) -> Any:
    parts = [part for part in _TITLES if any(part in row[key] for row in rows)]
    table = new_table(
        "image, px", "variant", numbers=tuple(_TITLES[part] for part in parts), title=title
    )
    table.padding = _NARROW
    for row in _sectioned(table, rows):
        values = (row[key].get(part, 0.0) for part in parts)
        shown = (_number(value) if value else "" for value in values)
        table.add_row(_label(row), row["variant"], *shown)
    return table


def _sectioned(table: Any, rows: list[dict[str, Any]]) -> Any:
    """Rows, with a line in the table between images."""
    previous = None
    for row in rows:
        if previous not in (None, row["size"]):
            table.add_section()
        previous = row["size"]
        yield row


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _label(row: dict[str, Any]) -> str:
    width, height = row["size"]
    return f"{width}x{height}"


# ---- plot ----------------------------------------------------------------------------------------

_COLORS = {
    "none": "#808080",
    "early": "#1f6fb4",
    "post": "#c03d3e",
    "progressive": "#3a923a",
    "native": "#e0802b",
}


def _draw(result: dict[str, Any], figure: Figure) -> None:
    """Draw totals over resolution, one panel for each model, with the points where lines cross."""
    models, compared = result["models"], result["compared"]
    upto = "encoding" if result["llm"] is None else f"until the first token of {result['llm']}"
    unit, factor, quantity = "MACs", 1e9, "multiply-accumulates"
    if compared == "milliseconds":
        unit, factor, quantity = "s", 1e-3, "time"
    figure.set_size_inches(1 + 6 * len(models), 5.5)
    figure.set_layout_engine("constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in sorted(model["rows"], key=_side):
            point = _side(row), factor * row[compared]["total"]
            lines.setdefault(row["variant"], []).append(point)
        marks = [
            (f"{c['below']} to {c['above']}, {c['side']:.0f} px", c["side"], factor * c["total"])
            for c in model["crossings"]
        ]
        label = f"{quantity}, {upto}"
        plot.costs(lines, unit=unit, label=label, colors=_COLORS, marks=marks, axes=axes)
        axes.set_title(model["model"])
