# SPDX-License-Identifier: Apache-2.0
"""Encode a corpus: encode_dataset against loops over its images, in time and in memory.

    python benchmarks/bench_corpus.py                prints a table, writes results/
    python benchmarks/bench_corpus.py --images 8     smaller; writes nothing

Every way runs in a process of its own, in turns, with random weights and torch on one thread: "one
at a time" loads, slices, packs and encodes an image before it opens the next one; "loaded first"
opens all images and then does the same. Half of the images have 24 megapixels, half have 640 x 480
pixels. Time begins when the model is there, but those of two workers are only made then. Memory is
the peak of the largest process.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
from PIL import Image

import uhd_ops
from uhd_ops.corpus import CorpusModel
from uhd_ops.nn import SliceEncoder

MODEL, LAYER = "vit_small_patch16_384", 2
SIZES = ((6000, 4000), (640, 480))
WAYS = ("loaded first", "one at a time", "encode_dataset, 1 worker", "encode_dataset, 2 workers")


def make_model() -> CorpusModel:
    import timm

    torch.manual_seed(0)
    vit = timm.create_model(MODEL, num_classes=0).eval()
    config = vit.pretrained_cfg
    encoder = SliceEncoder(uhd_ops.insert_early_compressor(vit, LAYER)).requires_grad_(False)
    return CorpusModel(encoder, 16, 384, config["mean"], config["std"], {"name": MODEL})


def make_images(folder: Path, count: int) -> None:
    """Smooth noise: as large as a photograph of that size when it is compressed, or so."""
    generator = np.random.default_rng(0)
    for number in range(count):
        size = SIZES[number % len(SIZES)]
        small = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number:04}.jpg", quality=90
        )


def encode_alone(model: CorpusModel, image: Image.Image) -> torch.Tensor:
    plan = uhd_ops.plan_slices(*image.size, scale_resolution=384, patch_size=16)
    ((tokens, _),) = model.encode([uhd_ops.slice_image(image, plan)])
    return tokens


def run_way(way: str, folder: Path, out: str) -> dict[str, float]:
    """Encode the images of a folder, and say how long it took and what it needed."""
    torch.set_num_threads(1)
    model, paths = make_model(), sorted(folder.iterdir())
    model.bytes_per_token()  # what is prepared once
    start = time.perf_counter()
    if way == "loaded first":
        images = [uhd_ops.load_image(path) for path in paths]
        tokens = [encode_alone(model, image) for image in images]
    elif way == "one at a time":
        tokens = [encode_alone(model, uhd_ops.load_image(path)) for path in paths]
    else:
        workers = int(way.split()[1])
        uhd_ops.encode_dataset(folder, out, make_model, workers=workers, shard_mb=8)
        tokens = [image.tokens for image in uhd_ops.open_dataset(out).values()]
    seconds = time.perf_counter() - start
    assert len(tokens) == len(paths)
    peaks = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {
        "seconds": seconds,
        "peak_mb": max(peaks) * 1024 / 1e6,
        "tokens": sum(map(len, tokens)),
    }


def measure(count: int, rounds: int) -> list[dict[str, object]]:
    """Return a row for every way."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        images = Path(name, "images")
        images.mkdir()
        make_images(images, count)
        for number in range(rounds):
            for way in WAYS:
                out = str(Path(name, f"{way} {number}"))
                command = [sys.executable, __file__, "--way", way, str(images), out]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(done.stdout))
    alone = [run["seconds"] for run in found["one at a time"]]
    return [
        {
            "way": way,
            "images": count,
            "rounds": rounds,
            "images_per_second": count / statistics.median(run["seconds"] for run in runs),
            "ratio": statistics.median(
                other / run["seconds"] for other, run in zip(alone, runs, strict=True)
            ),
            "peak_mb": statistics.median(run["peak_mb"] for run in runs),
            "tokens": runs[0]["tokens"],
        }
        for way, runs in found.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="number of images (default: 32)")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        way, images, out = arguments.way
        print(json.dumps(run_way(way, Path(images), out)))
        return 0
    rows = measure(arguments.images or 32, arguments.rounds)
    print(f"{'':<28}{'images/s':>10}{'ratio':>8}{'peak MB':>10}")
    for row in rows:
        numbers = f"{row['images_per_second']:>10.2f}{row['ratio']:>8.2f}{row['peak_mb']:>10.0f}"
        print(f"{row['way']:<28}{numbers}")
    if arguments.images is None:
        harness.store("corpus", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
