# SPDX-License-Identifier: Apache-2.0
"""Where in a transformer tokens can be merged: what a merge breaks, and whether training mends it.

LLaVA-UHD v3 merges tokens at several depths of a trained transformer, by pooling. Here one 2 x 2
merge stands after 1, 4, 10, 18 or 27 of 27 blocks, scaled to a transformer of 12, with each of the
three poolings. Model, data and training are those of 04_warm_start.py; docs/stability.md has the
results and says what they show.

Run: python examples/06_merge_stability.py [--seeds 3] [--epochs 2] [--out DIR] [--quick]
"""

import copy
import importlib
import time

import torch
from torch.nn import functional

import uhd_ops

warm_start = importlib.import_module("04_warm_start")  # a name that an import cannot hold
experiments = warm_start.experiments

PAPER_BLOCKS, BLOCKS = 27, 12
# How many blocks stand in front of the merge: in the paper's transformer, and in this one.
IN_FRONT = {n: max(1, round(n * BLOCKS / PAPER_BLOCKS)) for n in (1, 4, 10, 18, 27)}
POOLS = ("mean", "adaptive", "unshuffle")
GRID, CHANNELS = warm_start.GRID, warm_start.DIM


@torch.no_grad()
def tokens_of(model, images):
    """Tokens of the transformer: 8 x 8 of an image, or 4 x 4 where they are merged."""
    return model.eval().vit.forward_features(images)


def similarity(tokens, others):
    """Mean cosine of tokens with others, all of them ``(..., C)``."""
    return float(functional.cosine_similarity(tokens, others, dim=-1).mean())


@torch.no_grad()
def redundancy(model, images, in_front):
    """Mean cosine of a token with the mean of its window, behind so many blocks."""
    seen = []
    hook = model.vit.blocks[in_front - 1].register_forward_hook(lambda *call: seen.append(call[-1]))
    model.eval().vit.forward_features(images)
    hook.remove()
    tokens = uhd_ops.pixel_unshuffle(seen[0], GRID).unflatten(-1, (4, CHANNELS))  # by windows
    return similarity(tokens, tokens.mean(-2, keepdim=True).expand_as(tokens))


def insert(trained, in_front, pool):
    """Return a copy of the trained model with a merge behind ``in_front`` blocks."""
    model = copy.deepcopy(trained)
    uhd_ops.insert_progressive_compression(model.vit, (in_front - 1,), pool=pool)
    return model


def fine_tune(model, data, settings):
    """Train everything; return the number of correct test images at each of the steps."""
    *_, images, labels = data
    correct = [warm_start.count_correct(model, images, labels)]

    def measure(step):
        if step in warm_start.measured_steps(settings):
            correct.append(warm_start.count_correct(model, images, labels))

    warm_start.train(model, data, settings.epochs, warm_start.PEAK_LR["stage 2"], measure)
    return correct


def run_seed(seed, settings):
    """Train one model, and merge its tokens in every way on the same batches."""
    data = warm_start.load(settings)
    images = data[2]
    torch.manual_seed(seed)
    trained = warm_start.Classifier(BLOCKS)
    peak_lr = warm_start.PEAK_LR["pretraining"]
    warm_start.train(trained, data, settings.pretraining_epochs, peak_lr)
    expected = uhd_ops.window_mean(tokens_of(trained, images), GRID)
    arms = [(n, pool) for n in IN_FRONT for pool in POOLS]
    rows = []
    for n, pool in [(None, "untouched"), *arms]:
        torch.manual_seed(1000 + seed)  # what is initialised at random
        model = copy.deepcopy(trained) if n is None else insert(trained, IN_FRONT[n], pool)
        row = {"arm": pool, "start": n, "seed": seed}
        if n is not None:
            row["redundancy"] = redundancy(trained, images, IN_FRONT[n])
            row["similarity"] = similarity(tokens_of(model, images), expected)
        row["readable"] = warm_start.count_readable(model, data)
        torch.manual_seed(2000 + seed)  # batches and augmentation
        row["correct"] = fine_tune(model, data, settings)
        rows.append(row)
    return rows


def run(seeds, settings):
    """Run the seeds, in this process and one thread, and return the record of it all."""
    torch.set_num_threads(1)
    began, cpu, rows = time.perf_counter(), time.process_time(), []
    for seed in range(seeds):
        rows += run_seed(seed, settings)
        print(f"seed {seed}: {time.process_time() - cpu:.0f} CPU seconds so far", flush=True)
    return {
        "environment": experiments.environment("timm", "scikit-learn", processes=1),
        "settings": {
            **settings._asdict(),
            "model": {"dim": CHANNELS, "depth": BLOCKS, "heads": warm_start.HEADS, "grid": GRID},
            "in_front": IN_FRONT,
            "batch": warm_start.BATCH,
            "peak_lr": warm_start.PEAK_LR["stage 2"],
        },
        "seeds": list(range(seeds)),
        "cpu_seconds": round(time.process_time() - cpu),
        "wall_seconds": round(time.perf_counter() - began),
        "steps": warm_start.measured_steps(settings),
        "rows": rows,
    }


def tables(record):
    """Return the table of a record, and where it was measured, as Markdown."""
    steps, found = record["steps"], experiments.accuracy(record)
    readout = experiments.accuracy(record, "readable")
    shown = [0, 1, -1]
    titles = ["readout, step 0", *(f"step {steps[i]}" for i in shown)]
    lines = [
        f"| merged after | pooling | redundancy | similarity | {' | '.join(titles)} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (pool, n), seeds in found.items():
        rows = [row for row in record["rows"] if (row["arm"], row["start"]) == (pool, n)]
        where = "" if n is None else f"{IN_FRONT[n]} of {BLOCKS} (paper: {n} of {PAPER_BLOCKS})"
        cells = [
            "" if n is None else f"{sum(row[key] for row in rows) / len(rows):.2f}"
            for key in ("redundancy", "similarity")
        ]
        cells.append(experiments.cell(readout[pool, n]))
        cells += [experiments.cell([curve[i] for curve in seeds]) for i in shown]
        lines.append(f"| {' | '.join([where, pool, *cells])} |")
    images = record["settings"]["test_images"]
    measured = experiments.measured(record, f"Accuracy in % of {images} test images")
    return "\n".join([*lines, "", measured]) + "\n"


def main():
    warm_start.command_line(
        __doc__,
        "stability",
        run,
        seeds=3,
        usual=warm_start.Settings(2, pretraining_epochs=25),
        quick=warm_start.Settings(1, pretraining_epochs=1, train_images=40, test_images=10),
        tables=tables,
    )


if __name__ == "__main__":
    main()
