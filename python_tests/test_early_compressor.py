# SPDX-License-Identifier: Apache-2.0
"""nn.EarlyCompressor is the formula of LLaVA-UHD v4, section 3.2, with the weights of its block."""

import copy
import functools

import pytest
import torch
from families.case import assert_close as close
from families.case import packed_windows
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional

from uhd_ops import PackedGrids
from uhd_ops.nn import EarlyCompressor

GRIDS = [(4, 6), (3, 5), (1, 1)]  # full windows, ragged ones at both edges, a single token
TOKENS = 40
DIM, HEADS = 32, 2
FORMS = ("dense", "block", "tied")
# Each of the 8 products in a row sums at most 4 * 4 * DIM terms, and two norms divide by a standard
# deviation of about one: so many roundings, relative to the largest number on the way.
ROUNDINGS = 8 * 16 * DIM
assert_close = functools.partial(close, roundings=ROUNDINGS)

BLOCKS = {
    "plain": {},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "LayerScale": {"init_values": 0.3},
    "query and key norm": {"qk_norm": True},
    "tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "relu": {"act_layer": nn.ReLU},
    "silu": {"act_layer": nn.SiLU},
    "wide MLP": {"mlp_ratio": 5.5},
    "eps": {"norm_layer": lambda n, **factory: nn.LayerNorm(n, eps=1e-3, **factory)},
    "norm without bias": {"norm_layer": lambda n, **on: nn.LayerNorm(n, bias=False, **on)},
    "norm without weights": {
        "norm_layer": lambda n, **on: nn.LayerNorm(n, elementwise_affine=False, **on)
    },
}


def random_block(cls=Block, dtype=torch.float64, **options):
    block = cls(DIM, HEADS, **{"qkv_bias": True, **options}).to(dtype).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return block


def tokens(dtype=torch.float64):
    return torch.randn(TOKENS, DIM, dtype=dtype)


def by_hand(block, x, grids, *, f=2, attention=True):
    """The paper's formula, window by window, with the modules of the block itself."""
    patches, dense = f * f, block.mlp
    fc1 = torch.block_diag(*[dense.fc1.weight] * patches)
    fc2 = torch.cat([dense.fc2.weight] * patches, 1) / patches
    bias = None if dense.fc1.bias is None else dense.fc1.bias.repeat(patches)
    affine = [
        None if p is None else p.repeat(patches) for p in (block.norm2.weight, block.norm2.bias)
    ]
    out = []
    for present, slots in packed_windows(grids, f):
        y = x.clone()
        if attention:
            y[present] += block.ls1(block.attn(block.norm1(x[present])[None]))[0]
        z = y[slots].flatten()
        h = functional.layer_norm(z, z.shape, *affine, block.norm2.eps)
        h = dense.act(functional.linear(h, fc1, bias))
        out.append(y[present].mean(0) + block.ls2(functional.linear(h, fc2, dense.fc2.bias)))
    return torch.stack(out)


