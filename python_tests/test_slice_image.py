# SPDX-License-Identifier: Apache-2.0
"""Loading images of every kind and refusing broken ones; views and patches as models take them."""

import io
import sys
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.models.minicpmv4_6.image_processing_minicpmv4_6 import MiniCPMV4_6ImageProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import (
    MiniCPMV4_6ImageProcessorPil,
)

from uhd_ops.grids import PackedGrids
from uhd_ops.slicing import load_image, pack_views, plan_slices, slice_image

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
RGBA = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)


def encoded(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def transparent_palette(transparency):
    image = Image.fromarray(RGB).quantize(16)
    image.info["transparency"] = transparency
    return image


def transparent_colour():
    image = Image.fromarray(RGB)
    image.info["transparency"] = tuple(RGB[3, 4].tolist())
    return image


IMAGES = {
    **{mode: Image.fromarray(RGB).convert(mode) for mode in ("1", "L", "P", "RGB", "RGBX", "CMYK")},
    **{mode: Image.fromarray(RGB).convert(mode) for mode in ("YCbCr", "HSV")},
    **{mode: Image.fromarray(RGBA).convert(mode) for mode in ("RGBA", "LA", "PA")},
    "P, one transparent entry": transparent_palette(3),
    "P, entries with alpha": transparent_palette(bytes(range(0, 256, 16))),
    "RGB, one transparent colour": transparent_colour(),
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_modes_convert_as_in_the_processor(image):
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), convert_to_rgb(image, return_numpy=True))


def test_transparency_is_laid_on_white():
    pixels = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[[255, 255, 255], [200, 100, 0], [204, 204, 204]]]
    for image in (Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        np.testing.assert_array_equal(np.asarray(load_image(image)), expected)
    premultiplied = Image.fromarray(pixels).convert("RGBa")
    np.testing.assert_array_equal(np.asarray(load_image(premultiplied)), expected)
    gray = Image.fromarray(pixels[:, :, [0, 3]]).convert("La")
    assert np.asarray(load_image(gray))[0, :, 1].tolist() == [255, 200, 204]


HIGH = np.array([[0, 128, 129, 257, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
HIGH_IN_8_BIT = np.array([[0, 0, 1, 1, 127, 128, 254, 255, 255]], dtype=np.uint8)


HIGH_RANGE_IMAGES = {
    "I;16": Image.fromarray(HIGH),
    "I;16B": Image.frombytes("I;16B", (9, 1), HIGH.astype(">u2").tobytes()),
    "I": Image.fromarray(HIGH.astype(np.int32)),
    "F": Image.fromarray(HIGH.astype(np.float32) / 65535),
    "PNG": encoded(Image.fromarray(HIGH), "PNG"),
    "TIFF": encoded(Image.fromarray(HIGH), "TIFF"),
    "uint16 array": HIGH,
    "big-endian array": HIGH.astype(">u2"),
    "(H, W, 1) array": HIGH[:, :, None],
    "float64 array": HIGH.astype(np.float64) / 65535,
    "uint16 tensor": torch.from_numpy(HIGH),
    "(1, H, W) tensor": torch.from_numpy(HIGH.astype(np.float32) / 65535)[None],
}


@pytest.mark.parametrize("image", HIGH_RANGE_IMAGES.values(), ids=HIGH_RANGE_IMAGES.keys())
def test_16_bit_and_float_keep_their_full_range(image):
    expected = np.repeat(HIGH_IN_8_BIT[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(load_image(image)), expected)


def test_16_bit_png_with_a_transparent_value():
    data = encoded(Image.fromarray(HIGH), "PNG", transparency=257)
    assert np.asarray(load_image(data))[0, :, 0].tolist() == [0, 0, 1, 255, 127, 128, 254, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_width_round_to_nearest(dtype):
    # bfloat16, the coarsest, is within 2⁻⁹ * 255 = 0.498 levels of the value, so nearest finds it.
    values = torch.arange(256).div(255).to(dtype).repeat(3, 2, 1).requires_grad_()
    loaded = np.asarray(load_image(values))
    np.testing.assert_array_equal(loaded, np.arange(256)[None, :, None] + np.zeros((2, 1, 3)))


@pytest.mark.parametrize(
    "source",
    [
        RGB,
        RGB[::-1][::-1],
        np.asfortranarray(RGB),
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch._neg_view(torch.from_numpy(RGB / -255).permute(2, 0, 1)),
        RGB.astype(np.float32) / 255,
        Image.fromarray(RGB),
        encoded(Image.fromarray(RGB), "PNG"),
        bytearray(encoded(Image.fromarray(RGB), "BMP")),
        memoryview(encoded(Image.fromarray(RGB), "TIFF")),
    ],
    ids=[
        "array",
        "flipped",
        "Fortran",
        "tensor",
        "negative view",
        "float",
        "PIL",
        "bytes",
        "bytearray",
        "memoryview",
    ],
)
def test_sources(source):
    np.testing.assert_array_equal(np.asarray(load_image(source)), RGB)


def test_files(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(Image.fromarray(RGB), "PNG"))
    with path.open("rb") as file:
        for source in (path, str(path), file):
            np.testing.assert_array_equal(np.asarray(load_image(source)), RGB)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "missing.png")
    path.write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"^image '.*image\.png' cannot be read: it is in no format"
    ):
        load_image(path)


ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(data)), ORIENTATIONS[orientation](RGB))
    # An image that the caller has opened stays as it lies.
    with Image.open(io.BytesIO(data)) as opened:
        np.testing.assert_array_equal(np.asarray(load_image(opened)), RGB)


def test_turned_file_meets_a_plan_of_the_other_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(RGB), "JPEG", exif=exif)
    with pytest.raises(
        ValueError, match=r"30x20 px .* got 20x30 px; the sides are swapped, .* EXIF"
    ):
        slice_image(data, plan_slices(30, 20))
    assert len(slice_image(data, plan_slices(*load_image(data).size))) == 1


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(load_image(data)), RGB)


