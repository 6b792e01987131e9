# SPDX-License-Identifier: Apache-2.0
"""What all drawings share: matplotlib where it is needed, colours, panels, numbers with units."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

GREY, BLUE, ORANGE = "#b0b0b0", "#1f6fb4", "#e0802b"
"""Colours of the original or what was published, what is compared with it, and what stands out."""
_MOST_ELONGATED = 6  # a panel has at most so many times the width of its height, or the reverse
_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T"}


def readable(value: float, unit: str = "") -> str:
    """Write a number with three digits and the prefix of a power of a thousand.

    Args:
        value: The number, such as one of multiply-accumulates or seconds.
        unit: Its unit, without a prefix.

    Returns:
        The number, a space, and the unit with its prefix.

    Example:
        >>> readable(1.591e9, "MACs"), readable(0.00481, "s"), readable(66, "tokens")
        ('1.59 GMACs', '4.81 ms', '66 tokens')
    """
    value = float(f"{value:.3g}")  # 999.9 is 1 of the next prefix
    size, prefix = prefix_of(value)
    return f"{value / size:.3g} {prefix}{unit}".rstrip()


def prefix_of(value: float) -> tuple[float, str]:
    """Return the power of a thousand in which a number reads best, and its prefix."""
    exponent = 0
    if value and math.isfinite(value):
        exponent = math.floor(math.log10(abs(value)) / 3)
        exponent = min(max(exponent, min(_PREFIXES)), max(_PREFIXES))
    return 1000.0**exponent, _PREFIXES[exponent]


def saved(before: float, after: float) -> str:
    """Say in words how much less the second is, or how many times as much."""
    if after > before:
        return f"{after / before:.3g} times as much"
    return f"{1 - after / before:.1%} saved"


def require_matplotlib() -> None:
    """Raise an ImportError that names the extra if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'uhd_ops[plot]'") from error


def figure_of(figure: Figure | SubFigure | None, size: tuple[float, float]) -> Any:
    """Return the figure to draw in: the given one in this size, in inches, or a new one of pyplot.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``figure`` is none.
    """
    require_matplotlib()
    from matplotlib.figure import Figure, FigureBase

    if figure is None:
        from matplotlib import pyplot

        return pyplot.figure(figsize=size, layout="constrained")
    if not isinstance(figure, FigureBase):
        raise TypeError(f"figure must be a matplotlib Figure, got {type(figure).__name__}")
    if isinstance(figure, Figure):  # a part of a figure has no size of its own
        figure.set_size_inches(size)
        figure.set_layout_engine("constrained")
    return figure


def axes_of(axes: Axes | None, size: tuple[float, float] = (6.4, 4.8)) -> Any:
    """Return the axes to draw in: the given ones, or those of a new figure of pyplot.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``axes`` are none.
    """
    require_matplotlib()
    from matplotlib.axes import Axes

    if axes is None:
        return figure_of(None, size).subplots()
    if not isinstance(axes, Axes):
        raise TypeError(f"axes must be matplotlib Axes, got {type(axes).__name__}")
    return axes


def box_aspect(width: float, height: float) -> float:
    """Height by width of a panel for an image: its own, unless that were a hairline."""
    return min(max(height / width, 1 / _MOST_ELONGATED), _MOST_ELONGATED)


def frame(axes: Axes, width: float, height: float) -> bool:
    """Give axes the coordinates of an image, and a box in which it can be seen.

    Returns:
        Whether the image is stretched to fill the box.
    """
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())
    aspect = box_aspect(width, height)
    axes.set_box_aspect(aspect)
    axes.set_anchor("N")  # level with a panel that has no colour bar below it
    return not math.isclose(aspect, height / width)


def panels(figure: Any, count: int, width: float, height: float) -> list[Axes]:
    """Make panels for pictures of one size: in a row, or, where they are wide, in a column.

    Args:
        figure: None, or where the caller wants them.
        count: How many.
        width: Of each picture, in any unit.
        height: Likewise.
    """
    aspect = box_aspect(width, height)
    if aspect < 0.45:
        across = min(11, 3.5 / aspect)
        size = max(across, 8), count * (across * aspect + 1.3)
        return list(figure_of(figure, size).subplots(count, 1, squeeze=False)[:, 0])
    across = min(5.2, 9 / aspect)
    size = count * max(across, 3.7), across * aspect + 1.5
    return list(figure_of(figure, size).subplots(1, count, squeeze=False)[0])


def strip_spines(axes: Axes) -> None:
    """Leave the axes of a chart the lines that carry its scales."""
    axes.spines[["top", "right"]].set_visible(False)


def in_units(axis: Any, unit: str) -> None:
    """Label an axis with prefixes of a unit; a logarithmic one at 1, 2 and 5 in each decade."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(EngFormatter(unit=unit))
