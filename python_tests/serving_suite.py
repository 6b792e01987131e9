# SPDX-License-Identifier: Apache-2.0
"""The plugin for vLLM and the patch for SGLang of docs/serving.md, against their own classes.

``.ci/serving_suite.sh`` fetches both and names the folder of their sources in ``SERVING_SOURCES``.
The classes with the compressor and the connector are executed as they stand there. The layers that
they are made of, which the engines split over processes, are stand-ins on one process, and so is
the rest of the engines.
"""

import ast
import importlib.metadata
import os
import re
import sys
import types
from pathlib import Path
from typing import Optional

import pytest
import torch
from families.case import assert_close
from torch import nn
from torch.nn import functional

import uhd_ops
from uhd_ops.integrations import vllm

ROUNDINGS = 12 * 512
CHANNELS, HEADS, OUT = 32, 2, 24
SOURCES = Path(os.environ["SERVING_SOURCES"])
PAGE = Path(__file__).resolve().parent.parent / "docs" / "serving.md"
MODULE = "vllm.model_executor.models.minicpmv4_6"
OWN = [
    "MiniCPMV4_6ViTWindowAttentionSelfAttn",
    "MiniCPMV4_6ViTWindowAttentionMerger",
    "MiniCPMV4_6DownsampleMLP",
    "MiniCPMV4_6Merger",
]


class Parallel(nn.Linear):
    """A layer of vLLM on one process: it returns its bias apart, which is None here."""

    def forward(self, x):
        return super().forward(x), None


def qkv_layer(dim, head_dim, heads, **options):
    return Parallel(dim, 3 * heads * head_dim)


def row_layer(inputs, outputs, bias=True, **options):
    return Parallel(inputs, outputs, bias)


class Attention(nn.Module):
    def __init__(self, heads, head_dim, scale, prefix=""):
        super().__init__()
        self.heads, self.scale = heads, scale

    def forward(self, q, k, v):
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return out.transpose(1, 2).flatten(2)


ACTIVATIONS = {"gelu": nn.GELU, "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh")}


def classes_of(name, own, **stand_ins):
    """Execute these classes of a module of an engine, with stand-ins for what they use."""
    tree = ast.parse((SOURCES / f"{name.replace('.', '/')}.py").read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in own]
    assert len(tree.body) == len(own), f"{name} has other classes now"
    module = types.ModuleType(name)
    vars(module).update(stand_ins, torch=torch, nn=nn)
    exec(compile(tree, name, "exec"), vars(module))
    return module


@pytest.fixture(scope="module", autouse=True)
def sources():
    """Put vLLM's classes where they are in vLLM."""
    module = classes_of(
        MODULE,
        OWN,
        QuantizationConfig=object,
        QKVParallelLinear=qkv_layer,
        RowParallelLinear=row_layer,
        MMEncoderAttention=Attention,
        get_act_fn=lambda name: ACTIVATIONS[name](),
        is_vit_use_data_parallel=lambda: False,
        get_tensor_model_parallel_world_size=lambda: 1,
    )

    class Served(nn.Module):
        def __init__(self, times=1):
            super().__init__()
            sizes = {"hidden_size": CHANNELS, "num_attention_heads": HEADS}
            config = types.SimpleNamespace(**sizes, intermediate_size=48, layer_norm_eps=1e-6)
            self.vit_merger = module.MiniCPMV4_6ViTWindowAttentionMerger(config)
            self.merger = module.MiniCPMV4_6Merger(CHANNELS, OUT, times=times)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

    module.MiniCPMV4_6ForConditionalGeneration = Served
    with pytest.MonkeyPatch.context() as patch:
        for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, MODULE, module)
        yield module


