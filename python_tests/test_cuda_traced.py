# SPDX-License-Identifier: Apache-2.0
"""torch.compile on a GPU. It takes longest, so it is last among the tests for a GPU."""

import pytest
import torch
from battery import NATIVE, assert_same, gradients, make_call, public

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", NATIVE)
def test_compiled(name):
    torch._dynamo.reset()
    call = make_call(name).map_tensors(torch.Tensor.cuda)
    compiled = torch.compile(public(name), fullgraph=True)
    wanted, actual = gradients(public(name), call), gradients(compiled, call)
    assert_same(name, "batch_invariance", make_call(name), actual[0].cpu(), wanted[0].cpu())
