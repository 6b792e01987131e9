# SPDX-License-Identifier: Apache-2.0
"""What encoding costs: by layer, over resolution, beside others, beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from uhd_ops._checks import check_finite
from uhd_ops.flops.count import FlopReport
from uhd_ops.plot.figures import (
    BLUE,
    GREY,
    ORANGE,
    axes_of,
    figure_of,
    in_units,
    readable,
    saved,
    strip_spines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

_MARKERS = "os^Dv"  # lines that lie on each other are told apart


def layers(
    report: FlopReport, without: FlopReport | None = None, *, axes: Axes | None = None
) -> Axes:
    """Draw what each layer of an encoder costs, with and without compressors.

    Args:
        report: What is counted, by :func:`uhd_ops.flops.of_vit` or another function.
        without: The same without compressors, drawn behind it in grey; None for none.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, with a bar for each layer of each report.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If the reports are counted in different ways.

    Example:
        >>> from uhd_ops import flops
        >>> grids, config = [(32, 32)], flops.CompressorConfig(layers=6)
        >>> without = flops.count_vit(flops.SIGLIP_SO400M, grids)
        >>> axes = layers(flops.count_vit(flops.SIGLIP_SO400M, grids, config), without)
        >>> axes.get_title()
        '487 GMACs to 239 GMACs, 51.0% saved'
    """
    reports = {"report": report} if without is None else {"report": report, "without": without}
    for name, given in reports.items():
        if not isinstance(given, FlopReport):
            raise TypeError(f"{name} must be a FlopReport, got {type(given).__name__}")
    if without is not None and without.counting != report.counting:
        raise ValueError(
            f"without must be counted like report, {report.counting!r}, got {without.counting!r}"
        )
    unit = "MACs" if report.counting == "macs" else "operations"
    names = [layer.name for layer in report.layers]
    axes = axes_of(axes, (max(6, 0.32 * len(names)), 5))
    title = readable(report.total, unit)
    if without is not None:
        before = {layer.name: layer.total for layer in without.layers}
        totals = [before.get(name, 0) for name in names]
        axes.bar(range(len(names)), totals, 0.9, color=GREY, label="without compression")
        title = f"{readable(without.total, unit)} to {title}"
        if without.total:
            title += f", {saved(without.total, report.total)}"
    kinds = {
        BLUE: ("layer" if without is None else "with compression", False),
        ORANGE: ("compressor", True),
    }
    for color, (label, inserted) in kinds.items():
        rows = [
            (place, layer.total)
            for place, layer in enumerate(report.layers)
            if layer.name.startswith("compressor") == inserted
        ]
        if rows:
            axes.bar(*zip(*rows, strict=True), 0.6, color=color, label=label)
    axes.set_xticks(range(len(names)), names, rotation=90)
    in_units(axes.yaxis, unit)
    axes.set_ylabel("multiply-accumulates" if unit == "MACs" else unit)
    axes.set_title(title, pad=26)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    strip_spines(axes)
    return axes


def costs(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    unit: str = "MACs",
    label: str = "multiply-accumulates",
    colors: Mapping[str, str] | None = None,
    marks: Sequence[tuple[str, float, float]] = (),
    axes: Axes | None = None,
) -> Axes:
    """Draw costs over resolution, one line for each way to encode, on logarithmic scales.

    Args:
        lines: For each name, points of the side of an image in px, or the square root of its area,
            and the cost.
        unit: Unit of a cost, without a prefix, such as ``"MACs"`` or ``"s"``.
        label: What the axis of the costs says.
        colors: Colours of lines by their names; None for those of matplotlib.
        marks: Points to be numbered, such as where lines cross: what is said of each, its side and
            its cost.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, with a line for each name, in order, and then a ring for each mark.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If a number is none.
        ValueError: If there is no line, a line has no points, or a number is not positive.

    Example:
        >>> from uhd_ops import flops
        >>> grids = {side: uhd_ops.plan_slices(side, side).grids for side in (448, 896, 1344)}
        >>> def line(config):
        ...     count = flops.count_vit
        ...     return [(s, count(flops.SIGLIP_SO400M, g, config).total) for s, g in grids.items()]
        >>> axes = costs({"without": line(None), "early": line(flops.CompressorConfig(layers=6))})
        >>> [line.get_label() for line in axes.lines]
        ['without', 'early']
    """
    points = [(f"lines[{name!r}]", line) for name, line in lines.items()]
    points.append(("marks", [mark[1:] for mark in marks]))
    for name, line in points:
        if not len(line) and name != "marks":
            raise ValueError(f"{name} must have points, got none")
        for number in (number for point in line for number in point):
            if check_finite(number, name) <= 0:
                raise ValueError(f"{name} must hold positive numbers, got {number}")
    if not lines:
        raise ValueError("lines must hold a line, got none")
    axes = axes_of(axes)
    for index, (name, line) in enumerate(lines.items()):
        color = None if colors is None else colors.get(name)
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(*zip(*line, strict=True), marker=marker, ms=4, color=color, label=name)
    notes = []
    for number, (note, *place) in enumerate(marks, 1):
        axes.plot(*place, "o", mfc="none", mec="black", ms=11, label="_mark")
        axes.annotate(str(number), place, (7, 5), textcoords="offset points", fontsize=8)
        notes.append(f"{number}: {note}")
    axes.text(1, 0, "\n".join(notes), ha="right", va="bottom", transform=axes.transAxes, size=8)
    axes.set(xscale="log", yscale="log", xlabel="square root of the area of the image, px")
    axes.set_ylabel(label)
    in_units(axes.yaxis, unit)
    in_units(axes.xaxis, "")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    strip_spines(axes)
    return axes


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    colors: Mapping[str, str | Sequence[str]] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw horizontal bars, those of one name beside each other, with numbers behind them.

    Args:
        names: What each group of bars is called, from top to bottom.
        series: Lengths of the bars, one for each name, by the name of the series.
        texts: What is written behind each bar; None for its length with three digits.
        colors: A colour for each series, or one for each of its bars; None for grey, blue and
            orange.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, with a legend where there are several series.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a series does not have a number for each name, or there is none.

    Example:
        >>> axes = bars(["448 px", "980 px"], {"saved, %": [51.1, 57.2]})
        >>> [text.get_text() for text in axes.texts]
        ['51.1', '57.2']
    """
    if not series:
        raise ValueError("series must hold one, got none")
    for name, lengths in series.items():
        if len(lengths) != len(names):
            raise ValueError(
                f"series[{name!r}] must have {len(names)} numbers, one for each name, got "
                f"{len(lengths)}"
            )
    axes = axes_of(axes, (8, 1 + 0.3 * len(names) * len(series)))
    thick = 0.8 / len(series)
    for index, (name, lengths) in enumerate(series.items()):
        color = BLUE if len(series) == 1 else (GREY, BLUE, ORANGE)[index % 3]
        if colors is not None:
            color = colors.get(name, color)
        places = [p + (index - (len(series) - 1) / 2) * thick for p in range(len(names))]
        drawn = axes.barh(places, lengths, thick, color=color, label=name)
        written = [f"{n:.3g}" for n in lengths] if texts is None else texts[name]
        axes.bar_label(drawn, written, padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    strip_spines(axes)
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return axes


def timings(
    cases: Mapping[str, Mapping[str, float]],
    *,
    ours: str = "uhd_ops",
    figure: Figure | None = None,
) -> Figure:
    """Draw measured times, a panel for each case, and how many times as long as ours each takes.

    Args:
        cases: Seconds of each variant, by the name of the case.
        ours: The variant that others are compared with; all whose names begin like it are blue.
        figure: Where to draw; it gets the size that this takes. None for a new one of pyplot.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no case, or one has no variant ``ours``.

    Example:
        >>> figure = timings({"forward": {"uhd_ops": 0.0048, "SDPA": 0.0235}})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['4.8 ms, 1.00x', '23.5 ms, 4.90x']
    """
    if not cases:
        raise ValueError("cases must hold one, got none")
    for name, seconds in cases.items():
        if ours not in seconds:
            raise ValueError(f"cases[{name!r}] must have the variant {ours!r}, got {list(seconds)}")
    counts = [len(seconds) for seconds in cases.values()]
    figure = figure_of(figure, (9, 1 + 0.3 * sum(counts) + 0.6 * len(counts)))
    drawn = figure.subplots(len(cases), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, (name, seconds) in zip(drawn, cases.items(), strict=True):
        own = seconds[ours]
        bars(
            list(seconds),
            {name: list(seconds.values())},
            texts={name: [f"{readable(s, 's')}, {s / own:.2f}x" for s in seconds.values()]},
            colors={name: [BLUE if v.startswith(ours) else GREY for v in seconds]},
            axes=axes,
        )
        in_units(axes.xaxis, "s")
        axes.set_title(name, loc="left", fontsize=9)
    drawn[-1].set_xlabel(f"median time, and how many times that of {ours}")
    return figure


def agreement(
    rows: Sequence[tuple[str, float, float]],
    *,
    rounding: float,
    unit: str,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draw numbers that were published and computed, and by how much they differ.

    Bars of both would look the same: the numbers are on the left, and on the right the differences
    on a scale of their own, with the band that the rounding of what was published explains.

    Args:
        rows: The name, the published and the computed number of each.
        rounding: Largest difference that rounding explains: half of the last published digit.
        unit: What the numbers are.
        figure: Where to draw, a part of a figure too; a whole one gets the size that this takes.
            None for a new one of pyplot.

    Returns:
        The figure, with two axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no rows, or ``rounding`` is not positive.

    Example:
        >>> rows = [("SigLIP", 3555.1, 3555.07), ("early", 1573.1, 1573.097)]
        >>> figure = agreement(rows, rounding=0.05, unit="1e9 operations")
        >>> [len(axes.collections) for axes in figure.axes]
        [2, 2]
    """
    if not rows:
        raise ValueError("rows must hold one, got none")
    if not check_finite(rounding, "rounding") > 0:
        raise ValueError(f"rounding must be positive, got {rounding}")
    figure = figure_of(figure, (11, 1.5 + 0.3 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names, published, computed = zip(*rows, strict=True)
    places = range(len(rows))
    left.scatter(published, places, s=80, fc="none", ec=ORANGE, lw=1.5, label="published")
    left.scatter(computed, places, s=14, color=BLUE, label="computed")
    for place, value in enumerate(published):
        left.annotate(
            f"{value:g}", (value, place), (9, 0), textcoords="offset points", va="center", size=8
        )
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_xlim(left=0)
    left.margins(x=0.12)
    left.grid(axis="y", color=GREY, lw=0.4)
    left.set_xlabel(unit)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    differences = [c - p for p, c in zip(published, computed, strict=True)]
    right.axvspan(-rounding, rounding, color=GREY, alpha=0.35, label=f"rounding, ±{rounding:g}")
    right.hlines(places, 0, differences, color=BLUE, lw=2)
    right.scatter(differences, places, s=14, color=BLUE)
    right.axvline(0, color="black", lw=0.8)
    reach = 1.2 * max(2 * rounding, *map(abs, differences))
    right.set_xlim(-reach, reach)
    right.set_xlabel(f"computed minus published, {unit}")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    for axes in (left, right):
        strip_spines(axes)
    return figure
