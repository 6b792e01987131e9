# SPDX-License-Identifier: Apache-2.0
"""A compressor follows its model: init_weights, the meta device, checkpoints without one."""

import pytest
import torch

import uhd_ops

timm = pytest.importorskip("timm")

# Every class of timm whose models initialise themselves.
MODELS = {
    "test_vit": {},
    "beit_base_patch16_224": {"embed_dim": 32, "num_heads": 2},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "naflexvit_base_patch16_gap": {"embed_dim": 32, "num_heads": 2},
    "vit_relpos_small_patch16_224": {},
    "qwen3_vit_88m": {},
    "deepseek_vit_412m": {"embed_dim": 64, "num_heads": 4},
    "gemma4_vit_167m": {"embed_dim": 64, "num_heads": 2},
}


def make(name):
    return timm.create_model(name, **{"num_classes": 0, "depth": 3} | MODELS[name])


def compressed(name, **options):
    return uhd_ops.insert_early_compressor(make(name), layer=1, **options)


def compressor_of(vit):
    (found,) = [m for m in vit.modules() if isinstance(m, uhd_ops.nn.EarlyCompressor)]
    return found


def assert_reuses(vit):
    """The compressor is what one that is inserted now would be."""
    compressor = compressor_of(vit)
    held = {name: tensor.clone() for name, tensor in compressor.state_dict().items()}
    uhd_ops.remove_early_compressor(vit)
    fresh = compressor_of(uhd_ops.insert_early_compressor(vit, layer=1)).state_dict()
    assert held.keys() == fresh.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, fresh[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_init_weights_reuses_the_new_weights(name):
    vit = compressed(name)
    before = compressor_of(vit).mlp.fc1.weight.clone()
    with torch.no_grad():
        for tensor in compressor_of(vit).parameters():
            tensor.fill_(7)
    vit.init_weights()
    assert not torch.equal(compressor_of(vit).mlp.fc1.weight, before)
    assert_reuses(vit)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_the_meta_device_is_initialised_as_a_whole(name):
    with torch.device("meta"):
        vit = make(name)
    uhd_ops.insert_early_compressor(vit, layer=1)
    vit.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in vit.parameters():
            tensor.fill_(torch.nan)
    vit.init_weights()
    assert [name for name, tensor in vit.named_parameters() if tensor.isnan().any()] == []
    assert_reuses(vit)


def test_progressive_pooling_starts_again():
    vit = make("test_vit")
    uhd_ops.insert_progressive_compression(vit, layers=(0, 1))
    with torch.no_grad():
        for tensor in vit.parameters():
            tensor.fill_(torch.nan)
    vit.init_weights()
    assert not any(tensor.isnan().any() for tensor in vit.parameters())
    for block in vit.blocks[:2]:
        assert block.compressor.fc2.weight.eq(0).all()


@pytest.mark.parametrize("name", ["test_vit", "beit_base_patch16_224", "qwen3_vit_88m"])
def test_plain_checkpoint(name):
    checkpoint = make(name).state_dict()
    vit = compressed(name, form="tied")
    assert uhd_ops.load_plain_checkpoint(vit, checkpoint) is vit
    expected = make(name)
    expected.load_state_dict(checkpoint)
    uhd_ops.insert_early_compressor(expected, layer=1, form="tied")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(vit.state_dict()[name], tensor), name


def test_wrong_checkpoints_change_nothing():
    vit, checkpoint = compressed("test_vit"), make("test_vit").state_dict()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    wrong = {
        "must have shape None, got": checkpoint | {"more": torch.zeros(1)},
        r"got None": {n: t for n, t in checkpoint.items() if n != "pos_embed"},
        r"1 differ: norm.bias must have shape \(\d+,\), got \(3,\)": checkpoint
        | {"norm.bias": torch.zeros(3)},
    }
    for message, state_dict in wrong.items():
        with pytest.raises(ValueError, match=message):
            uhd_ops.load_plain_checkpoint(vit, state_dict)
    with pytest.raises(TypeError, match="state_dict must be a mapping, got list"):
        uhd_ops.load_plain_checkpoint(vit, list(checkpoint.items()))
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match="vit must hold a compressor, got VisionTransformer"):
        uhd_ops.load_plain_checkpoint(make("test_vit"), checkpoint)


def test_a_block_that_cannot_be_reused_changes_nothing():
    vit, checkpoint = compressed("test_vit"), make("test_vit").state_dict()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    (block,) = (block for block in vit.blocks if hasattr(block, "compressor"))
    block.attn.qkv.__class__ = type("Adapted", (torch.nn.Linear,), {})
    with pytest.raises(NotImplementedError, match="Adapted"):
        uhd_ops.load_plain_checkpoint(vit, checkpoint)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, before[name]), name
