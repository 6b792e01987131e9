# SPDX-License-Identifier: Apache-2.0
"""On the image: slices and windows, the ratios of views, tokens before and after a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from uhd_ops._checks import check_positive_int, check_tensor
from uhd_ops.grids import Grids, PackedGrids
from uhd_ops.nn.view_ratios import ViewRatios
from uhd_ops.plot.figures import axes_of, box_aspect, frame, panels
from uhd_ops.slicing.plan import SlicePlan
from uhd_ops.slicing.views import load_planned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from uhd_ops.slicing.load import ImageSource

Show: TypeAlias = Literal["norm", "pca"]
SHOWN: tuple[Show, ...] = get_args(Show)
_MOST_PIXELS = 1600  # along a side: an image is shown smaller than it is stored
_NORM = "L2 norm of a token"


def views(
    image: ImageSource, plan: SlicePlan, *, window: int | None = None, axes: Axes | None = None
) -> Axes:
    """Draw the slices of a plan on the image, and the windows in them.

    An image that is more than six times as wide as it is high, or the reverse, is stretched so that
    it can be seen; the title says so.

    Args:
        image: Whatever :func:`uhd_ops.load_image` takes.
        plan: A plan made for this image's size.
        window: Side, in patches, of windows whose borders are drawn too; None for none.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, in px of the image, with a rectangle for each slice.

    Raises:
        ImportError: If matplotlib or Pillow is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If the image cannot be read, its size is not ``plan.image_size``, or
            ``window < 1``.

    Example:
        >>> axes = views(torch.zeros(3, 600, 800), uhd_ops.plan_slices(800, 600), window=2)
        >>> len(axes.patches)
        4
    """
    rgb = load_planned(image, plan)
    if window is not None:
        window = check_positive_int(window, "window")
    axes = axes_of(axes)
    width, height = plan.image_size
    slices = "not sliced"
    if plan.slice is not None:
        slices = f"{plan.num_slices} slices of {_times(plan.slice)} px"
    title = f"{width}x{height} px: {slices}\nand a thumbnail of {_times(plan.thumbnail)} px"
    if plan.slice is None:
        title = f"{width}x{height} px: not sliced,\none view of {_times(plan.thumbnail)} px"
    stretched = frame(axes, width, height)
    axes.set_title(f"{title}{', stretched' * stretched}", fontsize=10)
    axes.imshow(_small(rgb), extent=(0, width, height, 0), aspect="auto")
    if window is not None:
        _draw_windows(axes, plan, window)
    _draw_slices(axes, plan)
    return axes


def ratios(
    image: ImageSource,
    plan: SlicePlan,
    ratios: Sequence[int],
    *,
    window: int = 2,
    axes: Axes | None = None,
) -> Axes:
    """Draw on each slice how many of its patches become one token.

    Args:
        image: Whatever :func:`uhd_ops.load_image` takes.
        plan: A plan made for this image's size.
        ratios: A power of ``window²`` for each view, thumbnail first, as
            :func:`uhd_ops.nn.choose_ratios` returns them.
        window: Side of the windows that the compressor merges, in tokens.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, with a coloured rectangle and a text for each slice, or for the one view of an
        image that is not sliced.

    Raises:
        ImportError: If matplotlib or Pillow is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If the image cannot be read, its size is not ``plan.image_size``, or the ratios
            do not fit the views.

    Example:
        >>> plan = uhd_ops.plan_slices(800, 600)
        >>> axes = ratios(torch.zeros(3, 600, 800), plan, [1, 4, 4, 16, 4])
        >>> axes.texts[2].get_text().splitlines()
        ['16 to 1', '63 tokens']
    """
    rgb = load_planned(image, plan)
    window = check_positive_int(window, "window")
    found = ViewRatios(ratios, plan.grids, window)
    axes = axes_of(axes)
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    frame(axes, *plan.image_size)
    width, height = plan.image_size
    axes.imshow(_small(rgb.convert("L")), extent=(0, width, height, 0), aspect="auto", cmap="gray")
    each = [window ** (2 * count) for count in found.times]
    tokens_left = [rows * columns for rows, columns in found.grids]
    deepest = max(found.times) or 1
    for view, (left, top, across, down) in _places(plan):
        color = colormaps["viridis"](1 - found.times[view] / deepest)
        axes.add_patch(Rectangle((left, top), across, down, fc=(*color[:3], 0.45), ec="white"))
        axes.text(
            left + across / 2,
            top + down / 2,
            f"{each[view]} to 1\n{tokens_left[view]} tokens",
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            path_effects=_outlined(),
        )
    title = f"{plan.num_tokens} patches become {found.grids.num_tokens} tokens"
    if plan.grid is not None:
        title += f"\nthumbnail: {each[0]} to 1, {tokens_left[0]} tokens"
    axes.set_title(title, fontsize=10)
    return axes


def tokens(
    x: torch.Tensor,
    grids: Grids,
    plan: SlicePlan | None = None,
    *,
    show: Show = "norm",
    label: str | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw a map of packed tokens, laid out like the image.

    Args:
        x: Tokens ``(N, C)`` of all views, or a number for each, ``(N,)``, which is drawn as it is.
        grids: Their grids, thumbnail first.
        plan: The plan of the views. Its slices are drawn where they lie in the image, and the
            thumbnail only for an image that is not sliced. None for tokens of one view.
        show: ``"norm"`` for the L2 norm of each token, with a colour bar; ``"pca"`` for its first
            three principal components as red, green and blue.
        label: What the colour bar says; None for what ``show`` says.
        axes: Where to draw; None for a new figure of pyplot.

    Returns:
        The axes, in px of the image or in tokens, with a picture for each slice.

    Raises:
        ImportError: If matplotlib is not installed.
        TypeError: If ``x`` is no tensor of a floating dtype, or ``grids`` or ``plan`` is of a wrong
            type.
        ValueError: If the numbers of tokens or views do not fit, or ``show`` is unknown.

    Example:
        >>> plan = uhd_ops.plan_slices(800, 600)
        >>> axes = tokens(torch.randn(plan.num_tokens, 16), plan.grids, plan)
        >>> len(axes.images), axes.get_title()
        (4, '4032 tokens in the slices')
    """
    grids = PackedGrids.of(grids)
    check_views(grids, plan)
    picture = _picture(x, "x", grids, show)
    return draw_tokens(axes_of(axes), picture, grids, plan, label or _label(x, show))


