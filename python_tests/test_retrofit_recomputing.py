# SPDX-License-Identifier: Apache-2.0
"""Blocks that run outside their model's forward pass find their grid: recomputed, or on their own.

Passes over 4 x 4 and 2 x 8 patches are alive together wherever they can be: their tokens are as
many, so nothing but the pass itself tells them apart.
"""

import contextlib
import copy
import functools
import itertools
import pickle
import threading
import weakref

import pytest
import torch
from battery.calls import in_threads
from families import eva, naflexvit
from families.case import assert_close
from families.case import random_images as images
from families.vision_transformer import make as tiny_vit
from timm.layers import set_reentrant_ckpt
from timm.models import checkpoint_seq, vision_transformer
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from uhd_ops import insert_early_compressor, insert_progressive_compression
from uhd_ops.retrofit import adapter

LAYER = 1
ROUNDINGS = 12 * 512  # as in families/case.py: new tensors may lie differently for a product
GRIDS = ((16, 16), (8, 32))  # in px, 4 to a patch
MODELS = {
    "ViT": functools.partial(tiny_vit, dynamic_img_size=True),
    "Eva": functools.partial(eva.make, **eva.ROPE, dynamic_img_size=True),
    "NaFlexVit": functools.partial(naflexvit.make_with_rope, "dinov3"),
}
INSERTIONS = {
    "early": functools.partial(insert_early_compressor, layer=LAYER),
    "progressive": functools.partial(insert_progressive_compression, layers=(0, 1)),
}


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, *size, generator=generator) for size in GRIDS]


def gradients(vit, loss):
    vit.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}


def loss_of_both(vit):
    first, second = (vit.forward_features(x) for x in batches())
    return first.square().sum() + second.sin().sum()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, ROUNDINGS)


def fresh_tokens(block, args):
    return (args[0] * 1.0, *args[1:])


@contextlib.contextmanager
def checkpointing(vit, way, monkeypatch):
    """Run the blocks again in the backward pass; ``way`` says how."""
    hooks = []
    vit.set_grad_checkpointing(True)
    if way == "hooks that make new tokens":
        hooks = [block.register_forward_pre_hook(fresh_tokens) for block in vit.blocks]
    if way == "reentrant":
        set_reentrant_ckpt(True)
    if way == "pairs of blocks":
        pairs = functools.partial(checkpoint_seq, every=2)
        monkeypatch.setattr(vision_transformer, "checkpoint_seq", pairs)
    try:
        with save_on_cpu() if way == "save_on_cpu" else contextlib.nullcontext():
            yield
    finally:
        set_reentrant_ckpt(False)
        vit.set_grad_checkpointing(False)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("insertion", INSERTIONS)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(MODELS, ("each block", "hooks that make new tokens", "save_on_cpu")),
        ("ViT", "reentrant"),  # timm gives the others' blocks keywords, which this kind refuses
    ],
)
def test_gradients_with_checkpointing(name, way, insertion, monkeypatch):
    vit = INSERTIONS[insertion](MODELS[name]())
    expected = gradients(vit, functools.partial(loss_of_both, vit))
    with checkpointing(vit, way, monkeypatch):
        assert_same(gradients(vit, functools.partial(loss_of_both, vit)), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_pairs_of_blocks(layer, monkeypatch):
    """The compressed block comes first, or second, and then its tokens are computed anew."""
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), layer)
    expected = gradients(vit, functools.partial(loss_of_both, vit))
    with checkpointing(vit, "pairs of blocks", monkeypatch):
        assert_same(gradients(vit, functools.partial(loss_of_both, vit)), expected)


@pytest.mark.parametrize("way", ["each block", "pairs of blocks"])
def test_frozen_in_front(way, monkeypatch):
    """No gradient flows to what made the tokens of the compressed block."""
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    for part in (vit.patch_embed, *vit.blocks[: LAYER + 1]):
        part.requires_grad_(False)
    vit.pos_embed.requires_grad_(False)
    vit.cls_token.requires_grad_(False)
    vit.blocks[LAYER].compressor.requires_grad_(True)
    x, _ = batches()

    def loss():
        return vit.forward_features(x).square().sum()

    expected = gradients(vit, loss)
    with checkpointing(vit, way, monkeypatch):
        assert_same(gradients(vit, loss), expected)


def test_reentrant_pairs(monkeypatch):
    """Nothing behind their nodes tells of the pass, so the passes that are alive must agree."""
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    x, other = batches()

    def loss():
        return vit.forward_features(x).square().sum()

    expected = gradients(vit, loss)
    with checkpointing(vit, "pairs of blocks", monkeypatch), checkpointing(vit, "reentrant", None):
        assert_same(gradients(vit, loss), expected)
        assert_same(gradients(vit, loss), expected)
        vit.set_grad_checkpointing(True)
        alive = vit.forward_features(other)
        with pytest.raises(RuntimeError, match="forward passes with as many tokens have different"):
            loss().backward()
        del alive


