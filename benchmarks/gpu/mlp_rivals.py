# SPDX-License-Identifier: Apache-2.0
"""The other operators as torch, its compiler, cuBLASLt's epilogue and transformers do them."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from gpu.cases import BACKWARD, DENSE, Case
from uhd_ops.cli import rivals as eager


def norm(case: Case, device: torch.device):
    return lambda x, weight, bias, *_: eager.unshuffle_norm(x, weight, bias, case.grid)


def unshuffle(case: Case, device: torch.device):
    return lambda x: eager.unshuffle(x, case.grid)


def mean(case: Case, device: torch.device):
    return lambda x: eager.mean(x, case.grid)


def mean_avg_pool(case: Case, device: torch.device):
    return lambda x: eager.mean_avg_pool(x, case.grid)


def pool(case: Case, device: torch.device):
    return lambda x, logits: eager.pool(x, logits, case.grid)


def tiles(case: Case, device: torch.device):
    return lambda w1, w2: (torch.block_diag(*[w1] * 4), (w2 / 4).repeat(1, 4))


def mlp(case: Case, device: torch.device):
    """Eager layers; for tied weights the hidden is averaged before the second product."""
    form = eager.mlp_dense if case.op == DENSE else eager.mlp_tied
    return lambda *tensors: form(*tensors, case.grid)


def compiled(make):
    """Return the same rival with torch.compile around it."""
    return lambda case, device: torch.compile(make(case, device), dynamic=False)


def mlp_epilogue(case: Case, device: torch.device):
    """Bias and GELU in cuBLASLt's epilogue. torch has no derivative of it."""
    if case.direction != "forward":
        raise NotImplementedError("torch._addmm_activation has no backward pass")
    if device.type != "cuda":
        raise NotImplementedError("torch._addmm_activation is the tanh form of GELU on CUDA only")
    return _epilogue(case, lambda b, z, w: torch._addmm_activation(b, z, w.t(), use_gelu=True))


def mlp_epilogue_emulated(case: Case, device: torch.device):
    """Return the same with the epilogue written out, to check the maths where there is no GPU."""
    return _epilogue(case, lambda b, z, w: F.gelu(F.linear(z, w, b), approximate="tanh"))


def _epilogue(case: Case, activate):
    def run(x, w1, b1, w2, b2, weight, bias):
        z, residual = eager.unshuffle_norm(x, weight, bias, case.grid)
        if case.op == DENSE:
            hidden = activate(b1, z, w1)
        else:
            hidden = activate(b1, z.view(-1, x.shape[1]), w1)
            hidden = hidden.view(-1, 4, hidden.shape[1]).mean(1)
        return torch.addmm(b2, hidden, w2.t()) + residual

    return run


class Merger(torch.nn.Module):
    """transformers' Qwen2-VL PatchMerger on random weights.

    Another function: it normalises each token, its hidden layer has 4 C channels instead of 4 I,
    and its tokens are window-major already. It stands for what models do at this place.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        module = importlib.import_module("transformers.models.qwen2_vl.modeling_qwen2_vl")
        self.merger = module.PatchMerger(case.channels, case.channels)
        self.to(device=device, dtype=getattr(torch, case.dtype))

    def forward(self, x, *_):
        return self.merger(x)


def merger(case: Case, device: torch.device):
    if case.direction == BACKWARD:
        raise NotImplementedError("measured forward, and forward + backward")
    return Merger(case, device)
