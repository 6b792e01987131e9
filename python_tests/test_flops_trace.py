# SPDX-License-Identifier: Apache-2.0
"""Counting a forward pass without data, and torch's counter with the library's formulas."""

import json
import subprocess
import sys

import pytest
import timm
import torch
from battery.marks import native_only
from families.eva import DINOV3, make
from families.vision_transformer import make as tiny_vit
from tiny_minicpm import EVEN, tiny_tower
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import uhd_ops
from uhd_ops import _native, flops, insert_early_compressor
from uhd_ops.cli import main
from uhd_ops.flops import trace
from uhd_ops.nn import EarlyCompressor, PixelUnshuffleConnector, SliceEncoder

GRIDS = [(4, 6), (3, 5), (1, 1)]
TOKENS = 40


needs_formulas = native_only("there are no native operators that would need formulas")
skips_slots = native_only("the definition of window attention computes what ragged windows lack")


def macs(function, *args, **kwargs):
    """What torch's counter counts of a real pass, halved."""
    flops.register_formulas()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function(*args, **kwargs)
    return counter.get_total_flops() // 2


@needs_formulas
@pytest.mark.parametrize("window", [1, 2, 3, 50])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_formula_of_window_attention(window, backward, packed):
    qkv = torch.randn(TOKENS, 3, 2, 8, requires_grad=True)
    pairs = 0
    for height, width in GRIDS:
        for top in range(0, height, window):
            for left in range(0, width, window):
                pairs += (min(window, height - top) * min(window, width - left)) ** 2

    def run():
        if packed:
            out = uhd_ops.window_attention_qkvpacked(qkv, GRIDS, window)
        else:
            out = uhd_ops.window_attention(*qkv.unbind(1), GRIDS, window)
        if backward:
            out.sum().backward()

    # Scores and mixture; backwards scores again and four gradients.
    assert macs(run) == (7 if backward else 2) * pairs * 2 * 8


@needs_formulas
@pytest.mark.parametrize("form", ["dense", "block", "tied"])
@pytest.mark.parametrize("backward", [False, True])
def test_formulas_equal_the_definitions(form, backward, monkeypatch):
    """Whole windows, of which the definition of the attention computes nothing in vain."""
    compressor, x = EarlyCompressor(16, 2, form=form), torch.randn(24, 16, requires_grad=True)

    def run():
        out = compressor(x, [(4, 6)])
        if backward:
            out.sum().backward()

    native = macs(run)
    monkeypatch.setattr(_native, "has_kernels", lambda device: False)
    # Backwards, our attention computes its scores once more, which torch keeps instead.
    again = 6 * 4 * 4 * 16 if backward else 0
    assert native == macs(run) + again


@needs_formulas
def test_formula_without_data():
    flops.register_formulas()
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(24, 2, 8)
        uhd_ops.window_attention(q, q, q, [(4, 6)])
        assert counter.get_total_flops() == 2 * 2 * 6 * 16 * 16
        q = torch.empty(15, 2, 8)
        with pytest.raises(NotImplementedError, match="do not tell how the 6 windows share 15"):
            uhd_ops.window_attention(q, q, q, [(3, 5)])


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_formula_of_torchs_attention_on_the_cpu(backward, masked):
    """As many products as torch counts of its fused attention on CUDA."""
    flops.register_formulas()
    q = torch.randn(2, 3, 10, 16, requires_grad=True)
    k, v = (torch.randn(2, 3, 7, 16, requires_grad=True) for _ in range(2))
    mask = torch.zeros(10, 7) if masked else None
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if backward:
            out.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert {str(name) for name in counts} <= {f"aten.{name}" for name in trace._OF_TORCH}
    assert counter.get_total_flops() == 2 * 2 * 3 * 10 * 7 * 16 * (7 if backward else 2)


