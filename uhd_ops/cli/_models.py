# SPDX-License-Identifier: Apache-2.0
"""Make the vision transformer that ``uhd-ops encode`` runs."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import NamedTuple

import torch
from torch import nn

from uhd_ops.cli._support import UserError, user_errors


class Encoder(NamedTuple):
    """A timm ViT and what slicing has to know about it."""

    vit: nn.Module
    weights: str  # for people: "pretrained" or "random (seed 0)"
    patch_size: int  # px
    scale_resolution: int  # px
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_encoder(name: str, *, pretrained: bool, seed: int, dtype: torch.dtype) -> Encoder:
    """Create a timm model without its classifier.

    Args:
        name: Name of a timm model.
        pretrained: Fetch its weights; otherwise they are random.
        seed: Seed of random weights.
        dtype: Dtype of the weights.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        UserError: There is no such model, its weights cannot be fetched, or it is no plain ViT.
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
    with user_errors(NotImplementedError, AttributeError, prefix=f"model {name}: "):
        from uhd_ops.flops import vit_config

        patch_size = vit_config(vit).patch
        sides = vit.patch_embed.img_size or (448, 448)
    config = vit.pretrained_cfg
    vit = vit.to(dtype).eval().requires_grad_(False)
    return Encoder(vit, weights, patch_size, max(sides), config["mean"], config["std"])


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
        similar = (
            list_models(f"*{name.split('.')[0][:12]}*")[:5] or list_models("vit_base_*siglip*")[:5]
        )
        return f"timm has no model {name!r}; it has, for example, {', '.join(similar)}"
    return f"model {name} cannot be made: {error}" + (" (--pretrained)" if pretrained else "")
