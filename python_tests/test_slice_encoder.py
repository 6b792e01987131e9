# SPDX-License-Identifier: Apache-2.0
"""nn.SliceEncoder gives every view what the model gives it alone, and packs without mixing."""

import copy

import pytest
import torch
from families.vision_transformer import CASES
from families.vision_transformer import make as tiny_vit
from families.vision_transformer import make_distilled as tiny_distilled
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from uhd_ops import PackedGrids, insert_early_compressor
from uhd_ops.nn import SliceEncoder

# Two images of four and two views: equal neighbours, equal ones apart, ragged grids, one patch.
FEATURES = CASES["VisionTransformer"].variants
SIZES = [(28, 28), (16, 20), (16, 20), (12, 36), (4, 4), (16, 20)]
GRIDS = [(7, 7), (4, 5), (4, 5), (3, 9), (1, 1), (4, 5)]
MERGED = [(4, 4), (2, 3), (2, 3), (2, 5), (1, 1), (2, 3)]
COUNTS = (4, 2)


def random_views(dtype=torch.float32, sizes=SIZES):
    return [torch.randn(3, *size, dtype=dtype) for size in sizes]


def alone(vit, view):
    """Return forward_features of one view, on a model of the view's size."""
    vit = copy.deepcopy(vit)
    if not vit.dynamic_img_size:
        vit.set_input_size(img_size=tuple(view.shape[1:]))
    return vit.forward_features(view[None])[0]


