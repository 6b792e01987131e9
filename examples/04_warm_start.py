# SPDX-License-Identifier: Apache-2.0
"""What reusing weights is worth: accuracy at the moment of insertion, and how fast it recovers.

A small vision transformer learns scikit-learn's handwritten digits. Then each variant of the
paper's ablation is inserted at its middle layer, once initialised from the block (reused) and once
as torch initialises layers (random), and the model is fine-tuned in two stages. docs/warm_start.md
has the results and says what they show.

Run: python examples/04_warm_start.py [--seeds 5] [--epochs 8] [--out DIR] [--quick]
"""

import argparse
import contextlib
import copy
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

import uhd_ops
from uhd_ops.nn import ABLATION, PixelUnshuffleConnector

try:
    import experiments
    from sklearn.datasets import load_digits
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    raise SystemExit(
        f"{error}; this example needs timm, scikit-learn and matplotlib: "
        "pip install 'uhd_ops[examples]'"
    ) from None

DIM, DEPTH, HEADS, LAYER = 32, 4, 2, 1  # the compressor stands between blocks 1 and 2 of 0..3
GRID = (8, 8)
BATCH, CLASSES = 40, 10
PEAK_LR = {"pretraining": 3e-3, "stage 1": 1e-3, "stage 2": 1e-3}
OURS = "window attention + reused MLP"


class Settings(NamedTuple):
    """How long, and on how much; everything else is a constant above."""

    epochs: int  # of fine-tuning, half of them for each stage
    pretraining_epochs: int = 40
    train_images: int = 1200
    test_images: int = 597


class Arm(NamedTuple):
    """One way to get from the trained model to fewer tokens."""

    name: str
    start: str  # "reused", "random", or "" where there is nothing to choose
    options: dict | None  # of insert_early_compressor; None inserts nothing


ARMS = [Arm("untouched", "", None), Arm("post-ViT", "", None)]
for name, options in ABLATION.items():
    starts = ("",) if name == "average pool" else experiments.STARTS
    ARMS += [Arm(name, start, options) for start in starts]
tied = {**ABLATION[OURS], "form": "tied"}
ARMS += [Arm(f"{OURS}, tied", start, tied) for start in experiments.STARTS]


class Classifier(nn.Module):
    """A vision transformer, the connector behind it, and a linear layer on the mean token."""

    def __init__(self, depth=DEPTH):
        super().__init__()
        self.vit = VisionTransformer(
            img_size=4 * GRID[0],
            patch_size=4,
            in_chans=1,
            embed_dim=DIM,
            depth=depth,
            num_heads=HEADS,
            class_token=False,
            global_pool="",
            num_classes=0,
        )
        self.connector = PixelUnshuffleConnector(DIM, DIM)  # 2 x 2 tokens to one
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images):
        tokens = self.vit.forward_features(images)
        side = GRID[0] // 2 if is_compressed(self.vit) else GRID[0]
        return self.head(self.connector(tokens, (side, side)).mean(1))


def is_compressed(vit):
    return hasattr(vit, "compression")


