# SPDX-License-Identifier: Apache-2.0
"""``load_image``: every kind of image a user may hold, turned into 8-bit RGB.

The conversions follow MiniCPM-V 4.6's image processor (transformers'
``MiniCPMV4_6ImageProcessorPil``) where it is well defined: transparency is laid on white, palettes,
gray and CMYK go through Pillow. Where it clips or wraps around (16-bit and float data) the full
range is scaled instead.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

    ImageSource = (
        Image.Image | str | os.PathLike[str] | bytes | BinaryIO | np.ndarray | torch.Tensor
    )

_ACCEPTED = (
    "a PIL image, a path, bytes, a binary file, a NumPy array (H, W), (H, W, 1 | 3 | 4) or a torch "
    "tensor (H, W), (1 | 3 | 4, H, W)"
)

# What Pillow's decoders raise on damaged data, found by feeding it to all of them. A MemoryError is
# not among them: it says nothing about the data.
_DECODER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def load_image(source: ImageSource) -> Image.Image:
    """Turn an image of any kind into a fully decoded 8-bit RGB Pillow image.

    * Files (a path, bytes, a binary file) are turned upright by their EXIF orientation. A Pillow
      image is taken as it lies, since its owner may have turned it already. Of an animation the
      first frame counts.
    * Transparency (alpha, a transparent palette entry or colour) is laid on white.
    * 16-bit values are scaled from 0..65535 to 0..255, floats from 0..1, both rounded to nearest.
    * A tensor on a device is copied to the host; gradients do not flow through.

    Args:
        source: The image. Arrays and tensors must be uint8, uint16 or floating point in [0, 1];
            their four channels are RGB and alpha.

    Returns:
        The image in mode "RGB". It may be ``source`` itself, if that is what it is.

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If a path cannot be opened, for example because it does not exist.
        TypeError: If ``source`` is of no accepted type or dtype.
        ValueError: If the data is truncated, broken, no image, larger than Pillow's limit on
            pixels, of an unsupported mode or shape, or if floats are outside [0, 1].

    Example:
        >>> load_image(np.zeros((480, 640), dtype=np.uint8)).size
        (640, 480)
    """
    image_module = require_pillow()
    if isinstance(source, image_module.Image):
        return _to_rgb(source, "the image")
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return _read(file, f"image {os.fspath(source)!r}")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(BytesIO(source), "the image in the bytes")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        source = _tensor_to_array(source)
    if isinstance(source, np.ndarray):
        return _to_rgb(image_module.fromarray(_to_8_bit(source)), "the image")
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _read(source, "the image in the file")
    raise TypeError(f"image must be {_ACCEPTED}, got {type(source).__name__}")


def require_pillow() -> Any:
    """Return the module ``PIL.Image``, or raise an ImportError that names the extra."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow: pip install 'uhd_ops[image]'") from error
    return Image


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Turn what Pillow raises on data it cannot or will not decode into one ValueError."""
    image_module = require_pillow()
    bombs = (image_module.DecompressionBombError, image_module.DecompressionBombWarning)
    try:
        yield
    except bombs as error:
        raise ValueError(
            f"{name} has too many pixels ({error}); "
            "if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from error
    except image_module.UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read: it is in no format that Pillow knows") from error
    except _DECODER_ERRORS as error:
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error


def _read(file: BinaryIO, name: str) -> Image.Image:
    from PIL import ImageOps

    with readable_errors(name):
        image = require_pillow().open(file)
        image.load()
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    with readable_errors(name):
        image.load()  # a Pillow image that the caller opened may not be decoded yet
    if 0 in image.size:
        raise ValueError(f"{name} must have at least one pixel, got {image.width}x{image.height}")
    if image.mode == "LAB":
        raise ValueError(f"{name} has mode LAB, which Pillow converts only with a colour profile")
    if image.mode == "F" or image.mode.startswith("I"):
        return _high_range_to_rgb(image)
    if image.has_transparency_data:
        if image.mode == "La":  # Pillow knows no direct way from premultiplied gray
            image = image.convert("LA")
        image = image.convert("RGBA")
        white = require_pillow().new("RGBA", image.size, "white")
        return require_pillow().alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _high_range_to_rgb(image: Image.Image) -> Image.Image:
    """Convert modes "I;16*" and "I" (16-bit values) and "F" (0..1) to RGB."""
    array = np.asarray(image)
    if array.dtype == np.int32:
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                "an image of mode I must have values in [0, 65535], "
                f"got [{array.min()}, {array.max()}]"
            )
        array = array.astype(np.uint16)
    gray = _to_8_bit(array)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a 16-bit PNG may name one transparent gray value
        gray = np.where(array == transparent, np.uint8(255), gray)
    return require_pillow().fromarray(gray).convert("RGB")


def _tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    import torch

    shape = tuple(tensor.shape)
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3, 4)):
        raise ValueError(f"image tensor must be (H, W) or (1 | 3 | 4, H, W), got shape {shape}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise TypeError(
            f"image tensor must be dense and hold data, got {tensor.layout} on {tensor.device}"
        )
    tensor = tensor.detach().cpu().resolve_neg()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()  # NumPy has neither bfloat16 nor the 8-bit types
    array = tensor.numpy()
    return array if array.ndim == 2 else np.moveaxis(array, 0, -1)


def _to_8_bit(array: np.ndarray) -> np.ndarray:
    """Return (H, W) or (H, W, 3 | 4) uint8 values of an array of any accepted shape and dtype."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"image array must be (H, W) or (H, W, 1 | 3 | 4), got shape {array.shape}"
        )
    if array.size == 0:
        raise ValueError(f"image array must have at least one pixel, got shape {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        # Nearest integer to value * 255 / 65535 = value / 257; 257 is odd, so there are no ties.
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise ValueError(f"a floating-point image must be in [0, 1], got [{low}, {high}]")
        return np.rint(array.astype(np.promote_types(array.dtype, np.float32)) * 255).astype(
            np.uint8
        )
    raise TypeError(
        f"image must be uint8, uint16 or floating point in [0, 1], got dtype {array.dtype}"
    )
