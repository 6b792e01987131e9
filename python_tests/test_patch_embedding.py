# SPDX-License-Identifier: Apache-2.0
"""refine_patch_embedding keeps what a patch embedding sees, at another patch size."""

import copy

import pytest
import torch
from families.case import assert_close, randomise
from hf_packed import PATCH, make_moonvit
from timm.layers import resample_patch_embed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch.nn import functional

from uhd_ops import insert_early_compressor, refine_patch_embedding

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PAIRS = [(16, 8), (16, 10), (14, 10), (14, 8), (8, 16), (10, 14), (14, 14)]
FILTERED = [("bicubic", True), ("bilinear", True)]
UNFILTERED = [("bicubic", False), ("bilinear", False), ("area", False)]
KINDS = [*FILTERED, *UNFILTERED, ("nearest-exact", False)]
FLOAT32 = torch.finfo(torch.float32).eps


def resize_by_hand(patches, side, interpolation, antialias):
    """Patches (..., p, p), resized; torch takes no antialias where it has none."""
    options = {"antialias": antialias} if interpolation.startswith("bi") else {}
    return functional.interpolate(patches, size=(side, side), mode=interpolation, **options)


def model(patch, side=560, cls=VisionTransformer, **options):
    torch.manual_seed(0)
    return randomise(cls(img_size=side, patch_size=patch, num_classes=0, **{**SMALL, **options}))


def smooth(vit):
    """Give the patch embedding kernels like trained ones: low frequencies only."""
    weight = vit.patch_embed.proj.weight
    coarse = torch.randn(*weight.shape[:2], 4, 4)
    with torch.no_grad():
        weight.copy_(functional.interpolate(coarse, size=weight.shape[2:], mode="bicubic"))
    return vit


@pytest.mark.parametrize(("interpolation", "antialias"), KINDS)
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_residual_is_that_of_least_squares(old, new, interpolation, antialias):
    vit = model(old)
    before = vit.patch_embed.proj.weight.detach().double().flatten(2)
    options = {"interpolation": interpolation, "antialias": antialias}
    assert refine_patch_embedding(vit, new, **options) is vit
    after = vit.patch_embed.proj.weight.detach().double().flatten(2)
    impulses = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    resize = resize_by_hand(impulses, new, interpolation, antialias).flatten(1).T  # (q², p²): B
    best = torch.linalg.lstsq(resize.T, before.flatten(0, 1).T).solution.T.view_as(after)
    # Solved in float64, and rounded once.
    assert (after - best).abs().max() <= FLOAT32 * best.abs().max()
    tolerance = FLOAT32 * float(torch.linalg.cond(resize))
    expected = float((best @ resize - before).norm() / before.norm())
    done = vit.patch_refinement
    assert (done.old_patch_size, done.new_patch_size) == (old, new)
    assert (done.interpolation, done.antialias) == (interpolation, antialias)
    assert abs(done.residual - expected) <= tolerance
    if new >= old:
        assert done.residual <= tolerance
    else:
        # What a least-squares fit of white noise leaves, up to the noise of so many coefficients.
        white = (1 - (new / old) ** 2) ** 0.5
        assert abs(done.residual - white) < 4 / before.numel() ** 0.5


@pytest.mark.parametrize(("interpolation", "antialias"), KINDS)
@pytest.mark.parametrize(("old", "new"), [(8, 16), (10, 14)])
@torch.no_grad()
def test_larger_patches_see_the_same(old, new, interpolation, antialias):
    # A patch enlarged by the same resize gives the same product: that is the definition.
    vit = model(old, side=old * 3)
    patch = torch.randn(1, 3, old, old)
    expected = functional.conv2d(patch, vit.patch_embed.proj.weight)
    options = {"interpolation": interpolation, "antialias": antialias}
    refine_patch_embedding(vit, new, img_size=new * 3, **options)
    larger = resize_by_hand(patch, new, interpolation, antialias)
    actual = functional.conv2d(larger, vit.patch_embed.proj.weight)
    assert (actual - expected).abs().max() <= 100 * new**2 * FLOAT32 * expected.abs().max()


@pytest.mark.parametrize(("old", "new"), PAIRS[:4])
def test_what_smooth_kernels_lose(old, new):
    """The order that the documentation names, and little where a filter has been."""
    lost = {}
    for kind in KINDS:
        options = dict(zip(("interpolation", "antialias"), kind, strict=True))
        vit = refine_patch_embedding(smooth(model(old)), new, **options)
        lost[kind] = vit.patch_refinement.residual
    white = (1 - (new / old) ** 2) ** 0.5
    filtered, unfiltered = [lost[kind] for kind in FILTERED], [lost[kind] for kind in UNFILTERED]
    assert max(filtered) < white / 4
    assert max(filtered) < min(unfiltered)
    assert max(unfiltered) < lost["nearest-exact", False]
    assert lost["nearest-exact", False] > 0.9 * white


def test_kinds_without_a_filter_say_so():
    vit = refine_patch_embedding(model(16, 80), 8, interpolation="area", antialias=True)
    assert not vit.patch_refinement.antialias


def test_models_without_weights():
    with torch.device("meta"):
        vit = refine_patch_embedding(model(16, 80), 8, interpolation="bilinear")
    assert vit.patch_embed.proj.weight.shape == (32, 3, 8, 8)
    assert vit.patch_embed.proj.weight.is_meta
    refined, vit = refine_patch_embedding(model(16), 8), model(16)
    with torch.device("meta"):
        refine_patch_embedding(vit, 8)
    assert torch.equal(vit.patch_embed.proj.weight, refined.patch_embed.proj.weight)
    assert vit.patch_refinement == refined.patch_refinement


