# SPDX-License-Identifier: Apache-2.0
"""nn.EarlyCompressor is the formula of LLaVA-UHD v4, section 3.2, with the weights of its block."""

import copy
import functools

import pytest
import torch
from families.case import assert_close as close
from families.case import packed_windows
from timm.layers import AttentionRope, GatedMlp, SimpleNorm
from timm.models import cait, convit
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import uhd_ops
from uhd_ops import PackedGrids
from uhd_ops.nn import EarlyCompressor
from uhd_ops.nn.attention import drop_path, gathered_window_attention
from uhd_ops.nn.block_spec import MlpSpec
from uhd_ops.nn.mlp_forms import FORMS, WindowMlp

GRIDS = [(4, 6), (3, 5), (1, 1)]  # full windows, ragged ones at both edges, a single token
TOKENS = 40
DIM, HEADS = 32, 2
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


# ---- in training: stochastic depth and dropout, of the right things ------------------------------

EPS = torch.finfo(torch.float64).eps


def compressor(form="dense", **options):
    block = Block(DIM, HEADS, qkv_bias=True, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    return EarlyCompressor.from_block(block.train(), form=form)


def per_window(views):
    """One value per view, repeated for its merged tokens."""
    counts = torch.tensor([-(-h // 2) * -(-w // 2) for h, w in GRIDS])
    return views.repeat_interleave(counts)


def test_without_probabilities_training_is_evaluation():
    module, x = compressor(init_values=0.3), tokens()
    assert module.training
    assert torch.equal(module(x, GRIDS), module.eval()(x, GRIDS))


@pytest.mark.parametrize(
    "options", [{"drop_path": 0.5}, {"proj_drop": 0.5}, {"attn_drop": 0.5}], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_acts_in_training_only(form, options):
    module, x = compressor(form, **options), tokens()
    first = module(x, GRIDS)
    assert not torch.equal(first, module(x, GRIDS))
    first.sum().backward()
    module.eval()
    assert torch.equal(module(x, GRIDS), module(x, GRIDS))


@torch.no_grad()
def test_drop_path_takes_whole_views():
    # Without attention the result is mean(X) plus the branch, or the mean alone.
    x = tokens()
    module = compressor(drop_path=0.5)
    module.attention = "none"
    mean = uhd_ops.window_mean(x, GRIDS)
    branch = module.eval()(x, GRIDS) - mean
    module.train()
    seen = set()
    for _ in range(40):
        factor = ((module(x, GRIDS) - mean) * branch).sum(1) / branch.square().sum(1)
        kept = torch.tensor([factor[0], factor[6], factor[12]])
        assert ((factor - per_window(kept.round())).abs() < 100 * DIM * EPS).all()
        seen.add(tuple(kept.round().tolist()))
    assert seen == {(a, b, c) for a in (0.0, 2.0) for b in (0.0, 2.0) for c in (0.0, 2.0)}


def test_drop_path_of_a_batch():
    branch = torch.ones(200, 3, 4)
    dropped = drop_path(branch, 0.25)
    kept = dropped[:, :1, :1]
    assert torch.equal(dropped, kept.expand_as(branch))
    assert set(kept.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(drop_path(branch, 1.0), torch.zeros_like(branch))
    assert drop_path(branch, 0.0) is branch


@pytest.mark.parametrize("batched", [False, True])
def test_attention_path_without_dropout_is_the_operator(batched):
    shape = (2, 15, HEADS, 8) if batched else (TOKENS, HEADS, 8)
    grids = (3, 5) if batched else GRIDS
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    expected = uhd_ops.window_attention(q, k, v, grids)
    actual = gathered_window_attention(q, k, v, grids, 2)
    # Scores of 8 products in the exponent, and sums of 4 terms.
    assert (actual - expected).abs().max() <= 2 * (8 * 8**0.5 + 4) * EPS * v.abs().max()


def test_attention_dropout_keeps_the_mean():
    q, k, v = (torch.randn(6, 1, 4, dtype=torch.float64) for _ in range(3))
    expected = uhd_ops.window_attention(q, k, v, (2, 3))
    repeat = 4000
    many = [x.expand(repeat, *x.shape) for x in (q, k, v)]
    out = gathered_window_attention(*many, (2, 3), 2, dropout=0.3)
    # Six standard errors of the mean of so many draws.
    bound = 6 * out.std(0) / repeat**0.5
    assert ((out.mean(0) - expected).abs() <= bound).all()
    assert (out.std(0) > 0).any()


def mlp(hidden, form, bias=True, dim=DIM, **options):
    host = MlpSpec(
        torch.nn.Linear(dim, hidden, bias),
        torch.nn.Linear(hidden, dim, bias),
        options.pop("activation", "gelu"),
        norm=torch.nn.LayerNorm(dim),
        **options,
    )
    return WindowMlp(host, dim, 2, form).double()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_mlp_path_without_dropout_is_the_operator(form, bias, batched):
    x = torch.randn(2, 15, DIM, dtype=torch.float64) if batched else tokens()
    grids = (3, 5) if batched else GRIDS
    hidden = 24
    module = mlp(hidden, form, bias)
    expected = module(x, grids, residual=False)
    actual = module._call_layers(x, grids)
    assert module.reads_layers()
    assert actual.shape == expected.shape
    # Sums of 4 * DIM and of 4 * hidden terms, each as large as sqrt(DIM) times a standard normal.
    bound = (4 * DIM + 4 * hidden) * DIM**0.5 * EPS * expected.abs().max()
    assert (actual - expected).abs().max() <= bound


def test_hidden_dropout_drops_hidden_channels():
    # fc2 sums what is kept: with one hidden channel, an output is 0 or twice the value.
    module = mlp(1, "dense", False, dim=4, activation="relu", hidden_dropout=0.5)
    x = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        sign = module.norm(x.flatten()).sign()
        module.fc1.weight.copy_(module.fc1.weight.abs() * sign * (torch.arange(4) == 0)[:, None])
        module.fc2.weight.abs_()
    x = x.expand(64, 4, 4)
    some = module(x, (2, 2), residual=False)
    whole = module.eval()(x, (2, 2), residual=False)
    assert set((some / whole).round().flatten().tolist()) == {0.0, 2.0}


# ---- which blocks are refused, and with what words -----------------------------------------------


def spoil(cls=Block, **parts):
    block = cls(DIM, HEADS)
    for name, part in parts.items():
        owner, _, leaf = name.rpartition("__")
        setattr(block.get_submodule(owner.replace("__", ".")), leaf, part)
    return block


def pruned(inputs, outputs):
    return prune.l1_unstructured(nn.Linear(inputs, outputs), "weight", 0.5)


class OtherBlock(Block):
    pass


def quantised(inputs, outputs):
    layer = nn.Linear(inputs, outputs)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return layer


PLAIN = "must hold its weight as a plain parameter, got weight_mask, weight_orig"
REFUSED = {
    "class attention": (
        lambda: cait.LayerScaleBlockClassAttn(DIM, HEADS),
        r"got LayerScaleBlockClassAttn \(timm.models.cait\)",
    ),
    "a Block of another file": (
        lambda: convit.Block(DIM, HEADS),
        r"block must be one of .*Block, .*, got Block \(timm.models.convit\)",
    ),
    "subclass": (lambda: OtherBlock(DIM, HEADS), "block must be one of .*Block.*, got OtherBlock"),
    "no block": (lambda: nn.Linear(2, 2), "block must be one of .*Block, .*, got Linear"),
    "gated MLP": (
        lambda: spoil(mlp=GatedMlp(DIM, 64)),
        "block.mlp must be Mlp or GluMlp or SwiGLU or GeGluMlp, got GatedMlp",
    ),
    "rotary attention": (
        lambda: spoil(attn=AttentionRope(DIM, HEADS)),
        "block.attn must be Attention or DiffAttention, got AttentionRope",
    ),
    "norm in the MLP": (
        lambda: spoil(mlp__norm=SimpleNorm(128)),
        "block.mlp.norm must be LayerNorm or .* or RmsNormFp32, got SimpleNorm",
    ),
    "norm in the attention": (
        lambda: spoil(attn__norm=SimpleNorm(DIM)),
        "block.attn.norm must be LayerNorm or .*, got SimpleNorm",
    ),
    "norm in front": (
        lambda: spoil(norm2=SimpleNorm(DIM)),
        "block.norm2 must be LayerNorm or .*, got SimpleNorm",
    ),
    "differential attention, pruned": (
        lambda: spoil(functools.partial(Block, attn_layer="diff"), attn__qkv=pruned(DIM, 96)),
        f"block.attn.qkv {PLAIN}",
    ),
    "quantised in place": (
        lambda: spoil(attn__qkv=quantised(DIM, 96)),
        "block.attn.qkv.weight must have a floating dtype, got torch.int8",
    ),
    "parallel, pruned": (
        lambda: spoil(ParallelScalingBlock, in_proj=pruned(DIM, 224)),
        f"block.in_proj {PLAIN}",
    ),
    "parallel, narrow": (
        lambda: spoil(ParallelScalingBlock, in_proj=nn.Linear(DIM, 96)),
        r"block.in_proj.weight must have shape \(224, 32\), got \(96, 32\)",
    ),
    "parallel and differential, narrow": (
        lambda: spoil(DiffParallelScalingBlock, out_proj=nn.Linear(64, DIM)),
        r"block.out_proj.weight must have shape \(32, 160\), got \(32, 64\)",
    ),
    "talking heads, narrow": (
        lambda: spoil(cait.LayerScaleBlock, attn__proj=nn.Linear(16, DIM)),
        r"block.attn.proj.weight must have shape \(32, 32\), got \(32, 16\)",
    ),
    "parallel, other scale": (
        lambda: spoil(ParallelScalingBlock, scale=1.0),
        "block.scale must be head_dim",
    ),
    "parallel and differential, pruned": (
        lambda: spoil(DiffParallelScalingBlock, out_proj=pruned(160, DIM)),
        f"block.out_proj {PLAIN}",
    ),
    "parallel and differential, norm": (
        lambda: spoil(DiffParallelScalingBlock, sub_norm=SimpleNorm(16)),
        "block.sub_norm must be LayerNorm or .*, got SimpleNorm",
    ),
    "three things": (
        lambda: spoil(ParallelThingsBlock, ffns__1__mlp=GatedMlp(DIM, 64)),
        "block.ffns.1.mlp must be Mlp or .*, got GatedMlp",
    ),
    "three things, adapted": (
        lambda: spoil(ParallelThingsBlock, attns__0__adapter=nn.Linear(DIM, DIM)),
        r"block.attns.0 must hold \['norm', 'attn', 'ls', 'drop_path'\], got .*'adapter'\]",
    ),
    "talking heads, pruned": (
        lambda: spoil(cait.LayerScaleBlock, attn__proj_l=pruned(HEADS, HEADS)),
        f"block.attn.proj_l {PLAIN}",
    ),
    "activation": (
        lambda: Block(DIM, HEADS, act_layer=nn.Mish),
        "block.mlp.act must be GELU or GELUTanh or QuickGELU or SiLU or ReLU, got Mish",
    ),
    "adapted Linear": (
        lambda: spoil(attn__qkv=nn.utils.parametrizations.weight_norm(nn.Linear(DIM, 96))),
        "block.attn.qkv must be Linear, got ParametrizedLinear",
    ),
    "pruned Linear": (
        lambda: spoil(mlp__fc1=pruned(DIM, 128)),
        f"block.mlp.fc1 {PLAIN}",
    ),
    "spectral norm in a hook": (
        lambda: spoil(attn__proj=nn.utils.spectral_norm(nn.Linear(DIM, DIM))),
        "block.attn.proj must hold its weight as a plain parameter, got weight_orig, weight_u",
    ),
    "patched block": (
        lambda: spoil(forward=lambda x: x),
        "block must have the forward of its class, got one of its own",
    ),
    "patched attention": (
        lambda: spoil(attn__forward=lambda x: x),
        "block.attn must have the forward of its class",
    ),
    "patched Linear": (
        lambda: spoil(attn__qkv__forward=lambda x: x),
        "block.attn.qkv must have the forward of its class",
    ),
    "other scale": (lambda: spoil(attn__scale=1.0), "block.attn.scale must be head_dim"),
    "narrow projection": (
        lambda: spoil(attn__proj=nn.Linear(16, DIM)),
        r"block.attn.proj.weight must have shape \(32, 32\), got \(32, 16\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_does_not_understand(make, message):
    with pytest.raises(NotImplementedError, match=message):
        EarlyCompressor.from_block(make())