def test_checkpointed_model():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    x, other = batches()
    expected = gradients(vit, lambda: vit(x).square().sum())
    for reentrant in (False, True):
        x.requires_grad_()
        loss = checkpoint(vit, x, use_reentrant=reentrant).square().sum()
        vit(other)
        assert_same(gradients(vit, lambda loss=loss: loss), expected)


def test_a_pass_on_the_output_of_another():
    """The graph of the first pass lies behind that of the second."""
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    x, _ = batches()

    def loss():
        tokens = vit.forward_features(x)
        image = torch.nn.functional.interpolate(tokens[:, None, :, :32], size=GRIDS[1])
        return vit.forward_features(image.expand(-1, 3, -1, -1)).square().sum()

    expected = gradients(vit, loss)
    vit.set_grad_checkpointing(True)
    assert_same(gradients(vit, loss), expected)


def test_passes_die_with_their_graphs():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    x, other = batches()

    def alive():
        return [one for one in adapter._LIVE if vit.blocks[LAYER] in one.blocks]

    for checkpointed in (False, True):
        vit.set_grad_checkpointing(checkpointed)
        assert not alive()
        outputs = [vit(x), vit(other)]
        passes = [weakref.ref(one) for one in alive()]
        assert len(passes) == 2
        outputs[0].sum().backward()
        del outputs[0]
        assert [one.layout[:2] for one in alive()] == [(2, 8)]
        maps = vit.forward_intermediates(x, intermediates_only=True)
        del outputs[:]
        assert [one.layout[:2] for one in alive()] == [(4, 4)]  # kept by a map alone
        maps[-1].sum().backward()
        del maps
        assert not [one for one in passes if one() is not None]
    with torch.no_grad():
        vit(x)
    assert not alive()


def test_threads_recompute_their_own_pass():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    inputs = [x.requires_grad_() for x in batches()]
    expected = [torch.autograd.grad(vit(x).square().sum(), x)[0] for x in inputs]
    vit.set_grad_checkpointing(True)
    barrier, wrong = threading.Barrier(len(inputs)), []

    def work(x, gradient):
        for _ in range(5):
            loss = vit(x).square().sum()
            barrier.wait()
            (found,) = torch.autograd.grad(loss, x)
            if not torch.allclose(found, gradient):
                wrong.append(x.shape)

    in_threads(work, inputs, expected)
    assert not wrong


# ---- loops of the user's own -------------------------------------------------------------------


def loop(vit, x, run=lambda block, tokens: block(tokens)):
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block in vit.blocks:
        tokens = run(block, tokens)
    return vit.norm(tokens)


COPIES = {
    "itself": lambda vit: vit,
    "copy": copy.deepcopy,
    "pickle": lambda vit: pickle.loads(pickle.dumps(vit)),
}


@pytest.mark.parametrize("how", COPIES)
def test_own_loop(how):
    vit = COPIES[how](insert_early_compressor(tiny_vit(img_size=(16, 32)), LAYER))
    x = images(vit)
    expected = gradients(vit, lambda: vit.forward_features(x).square().sum())
    assert_close(loop(vit, x), vit.forward_features(x), ROUNDINGS)
    assert_same(gradients(vit, lambda: loop(vit, x).square().sum()), expected)
    for reentrant in (False, True):
        run = functools.partial(checkpoint, use_reentrant=reentrant)
        assert_same(gradients(vit, lambda run=run: loop(vit, x, run).square().sum()), expected)
    vit.set_input_size((32, 16))
    x = images(vit)
    assert_close(loop(vit, x), vit.forward_features(x), ROUNDINGS)
    with pytest.raises(ValueError, match="1 prefix tokens and 8 x 4 patches, 33 tokens, got"):
        vit.blocks[LAYER](torch.zeros(2, 32, 32))


def test_own_loop_over_images_of_any_size():
    """Not even a pass that is alive and has as many tokens may lend its grid."""
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True), LAYER)
    x, other = batches()
    alive = vit(other)
    with pytest.raises(RuntimeError, match="the patch grid of these tokens is not known"):
        loop(vit, x)
    del alive


def test_own_loop_with_rotary_embeddings():
    vit = insert_early_compressor(eva.make(**eva.ROPE), LAYER)
    x = images(vit)
    tokens, rope = vit._pos_embed(vit.patch_embed(x))
    for block in vit.blocks:
        tokens = block(tokens, rope=rope)
    assert_close(vit.norm(tokens), vit.forward_features(x), ROUNDINGS)
