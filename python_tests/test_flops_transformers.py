# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.flops`` against torch's counter on the vision models of transformers."""

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uhd_ops import flops, insert_early_compressor

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}
# Class, options of its configuration, and tokens in front of the patches.
MODELS = {
    "CLIPVisionModel": ({"image_size": 32, "intermediate_size": 48}, 1),
    "SiglipVisionModel": ({"image_size": 32, "intermediate_size": 48}, 0),
    "Dinov2Model": ({"image_size": 32, "use_swiglu_ffn": True}, 1),
    "Dinov2WithRegistersModel": ({"image_size": 32, "mlp_ratio": 2}, 1 + 4),
    "DINOv3ViTModel": ({"image_size": 32, "intermediate_size": 48, "use_gated_mlp": True}, 1),
}


def made(name, **options):
    cls = getattr(transformers, name)
    config = cls.config_class(**SIZES, **options)
    return cls(config).eval().requires_grad_(False)


def macs(model, *inputs, **options):
    flops.register_formulas()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*inputs, **options)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_images(name, compressed):
    """A grid that is not the one that the model was made for, with ragged windows."""
    options, prefix = MODELS[name]
    model = made(name, **options)
    if compressed:
        insert_early_compressor(model, 1)
    resized = {"interpolate_pos_encoding": True} if name[0] in "CS" else {}
    x = torch.randn(1, 3, 8 * 3, 8 * 5)
    counted = flops.count_forward(model, x, **resized)
    assert counted.total == macs(model, x, **resized)
    report = flops.of_vit(model, [(3, 5)])
    assert report.total == counted.total - counted["head"].total
    expected = [15, 15 + prefix, 15 + prefix, 15, 6 + prefix] if compressed else [15 + prefix] * 4
    assert [row.tokens for row in report.layers][1:] == expected[1:]
    assert report.layers[0].tokens == 15


@pytest.mark.parametrize("compressed", [False, True])
def test_padded_batch(compressed):
    """Siglip2 takes patches with a mask and the shapes of the images."""
    model = made("Siglip2VisionModel", intermediate_size=48, num_patches=16)
    if compressed:
        insert_early_compressor(model, 1)
    shapes = torch.tensor([(3, 5), (4, 2)])
    mask = (torch.arange(16) < shapes.prod(1)[:, None]).int()
    inputs = torch.randn(2, 16, 3 * 8 * 8), mask, shapes
    assert flops.count_forward(model, *inputs).total == macs(model, *inputs)
    with pytest.raises(NotImplementedError, match=r"^vit must take images and nothing else, but"):
        flops.of_vit(model, [(3, 5)])
