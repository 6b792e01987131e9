# SPDX-License-Identifier: Apache-2.0
"""What timm's NaFlexVit with a compressor refuses: batches without whole grids, masks, parts."""

import pytest
import torch
from families.naflexvit import make, make_with_rope
from padded_batches import GRIDS, images_of, padded

from uhd_ops import insert_early_compressor

AVERAGE = {"class_token": False, "global_pool": "avg"}


def swap(batch):
    batch["patch_coord"][0, [1, 2]] = batch["patch_coord"][0, [2, 1]]


def punch(batch):
    batch["patch_valid"][3, 4] = False


def cut(batch):
    batch["patch_valid"][3, 9] = False


def shift(batch):
    batch["patch_coord"] += 1


def float_coordinates(batch):
    batch["patch_coord"] = batch["patch_coord"].double()


def shorten(batch):
    batch["patch_valid"] = batch["patch_valid"][:, 1:]


def flatten(batch):
    batch["patch_coord"] = batch["patch_coord"].flatten(1)


def mask(batch):
    batch["attn_mask"] = torch.zeros(len(GRIDS), 1, 1, batch["patches"].shape[1])


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (ValueError, r"one whole grid for each sample.*sample 0, with .* \(6, 6\), do not", swap),
        (ValueError, r"those of sample 3, with coordinates up to \(4, 1\)", punch),
        (ValueError, r"those of sample 3, with coordinates up to \(4, 1\)", cut),
        (ValueError, r"those of sample 0, with coordinates up to \(7, 7\)", shift),
        (TypeError, "patch_coord must hold integers, got torch.float64", float_coordinates),
        (ValueError, r"patch_valid must have shape \(7, 51\).*, got \(7, 50\)", shorten),
        (ValueError, r"patch_coord must be \(B, L, 2\) with L >= 1, got shape \(7, 102\)", flatten),
        (NotImplementedError, "attn_mask must be None", mask),
    ],
)
@torch.no_grad()
def test_refused_batches(error, match, change):
    model = insert_early_compressor(make(**AVERAGE), 1)
    batch = padded(images_of(dtype=torch.float32))
    expected = model(batch)
    changed = {key: value.clone() for key, value in batch.items()}
    change(changed)
    with pytest.raises(error, match=match):
        model(changed)
    assert torch.equal(model(batch), expected)


@torch.no_grad()
def test_refusals():
    model = insert_early_compressor(make(**AVERAGE), 1)
    batch = padded(images_of(dtype=torch.float32))
    with pytest.raises(ValueError, match='output_fmt must be "NLC" for a padded batch'):
        model.forward_intermediates(batch)
    with pytest.raises(NotImplementedError, match="patch_valid must come with patch_coord"):
        model.forward_features(batch["patches"], patch_valid=torch.ones(1, 49, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"B = 1 samples.*got shape \(7, 51, 32\)"):
        model.forward_features(batch["patches"], batch["patch_coord"][:1], batch["patch_valid"][:1])


@pytest.mark.parametrize("part", ["embeds", "rope"])
def test_refused_parts(part):
    model = make_with_rope()
    module = getattr(model, part)
    module.__class__ = type("Other", (type(module),), {})
    with pytest.raises(NotImplementedError, match=rf"vit\.{part} must be .*, got Other"):
        insert_early_compressor(model, 1)
    model = make_with_rope()
    model._pool = model._pool
    with pytest.raises(NotImplementedError, match=r"vit must leave NaFlexVit\._pool as it is"):
        insert_early_compressor(model, 1)
    assert type(model).__name__ == "NaFlexVit"
