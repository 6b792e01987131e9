# SPDX-License-Identifier: Apache-2.0
"""One operator, four ways: call it, check it against its definition, differentiate it, compile it.

Run: python examples/01_one_op.py
"""

import torch

import uhd_ops

torch.manual_seed(0)

# The tokens of two views, one after the other: a 4x6 thumbnail and a 3x5 slice, whose right and
# bottom windows are ragged. Two heads of 8 channels; q, k and v are slices of one tensor, not
# copies.
grids = [(4, 6), (3, 5)]
qkv = torch.randn(4 * 6 + 3 * 5, 3, 2, 8, requires_grad=True)
q, k, v = qkv.unbind(1)

# Call it: every token attends to the tokens of its own 2x2 window.
out = uhd_ops.window_attention(q, k, v, grids)
print(f"window_attention: {tuple(q.shape)} -> {tuple(out.shape)}")
print(f"it ran on: {uhd_ops.build_info().backends['window_attention']['cpu']}")

# Check it: every operator has a definition in plain PyTorch, with the same arguments.
expected = uhd_ops.reference.window_attention(q.double(), k.double(), v.double(), grids)
error = (out - expected).abs().max().item()
print(f"largest difference from the float64 definition: {error:.1e}")
assert error < 1e-5

# Differentiate it: the backward pass is a native kernel, too.
out.square().sum().backward()
print(f"gradient of qkv: {tuple(qkv.grad.shape)}, norm {qkv.grad.norm().item():.3f}")


# Compile it: one graph, no break.
@torch.compile(fullgraph=True, backend="aot_eager")  # leave out the backend to generate code
def attend(qkv, grids):
    q, k, v = qkv.unbind(1)
    return uhd_ops.window_attention(q, k, v, grids)


compiled = attend(qkv.detach(), uhd_ops.PackedGrids(grids))
print(f"compiled equals eager: {torch.equal(compiled, out.detach())}")
assert torch.equal(compiled, out.detach())