def load(settings):
    """Return train images, labels, test images and labels; the same ones for every seed."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 to -1..1
    images = functional.interpolate(images, scale_factor=4, mode="bilinear")
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train = order[: settings.train_images]
    test = order[settings.train_images :][: settings.test_images]
    return images[train], labels[train], images[test], labels[test]


def augment(images):
    """Rotate by up to 0.15 rad, scale by up to 10 %, shift by up to 1.6 px."""
    angle, scale, *shift = (2 * torch.rand(4, len(images)) - 1) * torch.tensor(
        [[0.15], [0.1], [0.1], [0.1]]
    )
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    matrix = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = functional.affine_grid(matrix, images.shape, align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def count_correct(model, images, labels):
    model.eval()
    return int((model(images).argmax(1) == labels).sum())


@torch.no_grad()
def count_readable(model, data):
    """Correct test images of a linear readout of the mean token, fitted by least squares.

    It judges the transformer without the connector and the linear layer, which were trained on four
    times as many tokens.
    """
    model.eval()
    images, labels, test_images, test_labels = data

    def features(batch):
        mean = model.vit.forward_features(batch).mean(1).double()
        return functional.pad(mean, (0, 1), value=1.0)

    targets = functional.one_hot(labels, CLASSES).double()
    weights = torch.linalg.lstsq(features(images), targets).solution
    return int(((features(test_images) @ weights).argmax(1) == test_labels).sum())


def train(model, data, epochs, peak_lr, measure=lambda step: None):
    """Train the parameters that require a gradient; call ``measure`` after each step."""
    images, labels, *_ = data
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05)
    per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak_lr, total_steps=epochs * per_epoch, pct_start=0.1
    )
    for epoch in range(epochs):
        order = torch.randperm(len(images))[: per_epoch * BATCH]
        for index, batch in enumerate(order.split(BATCH)):
            model.train()
            loss = functional.cross_entropy(model(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            measure(epoch * per_epoch + index + 1)


def measured_steps(settings):
    """Every epoch, and more often in the first."""
    per_epoch = settings.train_images // BATCH
    early = range(0, per_epoch, max(1, per_epoch // 3))
    return sorted({*early, *range(0, settings.epochs * per_epoch + 1, per_epoch)})


def compress(trained, arm):
    """Return a copy of the trained model with fewer tokens, as ``arm`` says."""
    model = copy.deepcopy(trained)
    if arm.name == "post-ViT":  # a second merge, random, in front of the trained one
        model.connector = PixelUnshuffleConnector(DIM, DIM, merger_times=2)
        model.connector.stages[1] = copy.deepcopy(trained.connector.stages[0])
    elif arm.options is not None:
        uhd_ops.insert_early_compressor(model.vit, LAYER, **arm.options)
        if arm.start == "random":
            experiments.reinitialise(model.vit.blocks[LAYER].compressor)
    return model


def fine_tune(model, data, settings):
    """Return the number of correct test images at each of ``measured_steps``.

    Stage 1 trains what was inserted, the connector and the linear layer; stage 2 everything.
    """
    *_, images, labels = data
    steps, correct = measured_steps(settings), [count_correct(model, images, labels)]
    lengths = {1: settings.epochs // 2, 2: settings.epochs - settings.epochs // 2}
    before = 0
    for stage, epochs in lengths.items():
        if is_compressed(model.vit):
            uhd_ops.freeze_for_stage(model.vit, stage)
        else:
            model.vit.requires_grad_(stage == 2)

        def measure(step, before=before):
            if before + step in steps:
                correct.append(count_correct(model, images, labels))

        train(model, data, epochs, PEAK_LR[f"stage {stage}"], measure)
        before += epochs * (settings.train_images // BATCH)
    return correct


def run_seed(seed, settings):
    """Train one model, and fine-tune every arm of it on the same batches."""
    torch.set_num_threads(1)
    start = time.process_time()
    data = load(settings)
    torch.manual_seed(seed)
    trained = Classifier()
    train(trained, data, settings.pretraining_epochs, PEAK_LR["pretraining"])
    rows = []
    for arm in ARMS:
        torch.manual_seed(1000 + seed)  # what is initialised at random
        model = compress(trained, arm)
        row = {"arm": arm.name, "start": arm.start, "seed": seed}
        row["readable"] = count_readable(model, data)
        torch.manual_seed(2000 + seed)  # batches and augmentation
        row["correct"] = fine_tune(model, data, settings)
        rows.append(row)
    return rows, time.process_time() - start


def run(seeds, settings):
    """Run the seeds, in two processes of one thread each, and return the record of it all."""
    began, rows, cpu_seconds = time.perf_counter(), [], 0.0
    with contextlib.ExitStack() as stack:
        in_order = map
        if seeds > 1:
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(max_workers=2, mp_context=context)
            in_order = stack.enter_context(pool).map
        for done, seconds in in_order(run_seed, range(seeds), [settings] * seeds):
            rows += done
            cpu_seconds += seconds
            print(f"seed {done[0]['seed']}: {seconds:.0f} CPU seconds", flush=True)
    return {
        "environment": experiments.environment("timm", "scikit-learn", processes=2),
        "settings": {
            **settings._asdict(),
            "model": {"dim": DIM, "depth": DEPTH, "heads": HEADS, "layer": LAYER, "grid": GRID},
            "batch": BATCH,
            "peak_lr": PEAK_LR,
        },
        "seeds": list(range(seeds)),
        "cpu_seconds": round(cpu_seconds),
        "wall_seconds": round(time.perf_counter() - began),
        "steps": measured_steps(settings),
        "stage_2_from_step": settings.epochs // 2 * (settings.train_images // BATCH),
        "rows": rows,
    }


def command_line(doc, name, run, seeds, usual, quick, tables, plot=None):
    """Run an experiment on the digits as the command line says, write its record, show its tables.

    Args:
        doc: The docstring of the script.
        name: That of the files, in front of the date.
        run: Takes the number of seeds and the settings, and returns the record.
        seeds: How many there are without ``--seeds``.
        usual: Settings; ``--epochs`` replaces theirs.
        quick: Settings of ``--quick``, with the smallest number of epochs that there may be.
        tables: Makes Markdown of a record.
        plot: Draws a record into a file; None draws none.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=seeds, help="how many; 0, 1, 2, ...")
    parser.add_argument("--epochs", type=int, default=usual.epochs, help="of fine-tuning, in all")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="for all files")
    parser.add_argument("--quick", action="store_true", help="a rehearsal; its numbers say nothing")
    arguments = parser.parse_args()
    for option, least in (("seeds", 1), ("epochs", quick.epochs)):
        if getattr(arguments, option) < least:
            parser.error(f"--{option} must be at least {least}, got {getattr(arguments, option)}")
    settings = quick if arguments.quick else usual._replace(epochs=arguments.epochs)
    record = run(arguments.seeds, settings)
    paths = experiments.write(record, arguments.out, name, plot)
    print(tables(record), *paths, sep="\n")


def main():
    command_line(
        __doc__,
        "warm_start",
        run,
        seeds=5,
        usual=Settings(8),
        quick=Settings(2, pretraining_epochs=1, train_images=120, test_images=50),
        tables=experiments.tables,
        plot=experiments.plot,
    )


if __name__ == "__main__":
    main()
