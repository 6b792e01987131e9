# SPDX-License-Identifier: Apache-2.0
"""Weights of MiniCPM-V go into our modules and back, bit for bit."""

import pytest
import torch
from tiny_minicpm import (
    DIM,
    EVEN,
    HEADS,
    HIDDEN,
    ODD,
    TEXT_DIM,
    TOWERS,
    assert_close,
    images,
    randomized,
    tiny_model,
    tiny_tower,
    tower_by_hand,
)

from uhd_ops import PackedGrids
from uhd_ops.integrations.transformers import (
    accelerate,
    compressor_state_dict,
    connector_state_dict,
    merger_state_dict,
    vit_merger_state_dict,
)
from uhd_ops.nn import EarlyCompressor, PixelUnshuffleConnector

VERSIONS = pytest.mark.parametrize("version", TOWERS)
IN_MODEL = "model.vision_tower.vit_merger."


def compressor(**options):
    options = {"hidden_dim": HIDDEN, "dtype": torch.float64, **options}
    return randomized(EarlyCompressor(DIM, HEADS, **options))


def connector(**options):
    return randomized(PixelUnshuffleConnector(DIM, TEXT_DIM, dtype=torch.float64, **options))


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compressor_round_trip(version, dtype):
    model = tiny_model(version, dtype=dtype)
    whole = model.state_dict()
    part = {name: tensor for name, tensor in whole.items() if name.startswith(IN_MODEL)}
    ours = compressor(dtype=dtype)
    ours.load_state_dict(compressor_state_dict(whole))
    assert_equal(vit_merger_state_dict(ours.state_dict(), prefix=IN_MODEL), part)
    tower = model.model.vision_tower
    for source in (tower.state_dict(), tower.vit_merger.state_dict(), part):
        assert_equal(compressor_state_dict(source), ours.state_dict())
    tower.load_state_dict({**tower.state_dict(), **vit_merger_state_dict(ours.state_dict())})
    tower.vit_merger.load_state_dict(vit_merger_state_dict(ours.state_dict(), prefix=""))
    assert_equal(model.state_dict(), whole)


@VERSIONS
@pytest.mark.parametrize("merger_times", [1, 3])
def test_connector_round_trip(version, merger_times):
    model = tiny_model(version, merger_times=merger_times)
    whole = model.state_dict()
    part = {name: x for name, x in whole.items() if name.startswith("model.merger.")}
    ours = connector(merger_times=merger_times)
    ours.load_state_dict(connector_state_dict(whole))
    assert_equal(merger_state_dict(ours.state_dict(), prefix="model.merger."), part)
    assert_equal(connector_state_dict(model.model.merger.state_dict()), ours.state_dict())
    assert_equal(connector_state_dict(model.model.state_dict()), ours.state_dict())
    model.model.merger.load_state_dict(merger_state_dict(ours.state_dict(), prefix=""))
    assert_equal(model.state_dict(), whole)


