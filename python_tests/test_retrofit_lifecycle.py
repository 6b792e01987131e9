# SPDX-License-Identifier: Apache-2.0
"""Insertion and removal change nothing else, and a compressed model can be copied and compiled."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_vits import images, snapshot, tiny_distilled, tiny_vit
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from uhd_ops import insert_early_compressor, remove_early_compressor
from uhd_ops.retrofit import CompressorConfig

LAYER = 1
MAKERS = {"plain": tiny_vit, "distilled": tiny_distilled}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_removal_restores_every_bit(make):
    vit = make()
    x = images(vit)
    before, logits = snapshot(vit), vit(x)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    insert_early_compressor(vit, LAYER)
    assert not torch.equal(vit(x), logits)
    assert remove_early_compressor(vit) is vit
    assert snapshot(vit) == before
    assert torch.equal(vit(x), logits)
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in state.items())


def test_every_key_and_class_survives():
    vit = tiny_vit(init_values=0.3)
    keys, groups = list(vit.state_dict()), vit.group_matcher()
    insert_early_compressor(vit, LAYER)
    assert isinstance(vit, VisionTransformer)
    assert [key for key in vit.state_dict() if ".compressor." not in key] == keys
    new = [key for key in vit.state_dict() if ".compressor." in key]
    assert all(key.startswith(f"blocks.{LAYER}.compressor.") for key in new)
    assert len(vit.blocks) == 4
    assert vit.group_matcher() == groups
    vit.fix_init_weight()


def test_original_checkpoint_loads_after_insertion():
    vit, other = tiny_vit(), tiny_vit()
    insert_early_compressor(vit, LAYER)
    missing, unexpected = vit.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert all(".compressor." in key for key in missing)


@pytest.mark.parametrize("form", ["dense", "block", "tied"])
def test_state_dict_round_trip(form):
    vit, twin = tiny_vit(), tiny_vit()
    insert_early_compressor(vit, LAYER, form=form)
    insert_early_compressor(twin, LAYER, form=form).load_state_dict(vit.state_dict())
    x = images(vit)
    assert torch.equal(twin(x), vit(x))


def test_inserting_twice():
    vit = insert_early_compressor(tiny_vit(), LAYER, form="tied")
    before = snapshot(vit)
    assert insert_early_compressor(vit, LAYER, form="tied") is vit
    with pytest.raises(
        ValueError, match=r"holds a compressor .*layers=\(1,\).* remove_early_compressor"
    ):
        insert_early_compressor(vit, 2, form="tied")
    with pytest.raises(ValueError, match=r"remove_early_compressor"):
        insert_early_compressor(vit, LAYER)
    assert snapshot(vit) == before
    insert_early_compressor(remove_early_compressor(vit), 2)
    assert vit.compression == CompressorConfig(layers=2, attention="window")


def test_removing_twice():
    vit = remove_early_compressor(insert_early_compressor(tiny_vit(), LAYER))
    with pytest.raises(ValueError, match="vit holds no compressor"):
        remove_early_compressor(vit)


@pytest.mark.parametrize("name", ["", "blocks.1"], ids=["model", "block"])
def test_removal_leaves_alone_what_was_extended_since(name):
    vit = insert_early_compressor(tiny_vit(), LAYER)
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
    text = repr(insert_early_compressor(tiny_vit(), LAYER, form="tied", attention=False))
    assert text.startswith("CompressedVisionTransformer(\n  compression=CompressorConfig")
    assert "layers=(1,), attention='none', mlp='reuse', form='tied', window=2" in text
    assert "(1): CompressedBlock(" in text


def test_new_parameters_follow_block_and_mode():
    vit = tiny_vit().train().requires_grad_(False)
    compressor = insert_early_compressor(vit, LAYER).blocks[LAYER].compressor
    assert compressor.training
    assert all(p.requires_grad for p in compressor.parameters())
    assert not vit.blocks[LAYER].attn.qkv.weight.requires_grad
    meta = insert_early_compressor(tiny_vit(device="meta", weight_init="skip"), LAYER)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


# ---- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_deepcopy_uses_its_own_weights(make):
    vit = insert_early_compressor(make(), LAYER)
    x = images(vit)
    wanted = vit(x)
    twin = copy.deepcopy(vit)
    assert type(twin) is type(vit)
    assert torch.equal(twin(x), wanted)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), wanted)
    remove_early_compressor(twin)
    assert type(vit).__name__.startswith("Compressed")


def test_deepcopy_keeps_an_extension_of_the_class():
    vit = insert_early_compressor(tiny_vit(), LAYER)
    vit.__class__ = type("Extended", (type(vit),), {})
    twin, x = copy.deepcopy(vit), images(vit)
    assert type(twin) is type(vit)
    assert torch.equal(twin(x), vit(x))


def test_pickle_in_a_fresh_process(tmp_path):
    vits = [insert_early_compressor(make(), LAYER) for make in MAKERS.values()]
    x = images(vits[0])
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
    vit = insert_early_compressor(tiny_distilled(depth=2), LAYER)
    x = images(vit)
    twin = pickle.loads(pickle.dumps(vit, protocol))
    assert type(twin) is type(vit)
    assert torch.equal(twin(x), vit(x))


# ---- compilers and threads ---------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed size", "dynamic size"])
def test_compiles_to_one_graph(dynamic):
    vit = insert_early_compressor(tiny_vit(depth=2, dynamic_img_size=dynamic, reg_tokens=2), 0)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for size in [(28, 28), (16, 20)] if dynamic else [(28, 28)]:
        x = images(vit, size=size)
        assert torch.equal(compiled(x), vit(x))
    maps = torch.compile(vit.forward_intermediates, fullgraph=True, backend="aot_eager")
    for y, wanted in zip(maps(x)[1], vit.forward_intermediates(x)[1], strict=True):
        assert torch.equal(y, wanted)


def test_compiles_with_gradient_checkpointing():
    vit = insert_early_compressor(tiny_vit(depth=2), 0).train()
    x = images(vit)
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


def test_exports():
    vit = insert_early_compressor(tiny_vit(), LAYER)
    x = images(vit)
    assert torch.equal(torch.export.export(vit, (x,)).module()(x), vit(x))


def test_threads_may_use_different_sizes():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    inputs = [images(vit, size=size) for size in ((28, 28), (8, 32), (16, 16), (4, 12))]
    wanted, wrong = [vit(x) for x in inputs], []
    barrier = threading.Barrier(len(inputs))

    def work(x, logits):
        barrier.wait()
        for _ in range(5):
            if not torch.equal(vit(x), logits):
                wrong.append(x.shape)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, wanted, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_wrapped_blocks():
    vit = insert_early_compressor(tiny_vit(), LAYER)
    x = images(vit)
    wanted = vit(x)
    vit.blocks[LAYER] = checkpoint_wrapper(vit.blocks[LAYER])
    assert torch.equal(vit(x), wanted)
    vit(x).sum().backward()
    assert torch.equal(torch.compile(vit, backend="aot_eager")(x), wanted)
    remove_early_compressor(vit)
