# SPDX-License-Identifier: Apache-2.0
"""The compressor's layers are ordinary modules: what is put in their place takes effect."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from uhd_ops import nn as uhd_nn
from uhd_ops._checks import is_plain
from uhd_ops.nn.mlp_forms import WindowMlp
from uhd_ops.nn.modules import BlockLinear

GRIDS = [(4, 6), (3, 5)]
TOKENS = 4 * 6 + 3 * 5
DIM = 16
FORMS = ("dense", "block", "tied")
# Sums of at most 4 * 4 * DIM products of numbers around one, twice, in float64.
BOUND = 2 * 16 * DIM * torch.finfo(torch.float64).eps * 64


def compressor(form="dense", **options):
    return uhd_nn.EarlyCompressor(DIM, 2, form=form, **options).double()


def tokens():
    return torch.randn(TOKENS, DIM, dtype=torch.float64)


class LowRank(nn.Module):
    """What an adapter library puts around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2, dtype=torch.float64))

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize(
    ("form", "cls"), [("dense", nn.Linear), ("block", BlockLinear), ("tied", nn.Linear)]
)
def test_classes(form, cls):
    mlp = compressor(form).mlp
    assert type(mlp.fc1) is type(mlp.fc2) is cls
    if form == "dense":
        assert (mlp.fc1.in_features, mlp.fc1.out_features) == (4 * DIM, 16 * DIM)
        assert (mlp.fc2.in_features, mlp.fc2.out_features) == (16 * DIM, DIM)


@pytest.mark.parametrize("name", ["norm", "fc1", "fc2"])
@pytest.mark.parametrize("form", FORMS)
def test_hooks_run(form, name):
    module, x = compressor(form), tokens()
    expected = module(x, GRIDS)
    seen = []
    module.mlp.get_submodule(name).register_forward_hook(lambda *call: seen.append(call))
    actual = module(x, GRIDS)
    assert len(seen) == 1
    assert (actual - expected).abs().max() <= BOUND


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("form", ["dense", "tied"])
def test_adapters_start_as_nothing_and_learn(form, residual):
    mlp, x = compressor(form).mlp, tokens()
    expected = mlp(x, GRIDS, residual=residual)
    mlp.fc1, mlp.fc2 = LowRank(mlp.fc1), LowRank(mlp.fc2)
    actual = mlp(x, GRIDS, residual=residual)
    assert (actual - expected).abs().max() <= BOUND
    actual.pow(2).sum().backward()
    assert mlp.fc1.b.grad.abs().max() > 0
    assert mlp.fc2.b.grad.abs().max() > 0
    with torch.no_grad():
        mlp.fc1.b.fill_(0.1)
    assert (mlp(x, GRIDS, residual=residual) - expected).abs().max() > 1e-3


def test_a_parametrised_weight_takes_effect():
    module, x = compressor(), tokens()
    expected = copy.deepcopy(module)
    with torch.no_grad():
        expected.mlp.fc2.weight.mul_(2)

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module.mlp.fc2, "weight", Double())
    difference = module(x, GRIDS) - expected(x, GRIDS)
    assert difference.abs().max() <= BOUND


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation_reaches_every_layer():
    module, x = compressor().float().eval(), tokens().float()
    expected = module(x, GRIDS)
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    left = [name for name, child in quantised.named_modules() if type(child) is nn.Linear]
    assert left == []
    error = (quantised(x, GRIDS) - expected).norm() / expected.norm()
    # Two roundings to 8 bits, of weights and of inputs, in each of four layers, each at most
    # half a step of 1/127 of the largest entry; entries are normal, largest about 4 deviations.
    assert 0 < error <= 4 * 2 * 4 / 127 / 2


def test_weights_that_are_fetched_for_each_call():
    # Offloading: between calls the parameter has no data; a hook brings it and takes it away.
    module, x = compressor(), tokens()
    expected = module(x, GRIDS)
    for name in ("fc1", "fc2"):
        layer = module.mlp.get_submodule(name)
        kept = {n: p.detach() for n, p in layer.named_parameters()}
        forward = layer.forward

        def fetch(x, layer=layer, kept=kept, forward=forward):
            for n, p in kept.items():
                setattr(layer, n, nn.Parameter(p))
            out = forward(x)
            for n, p in kept.items():
                setattr(layer, n, nn.Parameter(p.to("meta")))
            return out

        layer.forward = fetch
        for n, p in kept.items():
            setattr(layer, n, nn.Parameter(p.to("meta")))
    with torch.no_grad():
        assert (module(x, GRIDS) - expected).abs().max() <= BOUND


def test_pooling_calls_what_is_put_in_place_of_its_first_layer():
    module, x = uhd_nn.WindowTokenCompressor(DIM).double(), tokens()
    with torch.no_grad():
        module.fc2.weight.normal_()
    expected = module(x, GRIDS)
    module.fc1 = LowRank(module.fc1)
    actual = module(x, GRIDS)
    assert (actual - expected).abs().max() <= BOUND
    actual.pow(2).sum().backward()
    assert module.fc1.b.grad.abs().max() > 0


def test_plain_means_plain():
    assert is_plain(nn.Linear(2, 2), nn.Linear)
    assert not is_plain(nn.Bilinear(2, 2, 2), nn.Linear)
    hooked = nn.Linear(2, 2)
    hook = hooked.register_full_backward_hook(lambda *_: None)
    assert not is_plain(hooked, nn.Linear)
    hook.remove()
    assert is_plain(hooked, nn.Linear)
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x
    assert not is_plain(patched, nn.Linear)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attention", [True, False, "cross_mean"])
def test_reuse_is_the_initialisation(form, attention):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    block = vision_transformer.Block(DIM, 2, qkv_bias=True, qk_norm=True, init_values=0.5)
    options = {"form": form, "attention": attention}
    expected = uhd_nn.EarlyCompressor.from_block(block, **options)
    other = copy.deepcopy(expected)
    parameters = dict(other.named_parameters())
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.fill_(7)
    assert other.reuse_(block) is other
    assert dict(other.named_parameters()).items() == parameters.items()  # the same objects
    for name, tensor in expected.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_reuse_after_the_meta_device():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    block = vision_transformer.Block(DIM, 2)
    expected = uhd_nn.EarlyCompressor.from_block(block)
    module = uhd_nn.EarlyCompressor.from_block(copy.deepcopy(block).to("meta"))
    module.to_empty(device="cpu").reuse_(block)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor), name


def test_reuse_of_another_block_changes_nothing():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    module = uhd_nn.EarlyCompressor.from_block(vision_transformer.Block(DIM, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wider = vision_transformer.Block(DIM, 2, mlp_ratio=2)
    with pytest.raises(ValueError, match=r"mlp.fc1.bias must have shape \(256,\), got \(128,\)"):
        module.reuse_(wider)
    with pytest.raises(ValueError, match="must have shape None, got"):
        module.reuse_(vision_transformer.Block(DIM, 2, init_values=0.1))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_pooling_starts_again_as_the_mean():
    module, x = uhd_nn.WindowTokenCompressor(DIM).double(), tokens()
    expected = module(x, GRIDS)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3)
    assert torch.equal(module.reuse_()(x, GRIDS), expected)
    assert isinstance(module.fc1, nn.Linear)


def test_gates_and_forms_read_nothing():
    # A gate is no part of the operator; the layers are called then.
    from uhd_ops.nn import MlpSpec

    spec = MlpSpec(nn.Linear(DIM, 8), nn.Linear(8, DIM), "silu", gate=nn.Linear(DIM, 8))
    assert not WindowMlp(spec, DIM, 2, "dense").reads_layers()