FORMATS = ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM"]
FILES = {name: encoded(Image.fromarray(RGB), name) for name in FORMATS}


@pytest.mark.parametrize("image_format", FORMATS)
def test_truncated_files(image_format):
    data = FILES[image_format]
    with pytest.raises(ValueError, match=r"^the image in the bytes cannot be read: ."):
        load_image(data[: len(data) // 2])


def test_truncated_image_that_the_caller_opened():
    with (
        Image.open(io.BytesIO(FILES["PNG"][:-100])) as opened,
        pytest.raises(ValueError, match=r"^the image cannot be read: .*truncated"),
    ):
        load_image(opened)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), image_format=st.sampled_from(FORMATS))
def test_damaged_files_raise_nothing_but_value_error(data, image_format):
    file = bytearray(FILES[image_format])
    for _ in range(data.draw(st.integers(1, 4))):
        # Damage in the first 200 bytes meets the headers.
        position = data.draw(
            st.integers(0, len(file) - 1) | st.integers(0, min(len(file), 200) - 1)
        )
        file[position] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = load_image(bytes(file))
        except ValueError:
            return
    assert image.mode == "RGB"


def test_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    message = (
        r"^the image in the bytes has too many pixels \(.*600.*\); .*PIL\.Image\.MAX_IMAGE_PIXELS$"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            load_image(FILES["PNG"])
    with pytest.warns(Image.DecompressionBombWarning):
        load_image(FILES["PNG"])  # up to twice the limit Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(ValueError, match=message):
        load_image(FILES["PNG"])


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (b"", ValueError, "the image in the bytes cannot be read: it is in no format"),
        (
            io.BytesIO(b"text"),
            ValueError,
            "the image in the file cannot be read: it is in no format",
        ),
        (None, TypeError, "image must be a PIL image, .*, got NoneType"),
        (RGB.tolist(), TypeError, "image must be a PIL image, .*, got list"),
        (
            RGB.transpose(2, 0, 1),
            ValueError,
            r"array must be \(H, W\) or .* got shape \(3, 20, 30\)",
        ),
        (RGB[:, :, :2], ValueError, r"array must be .* got shape \(20, 30, 2\)"),
        (RGB[None], ValueError, r"array must be .* got shape \(1, 20, 30, 3\)"),
        (RGB[:0], ValueError, r"array must have at least one pixel, got shape \(0, 30, 3\)"),
        (RGB.astype(np.int64), TypeError, "must be uint8, uint16 or .* got dtype int64"),
        (RGB > 9, TypeError, "must be uint8, uint16 or .* got dtype bool"),
        (RGB * 1.0, ValueError, r"floating-point image must be in \[0, 1\], got \[0.0, 255.0\]"),
        (RGB[:, :, 0] * np.nan, ValueError, r"must be in \[0, 1\], got \[nan, nan\]"),
        (RGB - np.inf, ValueError, r"must be in \[0, 1\]"),
        (torch.zeros(20, 30, 3), ValueError, r"tensor must be .* got shape \(20, 30, 3\)"),
        (torch.zeros(()), ValueError, r"tensor must be .* got shape \(\)"),
        (torch.zeros(3, 0, 5), ValueError, r"at least one pixel, got shape \(0, 5, 3\)"),
        (torch.zeros(3, 4, 5, device="meta"), TypeError, "dense and hold data, .* on meta"),
        (torch.zeros(4, 5).to_sparse(), TypeError, "dense and hold data, got torch.sparse_coo"),
        (torch.zeros(4, 5, dtype=torch.int16), TypeError, "got dtype int16"),
        (Image.new("LAB", (2, 2)), ValueError, "mode LAB"),
        (Image.new("L", (0, 2)), ValueError, "must have at least one pixel, got 0x2"),
        (Image.new("I", (2, 2), -1), ValueError, r"values in \[0, 65535\], got \[-1, -1\]"),
        (Image.new("F", (2, 2), 2.0), ValueError, r"must be in \[0, 1\], got \[2.0, 2.0\]"),
    ],
)
def test_bad_sources(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source)


def test_missing_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'uhd_ops\[image\]'"):
        load_image(RGB)


def test_a_view_that_pillow_calls_a_bomb_is_a_value_error(monkeypatch):
    image = Image.new("RGB", (64, 48))
    plan = plan_slices(64, 48, scale_resolution=16, patch_size=8, merge=1)
    width, height = plan.slice
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height)  # up to twice it only warns
    assert len(slice_image(image, plan)) == plan.num_views
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", width * height // 2 - 1)
    with pytest.raises(ValueError, match="a view of the plan has too many pixels"):
        slice_image(image, plan)


# ---- views and packed patches: equal to the image processor's, and right for an embedding --------

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