@pytest.mark.parametrize("attention", [True, False], ids=["attention", "MLP only"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_reuses_the_block_as_the_paper_says(options, form, attention):
    block = random_block(**options)
    x = tokens()
    compressor = EarlyCompressor.from_block(block, form=form, attention=attention)
    assert_close(compressor(x, GRIDS), by_hand(block, x, GRIDS, attention=attention))


@pytest.mark.parametrize("window", [3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_other_windows(form, window):
    block, x = random_block(), tokens()
    compressor = EarlyCompressor.from_block(block, form=form, window=window)
    assert_close(compressor(x, GRIDS), by_hand(block, x, GRIDS, f=window), roundings=4 * ROUNDINGS)


def test_dense_weights_are_the_formula():
    block = random_block()
    compressor = EarlyCompressor.from_block(block)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    assert torch.equal(compressor.mlp.fc1.weight, torch.block_diag(*[fc1.weight] * 4))
    assert torch.equal(compressor.mlp.fc1.bias, fc1.bias.repeat(4))
    assert torch.equal(compressor.mlp.fc2.weight, torch.cat([fc2.weight] * 4, 1) / 4)
    assert torch.equal(compressor.mlp.fc2.bias, fc2.bias)
    assert torch.equal(compressor.mlp.norm.weight, block.norm2.weight.repeat(4))
    assert torch.equal(compressor.mlp.norm.bias, block.norm2.bias.repeat(4))
    assert compressor.mlp.norm.eps == block.norm2.eps
    assert torch.equal(compressor.attn.qkv.weight, block.attn.qkv.weight)


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_equal_tokens_give_what_the_block_gives(options):
    # Attention, norms and the MLP of a window of equal tokens are those of one token.
    block = random_block(**options)
    x = torch.randn(DIM, dtype=torch.float64).expand(TOKENS, DIM).contiguous()
    merged = EarlyCompressor.from_block(block)(x, GRIDS)
    assert_close(merged, block(x[None, :1])[0].expand_as(merged))


def test_the_block_is_copied_not_shared():
    block = random_block().requires_grad_(False)
    seen = []
    block.norm1.register_forward_hook(lambda *_: seen.append(1))
    compressor = EarlyCompressor.from_block(block)
    compressor(tokens(), GRIDS)
    assert not seen
    pointers = {p.data_ptr() for p in block.parameters()}
    assert not pointers & {p.data_ptr() for p in compressor.parameters()}
    assert all(p.requires_grad for p in compressor.parameters())


def test_the_function_of_a_compiled_part_is_not_copied():
    block, x = random_block(), tokens()
    expected = EarlyCompressor.from_block(block)(x, GRIDS)
    for part in (block.norm1, block.attn.qkv):
        part.compile(backend="eager")
    compressor = EarlyCompressor.from_block(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    assert torch.equal(compressor(x, GRIDS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    block = random_block(dtype=dtype)
    compressor = EarlyCompressor.from_block(block, form="tied")
    assert {p.dtype for p in compressor.parameters()} == {dtype}
    x = tokens(dtype)
    out = compressor(x, GRIDS)
    assert out.dtype == dtype
    exact = by_hand(copy.deepcopy(block).double(), x.double(), GRIDS)
    # 12 results are rounded to the type between x and the output; the norms, two in a row, and
    # weights of 0.3 times sqrt(C) widen each.
    growth = (0.3 * DIM**0.5) ** 2
    bound = 12 * growth * torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= bound


def test_autocast():
    compressor = EarlyCompressor.from_block(random_block(dtype=torch.float32, qk_norm=True))
    with torch.autocast("cpu", torch.bfloat16):
        out = compressor(tokens(torch.float32), GRIDS)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


# ---- the constructor ---------------------------------------------------------------------------


def test_forms_start_as_the_same_function():
    x = tokens()
    outs = []
    for form in FORMS:
        torch.manual_seed(5)
        module = EarlyCompressor(
            DIM, HEADS, form=form, qk_norm=True, layer_scale=0.5, dtype=torch.float64
        )
        outs.append(module(x, GRIDS))
    assert_close(outs[1], outs[0])
    assert_close(outs[2], outs[0])


def test_sizes():
    module = EarlyCompressor(DIM, 3, head_dim=8, hidden_dim=20, window=3, form="block", bias=False)
    assert module.attn.qkv.weight.shape == (3 * 24, DIM)
    assert module.mlp.fc1.weight.shape == (9, 20, DIM)
    assert module.mlp.fc1.bias is None
    assert module(tokens(torch.float32), GRIDS).shape == (
        PackedGrids(GRIDS).num_windows(3),
        DIM,
    )


def test_repr():
    module = EarlyCompressor(DIM, HEADS, form="tied")
    assert "dim=32, window=2, form='tied', attention='window'" in repr(module)
    assert "window=2, form='tied', activation='gelu_tanh'" in repr(module)