@pytest.mark.parametrize("cls", [VisionTransformer, Eva, Beit, VisionTransformerRelPos])
@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")
@torch.no_grad()
def test_whole_models(cls):
    options = {"use_rot_pos_emb": True} if cls is Eva else {}
    options |= {"use_rel_pos_bias": True} if cls is Beit else {}
    vit = model(16, 80, cls, **options)
    assert refine_patch_embedding(vit, 10).patch_embed.grid_size == (8, 8)
    assert vit.feature_info[0]["reduction"] == 10
    prefix = vit.num_prefix_tokens
    assert vit.forward_features(torch.randn(2, 3, 80, 80)).shape == (2, prefix + 64, 32)
    insert_early_compressor(vit, 0)
    assert vit.forward_features(torch.randn(2, 3, 80, 80)).shape == (2, prefix + 16, 32)
    assert vit.forward_features(torch.randn(2, 3, 80, 80)).isfinite().all()


@torch.no_grad()
def test_after_the_insertion():
    vit = model(16, 80)
    other = copy.deepcopy(vit)
    x = torch.randn(1, 3, 80, 80)
    refine_patch_embedding(insert_early_compressor(vit, 0), 8)
    insert_early_compressor(refine_patch_embedding(other, 8), 0)
    assert torch.equal(vit.forward_features(x), other.forward_features(x))
    assert vit.feature_info == other.feature_info


@torch.no_grad()
@pytest.mark.parametrize("first", ["insert", "refine"])
def test_moonvit(first, tmp_path):
    """Patches enlarged by the same resize become the same tokens, with compressors and without."""
    old, new = make_moonvit(), make_moonvit()
    new.load_state_dict(old.state_dict())
    shapes = torch.tensor([(1, 4, 8), (1, 8, 4)])
    patches = torch.randn(64, 3, PATCH, PATCH)
    larger = functional.interpolate(patches, size=(6, 6), mode="bicubic", antialias=True)
    insert_early_compressor(old, 1)
    if first == "insert":
        insert_early_compressor(new, 1)
    frozen = new.patch_embed.proj.weight.requires_grad_(False)
    assert refine_patch_embedding(new, PATCH) is new
    assert new.patch_embed.proj.weight is frozen
    refine_patch_embedding(new, 6)
    assert new.patch_embed.proj.kernel_size == new.patch_embed.proj.stride == (6, 6)
    assert new.patch_refinement.residual <= 100 * PATCH**2 * FLOAT32
    assert not new.patch_embed.proj.weight.requires_grad
    insert_early_compressor(new, 1)
    expected = old(patches, shapes).last_hidden_state
    # The solution's rounding, once more for each of four layers.
    assert_close(new(larger, shapes).last_hidden_state, expected, 4 * 100 * PATCH**2)
    with pytest.raises(ValueError, match="multiples of 4 x 4 patches, 24 x 24 px"):
        new(larger, torch.tensor([(1, 2, 32)]))
    solved = resample_patch_embed(new.patch_embed.proj.weight, [3, 3])
    new.save_pretrained(tmp_path)
    loaded = type(new).from_pretrained(tmp_path)
    assert torch.equal(loaded.patch_embed.proj.weight, new.patch_embed.proj.weight)
    smaller = refine_patch_embedding(loaded, 3).patch_embed.proj.weight
    assert_close(smaller, solved, 100 * 6**2)


def test_options_of_the_convolution_survive():
    vit = model(16, 80).to(torch.bfloat16)
    vit.patch_embed.proj.weight.requires_grad_(False)
    refine_patch_embedding(vit, 8)
    assert vit.patch_embed.proj.weight.dtype == torch.bfloat16
    assert not vit.patch_embed.proj.weight.requires_grad
    assert vit.pos_embed.requires_grad


def test_a_kernel_of_zeros_loses_nothing():
    vit = model(16, 80)
    torch.nn.init.zeros_(vit.patch_embed.proj.weight)
    assert refine_patch_embedding(vit, 8).patch_refinement.residual == 0.0


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: model(16, 80), {"patch_size": 7}, ValueError, "multiple of patch_size = 7 px"),
        (lambda: model(16, 80), {"patch_size": 0}, ValueError, "patch_size must be at least 1"),
        (lambda: model(16, 80), {"patch_size": 8.0}, TypeError, "patch_size must be an int"),
        (
            lambda: model(16, 80),
            {"patch_size": 8, "img_size": (80, 81)},
            ValueError,
            r"got 80 x 81 px",
        ),
        (
            lambda: model(16, 80),
            {"patch_size": 8, "interpolation": "lanczos"},
            ValueError,
            'one of "bicubic", "bilinear", "area", "nearest-exact", got \'lanczos\'',
        ),
        (
            make_moonvit,
            {"patch_size": 8, "antialias": 1},
            TypeError,
            "antialias must be a bool, got int",
        ),
        (lambda: model(16, 80), {"patch_size": 8, "img_size": "80"}, TypeError, "img_size must be"),
        (
            lambda: SwinTransformer(depths=(1,), num_heads=(1,), embed_dim=16),
            {"patch_size": 8},
            NotImplementedError,
            "VisionTransformerRelPos, or MoonViT of transformers, got SwinTransformer",
        ),
        (
            make_moonvit,
            {"patch_size": 8, "img_size": 64},
            ValueError,
            "img_size must be None for MoonViT, got 64",
        ),
        (lambda: None, {"patch_size": 8}, TypeError, r"vit must be a torch\.nn\.Module"),
    ],
)
def test_refusals(make, arguments, error, message):
    vit = make()
    before = None if vit is None else repr(vit)
    with pytest.raises(error, match=message):
        refine_patch_embedding(vit, **arguments)
    assert vit is None or repr(vit) == before