@pytest.fixture
def pair(sources):
    """A model of vLLM, and the plugin's with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = sources.MiniCPMV4_6ForConditionalGeneration(times=2).double()
    ours = vllm.MiniCPMV4_6ForConditionalGeneration(times=2).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


SIZES = torch.tensor([[8, 4], [4, 12], [4, 4]])


def batch(sizes=SIZES):
    lengths = sizes.prod(1)
    x = torch.randn(len(sizes), int(lengths.max()), CHANNELS, dtype=torch.float64)
    x[torch.arange(x.shape[1]) >= lengths[:, None]] = float("nan")
    return x


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False])
def test_compressor(pair, masked):
    x, mask = batch(), torch.zeros(1) if masked else None
    theirs, ours = (model.vit_merger(x, SIZES, mask) for model in pair)
    assert_close(ours[0], theirs[0], ROUNDINGS)
    assert torch.equal(ours[1], theirs[1])
    assert ours[1].dtype == theirs[1].dtype
    assert (ours[2] is None) == (theirs[2] is None)
    if masked:
        assert torch.equal(ours[2], theirs[2])


@torch.no_grad()
def test_connector(pair):
    x = batch()
    theirs, ours = (model.merger(x, SIZES) for model in pair)
    assert len(ours) == len(theirs)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_close(actual, expected, ROUNDINGS)


@torch.no_grad()
def test_odd_grids_that_vllm_refuses(pair):
    sizes = torch.tensor([[3, 5], [4, 4]])
    x = batch(sizes)
    with pytest.raises(RuntimeError):
        pair[0].vit_merger(x, sizes, None)
    tokens, merged, _ = pair[1].vit_merger(x, sizes, None)
    assert merged.tolist() == [[2, 3], [2, 2]]
    assert tokens.shape == (2, 6, CHANNELS)
    alone, _, _ = pair[1].vit_merger(x[:1, :15], sizes[:1], None)
    assert_close(tokens[:1], alone, ROUNDINGS)


@torch.no_grad()
@pytest.mark.parametrize("part", ["vit_merger", "merger"])
def test_padded_grids_for_cuda_graphs(pair, part):
    """The same call on the same sizes, whatever the grids; its first rows are the result."""
    module = getattr(pair[1], part)
    padded = uhd_ops.PaddedGrids(128, 4, {2: 32}, device="cpu")
    for sizes in (SIZES, SIZES[:1]):
        grids = uhd_ops.PackedGrids(sizes.tolist())
        x = torch.full((128, CHANNELS), float("nan"), dtype=torch.float64)
        x[: grids.num_tokens] = torch.randn(grids.num_tokens, CHANNELS, dtype=torch.float64)
        padded.update(grids)
        out, expected = module.merge(x, padded), module.merge(x[: grids.num_tokens], grids)
        assert_close(out[: len(expected)], expected, ROUNDINGS)


def test_parameters_keep_their_names(pair):
    theirs, ours = pair
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    assert vllm.accelerate(ours) is ours  # again is the same


def test_registration(sources, monkeypatch):
    """As vLLM does it: by the entry point, then by the name that it was given."""
    registered = {}
    registry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setattr(sys.modules["vllm"], "ModelRegistry", registry, raising=False)
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="vllm.general_plugins")
        if entry.name == "uhd_ops"
    )
    entry.load()()
    entry.load()()
    assert registered.keys() == vllm.MODELS.keys()
    module, _, name = registered["MiniCPMV4_6ForConditionalGeneration"].partition(":")
    served = getattr(sys.modules[module], name)
    assert issubclass(served, sources.MiniCPMV4_6ForConditionalGeneration)
    assert served is getattr(sys.modules[module], name)
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        _ = vllm.Unknown


def test_refusals(pair):
    theirs, _ = pair
    with pytest.raises(NotImplementedError, match=r"model must hold vllm\..*got Linear"):
        vllm.accelerate(nn.Linear(2, 2))
    theirs.merger.merge_kernel_size = (3, 3)
    with pytest.raises(NotImplementedError, match=r"merge_kernel_size must be \(2, 2\).*\(3, 3\)"):
        vllm.accelerate(theirs)
    assert type(theirs.vit_merger).__module__ == MODULE
    assert not isinstance(theirs.vit_merger, vllm.WindowAttentionMerger)


# ---- SGLang ------------------------------------------------------------------------------------

SGLANG = "sglang.srt.models.minicpmv_vit"


class VisionAttention(nn.Module):
    """What its docstring says of SGLang's: packed tokens, by lengths of the sequences."""

    def __init__(self, embed_dim, num_heads, projection_size, **options):
        super().__init__()
        self.heads, self.head_size = num_heads, embed_dim // num_heads
        self.qkv_proj = Parallel(embed_dim, 3 * projection_size)
        self.proj = Parallel(projection_size, embed_dim)

    def forward(self, x, cu_seqlens, forward_metadata):
        qkv, _ = self.qkv_proj(x[0])
        windows = qkv.unflatten(1, (3, self.heads, -1)).tensor_split(cu_seqlens[1:-1].tolist())
        parts = [functional.scaled_dot_product_attention(*w.permute(1, 2, 0, 3)) for w in windows]
        out, _ = self.proj(torch.cat(parts, 1).transpose(0, 1).flatten(1))
        return out[None]


@torch.no_grad()
def test_patch_for_sglang(monkeypatch):
    module = classes_of(
        SGLANG,
        ["MiniCPMV_ViTWindowAttentionMerger"],
        F=functional,
        VisionAttention=VisionAttention,
        ColumnParallelLinear=row_layer,
        RowParallelLinear=row_layer,
        PretrainedConfig=object,
        QuantizationConfig=object,
        get_act_fn=lambda name: ACTIVATIONS[name](),
        add_prefix=lambda name, prefix: name,
        is_npu=lambda: False,
        prepare_vision_attention_metadata=lambda *args, **kwargs: None,
        List=list,
        Optional=Optional,
        Tuple=tuple,
    )
    for name in ("sglang", "sglang.srt", "sglang.srt.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, SGLANG, module)
    monkeypatch.setattr(sys.modules["sglang.srt.models"], "minicpmv_vit", module, raising=False)
    sizes = {"hidden_size": CHANNELS, "num_attention_heads": HEADS, "attention_dropout": 0.0}
    config = types.SimpleNamespace(**sizes, intermediate_size=48, layer_norm_eps=1e-6)
    torch.manual_seed(0)
    merger = module.MiniCPMV_ViTWindowAttentionMerger(config).double()
    for parameter in merger.parameters():
        nn.init.normal_(parameter, std=0.3)
    lengths = SIZES.prod(1)
    x = torch.randn(1, int(lengths.sum()), CHANNELS, dtype=torch.float64)
    starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
    arguments = x, SIZES, starts, int(lengths.max())
    theirs = merger(*arguments)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    exec(compile(code, str(PAGE), "exec"), {})
    ours = merger(*arguments)
    assert_close(ours[0], theirs[0], ROUNDINGS)
    for actual, expected in zip(ours[1:3], theirs[1:3], strict=True):
        assert torch.equal(actual, expected)
        assert actual.dtype == expected.dtype
    assert ours[3] == theirs[3]
