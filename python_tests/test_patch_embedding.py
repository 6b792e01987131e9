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
from uhd_ops.retrofit.patch_embedding import kernel_residual

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
PAIRS = [(16, 8), (16, 10), (14, 10), (14, 8), (8, 16), (10, 14), (14, 14)]
# timm solves in float32: sums of p² products, and a matrix with a condition number below 5.
FLOAT32 = torch.finfo(torch.float32).eps


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


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_residual_is_that_of_least_squares(old, new):
    vit = model(old)
    before = vit.patch_embed.proj.weight.detach().double().flatten(2)
    assert refine_patch_embedding(vit, new) is vit
    after = vit.patch_embed.proj.weight.detach().double().flatten(2)
    impulses = torch.eye(old**2, dtype=torch.float64).view(-1, 1, old, old)
    resize = functional.interpolate(impulses, size=(new, new), mode="bicubic", antialias=True)
    resize = resize.flatten(1).T  # (q², p²): B
    best = torch.linalg.lstsq(resize.T, before.flatten(0, 1).T).solution.T.view_as(after)
    tolerance = 100 * old**2 * FLOAT32
    assert (after - best).abs().max() <= tolerance * best.abs().max()
    expected = float((best @ resize - before).norm() / before.norm())
    assert abs(vit.patch_refinement.residual - expected) <= tolerance
    if new >= old:
        assert vit.patch_refinement.residual <= tolerance
    else:
        # What a least-squares fit of white noise leaves, up to the noise of so many coefficients.
        white = (1 - (new / old) ** 2) ** 0.5
        assert abs(vit.patch_refinement.residual - white) < 4 / before.numel() ** 0.5


@pytest.mark.parametrize(("old", "new"), [(8, 16), (10, 14)])
@torch.no_grad()
def test_larger_patches_see_the_same(old, new):
    # A patch enlarged by the same resize gives the same product: that is the definition.
    vit = model(old, side=old * 3)
    patch = torch.randn(1, 3, old, old)
    expected = functional.conv2d(patch, vit.patch_embed.proj.weight)
    refine_patch_embedding(vit, new, img_size=new * 3)
    larger = functional.interpolate(patch, size=(new, new), mode="bicubic", antialias=True)
    actual = functional.conv2d(larger, vit.patch_embed.proj.weight)
    assert (actual - expected).abs().max() <= 100 * new**2 * FLOAT32 * expected.abs().max()


@pytest.mark.parametrize(("old", "new"), PAIRS[:4])
def test_smooth_kernels_lose_little(old, new):
    white = (1 - (new / old) ** 2) ** 0.5
    assert refine_patch_embedding(smooth(model(old)), new).patch_refinement.residual < white / 4


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
    assert kernel_residual(torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)) == 0.0


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