def assert_close(actual, expected):
    """The bound that the encoder promises, relative to the largest token."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_equals_each_view_alone(vit, views=None):
    views = random_views() if views is None else views
    result = SliceEncoder(vit)(views, views_per_image=COUNTS)
    prefix = vit.num_prefix_tokens
    for view, tokens, in_front in zip(views, result.per_view(), result.prefix, strict=True):
        expected = alone(vit, view)
        assert_close(tokens, expected[prefix:])
        assert_close(in_front, expected[:prefix])
    return result


@pytest.mark.parametrize("layer", [None, 0, 2, 3])
def test_layers(layer):
    vit = tiny_vit()
    if layer is not None:
        insert_early_compressor(vit, layer)
    result = assert_equals_each_view_alone(vit)
    assert list(result.grids) == (GRIDS if layer is None else MERGED)
    lengths = [h * w for h, w in result.grids]
    assert [len(x) for x in result.per_image()] == [sum(lengths[:4]), sum(lengths[4:])]
    assert torch.equal(torch.cat(result.per_image()), result.tokens)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features(features):
    assert_equals_each_view_alone(insert_early_compressor(tiny_vit(**features), 1))


@pytest.mark.parametrize(
    "options", [{"attention": False}, {"form": "tied"}, {"window": 3}], ids=str
)
def test_compressor_options(options):
    assert_equals_each_view_alone(insert_early_compressor(tiny_vit(), 1, **options))


def test_distilled():
    assert_equals_each_view_alone(insert_early_compressor(tiny_distilled(), 1))


def test_packed_patches_equal_views():
    encoder = SliceEncoder(insert_early_compressor(tiny_vit(), 1))
    views = random_views()
    tiles = [v.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(0, 1) for v in views]
    result = encoder(torch.cat(tiles), GRIDS)
    assert torch.equal(result.tokens, encoder(views).tokens)
    assert torch.equal(encoder(torch.cat(tiles), PackedGrids(GRIDS)).tokens, result.tokens)
    assert result.views_per_image == (6,)
    assert repr(result) == (
        f"SliceTokens(tokens={tuple(result.tokens.shape)}, grids={result.grids!r}, "
        f"prefix={tuple(result.prefix.shape)}, views_per_image=(6,), dtype=torch.float32, "
        "device='cpu')"
    )


def test_padded_views():
    vit = insert_early_compressor(tiny_vit(dynamic_img_size=True, dynamic_img_pad=True), 1)
    views = random_views(sizes=[(27, 29), (5, 4), (8, 8), (8, 8), (4, 4), (7, 7)])
    result = assert_equals_each_view_alone(vit, views)
    assert list(result.grids)[:2] == [(4, 4), (1, 1)]


def test_a_view_does_not_depend_on_the_others():
    encoder = SliceEncoder(insert_early_compressor(tiny_vit().double(), 1))
    views = random_views(torch.float64)
    tokens = encoder(views).per_view()
    views[0] = views[0] * float("nan")
    again = encoder(views).per_view()
    assert again[0].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(again[1:], tokens[1:], strict=True))


@pytest.mark.parametrize("vit", [tiny_vit(), tiny_vit(class_token=False, global_pool="avg")])
def test_no_views(vit):
    result = SliceEncoder(vit)([], views_per_image=[0, 0])
    assert result.tokens.shape == (0, 32)
    assert result.prefix.shape == (0, vit.num_prefix_tokens, 32)
    assert [len(x) for x in result.per_image()] == [0, 0]
    # Data-parallel training waits for a gradient of every parameter, from a rank without views too.
    result.tokens.sum().backward()
    unused = {name for name, p in vit.named_parameters() if p.grad is None}
    assert {name.partition(".")[0] for name in unused} <= {"head", "fc_norm"}


def test_gradients_with_and_without_checkpointing():
    vit = insert_early_compressor(tiny_vit(init_values=0.3, qk_norm=True), 1)
    encoder, views = SliceEncoder(vit).train(), random_views()
    grads = []
    for checkpointing in (False, True):
        vit.set_grad_checkpointing(checkpointing)
        encoder.zero_grad()
        encoder(views).tokens.square().sum().backward()
        grads.append({name: p.grad for name, p in vit.named_parameters() if p.grad is not None})
    unused = {name for name, _ in vit.named_parameters()} - grads[0].keys()
    assert unused == {"head.weight", "head.bias"}
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_drop_path_in_training():
    vit = insert_early_compressor(tiny_vit(drop_path_rate=0.5), 1)
    encoder, views = SliceEncoder(vit).train(), random_views()
    assert not torch.equal(encoder(views).tokens, encoder(views).tokens)
    assert torch.equal(encoder.eval()(views).tokens, encoder(views).tokens)


def test_half_types():
    encoder = SliceEncoder(insert_early_compressor(tiny_vit(), 1).bfloat16())
    assert encoder(random_views(torch.bfloat16)).tokens.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        result = SliceEncoder(tiny_vit(qk_norm=True))(random_views())
    assert result.tokens.isfinite().all()


class Adapted(nn.Linear):
    """A linear layer with a second one beside it."""

    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


@pytest.mark.parametrize("features", [{}, {"attn_layer": "diff"}], ids=str)
@torch.no_grad()
def test_compile_in_one_graph(features):
    vit = insert_early_compressor(tiny_vit(**features), 1)
    encoder, views = SliceEncoder(vit), random_views()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: encoder(x).tokens, backend="eager", fullgraph=True)
    assert torch.equal(compiled(views), encoder(views).tokens)
    before = encoder(views).tokens
    vit.blocks[2].attn.qkv.__class__ = Adapted
    assert torch.equal(compiled(views), encoder(views).tokens)
    assert not torch.equal(before, encoder(views).tokens)


def test_parameters_are_those_of_the_moment():
    vit = insert_early_compressor(tiny_vit(init_values=0.3), 1)
    encoder, views = SliceEncoder(vit), random_views()
    for assign in (False, True):
        other = {k: torch.randn_like(v) * 0.2 for k, v in vit.state_dict().items()}
        vit.load_state_dict(other, assign=assign)
        assert_equals_each_view_alone(vit, views)
        assert_close(encoder(views).tokens, SliceEncoder(vit)(views).tokens)
    optimiser = torch.optim.SGD(vit.parameters(), lr=1e-2)
    encoder(views).tokens.square().mean().backward()
    before = encoder(views).tokens.detach()
    optimiser.step()
    assert not torch.equal(encoder(views).tokens, before)
    for view, tokens in zip(views, encoder(views).per_view(), strict=True):
        assert_close(tokens, alone(vit, view)[vit.num_prefix_tokens :])


def test_shares_the_model_and_its_keys():
    vit = insert_early_compressor(tiny_vit(), 1)
    encoder = SliceEncoder(vit)
    assert list(encoder.state_dict()) == [f"vit.{key}" for key in vit.state_dict()]


class OtherEmbedding(VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(x)


def patched_vit(**methods):
    vit = tiny_vit()
    vars(vit).update(methods)
    return vit


class OtherStem(PatchEmbed):
    pass


REFUSED = {
    "no ViT": (
        lambda: nn.Linear(2, 2),
        r"vit is of no class that is known; got torch\.nn\.modules\.linear\.Linear\. docs",
    ),
    "other positions": (
        lambda: tiny_vit(OtherEmbedding),
        "vit must leave VisionTransformer._pos_embed as it is, but OtherEmbedding replaces it",
    ),
    "patched positions": (
        lambda: patched_vit(_pos_embed=lambda x: x),
        "vit must leave VisionTransformer._pos_embed as it is, but it has one of its own",
    ),
    "other stem": (
        lambda: tiny_vit(embed_layer=OtherStem),
        "vit.patch_embed must be PatchEmbed or HybridEmbed, got OtherStem",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_does_not_understand(make, message):
    with pytest.raises(NotImplementedError, match=message):
        SliceEncoder(make())


PATCHES = torch.zeros(20, 3, 4, 4)
BAD_CALLS = {
    "tensor without grids": ((PATCHES,), {}, TypeError, "views must be a sequence of"),
    "list with grids": (([PATCHES], [(4, 5)]), {}, TypeError, "views must be a torch.Tensor"),
    "too few patches": ((PATCHES, [(4, 6)]), {}, ValueError, r"\(24, 3, 4, 4\) for these grids"),
    "other patch size": (
        (torch.zeros(20, 3, 8, 8), [(4, 5)]),
        {},
        ValueError,
        r"got shape \(20, 3, 8, 8\)",
    ),
    "dtype": (
        (PATCHES.double(), [(4, 5)]),
        {},
        TypeError,
        "views must have the dtype of the model's parameters, torch.float32, got torch.float64",
    ),
    "side": (
        ([torch.zeros(3, 8, 9)],),
        {},
        ValueError,
        r"views\[0\] must have sides that are multiples of the patch, 4 x 4 px, got 8 x 9 px",
    ),
    "batch": (
        ([torch.zeros(1, 3, 8, 8)],),
        {},
        ValueError,
        r"views\[0\] must be \(3, H, W\), got shape \(1, 3, 8, 8\)",
    ),
    "bytes": (
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)],),
        {},
        TypeError,
        r"views\[0\] must be float32",
    ),
    "empty view": ((PATCHES, [(4, 5), (0, 3)]), {}, ValueError, "a patch for each view"),
    "counts": (
        (PATCHES, [(4, 5)]),
        {"views_per_image": [2]},
        ValueError,
        r"views_per_image must add up to 1 views, got \(2,\)",
    ),
    "count types": (
        (PATCHES, [(4, 5)]),
        {"views_per_image": [1.0]},
        TypeError,
        "views_per_image must hold ints",
    ),
    "one count": (
        (PATCHES, [(4, 5)]),
        {"views_per_image": 1},
        TypeError,
        "views_per_image must hold ints, got 1",
    ),
}


def test_counts_may_be_any_integers():
    result = SliceEncoder(tiny_vit())(PATCHES, [(4, 5)], views_per_image=torch.tensor([0, 1]))
    assert result.views_per_image == (0, 1)


def test_refuses_unknown_positions():
    with pytest.raises(ValueError, match='positions must be "resample" or "nearest", got "cubic"'):
        SliceEncoder(tiny_vit(), "cubic")
    with pytest.raises(ValueError, match='positions must be "resample" for a model without'):
        SliceEncoder(tiny_vit(pos_embed="none"), "nearest")


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        SliceEncoder(tiny_vit())(*args, **kwargs)


def test_training_refuses_dropout_of_patches():
    encoder = SliceEncoder(tiny_vit(patch_drop_rate=0.5))
    encoder(random_views())
    with pytest.raises(NotImplementedError, match="dropout"):
        encoder.train()(random_views())
