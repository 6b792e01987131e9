# SPDX-License-Identifier: Apache-2.0
"""Slicing: from an image of any size to the packed patches of its views.

A view is the thumbnail or one slice of the image. Three steps, each usable alone::

    image = load_image("photo.jpg")             # any mode or container -> 8-bit RGB
    plan = plan_slices(*image.size)             # which views; needs no pixels, no torch, no Pillow
    views = slice_image(image, plan)            # thumbnail first, then the slices
    pixels, grids = pack_views(views, plan.patch_size)   # (N, 3, 14, 14) and a PackedGrids

``plan_native`` plans one view of the whole image instead, at most as large as a budget.
"""

from uhd_ops.slicing.batches import pack_batches
from uhd_ops.slicing.load import load_image
from uhd_ops.slicing.native_resolution import plan_native
from uhd_ops.slicing.plan import SlicePlan
from uhd_ops.slicing.planner import plan_slices, plan_slices_batch
from uhd_ops.slicing.views import pack_views, slice_image

__all__ = [
    "SlicePlan",
    "load_image",
    "pack_batches",
    "pack_views",
    "plan_native",
    "plan_slices",
    "plan_slices_batch",
    "slice_image",
]
