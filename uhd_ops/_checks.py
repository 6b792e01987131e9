# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: one wording for everything that the library is given.

Every check uses types, shapes, dtypes and devices only, so it raises the same error on CPU, on
CUDA, under FakeTensorMode and while torch.compile traces.
"""

from __future__ import annotations

import math
import operator

import numpy as np
import torch
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

# Sums of two such options and a side stay far below 2**63, in which kernels compute.
LARGEST_INT = 2**31 - 1
FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_int(value: object) -> bool:
    """Whether ``value`` is an integer, a symbolic one or NumPy's included, and no bool."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    # A tensor has an index too, but to read it waits for its device; and torch.compile makes a
    # tensor of a NumPy integer.
    if isinstance(value, (torch.Tensor, np.bool_)) or torch.compiler.is_compiling():
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def check_int(value: object, name: str, least: int | None = None, most: int | None = None) -> int:
    """``value`` is an integer in [least, most], NumPy's included; returns it as an int.

    Raises:
        TypeError: It is not an integer; a bool and a float with an integral value are none.
        ValueError: It is out of range.
    """
    if type(value) is not int:
        if not is_int(value):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not isinstance(value, torch.SymInt):  # the index would fix a symbol's value
            value = int(operator.index(value))
    if (least is not None and value < least) or (most is not None and value > most):
        if most is None:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        raise ValueError(f"{name} must be an integer in [{least}, {most}], got {value}")
    return value


def check_positive_int(value: object, name: str) -> int:
    """``value`` is an integer in [1, LARGEST_INT], NumPy's included; returns it as an int."""
    if type(value) is int and 1 <= value <= LARGEST_INT:
        return value
    value = check_int(value, name, 1)
    if value > LARGEST_INT:
        raise ValueError(f"{name} must be at most {LARGEST_INT}, got {value}")
    return value


def check_finite(value: object, name: str) -> float:
    """``value`` is a finite real number; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would break torch.compile's graph
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def check_device(device: torch.device | str, name: str = "device") -> torch.device:
    """``device`` is one that is there; returns it with the index that tensors on it have.

    Raises:
        ValueError: There is no GPU that PyTorch can use, or none of that number.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} must be one that is there, got '{device}': {reason}") from None


def check_tensor(x: object, name: str) -> None:
    """``x`` is a tensor of a floating dtype that the kernels know."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.layout != torch.strided:
        raise NotImplementedError(f"{name} must be a strided tensor, got layout {x.layout}")
    # What torch.func and forward mode leave a mark of, which is rare, is looked at closely.
    marked = not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or functorch.is_functorch_wrapped_tensor(x)
    )
    if marked and _is_transformed(x):
        raise NotImplementedError(
            f"{name} takes part in torch.func.grad, vjp, jvp or forward-mode differentiation, "
            "which uhd_ops operators do not support; use torch.autograd, or uhd_ops.reference, "
            "which supports them"
        )


def _is_transformed(x: torch.Tensor) -> bool:
    # torch itself would refuse torch.func.grad with a message about setup_context, and would drop
    # the tangents of forward mode without a word.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    while functorch.is_functorch_wrapped_tensor(x):  # torch.vmap alone is supported
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def check_like(x: object, name: str, other: torch.Tensor, other_name: str) -> None:
    """``x`` is a tensor with the device of ``other`` and its dtype.

    Where autocast is on, any two dtypes do that it casts to the same one: all but float64.
    """
    check_tensor(x, name)
    if x.dtype != other.dtype:
        cast = torch.float64 not in (x.dtype, other.dtype) and autocast_dtype(other) is not None
        if not cast:
            raise TypeError(
                f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}"
            )
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )


def check_same_shape(x: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """``x`` has the shape of ``other``."""
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape of {other_name}, {tuple(other.shape)}, "
            f"got {tuple(x.shape)}"
        )


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Cast float32 and half tensors to the autocast dtype of their device, where autocast is on."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(
        x.to(dtype) if x is not None and x.dtype != torch.float64 and x.is_floating_point() else x
        for x in tensors
    )


def stay_as_they_are(*tensors: torch.Tensor | None) -> bool:
    """Whether the tensors have one dtype, in which :func:`autocast` leaves them."""
    dtypes = {x.dtype for x in tensors if x is not None}
    dtype = autocast_dtype(tensors[0])
    return len(dtypes) == 1 and (dtype is None or dtypes <= {dtype, torch.float64})


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of ``x``; None where it is off, or has no such device."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


_WRAPS = "__tensor_flatten__"


def is_plain(module: torch.nn.Module, cls: type[torch.nn.Module]) -> bool:
    """Whether calling ``module`` does nothing but what ``cls`` does with its own parameters.

    Then an operator may read them instead. It must not where a subclass, a hook or a ``forward`` on
    the instance does something else (adapters, offloading, observers), or where the weight is no
    dense tensor (quantised or sharded).
    """
    if type(module) is not cls or "forward" in vars(module):  # parametrised modules change class
        return False
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    return not [p for p in module._parameters.values() if hasattr(type(p), _WRAPS)]


def does_nothing(*modules: torch.nn.Module | None) -> bool:
    """Whether each is None or returns what it is given, so that nobody notices if it is left out.

    An Identity with a hook is called: somebody looks at what passes there.
    """
    for module in modules:
        if module is not None and not is_plain(module, torch.nn.Identity):
            return False
    return True


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its numbers itself: quantised and sharded ones wrap others."""
    return not hasattr(type(tensor), _WRAPS)
