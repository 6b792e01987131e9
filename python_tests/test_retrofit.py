# SPDX-License-Identifier: Apache-2.0
"""A retrofitted timm VisionTransformer: released models, copies, compilers, threads, removal."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import timm
import torch
from battery.calls import in_threads
from families import vision_transformer
from families.case import assert_close, random_images, snapshot
from families.vision_transformer import make, make_distilled
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from uhd_ops import insert_early_compressor, remove_early_compressor

LAYER = 1
ROUNDINGS = vision_transformer.CASES["VisionTransformer"].roundings


def compressed(**options):
    return insert_early_compressor(make(**options), LAYER)


def check_logits(vit, size=None, layer=LAYER):
    vit = vit.double().eval()
    x = random_images(vit, 1, torch.float64, size)
    _, features = vision_transformer.by_hand(vit, x, layer)
    expected = vit.forward_head(features)
    assert_close(insert_early_compressor(vit, layer)(x), expected, ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("make_vit", [make, make_distilled])
def test_unfused_attention(make_vit):
    vit = make_vit()
    for block in vit.blocks:
        block.attn.fused_attn = False
    check_logits(vit)


@torch.no_grad()
@pytest.mark.parametrize("side", [27, 37, 1, 2])
def test_grids_of_released_models(side):
    check_logits(make(img_size=4 * side, depth=2, class_token=False, global_pool="map"), layer=0)


def test_default_layer_sees_seven_blocks():
    vit = insert_early_compressor(make(depth=8))
    tokens = [y.shape[-1] for y in vit.forward_intermediates(random_images(vit))[1]]
    assert tokens == [7] * 6 + [4] * 2
    assert hasattr(vit.blocks[6], "compressor")


# Released configurations at a small width, so that their own options are what is tested.
ENTRYPOINTS = (
    "vit_so400m_patch14_siglip_384",
    "vit_base_patch16_siglip_512",
    "vit_large_patch14_clip_336",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch32_clip_448",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_tiny_patch16_224",
    "vit_betwixt_patch16_reg4_gap_256",
    "flexivit_small",
)


@torch.no_grad()
@pytest.mark.parametrize("name", ENTRYPOINTS)
def test_released_configurations(name):
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": (112, 112)}
    check_logits(timm.create_model(name, **options))


def test_intermediates_with_norm_and_prefix():
    vit = compressed(reg_tokens=2)
    x = random_images(vit)
    options = {"intermediates_only": True, "output_fmt": "NLC"}
    normed = vit.forward_intermediates(x, norm=True, **options)
    assert torch.equal(normed[-1], vit.forward_features(x)[:, 3:])
    fine, coarse = vit.get_intermediate_layers(x, [0, 2], reshape=True)
    _, pairs = vit.forward_intermediates(x, return_prefix_tokens=True)
    for (y, prefix), wanted in zip((pairs[0], pairs[2]), (fine, coarse), strict=True):
        assert torch.equal(y, wanted)
        assert prefix.shape == (2, 3, 32)


@pytest.mark.filterwarnings("ignore:.*Conv2d:UserWarning")
def test_empty_batch():
    vit = compressed(reg_tokens=2)
    assert vit.forward_features(torch.zeros(0, 3, 28, 28)).shape == (0, 3 + 16, 32)


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_state_dict_round_trip(form):
    vit, twin = make(), make()
    insert_early_compressor(vit, LAYER, form=form)
    insert_early_compressor(twin, LAYER, form=form).load_state_dict(vit.state_dict())
    x = random_images(vit)
    assert torch.equal(twin(x), vit(x))


@pytest.mark.parametrize("name", ["", "blocks.1"], ids=["model", "block"])
def test_removal_leaves_alone_what_was_extended_since(name):
    vit = compressed()
    module = vit.get_submodule(name)
    module.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    parametrize.register_parametrization(module, "extra", torch.nn.Identity())
    before = snapshot(vit)
    with pytest.raises(NotImplementedError, match="the insertion gave them, got Parametrized"):
        remove_early_compressor(vit)
    assert snapshot(vit) == before
    parametrize.remove_parametrizations(module, "extra")
    remove_early_compressor(vit)
    assert type(vit) is VisionTransformer


def test_repr_shows_the_configuration():
    text = repr(insert_early_compressor(make(), LAYER, form="tied", attention=False))
    assert text.startswith("CompressedVisionTransformer(\n  compression=CompressorConfig")
    assert "layers=(1,), attention='none', mlp='reuse', form='tied', window=2" in text
    assert "(1): CompressedBlock(" in text


def test_new_parameters_follow_block_and_mode():
    vit = make().train().requires_grad_(False)
    compressor = insert_early_compressor(vit, LAYER).blocks[LAYER].compressor
    assert compressor.training
    assert all(p.requires_grad for p in compressor.parameters())
    assert not vit.blocks[LAYER].attn.qkv.weight.requires_grad
    vit.fix_init_weight()  # which names parts of blocks
    evaluated = insert_early_compressor(make().eval(), LAYER)
    assert not any(module.training for module in evaluated.modules())


# ---- copies ------------------------------------------------------------------------------------


def test_deepcopy_keeps_an_extension_of_the_class():
    vit = compressed()
    vit.__class__ = type("Extended", (type(vit),), {})
    twin, x = copy.deepcopy(vit), random_images(vit)
    assert type(twin) is type(vit)
    assert torch.equal(twin(x), vit(x))


def test_pickle_in_a_fresh_process(tmp_path):
    vits = [insert_early_compressor(make_vit(), LAYER) for make_vit in (make, make_distilled)]
    x = random_images(vits[0])
    torch.save((vits, x, [vit(x) for vit in vits]), tmp_path / "models.pt")
    code = (
        "import sys, torch\n"
        "torch.set_num_threads(1)\n"
        "vits, x, outs = torch.load(sys.argv[1], weights_only=False)\n"
        "for vit, wanted in zip(vits, outs, strict=True):\n"
        # Another number of threads may sum the products of a matrix in another order.
        "    bound = 12 * 512 * torch.finfo(x.dtype).eps * wanted.abs().max()\n"
        "    assert (vit(x) - wanted).abs().max() <= bound\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "models.pt")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(protocol):
    vit = insert_early_compressor(make_distilled(depth=2), LAYER)
    x = random_images(vit)
    twin = pickle.loads(pickle.dumps(vit, protocol))
    assert type(twin) is type(vit)
    assert torch.equal(twin(x), vit(x))


# ---- compilers and threads ---------------------------------------------------------------------


def test_compiles_for_every_size_and_with_maps():
    vit = insert_early_compressor(make(depth=2, dynamic_img_size=True, reg_tokens=2), 0)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for size in [(28, 28), (16, 20)]:
        x = random_images(vit, size=size)
        assert torch.equal(compiled(x), vit(x))
    maps = torch.compile(vit.forward_intermediates, fullgraph=True, backend="aot_eager")
    for y, wanted in zip(maps(x)[1], vit.forward_intermediates(x)[1], strict=True):
        assert torch.equal(y, wanted)


def test_compiles_with_gradient_checkpointing():
    vit = insert_early_compressor(make(depth=2), 0).train()
    x = random_images(vit)
    vit(x).sum().backward()
    wanted = {name: p.grad for name, p in vit.named_parameters()}
    vit.zero_grad()
    vit.set_grad_checkpointing()
    torch.compile(vit, fullgraph=True, backend="aot_eager")(x).sum().backward()
    eps = torch.finfo(torch.float32).eps
    for name, parameter in vit.named_parameters():
        # The compiled backward pass may add up the terms of a product in another order.
        bound = 12 * 512 * eps * wanted[name].abs().max()
        assert (parameter.grad - wanted[name]).abs().max() <= bound, name


def test_threads_may_use_different_sizes():
    vit = insert_early_compressor(make(dynamic_img_size=True), LAYER)
    inputs = [random_images(vit, size=size) for size in ((28, 28), (8, 32), (16, 16), (4, 12))]
    wanted, wrong = [vit(x) for x in inputs], []
    barrier = threading.Barrier(len(inputs))

    def work(x, logits):
        barrier.wait()
        for _ in range(5):
            if not torch.equal(vit(x), logits):
                wrong.append(x.shape)

    in_threads(work, inputs, wanted)
    assert not wrong


def test_wrapped_blocks():
    vit = compressed()
    x = random_images(vit)
    wanted = vit(x)
    vit.blocks[LAYER] = checkpoint_wrapper(vit.blocks[LAYER])
    assert torch.equal(vit(x), wanted)
    vit(x).sum().backward()
    assert torch.equal(torch.compile(vit, backend="aot_eager")(x), wanted)
    remove_early_compressor(vit)