def test_the_counter_agrees_with_the_command_line(capsys):
    """On the CPU as a user runs it, with torch's choice of the attention."""
    assert main(["flops", "test_vit", "--layer", "2", "--form", "tied", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    vit, x = timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
    flops.register_formulas()
    for key in ("without", "with"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vit.forward_features(x)
        assert counter.get_total_flops() == 2 * result[key]["total"]
        insert_early_compressor(vit, 2, form="tied")


def test_registering_is_lazy_and_repeatable():
    """Triton, which torch's counter imports, takes longer to import than this library."""
    code = (
        "import sys, uhd_ops\n"
        "assert 'torch.utils.flop_counter' not in sys.modules\n"
        "uhd_ops.flops.register_formulas(); uhd_ops.flops.register_formulas()\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "print(sum('uhd_ops' in str(operator) for operator in flop_registry))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    expected = 7 if _native.status["cpu"] == "loaded" else 0
    assert result.stdout == f"{expected}\n", result.stderr


def total(module, *args, **kwargs):
    return flops.count_forward(module, *args, **kwargs).total


@skips_slots
@torch.no_grad()
def test_any_module():
    x = torch.randn(TOKENS, 16)
    connector = PixelUnshuffleConnector(16, 24, merger_times=2)
    (row,) = flops.count_forward(connector, x, GRIDS).layers
    assert (row.name, row.total) == ("forward", macs(connector, x, GRIDS))
    assert row.linear == row.total
    compressor = EarlyCompressor(16, 2)
    (row,) = flops.count_forward(compressor, x, grids=GRIDS).layers
    assert row.total == macs(compressor, x, GRIDS)
    # Windows of 4 tokens: six and two; of 2: one at the right and two at the bottom; of 1: two.
    assert row.attention == 2 * ((6 + 2) * 16 + (2 + 1) * 4 + (1 + 1)) * 16


@skips_slots
@torch.no_grad()
def test_packed_slices():
    """The slice encoder runs the parts of the blocks, not the blocks."""
    vit = insert_early_compressor(tiny_vit(img_size=32, class_token=False, global_pool="avg"), 1)
    pixels = torch.randn(TOKENS, 3, 4, 4)
    grids = uhd_ops.PackedGrids(GRIDS)
    report = flops.count_forward(SliceEncoder(vit), pixels, grids)
    assert report.total == macs(SliceEncoder(vit), pixels, grids)
    expected = flops.of_vit(vit, grids)
    for row, planned in zip(report.layers[:-1], expected.layers, strict=True):
        assert row.name.removeprefix("vit.") == planned.name
        assert (row.tokens, row.linear, row.attention) == (
            *(planned.tokens, planned.linear, planned.attention),
        )


@torch.no_grad()
def test_tower_that_decides_by_integers():
    """MiniCPM-V's tower in transformers takes the sizes of its views as a tensor."""
    tower, sizes = tiny_tower(dtype=torch.float32), torch.tensor(EVEN)
    pixels = torch.randn(1, 3, 8, 8 * int(sizes.prod(1).sum()))
    report = flops.count_forward(tower, pixels, target_sizes=sizes)
    assert report.total == macs(tower, pixels, target_sizes=sizes)
    assert len(report.layers) == 3 + 2


def test_modes_and_devices():
    vit = insert_early_compressor(tiny_vit(), 1)
    x = torch.randn(1, 3, 28, 28)
    expected = total(vit, x)
    with torch.inference_mode():
        assert total(vit, x) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert total(vit, x) == expected
    assert total(vit.bfloat16(), x.bfloat16()) == expected
    assert total(vit.to("meta"), x.bfloat16().to("meta")) == expected


@pytest.mark.parametrize(
    "options", [{}, {"use_rot_pos_emb": True, "dynamic_img_size": True, **DINOV3}], ids=str
)
@torch.no_grad()
def test_leaves_nothing_behind(options):
    """Not in the model, not in what it keeps for later, and none of its hooks lost."""
    model, calls = make(**options), []
    model.blocks[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 3, 28, 28)
    expected, state = model(x), {key: y.clone() for key, y in model.state_dict().items()}
    flops.count_forward(insert_early_compressor(model, 1), x)
    uhd_ops.remove_early_compressor(model)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(y, state[key]) for key, y in model.state_dict().items())
    assert type(model.patch_embed.proj.weight.data) is torch.Tensor


class Chatty(nn.Module):
    """Fails in the middle of a pass."""

    def forward(self, x):
        raise RuntimeError("stop")


def test_an_error_ends_the_count():
    x = torch.randn(2, 2)
    with pytest.raises(RuntimeError, match="stop"):
        flops.count_forward(Chatty(), x)
    assert type(nn.Linear(2, 2)(x)) is torch.Tensor  # no mode and no hook is left
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_bad_calls():
    with pytest.raises(TypeError, match=r"^forward must be a torch.nn.Module or a method of one"):
        flops.count_forward(len, [1])
    model = make()
    with pytest.raises(ValueError, match=r"^grids must hold grids that Eva takes, got \(9, 7\)"):
        flops.of_vit(model, [(7, 7), (9, 7)])
    assert flops.of_vit(model, []).total == 0
