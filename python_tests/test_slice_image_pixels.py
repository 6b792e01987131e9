# SPDX-License-Identifier: Apache-2.0
"""Views and packed patches: equal to the image processor's, and right for a patch embedding."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)

from uhd_ops.grids import PackedGrids
from uhd_ops.slicing import pack_views, plan_slices, slice_image

ROUNDING = 2.0**-24  # half of float32's spacing: the relative error of one rounding
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DOWNSAMPLE_MODE = {4: "16x", 2: "4x"}
SIZES = [(1, 1), (30, 50), (640, 480), (449, 449), (401, 1203), (1280, 720), (9, 700), (1200, 11)]


def random_image(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def processor_patches(features, patch_size):
    """Rearrange the processor's (1, 3, p, N * p) into (N, 3, p, p)."""
    pixels = torch.as_tensor(features["pixel_values"])
    return pixels.reshape(3, patch_size, -1, patch_size).permute(2, 0, 1, 3)


def ours(image, mean=0.5, std=0.5, **options):
    plan = plan_slices(*image.size, **options)
    return plan, *pack_views(slice_image(image, plan), plan.patch_size, mean=mean, std=std)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    ("max_slices", "scale_resolution", "patch_size", "merge"),
    [(9, 448, 14, 4), (9, 448, 14, 2), (4, 224, 16, 2), (1, 336, 14, 4)],
)
def test_pixels_equal_the_processor(size, max_slices, scale_resolution, patch_size, merge):
    image = random_image(*size)
    processor = MiniCPMV4_6ImageProcessorPil(
        max_slice_nums=max_slices,
        scale_resolution=scale_resolution,
        patch_size=patch_size,
        downsample_mode=DOWNSAMPLE_MODE[merge],
    )
    features = processor(image)
    plan, pixels, grids = ours(
        image,
        max_slices=max_slices,
        scale_resolution=scale_resolution,
        patch_size=patch_size,
        merge=merge,
    )
    assert grids == PackedGrids(plan.grids)
    assert [list(grid) for grid in grids] == np.asarray(features["target_sizes"]).tolist()
    assert list(plan.grid or (0, 0)) == list(features["grids"][0])
    assert features["num_patches_per_image"] == [plan.num_views]
    assert pixels.shape == (plan.num_tokens, 3, patch_size, patch_size)
    # The processor rounds x / 255 <= 1 and the difference <= 1/2, and divides by 1/2: 2 * 3/2
    # roundings; ours is one rounding of a value <= 1.
    error = (pixels - processor_patches(features, patch_size)).abs().max().item()
    assert error <= 4 * ROUNDING


def test_pixels_equal_the_processor_with_other_statistics():
    image = random_image(500, 700)
    processor = MiniCPMV4_6ImageProcessorPil(
        image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    )
    _, pixels, _ = ours(image, IMAGENET_MEAN, IMAGENET_STD)
    # Processor: x / 255 <= 1, mean <= 0.5 and difference <= 0.6 are rounded, then std and quotient
    # <= 2.7; ours rounds the quotient once. std >= 0.224.
    tolerance = ((1 + 0.5 + 0.6) / 0.224 + 3 * 2.7) * ROUNDING
    expected = processor_patches(processor(image), 14)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(640, 480), (449, 449), (300, 1100)])