def merge(
    before: torch.Tensor,
    after: torch.Tensor,
    grids: Grids,
    plan: SlicePlan | None = None,
    *,
    window: int = 2,
    show: Show = "norm",
    label: str | None = None,
    image: ImageSource | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Draw packed tokens before and after each window of them became one, beside the image.

    Args:
        before: Tokens ``(N, C)`` in front of the merge, or a number for each, ``(N,)``.
        after: Tokens ``(M, C)`` behind it, or a number for each, ``(M,)``.
        grids: Grids of ``before``, thumbnail first.
        plan: The plan of the views; None for tokens of one view.
        window: Side of the windows that were merged, in tokens.
        show: As for :func:`tokens`. With ``"pca"`` both maps have the same components.
        label: What the colour bars say; None for what ``show`` says.
        image: The image, to be drawn beside the tokens with its slices; needs ``plan``.
        figure: Where to draw; it gets the size that this takes. None for a new one of pyplot.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib, or for ``image`` Pillow, is not installed.
        TypeError: If an argument is of a wrong type.
        ValueError: If the numbers of tokens or views do not fit, ``show`` is unknown, the image is
            not that of the plan, or there is one without a plan.

    Example:
        >>> x, grids = torch.randn(24 * 32, 16), [(24, 32)]
        >>> figure = merge(x, uhd_ops.window_mean(x, grids), grids)
        >>> [axes.get_title().splitlines()[1] for axes in figure.axes[:2]]
        ['768 tokens', '192 tokens']
    """
    grids, window = PackedGrids.of(grids), check_positive_int(window, "window")
    if image is not None and plan is None:
        raise ValueError("plan must be given with image, got None")
    check_views(grids, plan)
    check_tensor(before, "before")
    check_tensor(after, "after")
    if before.shape[1:] != after.shape[1:]:
        raise ValueError(
            f"after must have the shape (M, *{tuple(before.shape[1:])}), like before, got "
            f"{tuple(after.shape)}"
        )
    rgb = None if image is None or plan is None else load_planned(image, plan)
    merged = grids.merged(window)
    basis = _Basis.of(before, after) if show == "pca" and before.dim() == 2 else None
    first = _picture(before, "before", grids, show, basis)
    second = _picture(after, "after", merged, show, basis)
    size = plan.image_size if plan is not None else grids[0][::-1]
    drawn = panels(figure, 2 if rgb is None else 3, *size)
    if rgb is not None and plan is not None:
        views(rgb, plan, axes=drawn[0])
    label = label or _label(before, show)
    for axes, picture, on, when in zip(
        drawn[-2:], (first, second), (grids, merged), ("before", "after"), strict=True
    ):
        draw_tokens(axes, picture, on, plan, label)
        axes.set_title(f"{when} the merge:\n{axes.get_title()}", fontsize=10)
    return drawn[0].get_figure()


# ---- the image -----------------------------------------------------------------------------------

Box: TypeAlias = tuple[float, float, float, float]  # left, top, width, height


def _times(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"


def _small(image: Image.Image) -> Image.Image:
    """Shrink an image to what can be seen; its sides shrink apart, since they are drawn in px."""
    size = tuple(min(side, _MOST_PIXELS) for side in image.size)
    return image if size == image.size else image.resize(size, reducing_gap=2.0)


def _places(plan: SlicePlan) -> list[tuple[int, Box]]:
    """The views that lie in the image, with their boxes there: the slices, or the one view."""
    width, height = plan.image_size
    if plan.resized_size is None:
        return [(0, (0, 0, width, height))]
    across, down = width / plan.resized_size[0], height / plan.resized_size[1]
    return [
        (view, (left * across, top * down, (right - left) * across, (bottom - top) * down))
        for view, (left, top, right, bottom) in enumerate(plan.boxes, 1)
    ]


def _outlined() -> list[Any]:
    """White on anything: with a dark edge."""
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=2.5, foreground="#202020")]


def _draw_slices(axes: Axes, plan: SlicePlan) -> None:
    from matplotlib.patches import Rectangle

    for _, (left, top, width, height) in _places(plan) if plan.grid is not None else ():
        rectangle = Rectangle((left, top), width, height, fill=False, ec="white", lw=1.2)
        rectangle.set_path_effects(_outlined())
        axes.add_patch(rectangle)


def _draw_windows(axes: Axes, plan: SlicePlan, window: int) -> None:
    from matplotlib.collections import LineCollection

    lines = []
    for view, (left, top, width, height) in _places(plan):
        rows, columns = plan.grids[view]
        for row in range(window, rows, window):
            y = top + height * row / rows
            lines.append([(left, y), (left + width, y)])
        for column in range(window, columns, window):
            x = left + width * column / columns
            lines.append([(x, top), (x, top + height)])
    axes.add_collection(
        LineCollection(lines, colors="white", linewidths=0.4, alpha=0.5), autolim=False
    )


# ---- tokens --------------------------------------------------------------------------------------


def _label(x: torch.Tensor, show: Show) -> str:
    return _NORM if show == "norm" and x.dim() == 2 else "value"


def check_views(grids: PackedGrids, plan: SlicePlan | None) -> dict[int, Box]:
    """The views that are drawn, with their boxes, in px of the image or in tokens."""
    if plan is None:
        if len(grids) != 1 or grids.num_tokens == 0:
            raise ValueError(f"grids must hold one view with tokens without a plan, got {grids}")
        height, width = grids[0]
        return {0: (0, 0, width, height)}
    if not isinstance(plan, SlicePlan):
        raise TypeError(f"plan must be a SlicePlan, got {type(plan).__name__}")
    if len(grids) != plan.num_views or grids.has_empty_views:
        raise ValueError(
            f"grids must hold the {plan.num_views} views of the plan, with tokens, got {grids}"
        )
    return dict(_places(plan))


class _Basis:
    """Three principal components of tokens, and the range of each that colours span."""

    def __init__(self, x: torch.Tensor) -> None:
        self.mean = x.mean(0)
        _, vectors = torch.linalg.eigh((x - self.mean).T @ (x - self.mean))
        vectors = torch.nn.functional.pad(vectors.flip(1)[:, :3], (0, max(0, 3 - x.shape[1])))
        # Of both directions that a component has, the one in which its largest entry is positive.
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.vectors = vectors * torch.where(signs == 0, 1.0, signs)
        scores = (x - self.mean) @ self.vectors
        ends = torch.tensor([0.01, 0.99], dtype=x.dtype)
        self.low, self.high = torch.stack([c.sort()[0][_ranks(c, ends)] for c in scores.T], 1)

    @classmethod
    def of(cls, *tokens: torch.Tensor) -> _Basis:
        """Fit all the tokens ``(N, C)``."""
        return cls(torch.cat([x.detach().cpu().double() for x in tokens]))

    def colors(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(N, 3)`` in [0, 1]."""
        scores = (x - self.mean) @ self.vectors
        span = (self.high - self.low).clamp(min=torch.finfo(x.dtype).tiny)
        return ((scores - self.low) / span).clamp(0, 1)


def _ranks(x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Places of quantiles; torch.quantile takes no more than 2**24 numbers."""
    return (shares * (len(x) - 1)).round().long()


def _picture(
    x: torch.Tensor, name: str, grids: PackedGrids, show: Show, basis: _Basis | None = None
) -> torch.Tensor:
    """Check tokens, and turn them into numbers ``(N,)`` or colours ``(N, 3)`` on the CPU."""
    if show not in SHOWN:
        raise ValueError(f'show must be "norm" or "pca", got {show!r}')
    check_tensor(x, name)
    if x.dim() not in (1, 2) or len(x) != grids.num_tokens:
        raise ValueError(
            f"{name} must be (N, C) or (N,) with N = {grids.num_tokens} tokens (sum of h*w over "
            f"grids), got shape {tuple(x.shape)}"
        )
    wide = x.detach().cpu().double()
    if x.dim() == 1:
        return wide
    return wide.norm(dim=1) if show == "norm" else (basis or _Basis(wide)).colors(wide)


def draw_tokens(
    axes: Axes, picture: torch.Tensor, grids: PackedGrids, plan: SlicePlan | None, label: str
) -> Axes:
    """Draw numbers ``(N,)`` with a colour bar, or colours ``(N, 3)``."""
    shown = check_views(grids, plan)
    per_view = picture.split([rows * columns for rows, columns in grids])
    drawn = torch.cat([per_view[view] for view in shown])
    width, height = plan.image_size if plan is not None else grids[0][::-1]
    frame(axes, width, height)
    scale = {} if picture.dim() == 2 else {"vmin": drawn.min().item(), "vmax": drawn.max().item()}
    maps = [
        axes.imshow(
            per_view[view].unflatten(0, grids[view]).numpy(),
            extent=(left, left + across, top + down, top),
            aspect="auto",
            interpolation="nearest",
            **scale,
        )
        for view, (left, top, across, down) in shown.items()
    ]
    axes.set(xlim=(0, width), ylim=(height, 0))
    if plan is not None:
        _draw_slices(axes, plan)
    where = " in the slices" if plan is not None and plan.grid is not None else ""
    axes.set_title(f"{len(drawn)} tokens{where}", fontsize=10)
    if picture.dim() == 1:
        from matplotlib.ticker import MaxNLocator

        tall = box_aspect(width, height) > 1.5
        options = {"location": "right"} if tall else {"location": "bottom", "pad": 0.02}
        bar = axes.get_figure().colorbar(
            maps[0], ax=axes, aspect=40, ticks=MaxNLocator(5), panchor=False, **options
        )
        bar.set_label(label)
    return axes