@VERSIONS
@pytest.mark.parametrize("grids", [EVEN, ODD], ids=["even", "odd"])
def test_same_function_as_the_tower(version, grids):
    """Through our modules, the tower computes what it computes by itself."""
    tower = tiny_tower(version)
    pixels, sizes = images(grids)
    ours = compressor()
    ours.load_state_dict(compressor_state_dict(tower.state_dict()))
    x = torch.randn(1, pixels.shape[-1] // 8, DIM, dtype=torch.float64)
    accelerated = accelerate(tower).vit_merger
    assert_close(ours(x[0], grids), accelerated(x, sizes)[0])


@VERSIONS
@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("merger_times", [1, 2])
@pytest.mark.parametrize("grids", [EVEN, ODD], ids=["even", "odd"])
def test_connector_in_both_modes(version, mode, merger_times, grids):
    model = accelerate(tiny_model(version, merger_times=merger_times))
    pixels, sizes = images(grids)
    expected = model.get_image_features(pixels, sizes, downsample_mode=mode).pooler_output
    views = tower_by_hand(model.model.vision_tower, pixels, grids, mode == "16x")
    coarse = PackedGrids([grid for _, grid in views])
    assert coarse == (PackedGrids(grids).merged(2) if mode == "16x" else PackedGrids(grids))
    ours = connector(merger_times=merger_times)
    ours.load_state_dict(connector_state_dict(model.state_dict()))
    actual = ours(torch.cat([tokens for tokens, _ in views]), coarse)
    counts = [height * width for height, width in ours.merged(coarse)]
    for view, wanted in zip(actual.split(counts), expected, strict=True):
        assert_close(view, wanted)


@pytest.mark.parametrize("form", ["block", "tied"])
def test_other_forms_become_dense(form):
    ours = compressor(form=form)
    tower = accelerate(tiny_tower())
    tower.vit_merger.load_state_dict(vit_merger_state_dict(ours.state_dict(), prefix=""))
    grids = ODD
    x = torch.randn(1, sum(h * w for h, w in grids), DIM, dtype=torch.float64)
    actual = tower.vit_merger(x, torch.tensor(grids))[0]
    assert_close(actual, ours(x[0], grids))


def test_fused_parts_share_no_memory():
    converted = vit_merger_state_dict(compressor().state_dict())
    parts = [tensor.untyped_storage().data_ptr() for tensor in converted.values()]
    assert len(set(parts)) == len(parts)
    assert all(tensor.is_contiguous() for tensor in converted.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": False}, "lacks attn.norm.bias, attn.norm.weight, attn.proj.bias"),
        ({"bias": False}, "lacks attn.proj.bias, attn.qkv.bias, mlp.fc1.bias, mlp.fc2.bias"),
        ({"layer_scale": 0.1}, "has attn.post.gamma, mlp.post.gamma, for which there is no place"),
        ({"qk_norm": True}, "has attn.k_norm.bias, attn.k_norm.weight, attn.q_norm.bias"),
        ({"window": 3}, r"mlp.norm.weight must have 128 rows .* 2 x 2, got shape \(288,\)"),
        ({"head_dim": 8}, r"attn.qkv.weight must have 96 rows for C = 32 .* \(48, 32\)"),
    ],
    ids=["no attention", "no biases", "LayerScale", "q/k norm", "3 x 3", "head_dim"],
)
def test_no_place_in_a_vit_merger(options, message):
    with pytest.raises(ValueError, match=message):
        vit_merger_state_dict(compressor(**options).state_dict())


CONVERTERS = [
    compressor_state_dict,
    vit_merger_state_dict,
    connector_state_dict,
    merger_state_dict,
]


@pytest.mark.parametrize("convert", CONVERTERS)
def test_no_mapping(convert):
    with pytest.raises(TypeError, match="state_dict must be a mapping, got EarlyCompressor"):
        convert(compressor())


@pytest.mark.parametrize("convert", CONVERTERS)
def test_other_weights(convert):
    with pytest.raises(ValueError, match=r"state_dict (lacks|must hold the key)"):
        convert(torch.nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("convert", "prefix"),
    [(compressor_state_dict, IN_MODEL), (connector_state_dict, "model.merger.")],
)
def test_incomplete_and_ambiguous(convert, prefix):
    whole = tiny_model().state_dict()
    names = [name for name in whole if name.startswith(prefix) and name.endswith("linear_2.bias")]
    lacking = {name: tensor for name, tensor in whole.items() if name not in names}
    with pytest.raises(ValueError, match=r"state_dict lacks .*linear_2\.bias$"):
        convert(lacking)
    with pytest.raises(ValueError, match=r"has .*lora_A, for which there is no place"):
        convert({**whole, names[0].replace("bias", "lora_A"): whole[names[0]]})
    twice = {**whole, **{f"teacher.{name}": tensor for name, tensor in whole.items()}}
    with pytest.raises(ValueError, match=r"once, .* got prefixes: 'model\..*', 'teacher\.model\."):
        convert(twice)
    with pytest.raises(ValueError, match="got prefixes: none"):
        convert({})


def test_a_missing_stage():
    ours = connector(merger_times=3).state_dict()
    gap = {name: tensor for name, tensor in ours.items() if not name.startswith("stages.1.")}
    with pytest.raises(ValueError, match=r"state_dict lacks stages\.1\.fc1\.bias"):
        merger_state_dict(gap)
