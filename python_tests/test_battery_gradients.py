# SPDX-License-Identifier: Apache-2.0
"""Every operator is differentiable where it says so, and refuses the rest aloud."""

import re

import pytest
import torch
from battery import (
    GRIDS,
    assert_gradients_close,
    assert_same,
    assert_same_bits,
    expected,
    gradients,
    make_call,
    not_exempt,
    per_case,
    per_op,
    public,
    run,
)
from battery.calls import random_like
from battery.marks import native_only
from specs import SPECS
from torch.autograd import forward_ad

import uhd_ops

kernels_only = native_only("the definition itself is tested by its users")


def as_function(name, call):
    """Return the operator as a function of its differentiable arguments, and these."""

    def function(*tensors):
        bound = call
        for key, tensor in zip(call.differentiable, tensors, strict=True):
            bound = bound.put(key, tensor)
        return run(public(name), bound)

    return function, [call.get(key) for key in call.differentiable]


@per_case()
def test_gradcheck(name, options, device):
    # Small grids: one full and one ragged window. The fast mode compares random projections of the
    # Jacobian; the defaults are compared entry by entry.
    call = make_call(name, torch.float64, [(2, 3), (1, 1)], device=device, **options)
    function, tensors = as_function(name, call)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=bool(options))


@per_op()
def test_only_the_wanted_gradients(name, device):
    call = make_call(name, device=device)
    _, wanted = gradients(public(name), call)
    for key in call.differentiable:
        tensors = {k: call.get(k).detach().requires_grad_(k == key) for k in call.differentiable}
        alone = call
        for k, tensor in tensors.items():
            alone = alone.put(k, tensor)
        out = run(public(name), alone)
        assert out.requires_grad
        out.backward(random_like(out))
        what = f"gradient of argument {key!r} alone"
        assert_same(name, "strides", call, tensors[key].grad, wanted[key], what)
        assert all(tensor.grad is None for k, tensor in tensors.items() if k != key)


@per_op()
def test_requires_grad_only_where_wanted(name, device):
    call = make_call(name, device=device)
    assert not run(public(name), call).requires_grad
    watched = call.put(call.differentiable[0], call.get(call.differentiable[0]).requires_grad_())
    assert run(public(name), watched).requires_grad
    with torch.no_grad():
        assert not run(public(name), watched).requires_grad
    with torch.inference_mode():
        assert_same_bits(run(public(name), watched), run(public(name), call).detach())


@per_case()
def test_expanded_gradient(name, options, device):
    # What out.sum().backward() hands down: one number with strides of zero.
    call = make_call(name, device=device, **options)
    exact_call = call.exact()
    exact_out = run(expected(name), exact_call)
    _, exact = gradients(expected(name), exact_call, torch.ones_like(exact_out))
    _, grads = gradients(public(name), call, torch.ones((), device=device).expand(exact_out.shape))
    _, wanted = gradients(public(name), call, torch.ones(exact_out.shape))
    assert_same(name, "strides", call, grads, wanted, "gradient")
    assert_gradients_close(SPECS[name], call, grads, exact)


@per_op()
def test_expanded_inputs(name, device):
    # Every row the same memory. The gradient of the one row is the sum over all of them.
    call = make_call(name, device=device)
    expanded = call.map_tensors(lambda x: x[:1].expand(x.shape))
    out, grads = gradients(public(name), expanded)
    wanted_out, wanted_grads = gradients(public(name), expanded.map_tensors(torch.clone))
    assert_same(name, "strides", call, out, wanted_out)
    assert_same(name, "strides", call, grads, wanted_grads, "gradient")


NOT_TWICE = ("pixel_unshuffle_mlp", "window_attention", "window_attention_qkvpacked", "window_pool")


@kernels_only
@per_op(sorted({*not_exempt("second_derivative")} - {*NOT_TWICE}))
def test_second_derivatives(name, device):
    call = make_call(name, torch.float64, [(2, 3), (1, 1)], device=device)
    function, tensors = as_function(name, call)
    assert torch.autograd.gradgradcheck(function, [tensor.requires_grad_() for tensor in tensors])


@kernels_only
@per_op(NOT_TWICE)
def test_second_derivatives_are_refused(name, device):
    call = make_call(name, torch.float64, [(2, 3), (1, 1)], device=device)
    function, tensors = as_function(name, call)
    text = f"uhd_ops.{name} has no second derivative; uhd_ops.reference.{name} has one"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(text)}$"):
        torch.autograd.gradgradcheck(function, [tensor.requires_grad_() for tensor in tensors])


@per_op()
def test_create_graph_without_a_second_backward(name, device):
    call = make_call(name, device=device)
    _, wanted = gradients(public(name), call)
    function, tensors = as_function(name, call)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, random_like(out), create_graph=True)
    for grad, key in zip(grads, call.differentiable, strict=True):
        what = f"gradient of argument {key!r}"
        assert_same(name, "strides", call, grad.detach(), wanted[key], what)


def _forward_mode(function, tensors):
    with forward_ad.dual_level():
        function(*(forward_ad.make_dual(tensor, tensor) for tensor in tensors))


TRANSFORMS = {
    "grad": lambda f, t: torch.func.grad(lambda *a: f(*a).sum())(*t),
    "vjp": lambda f, t: torch.func.vjp(f, *t),
    "jvp": lambda f, t: torch.func.jvp(f, tuple(t), tuple(t)),
    "jacrev": lambda f, t: torch.func.jacrev(f)(*t),
    "grad of vmap": lambda f, t: torch.func.grad(
        lambda *a: torch.vmap(f)(*(x[None] for x in a)).sum()
    )(*t),
    "vmap of grad": lambda f, t: torch.vmap(torch.func.grad(lambda *a: f(*a).sum()))(
        *(x[None] for x in t)
    ),
    "forward mode": _forward_mode,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch's own, under torch.func.jvp
@pytest.mark.parametrize("transform", TRANSFORMS)
@per_op()
def test_function_transforms_are_refused(name, device, transform):
    function, tensors = as_function(name, make_call(name, device=device))
    with pytest.raises(NotImplementedError, match=r"^\w+ takes part in torch\.func\.grad, vjp"):
        TRANSFORMS[transform](function, tensors)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@per_op()
def test_vmap(name, device):
    calls = [make_call(name, seed=seed, device=device) for seed in range(3)]
    function, _ = as_function(name, calls[0])
    stacked = [
        torch.stack([call.get(key) for call in calls]).requires_grad_()
        for key in calls[0].differentiable
    ]
    out = torch.vmap(function)(*stacked)
    results = [gradients(public(name), call) for call in calls]
    for i, (wanted, _) in enumerate(results):
        assert_same(name, "batch_invariance", calls[i], out[i], wanted, f"result {i}")
    grads = torch.autograd.grad(out, stacked, random_like(results[0][0]).expand(out.shape))
    for grad, key in zip(grads, calls[0].differentiable, strict=True):
        for i, (_, wanted) in enumerate(results):
            what = f"result {i}: gradient of argument {key!r}"
            assert_same(name, "batch_invariance", calls[i], grad[i], wanted[key], what)


# torch scripts a part of its own when forward mode is first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_forward_mode_elsewhere_does_not_matter():
    call = make_call("window_attention")
    wanted = run(uhd_ops.window_attention, call)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert_same_bits(run(uhd_ops.window_attention, call), wanted)
    assert call.get(call.grids) == GRIDS
