# SPDX-License-Identifier: Apache-2.0
"""``plan_native``: an image in one view, at its own resolution or at most a budget of tokens."""

from __future__ import annotations

import math

from uhd_ops._checks import check_int
from uhd_ops.slicing import _checks
from uhd_ops.slicing.plan import SlicePlan

# What Kimi K2.5's image processor takes: 1792 x 1792 px in patches of 14 px.
DEFAULT_MAX_TOKENS = 16384
_MERGE = 4
LEAST_MAX_TOKENS = _MERGE**2  # for this merge


def plan_native(
    width: int,
    height: int = _checks.MISSING,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    patch_size: int = 14,
    merge: int = _MERGE,
    max_upscale: float | None = 1.0,
) -> SlicePlan:
    """Plan one view of the whole image: native resolution, or "global encoding".

    The image keeps its size if that fits into the budget, and is scaled down to at most the budget
    otherwise. Its aspect ratio is kept as well as sides allow that are multiples of ``merge``
    patches: some exact scaling of the image is less than one such unit away on both sides. Where it
    fits, each side is the nearest multiple, half a unit going to the even one; else the one below.
    An image whose sides are multiples already, and that fits, is not resampled. A larger budget
    never makes a side shorter. Sides are computed in integers, with no rounding but these.

    This is the rule of Qwen2-VL's processor (transformers' ``smart_resize``, also of the later
    Qwen-VL models), with three differences: a side of less than half a unit becomes one unit; the
    budget holds for thin images, too; and no image is enlarged unless asked. LLaVA-UHD v3 takes the
    multiple below in both cases, of an image that it has brought to at least 512² px. Kimi K2.5's
    processor pads up to a multiple, by less than a unit, and SigLIP 2's NaFlex enlarges every image
    until it fills the budget.

    Args:
        width: Width of the image in px.
        height: Height of the image in px.
        max_tokens: The budget: most patches in the view, before any compression, at least
            ``merge²``. A budget of R² px, LLaVA-UHD v3's resolution R, is ``R**2 //
            patch_size**2``.
        patch_size: Side of a patch in px.
        merge: The sides of the view are multiples of ``merge`` patches, so that ``merge`` x
            ``merge`` patches can become one token.
        max_upscale: Enlarge the image by this factor, or less if the budget ends before: 1 never
            enlarges, LLaVA-UHD v3 was evaluated with 1.4 to 2.5. None for no limit: every image
            fills the budget.

    Returns:
        A plan without slices, whose ``thumbnail`` is the view. ``slice_image``, ``pack_views``,
        ``pack_batches`` and ``nn.SliceEncoder`` take it like any other.

    Raises:
        TypeError: If ``max_upscale`` is not a number, or another argument not an integer.
        ValueError: If an argument is out of range.

    Source:
        LLaVA-UHD v3, native-resolution encoding; LLaVA-UHD v4, section 2, global encoding.

    Example:
        >>> plan_native(1920, 1080)
        SlicePlan(image 1920x1080 px, thumbnail 1904x1064 px, no slices, 10336 tokens)
        >>> plan_native(3840, 2160, max_tokens=4096)
        SlicePlan(image 3840x2160 px, thumbnail 1176x672 px, no slices, 4032 tokens)
    """
    width, height = _checks.sides(width, height)
    options = _checks.options(patch_size=patch_size, merge=merge)
    patch_size, merge = options["patch_size"], options["merge"]
    max_tokens = check_int(max_tokens, "max_tokens", 1, 2**63 - 1)
    if max_tokens < merge**2:
        raise ValueError(
            f"max_tokens must be at least merge² = {merge**2}, the patches of the smallest view, "
            f"got {max_tokens}"
        )
    unit, scale = patch_size * merge, _checks.upscale(max_upscale)
    most = max_tokens // merge**2  # units x units in the view
    # At the largest scale, which may be infinite; what is cut off does not fit anyway.
    columns, rows = (max(round(min(side * scale / unit, 2 * most)), 1) for side in (width, height))
    if columns * rows > most:
        # The largest scale s with (s * width) * (s * height) px in the budget gives the sides
        # sqrt(width / height * max_tokens) and sqrt(height / width * max_tokens) patches. Where one
        # of them is below a unit, the other may be too long.
        columns = min(columns, math.isqrt(width * max_tokens // (height * merge**2)), most)
        rows = min(rows, math.isqrt(height * max_tokens // (width * merge**2)), most)
        columns, rows = max(columns, 1), max(rows, 1)
    return SlicePlan(
        image_size=(width, height),
        grid=None,
        thumbnail=(columns * unit, rows * unit),
        slice=None,
        patch_size=patch_size,
        merge=merge,
    )
