# SPDX-License-Identifier: Apache-2.0
"""Pages of text, rendered on the fly: what 05_train_mllm.py learns to read.

A page is larger than one view and holds a few made-up words of wide-spaced capitals. Its seed says
which words, in which font of the system, at which size and place. Words run over two slices.
Letters are larger than patches, and soft, so that neighbouring patches are alike, as on a scan with
more pixels than its print needs. What the model takes of a page are the packed patches of its
views, and a prompt with a place for each visual token.
"""

import functools
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import uhd_ops

PAGE = (128, 64)  # width and height in px
WORDS, LETTERS = 2, 2  # one word in each line
ALPHABET = "AEHKLMNO"
PATCH, VIEW = 8, 64  # side of a patch, and of a view of the usual shape, in px
MERGE = 4  # sides of views are multiples of so many patches
SIZES = range(30, 37)  # of a font, in px
JITTER = 2  # px that a line is moved by at most, to each side
SOFTNESS = 3  # px, the standard deviation of the Gaussian that blurs a page
FONTS = ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf"]
BUILT_IN = "Pillow's own"

NAMES = ["<end>", "<answer>", "<visual>", "<image>", "</image>", "<slice>", "</slice>", "\n", " "]
NUMBER = {name: number for number, name in enumerate([*NAMES, *ALPHABET])}
IGNORED = -100  # cross_entropy's label for what is not an answer


class Page(NamedTuple):
    """A rendered page, what it says, and where."""

    image: Image.Image
    text: str
    boxes: list[tuple[int, tuple[int, ...]]]  # of each letter: its number from 1 on, and its box


@functools.cache
def fonts():
    """Names of those of ``FONTS`` that the system has; without any, Pillow's own."""
    found = []
    for name in FONTS:
        try:
            ImageFont.truetype(name, SIZES[0])  # which knows where a system keeps its fonts
        except OSError:
            continue
        found.append(name)
    return found or [BUILT_IN]


@functools.cache
def font(name, size):
    if name == BUILT_IN:
        return ImageFont.load_default(size)
    return ImageFont.truetype(name, size)


def render(seed):
    """Return the page of a seed, which may be any string; the same one at every call."""
    draw = random.Random(seed)
    width, height = PAGE
    image = Image.new("RGB", PAGE, "white")
    canvas, words, boxes = ImageDraw.Draw(image), [], []
    for line in range(WORDS):
        word = "".join(draw.choice(ALPHABET) for _ in range(LETTERS))
        face = font(draw.choice(fonts()), draw.choice(SIZES))
        spread = draw.uniform(0.9, 1.0)
        left = width / 2 + draw.uniform(-JITTER, JITTER)
        middle = (line + 0.5) * height / WORDS + draw.uniform(-JITTER, JITTER)
        for index, letter in enumerate(word):
            x = left + spread * ((index + 0.5) / LETTERS - 0.5) * width
            canvas.text((x, middle), letter, fill="black", font=face, anchor="mm")
            box = canvas.textbbox((x, middle), letter, font=face, anchor="mm")
            boxes.append((1 + ALPHABET.index(letter), tuple(round(side) for side in box)))
        words.append(word)
    soft = image.filter(ImageFilter.GaussianBlur(SOFTNESS))
    return Page(soft, " ".join(words), boxes)


@functools.cache
def plan():
    """The views of every page: a thumbnail and two slices."""
    return uhd_ops.plan_slices(*PAGE, scale_resolution=VIEW, patch_size=PATCH, merge=MERGE)


def pack(pages):
    """Return the packed patches of all views of all pages, and their grids."""
    views = [view for page in pages for view in uhd_ops.slice_image(page.image, plan())]
    return uhd_ops.pack_views(views, PATCH)


def letters(page):
    """The number of the letter that covers the centre of each patch, 0 for none; in their order."""
    numbers = Image.new("L", PAGE, 0)
    canvas = ImageDraw.Draw(numbers)
    for number, box in page.boxes:
        canvas.rectangle(box, fill=number)
    views = [numbers.resize(plan().thumbnail, Image.Resampling.NEAREST)]
    whole = numbers.resize(plan().resized_size, Image.Resampling.NEAREST)
    views += [whole.crop(box) for box in plan().boxes]
    centres = np.s_[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    return np.concatenate([np.asarray(view)[centres].ravel() for view in views])


class Batch(NamedTuple):
    """Pages as the model takes them."""

    pixels: torch.Tensor  # (N, 3, PATCH, PATCH), the patches of all views
    grids: uhd_ops.PackedGrids
    ids: torch.Tensor  # (B, L), prompts and answers
    labels: torch.Tensor  # (B, L), the answers, and IGNORED in front of them
    letters: torch.Tensor  # (N,), those at the patches


def prompt(plan, side):
    """Return the names of the tokens in front of an answer: the schema of MiniCPM-V's processor.

    Args:
        plan: The views of the page.
        side: Side, in patches, of what becomes one token of the decoder.
    """

    def view(name, grid):
        visual = grid[0] // side * (grid[1] // side)
        return [f"<{name}>", *["<visual>"] * visual, f"</{name}>"]

    thumbnail, *slices = plan.grids
    tokens, (rows, columns) = view("image", thumbnail), plan.grid or (0, 0)
    for row in range(rows):
        for grid in slices[row * columns :][:columns]:
            tokens += view("slice", grid)
        tokens.append("\n")
    return [*tokens, "<answer>"]


def make_batch(seeds, side, device="cpu"):
    """Render, slice, pack and write down the pages of some seeds."""
    pages = [render(seed) for seed in seeds]
    pixels, grids = pack(pages)
    question = prompt(plan(), side)
    ids = [[NUMBER[name] for name in (*question, *page.text, "<end>")] for page in pages]
    ids = torch.tensor(ids)
    labels = ids.clone()
    labels[:, : len(question)] = IGNORED
    at_patches = torch.from_numpy(np.concatenate([letters(page) for page in pages])).long()
    tensors = [tensor.to(device) for tensor in (ids, labels, at_patches)]
    return Batch(pixels.to(device), grids, *tensors)
