# SPDX-License-Identifier: Apache-2.0
"""The arguments of every command.

Choices are written out here, as what they choose from is not imported before a command runs;
python_tests/test_cli_arguments.py compares them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from . import types

DEFAULT_MODEL = "vit_base_patch16_siglip_512"
DTYPES = ("float32", "bfloat16", "float16", "float64")
MODEL_DTYPES = ("float32", "bfloat16")
OPERATORS = (
    "window_attention",
    "pixel_unshuffle",
    "window_mean",
    "window_pool",
    "pixel_unshuffle_mlp",
    "tile_weight",
)
PAPERS = ("v4", "v3")
ATTENTIONS = ("window", "none", "cross_top_left", "cross_mean")
MLPS = ("reuse", "plain", "none")
FORMS = ("dense", "block", "tied")
POOLS = ("adaptive", "mean", "unshuffle")
NATIVE_TOKENS = 16384  # the budget of a view at native resolution
MOST_WORKERS = 4  # by default: each holds a model
FAILED = 3  # exit code of --strict
_SIZES = "448,980,1344,1920x1080"


def _model(parser: argparse.ArgumentParser) -> None:
    """Declare what says which model encodes, where, and which views."""
    add = parser.add_argument
    add(
        "--model",
        default=DEFAULT_MODEL,
        help="timm vision transformer, see docs/models.md (default: %(default)s)",
    )
    _compressor(parser)
    add("--pretrained", action="store_true", help="fetch trained weights (default: random ones)")
    add("--seed", type=types.seed, default=0, help="seed for random weights (default: %(default)s)")
    add(
        "--dtype",
        choices=MODEL_DTYPES,
        default="float32",
        help="type of weights and pixels (default: %(default)s)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes a GPU if there is one (default: %(default)s)",
    )
    views = parser.add_mutually_exclusive_group()
    views.add_argument(
        "--max-slices",
        type=types.positive_int,
        default=9,
        metavar="N",
        help="cut an image into at most N slices; 1 never slices (default: %(default)s)",
    )
    views.add_argument(
        "--native",
        nargs="?",
        type=types.native_tokens,
        const=NATIVE_TOKENS,
        metavar="TOKENS",
        help="instead of slices, one view at the image's own resolution, scaled down to at most "
        "TOKENS patches (default of TOKENS: %(const)s)",
    )


def _compressor(parser: argparse.ArgumentParser) -> None:
    """Declare what says where the compressor stands, and what it is."""
    add = parser.add_argument
    add(
        "--layer",
        type=types.non_negative_int,
        default=6,
        metavar="K",
        help="0-based block after which the compressor runs (default: %(default)s)",
    )
    add(
        "--form",
        choices=FORMS,
        default="dense",
        help="weight form of the compressor's MLP (default: %(default)s)",
    )


def _encode(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="image file")
    _model(parser)
    add("--compare", action="store_true", help="also run the model without the compressor")
    add(
        "--out",
        type=Path,
        default=Path("uhd-ops-output"),
        metavar="DIR",
        help="folder for the results, one subfolder per image (default: %(default)s)",
    )
    add("--threads", type=types.threads, help="CPU threads (default: as many as PyTorch chooses)")
    add("--json", action="store_true", help="print a JSON list with one summary per image")


def _encode_dataset(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="folder, glob, or text file with a path on each line")
    add("--out", required=True, metavar="OUT", help="folder for shards and index; runs resume")
    _model(parser)
    add(
        "--max-tokens",
        type=types.positive_int,
        default=32768,
        metavar="N",
        help="encode at most N tokens at a time, before compression (default: %(default)s)",
    )
    add(
        "--shard-mb",
        type=types.positive_int,
        default=64,
        metavar="MB",
        help="size of a shard in 10^6 bytes (default: %(default)s)",
    )
    add(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what starts the workers (default: %(default)s)",
    )
    add(
        "--workers",
        type=types.threads,
        metavar="N",
        help=f"models side by side (default: 1 on a GPU, else one a core up to {MOST_WORKERS})",
    )
    add(
        "--threads",
        type=types.threads,
        default=1,
        help="CPU threads of each worker; other numbers give other last bits (default: 1)",
    )
    add("--strict", action="store_true", help=f"exit with {FAILED} if an image cannot be encoded")
    add("--json", action="store_true", help="print the counts as JSON")


def _flops(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="timm vision transformer; its weights are neither fetched nor made",
    )
    add(
        "--paper",
        nargs="?",
        const="v4",
        choices=PAPERS,
        help="recompute tables 4, 5 and A3 of LLaVA-UHD v4 instead, or with v3 what the finer "
        "patches and merges of LLaVA-UHD v3 cost (default: v4)",
    )
    add(
        "--layer",
        type=types.non_negative_int,
        metavar="K",
        help="0-based block after which the compressor runs (default: 6)",
    )
    add("--attention", choices=ATTENTIONS, help="attention before merging (default: window)")
    add("--mlp", choices=MLPS, help="MLP of the compressor (default: reuse)")
    add("--form", choices=FORMS, help="form of the MLP's weights (default: dense)")
    add("--window", type=types.positive_int, metavar="F", help="side of a window (default: 2)")
    add(
        "--progressive",
        type=types.indices,
        metavar="K,K",
        help="merge after these 0-based blocks, such as 3,17, instead of the early compressor",
    )
    add("--pool", choices=POOLS, help="pooling, with --progressive (default: adaptive)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--grid", type=types.sides, metavar="HxW", help="patch grid of the view")
    size.add_argument(
        "--image",
        type=types.sides,
        metavar="WxH",
        help="size of the view in px (default: the size that the model was made for)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the result to a PNG file")
    add("--json", action="store_true", help="print JSON")


def _profile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="timm vision transformer, see docs/models.md")
    add(
        "--sizes",
        type=types.sizes,
        default=types.sizes(_SIZES),
        metavar="SIZE,...",
        help="sizes of images in px: a side, WxH, or squares from FIRST:LAST:STEP, such as "
        f"224:2240:112 (default: {_SIZES})",
    )
    summaries = "; ".join(f"{name}: {summary}" for name, summary in types.VARIANTS.items())
    add(
        "--variants",
        type=types.variants,
        default=list(types.VARIANTS),
        metavar="NAME,...",
        help=f"ways to encode an image (default: all). {summaries}",
    )
    _compressor(parser)
    add(
        "--max-slices",
        type=types.positive_int,
        default=9,
        metavar="N",
        help="cut an image into at most N slices (default: %(default)s)",
    )
    add(
        "--scale-resolution",
        type=types.positive_int,
        metavar="PX",
        help="a slice has about as many pixels as a square of this side (default: the size that "
        "the model was made for)",
    )
    add(
        "--progressive",
        type=types.indices,
        metavar="K,K",
        help="0-based blocks after which the variant progressive merges tokens (default: as deep "
        "as blocks 4 and 18 of 27)",
    )
    add(
        "--max-tokens",
        type=types.positive_int,
        default=NATIVE_TOKENS,
        metavar="N",
        help="largest number of patches in a native view (default: %(default)s)",
    )
    add(
        "--llm",
        metavar="CONFIG",
        help="also count the prefill of a language model of transformers: a config.json, or a "
        "model type, such as qwen3, for its default config; its weights are random",
    )
    add(
        "--out-dim",
        type=types.positive_int,
        metavar="D",
        help="width of the language model where there is no --llm (default: 4096)",
    )
    add(
        "--prompt",
        type=types.non_negative_int,
        metavar="N",
        help="tokens of text in addition to the visual ones, with --llm (default: 32)",
    )
    add(
        "--run",
        action="store_true",
        dest="measure",  # the parser's "run" is what runs a command
        help="also run everything, with random weights, and time it",
    )
    add(
        "--dtype",
        choices=MODEL_DTYPES,
        help="type of weights and pixels for --run (default: float32)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), help="device for --run (default: auto)")
    add("--rounds", type=types.positive_int, help="timed passes for --run (default: 3)")
    add("--threads", type=types.threads, help="CPU threads for --run (default: PyTorch's choice)")
    add("--plot", type=Path, metavar="FILE", help="draw cost over resolution to a PNG file")
    add("--json", action="store_true", help="print JSON")


def _info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--op",
        nargs="+",
        choices=OPERATORS,
        default=OPERATORS,
        metavar="NAME",
        help=f"operators to time: {', '.join(OPERATORS)} (default: all)",
    )
    add(
        "--views",
        type=types.grids,
        default=[(32, 32)],
        metavar="HxW,HxW",
        help="patch grids of the views, packed one after another (default: 32x32, one view of "
        "448x448 px)",
    )
    add(
        "--window",
        type=types.positive_int,
        default=2,
        metavar="F",
        help="side of a window in tokens; it must divide the sides of every view, because "
        "the plain PyTorch versions take whole windows only (default: %(default)s)",
    )
    add(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        default=["float32"],
        help="types of the tensors, one or several (default: float32)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes a GPU if there is one (default: %(default)s)",
    )
    add(
        "--dim",
        type=types.positive_int,
        default=1152,
        help="width of a token (default: %(default)s)",
    )
    add(
        "--heads",
        type=types.positive_int,
        default=16,
        help="attention heads (default: %(default)s)",
    )
    add(
        "--mlp-hidden",
        type=types.positive_int,
        default=4304,
        metavar="I",
        help="hidden width of the host's MLP (default: %(default)s)",
    )
    add(
        "--rounds",
        type=types.positive_int,
        default=10,
        help="timed calls each (default: %(default)s)",
    )
    add("--threads", type=types.threads, help="CPU threads (default: as many as PyTorch chooses)")
    add("--plot", type=Path, metavar="FILE", help="draw the result to a PNG file")
    add("--json", action="store_true", help="print JSON")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "encode": ("encode images with the early compressor, and report what it does", _encode),
    "encode-dataset": ("encode a corpus of images into shards, once", _encode_dataset),
    "flops": ("count the operations of a model with and without compression", _flops),
    "profile": (
        "compare what whole images cost, from pixels to the first token of a language model",
        _profile,
    ),
    "info": ("show versions, native libraries and the backend of every operator", _info),
    "bench": ("time the operators against plain PyTorch", _bench),
}
"""By name, what a command does, and what declares its arguments."""
