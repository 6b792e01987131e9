# SPDX-License-Identifier: Apache-2.0
"""The oldest versions of other packages: declared, tested and refused below are the same."""

import re
import sys
from pathlib import Path

import pytest
import timm
import tomllib
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.models.vitamin import GeGluMlp
from transformers import SiglipVisionConfig, SiglipVisionModel

from uhd_ops import insert_early_compressor
from uhd_ops.nn.modules import require_version
from uhd_ops.retrofit import registry

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^([\w-]+)==([\d.]+)$", re.MULTILINE)
OLDEST = dict(PIN.findall((ROOT / ".ci" / "oldest.txt").read_text()))
RAY = dict(PIN.findall((ROOT / ".ci" / "ray.txt").read_text()))
DEVELOPMENT = dict(PIN.findall((ROOT / "requirements-dev.txt").read_text()))
SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}


def numbers(version):
    found = [int(number) for number in version.split(".")]
    return [*found, 0, 0][:3]


def test_every_declared_floor_is_tested():
    groups = PROJECT["optional-dependencies"].values()
    declared = {*PROJECT["dependencies"], *(entry for group in groups for entry in group)}
    floors = dict(entry.split(">=") for entry in declared)
    assert len(floors) == len(declared), "two floors for one package"
    assert numbers(floors.pop("ray[data]")) == numbers(RAY["ray"])  # a suite of its own
    assert floors.keys() == OLDEST.keys() - {"torchvision"}
    for name, floor in floors.items():
        assert numbers(floor) == numbers(OLDEST[name]), name


def test_families_name_versions_that_are_admitted_and_tried():
    for library, version in registry._TRIED.items():
        assert numbers(version) == numbers(DEVELOPMENT[library])
        since = [v for module, v in registry._SINCE.items() if module.startswith(library)]
        assert min(map(numbers, since)) == numbers(OLDEST[library])
        assert max(map(numbers, since)) <= numbers(version)
    modules = {row.module for row in registry.FAMILIES}
    assert registry._SINCE.keys() <= modules


def siglip():
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = SiglipVisionConfig(**size, num_hidden_layers=3, image_size=16, patch_size=4)
    return SiglipVisionModel(config)


def naflex_with_rope():
    sizes = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return NaFlexVit(NaFlexVitCfg(**sizes, rope_type="axial"))


@pytest.mark.parametrize(
    ("make", "library", "version", "message"),
    [
        (
            lambda: VisionTransformer(**SIZE),
            "timm",
            "1.0.19",
            "timm.models.vision_transformer.VisionTransformer needs timm >= 1.0.20, got timm "
            "1.0.19",
        ),
        (
            lambda: VisionTransformer(**SIZE, pos_embed="none"),
            "timm",
            "1.0.25",
            "vit, with a class token but no positions, needs timm >= 1.0.26, got timm 1.0.25",
        ),
        (
            lambda: VisionTransformer(**SIZE, block_fn=ParallelScalingBlock),
            "timm",
            "1.0.24",
            "block, a ParallelScalingBlock, needs timm >= 1.0.25, got timm 1.0.24",
        ),
        (
            lambda: VisionTransformer(**SIZE, mlp_layer=GeGluMlp),
            "timm",
            "1.0.30.dev0",
            "block.mlp, a GeGluMlp, needs timm >= 1.0.31, got timm 1.0.30.dev0",
        ),
        (
            naflex_with_rope,
            "timm",
            "1.0.29",
            "vit, with rotary embeddings, needs timm >= 1.0.30, got timm 1.0.29",
        ),
        (
            siglip,
            "transformers",
            "4.57.6",
            "transformers.models.siglip.modeling_siglip.SiglipVisionModel needs transformers >= "
            "5.6, got transformers 4.57.6",
        ),
    ],
    ids=["class", "no positions", "block", "mlp", "rope", "transformers"],
)
def test_older_versions_are_refused_by_name(monkeypatch, make, library, version, message):
    vit = make()
    keys = list(vit.state_dict())
    # transformers puts another module in its own place while it is imported.
    monkeypatch.setattr(sys.modules[library], "__version__", version)
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        insert_early_compressor(vit, 1)
    assert list(vit.state_dict()) == keys


@pytest.mark.parametrize("version", ["1.0.31", "1.0.31.post1", "1.0.32.dev0", "1.1", "2.0.0"])
def test_newer_versions_are_taken(monkeypatch, version):
    monkeypatch.setattr(timm, "__version__", version)
    require_version("timm", "1.0.31", "this")
