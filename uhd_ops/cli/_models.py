# SPDX-License-Identifier: Apache-2.0
"""Make the vision transformers that the commands run and count."""

from __future__ import annotations

import difflib
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from uhd_ops.cli._support import (
    UserError,
    user_errors,
)

if TYPE_CHECKING:
    from uhd_ops.corpus import CorpusModel


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder(NamedTuple):
    """A timm model and what slicing has to know about it."""

    vit: nn.Module
    depth: int  # blocks
    weights: str  # for people: "pretrained", "random (seed 0)" or "none"
    patch_size: int  # px
    scale_resolution: int  # px
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_encoder(name: str, *, pretrained: bool, seed: int, dtype: torch.dtype) -> Encoder:
    """Create a timm model without its classifier.

    Args:
        name: Name of a timm model.
        pretrained: Fetch its weights; otherwise they are random.
        seed: Seed for random weights.
        dtype: Dtype of the weights.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        UserError: There is no such model, its weights cannot be fetched, or it is of a class that
            takes no compressor.
    """
    if pretrained and not _hub_answers():
        # Read when timm imports the hub's client: it then looks into its cache instead of retrying
        # for a minute.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import timm

    torch.manual_seed(seed)
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(why_not(name, error, pretrained=pretrained)) from error
    weights = "pretrained" if pretrained else f"random (seed {seed})"
    return _read(name, vit.to(dtype), weights)


def planned_encoder(name: str) -> Encoder:
    """Create a timm model without weights, on the meta device.

    Raises:
        UserError: There is no such model, or it is of a class that takes no compressor.
    """
    return _read(name, make_without_weights(name), "none")


def make_without_weights(name: str, **options: Any) -> nn.Module:
    """Make a timm model of sizes only, on the meta device.

    Raises:
        UserError: There is no such model, or it takes no such options.
    """
    import timm

    # timm 1.0.20 reads the rates of drop path from a tensor, which must have data for that.
    device = "meta" if hasattr(timm.layers, "calculate_drop_path_rates") else "cpu"
    try:
        with torch.device(device):
            return timm.create_model(name, num_classes=0, **options).to("meta")
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(why_not(name, error, pretrained=False)) from error


def _read(name: str, vit: nn.Module, weights: str) -> Encoder:
    """Read what slicing has to know about a model."""
    with user_errors(NotImplementedError, prefix=f"model {name}: "):
        from uhd_ops.retrofit.registry import packed_of

        transformer, packed = packed_of(vit)
    patch_size, _ = packed.patch_size(transformer)
    depth, config = len(transformer.get_submodule(packed.blocks_name)), vit.pretrained_cfg
    side = max(config["input_size"][1:])
    vit = vit.eval().requires_grad_(False)
    return Encoder(vit, depth, weights, patch_size, side, config["mean"], config["std"])


def load_corpus_model(
    name: str,
    *,
    layer: int,
    form: str,
    pretrained: bool,
    seed: int,
    dtype: torch.dtype,
    device: str,
) -> CorpusModel:
    """Create a timm model with a compressor, for ``uhd-ops encode-dataset``.

    Args:
        name: Name of a timm model.
        layer: Block after which the compressor runs.
        form: Weight form of its MLP.
        pretrained: Fetch the model's weights; otherwise they are random.
        seed: Seed for random weights.
        dtype: Dtype of the weights.
        device: Device of the model.

    Raises:
        UserError: As for :func:`load_encoder`, or there is no such layer.
    """
    from uhd_ops.corpus import CorpusModel
    from uhd_ops.nn import SliceEncoder
    from uhd_ops.retrofit import insert_early_compressor

    found = load_encoder(name, pretrained=pretrained, seed=seed, dtype=dtype)
    with user_errors(ValueError, NotImplementedError, prefix=f"model {name}: "):
        encoder = SliceEncoder(insert_early_compressor(found.vit, layer, form=form))
    return CorpusModel(
        encoder.to(device).eval().requires_grad_(False),
        found.patch_size,
        found.scale_resolution,
        found.mean,
        found.std,
        {
            "name": name,
            "layer": layer,
            "form": form,
            "weights": found.weights,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
        },
    )


def find_device(name: str) -> str:
    """The device that ``--device`` names: ``"auto"`` is a GPU where there is one.

    Raises:
        UserError: There is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU on this machine")
    return name


def _hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub that hosts the weights can be reached; an HTTP error is an answer, too."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def why_not(name: str, error: Exception, *, pretrained: bool) -> str:
    """Say why timm could not make a model."""
    from timm import list_models

    if isinstance(error, OSError):
        return (
            f"the pretrained weights of {name} are not on this machine and cannot be fetched "
            "from the model hub. Leave out --pretrained to run with random weights."
        )
    if "Unknown model" in str(error):
        similar = difflib.get_close_matches(name.partition(".")[0], list_models(), 5)
        similar = similar or list_models("vit_base_*siglip*")[:5]
        return f"timm has no model {name!r}; it has, for example, {', '.join(similar)}"
    return f"model {name} cannot be made: {error}" + (" (--pretrained)" if pretrained else "")