def test_torchvision_processor_has_the_same_views(size):
    # Gray levels 64..191: the filter's overshoot stays inside 0..255, so nothing is clipped.
    image = random_image(*size).point(lambda value: 64 + value // 2)
    features = MiniCPMV4_6ImageProcessor()(image, return_tensors="pt")
    plan, pixels, grids = ours(image)
    assert [list(grid) for grid in grids] == features["target_sizes"].tolist()
    assert list(plan.grid) == list(features["grids"][0])
    # Both implementations of the filter round to 8 bits after each of two passes. The weights of
    # a pass sum to at most 1.25 in absolute value, so each is within 0.5 * 1.25 + 0.5 levels of
    # the exact result, and the two are at most two whole levels of 2 / 255 apart.
    error = (pixels - processor_patches(features, 14)).abs().max().item()
    assert error <= 2 * (2 / 255) + 4 * ROUNDING


def test_views_are_thumbnail_then_slices_row_by_row():
    # Four quadrants of one colour each; the slices of a 2x2 grid are the quadrants.
    colours = np.array([[10, 80], [160, 250]], dtype=np.uint8)
    image = np.kron(colours, np.ones((448, 448), dtype=np.uint8))
    plan = plan_slices(896, 896)
    views = slice_image(image, plan)
    assert (plan.grid, len(views)) == ((2, 2), plan.num_views)
    assert [view.size for view in views] == [plan.thumbnail] + [plan.slice] * 4
    assert all(view.mode == "RGB" for view in views)
    assert [np.asarray(view)[224, 224, 0] for view in views[1:]] == [10, 80, 160, 250]


def test_slice_image_refuses():
    plan = plan_slices(30, 20)
    with pytest.raises(TypeError, match="plan must be a SlicePlan, got dict"):
        slice_image(random_image(30, 20), plan.to_dict())
    with pytest.raises(ValueError, match=r"must be 30x20 px .* as the plan says, got 31x20 px$"):
        slice_image(random_image(31, 20), plan)


def test_packed_patches_are_what_a_patch_embedding_sees():
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 4, stride=4).double()
    view = random_image(24, 16)
    pixels, grids = pack_views([view], 4, dtype=torch.float64)
    image = torch.from_numpy(np.array(view)).permute(2, 0, 1).double() / 255 * 2 - 1
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
        expected = conv(image[None]).flatten(2)[0].T
        tokens = pixels.flatten(1) @ conv.weight.flatten(1).T + conv.bias
    assert list(grids) == [(4, 6)]
    # Two orders of a sum of 48 products of normal weights and values <= 1.
    torch.testing.assert_close(tokens, expected, rtol=0, atol=48 * 48 * 2.0**-53)


def test_views_of_many_images_follow_one_another():
    views = [random_image(28, 14, 1), random_image(14, 42, 2), random_image(14, 14, 3)]
    pixels, grids = pack_views(iter(views), 14)
    assert list(grids) == [(1, 2), (3, 1), (1, 1)]
    alone = torch.cat([pack_views([view], 14)[0] for view in views])
    assert torch.equal(pixels, alone)
    assert pixels.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_are_rounded_once(dtype):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels, _ = pack_views([values], 16, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=dtype)
    for channel in range(3):
        exact = (np.arange(256) / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        expected = torch.from_numpy(exact).to(dtype).reshape(16, 16)
        assert torch.equal(pixels[0, channel], expected)


def test_pixels_are_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        pixels, _ = pack_views([random_image(28, 28)], 14)
    assert pixels.device.type == "cpu"


def test_no_views():
    pixels, grids = pack_views([], 14)
    assert pixels.shape == (0, 3, 14, 14)
    assert len(grids) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"views": random_image(14, 14)},
            TypeError,
            "views must be a sequence of images, got Image",
        ),
        ({"views": "view.png"}, TypeError, "views must be a sequence of images, got str"),
        ({"views": [None]}, TypeError, "image must be a PIL image"),
        (
            {"views": [random_image(14, 14), random_image(28, 15)]},
            ValueError,
            r"views\[1\] .* 28x15",
        ),
        ({"patch_size": 0}, ValueError, r"patch_size must be an integer in \[1, 65536\], got 0"),
        ({"patch_size": 14.0}, TypeError, "patch_size must be an int, got float"),
        ({"mean": float("nan")}, ValueError, "mean must be one or three finite numbers, got nan"),
        ({"mean": [0.5, 0.5]}, ValueError, r"mean must be one or three finite numbers, got \[0.5"),
        ({"mean": "half"}, TypeError, "mean must be a number or three numbers, got 'half'"),
        ({"mean": "123"}, TypeError, "mean must be a number or three numbers, got '123'"),
        ({"mean": None}, TypeError, "mean must be a number or three numbers, got None"),
        ({"std": 0}, ValueError, "std must be above zero, got 0"),
        ({"std": [1, 1, -1]}, ValueError, r"std must be above zero, got \[1, 1, -1\]"),
        ({"std": float("inf")}, ValueError, "std must be one or three finite numbers, got inf"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be a floating-point .* got torch.uint8"),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating-point .* got 'float32'"),
    ],
)
def test_pack_views_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_views(**{"views": [random_image(14, 14)], "patch_size": 14, **arguments})
