# SPDX-License-Identifier: Apache-2.0
"""Padded batches of patches, as timm's NaFlex collator makes them."""

import torch

# Grids (h, w), the ragged and the smallest ones included; several samples share one.
GRIDS = ((7, 7), (3, 10), (1, 1), (5, 2), (7, 7), (4, 4), (2, 3))


def images_of(grids=GRIDS, patch=4, dtype=torch.float64):
    """Return one image (1, 3, H, W) for each grid."""
    return [torch.rand(1, 3, h * patch, w * patch, dtype=dtype) for h, w in grids]


def padded(images, patch=4, length=None):
    """Return the images as a batch of patches; what the padding holds must not matter."""
    grids = [(x.shape[2] // patch, x.shape[3] // patch) for x in images]
    length = length or max(h * w for h, w in grids) + 2
    batch = len(images)
    patches = 5 * torch.randn(batch, length, patch * patch * 3, dtype=images[0].dtype)
    coordinates = torch.zeros(batch, length, 2, dtype=torch.int64)
    valid = torch.zeros(batch, length, dtype=torch.bool)
    for index, (x, (h, w)) in enumerate(zip(images, grids, strict=True)):
        for slot in range(h * w):
            row, column = divmod(slot, w)
            top, left = row * patch, column * patch
            own = x[0, :, top : top + patch, left : left + patch]
            patches[index, slot] = own.permute(1, 2, 0).flatten()
            coordinates[index, slot] = torch.tensor((row, column))
            valid[index, slot] = True
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def num_merged(x, patch=4, window=2):
    """Merged tokens of an image."""
    return -(-(x.shape[2] // patch) // window) * -(-(x.shape[3] // patch) // window)
