# SPDX-License-Identifier: Apache-2.0
"""Load the native libraries and say what was loaded.

``import torch`` comes first: its libraries satisfy the ones that ours are linked against. The CUDA
library is touched only where torch has CUDA.
"""

import contextlib
import importlib
import os
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from uhd_ops import _sharding
from uhd_ops._sharding import Rules

_DIRECTORY = Path(__file__).resolve().parent
_LIBRARIES = {"cpu": "libuhd_cpu.so", "cuda": "libuhd_cuda.so"}

status: dict[str, str] = {}
"""``loaded``, ``absent``, ``disabled``, ``torch has no CUDA`` or ``failed: <why>``, for cpu, cuda
and host."""

cublaslt: str = "absent"
"""``on: <version>``, ``off: <version>`` or ``absent: <why>``: whether a linear layer and its GELU
run on CUDA as one call of cuBLASLt. UHD_OPS_CUBLASLT=1 turns it on, read once, at import. It is off
by default because it has not been measured."""

cublaslt_enabled: bool = False


def _load(device: str) -> str:
    if os.environ.get("UHD_OPS_DISABLE_NATIVE", "0") not in ("", "0"):
        return "disabled"
    if device == "cuda" and torch.version.cuda is None:
        return "torch has no CUDA"
    if device == "cuda" and status["cpu"] != "loaded":
        return "needs the CPU library, which defines the operators"
    path = _DIRECTORY / _LIBRARIES[device]
    if not path.exists():
        return "absent"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"failed: {error.__cause__ or error}"
    return "loaded"


def _refuse_a_second_import() -> None:
    """Raise where this or another copy of the package has registered its operators.

    torch takes an operator once. A second time is an error, for those in C++ the end of the
    process.
    """
    library = _LIBRARIES["cpu"]
    others = [path for path in torch.ops.loaded_libraries if Path(path).name == library]
    in_cpp, ours = hasattr(torch.ops.uhd_ops, "_cpu_isa"), os.path.realpath(_DIRECTORY / library)
    in_python = hasattr(torch.ops.uhd_ops, "_view_attention")
    if in_python or (in_cpp and ours not in others):
        raise ImportError(
            "uhd_ops has been imported in this process before, from "
            f"{Path(others[0]).parent if others else 'elsewhere'}, and torch takes its operators "
            f"once, so {_DIRECTORY} cannot be imported: keep one copy of the package, and import "
            "it again in a new process only"
        )


def _load_host() -> str:
    if os.environ.get("UHD_OPS_DISABLE_NATIVE", "0") not in ("", "0"):
        return "disabled"
    try:
        importlib.import_module("uhd_ops._host")
    except (AttributeError, OSError) as error:
        return f"failed: {error}" if (_DIRECTORY / "libuhd_host.so").exists() else "absent"
    return "loaded"


def _find_cublaslt() -> str:
    if status["cuda"] != "loaded":
        return f"absent: native cuda library {status['cuda']}"
    enabled = os.environ.get("UHD_OPS_CUBLASLT", "0") not in ("", "0")
    try:
        version = torch.ops.uhd_ops._cublaslt_version()
    except RuntimeError as error:  # found, but it refuses what is asked of it
        found = f"absent: {error}"
    else:
        if version > 0:
            numbers = f"{version // 10000}.{version // 100 % 100}.{version % 100}"
            return f"{'on' if enabled else 'off'}: {numbers}"
        found = f"absent: {'not loaded by torch' if version == 0 else 'built without cublasLt.h'}"
    if enabled:
        warnings.warn(f"UHD_OPS_CUBLASLT has no effect, cuBLASLt is {found}", stacklevel=2)
    return found


def _load_all() -> None:
    _refuse_a_second_import()
    for device in _LIBRARIES:
        status[device] = _load(device)
    status["host"] = _load_host()
    global cublaslt, cublaslt_enabled
    cublaslt = _find_cublaslt()
    cublaslt_enabled = cublaslt.startswith("on")
    if text := missing("cpu"):
        warnings.warn(text, RuntimeWarning, stacklevel=2)


_REMEDIES = {
    "cpu": "Reinstall with a C++ compiler",
    "cuda": "Build from the sources where nvcc is, with UHD_OPS_CUDA=1 pip install "
    "--no-build-isolation ., or install the wheel for Linux on x86-64, which has them",
}


def missing(device: str) -> str | None:
    """Return what is missing for tensors on ``"cpu"`` or ``"cuda"``, and what to do about it.

    None where the kernels are there or turned off, and where torch has no such tensors.
    """
    if status[device] in ("loaded", "disabled", "torch has no CUDA"):
        return None
    return (
        f"uhd_ops has no native {device.upper()} kernels ({status[device]}); its operators run on "
        f"the PyTorch reference{' for CUDA tensors' * (device == 'cuda')}, which is slow. "
        f"{_REMEDIES[device]}, or see uhd_ops.build_info()."
    )


_definitions_only = 0  # how many definitions() are open


@contextlib.contextmanager
def definitions() -> Iterator[None]:
    """Run the operators' definitions in plain PyTorch instead of the native kernels, in this block.

    They are much slower, and made of PyTorch's own operators alone, so what is traced inside can
    be exported to formats that know no others, such as ONNX. Values agree within rounding.
    PaddedGrids, which exist for the kernels, are refused. It holds for all threads of the process.

    Returns:
        A context manager.

    Example:
        >>> import torch
        >>> import uhd_ops
        >>> with uhd_ops.definitions():
        ...     uhd_ops.window_mean(torch.arange(4.0)[:, None], (2, 2))
        tensor([[1.5000]])
    """
    global _definitions_only
    _definitions_only += 1
    try:
        yield
    finally:
        _definitions_only -= 1


def has_kernels(device: torch.device) -> bool:
    """Whether the operators have native kernels for tensors on ``device``."""
    if _definitions_only:
        return False
    kind = device.type
    if kind == "cuda":
        if status["cuda"] == "loaded":
            return _kernels_fit(device)
        _warn_without_cuda()
        return False
    # "meta" has no kernels, but shapes are computed by the fakes that accompany the CPU library.
    return status.get("cpu" if kind == "meta" else kind) == "loaded"


_warned_without_cuda = False


def _warn_without_cuda() -> None:
    """Warn at the first CUDA tensor, as pip hides what the build said; CPU tensors need no CUDA."""
    global _warned_without_cuda
    if not _warned_without_cuda and (text := missing("cuda")):
        _warned_without_cuda = True
        warnings.warn(text, RuntimeWarning, stacklevel=4)


# torch.compile calls it while it traces, instead of tracing it and leaving the warning out:
# torch.compiler.assume_constant_result, which imports the compiler.
_warn_without_cuda._dynamo_marked_constant = True

_OLDEST_GPU = (8, 0)  # compute capability; older ones run the definitions
_fits: dict[int | None, bool] = {}


def _kernels_fit(device: torch.device) -> bool:
    """Whether the GPU is one that the CUDA library was built for."""
    # While torch.compile traces, and for fake tensors, there may be no GPU to ask.
    if torch.compiler.is_compiling():
        return True
    if device.index not in _fits:
        if not torch.cuda.is_available():
            return True
        found = torch.cuda.get_device_capability(device)
        _fits[device.index] = found >= _OLDEST_GPU
        if not _fits[device.index]:
            warnings.warn(
                "uhd_ops' CUDA kernels need compute capability 8.0 or later, got "
                f"{'.'.join(map(str, found))}; its operators run on the PyTorch reference on "
                f"{device}, which is slow.",
                RuntimeWarning,
                stacklevel=4,
            )
    return _fits[device.index]


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: scalar, avx2 or avx512."""
    return torch.ops.uhd_ops._cpu_isa()


def set_cpu_isa(name: str) -> None:
    """Make the CPU kernels use another instruction set (for tests and benchmarks)."""
    torch.ops.uhd_ops._set_cpu_isa(name)


operators = types.SimpleNamespace()
"""The native operators by name, called as directly as a call allows; :func:`register` fills it."""

PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})
"""Types whose calls no subclass of tensors sees; None stands for a tensor that is left out."""


# Each call asks; a name of this module is found faster.
_is_compiling = torch.compiler.is_compiling
_in_functorch = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_traced_by_jit = torch._C._get_tracing_state
_function_modes = torch._C._len_torch_function_stack


def is_eager() -> bool:
    """Whether nothing but PyTorch's eager mode sees this call.

    Not while torch.compile, torch.export or torch.jit trace, in torch.func, in forward-mode
    differentiation, where a dispatch mode is on, that of fake tensors among them, or a mode of
    functions, and in :func:`definitions`.
    """
    return not (
        _is_compiling()
        or _definitions_only
        or _in_functorch()
        or _dispatch_modes()
        or (_function_modes() and not _only_default_device())
        or _traced_by_jit()
        or forward_ad._current_level >= 0
    )


def _only_default_device() -> bool:
    """Whether the modes of functions are default devices, which concern new tensors alone."""
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(mode) is DeviceContext for mode in modes)


def register(
    name: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    twice: tuple[Callable[..., Any], Callable[..., None]] | None = None,
    public: str | None = None,
    sharding: tuple[Rules, Rules] = ((), ()),
) -> None:
    """Tell torch the shapes and the gradients of an operator, where it is there.

    The operator, and ``_<name>_backward``, can be called in :data:`operators` then.

    Args:
        name: Name of the operator.
        fake: Its result for tensors without data.
        backward_fake: That of ``_<name>_backward``.
        backward: Gradients of its inputs.
        setup_context: What they need.
        twice: Both of these for ``_<name>_backward``. None where there is no second derivative,
            which is an error then, in the second backward pass: torch would give no gradient, and
            ``create_graph=True`` alone is fine.
        public: Public function that calls the operator, where that has another name.
        sharding: How DTensor may shard the operator, and ``_<name>_backward``, beside replicating
            both.
    """
    if not hasattr(torch.ops.uhd_ops, name):
        return
    public = public or name

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"uhd_ops.{public} has no second derivative; uhd_ops.reference.{public} has one"
        )

    derivative = f"_{name.lstrip('_')}_backward"
    again, setup_again = twice or (refuse, lambda ctx, inputs, output: None)
    _register_one(name, fake, backward, setup_context, False)
    _register_one(derivative, backward_fake, again, setup_again, True)
    for operator, rules in zip((name, derivative), sharding, strict=True):
        _sharding.declare(operator, rules)


def _register_one(name, fake, backward, setup_context, derivative) -> None:
    torch.library.register_fake(f"uhd_ops::{name}", _on_one_device(name, fake))
    torch.library.register_autograd(f"uhd_ops::{name}", backward, setup_context=setup_context)
    operator = getattr(torch.ops.uhd_ops, name).default
    setattr(operators, name, _eager_call(operator, backward, setup_context, derivative))


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse tensors of several devices, as the kernels do.

    The dispatcher asks the fake as soon as one tensor is on "meta", and what it returns is taken
    for a result: on the CPU, if the first tensor is there, in memory that nobody has written.
    """

    def checked(*args):
        devices = {x.device for x in args if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"{name}: tensors must be on one device, got {found}")
        return fake(*args)

    return checked


# Where nothing is to be done between a call of an operator and its kernel, the kernel is called by
# its dispatch key, which is a microsecond less. A profiler gets the operator's name from the
# dispatcher, which also sees to tensors that are only marked as negated, or as zeros. The gradients
# that a derivative gets come from anywhere, so that it is always left to the dispatcher.
_BY_KEY = (
    "by_key(cpu if {first}.is_cpu else cuda, {every}) if ({first}.is_cpu or {first}.is_cuda)"
    " and not (profiling() or {marked}) else by_name({every})"
)
_EAGER = """
def by_name({every}):
    with below_autograd():
        return dispatch({every})

def forward(ctx, {tensors}, others):
    {others} = others
    output = {call}
    setup_context(ctx, ({every}), output)
    return output

def backward(ctx, *grads):
    {every} = derive(ctx, *grads)
    return {tensors}, None

def eager({every}):
    if is_grad_enabled() and ({differentiated}):
        return apply({tensors}, ({others}))
    return {call}
"""


def _eager_call(
    operator: torch._ops.OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    derivative: bool,
) -> Callable[..., Any]:
    """Return a function that calls an operator, in eager mode past what only tracing needs.

    What register_autograd makes is Python that the dispatcher calls, for every call and whether
    there are gradients or not. In eager mode the derivative is the same, by the same functions,
    from a node that calls the operator's kernel below autograd. The attribute ``eager`` of the
    function is for callers that know that the mode is eager and the tensors are plain.

    A node looks at each of its inputs by itself, longest at one that is not a tensor: so it has the
    tensors, and one more for all others. The functions are made with the names of the arguments, as
    those of a dataclass are: with ``*args`` a call takes a microsecond more.
    """
    every = [argument.name for argument in operator._schema.arguments]
    tables = _sharding.tables_of(operator)
    # Tables of views hold integers.
    tensors = {
        argument.name: "Optional" in str(argument.type)
        for argument in operator._schema.arguments
        if "Tensor" in str(argument.type) and argument.name not in ("views", "rows")
    }

    def any_of(question: str) -> str:
        return " or ".join(
            (f"{x} is not None and " if optional else "") + question.replace("{}", x)
            for x, optional in tensors.items()
        )

    parts = {
        "every": ", ".join(every) + ",",
        "first": every[0],
        "tensors": ", ".join(tensors),
        "others": ", ".join(x for x in every if x not in tensors) + ",",
        "differentiated": any_of("{}.requires_grad"),
        "marked": any_of("({}.is_neg() or {}._is_zerotensor())"),
    }
    call = "by_name({every})" if derivative else _BY_KEY
    source = _EAGER.format(call=call.format(**parts), **parts)
    names = {
        "setup_context": setup_context,
        "derive": backward,
        "dispatch": operator._op,
        "by_key": operator._handle.redispatch_boxed,
        "cpu": torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
        "cuda": torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA),
        "below_autograd": torch._C._AutoDispatchBelowAutograd,
        "profiling": torch.autograd._profiler_enabled,
        "is_grad_enabled": torch.is_grad_enabled,
    }
    exec(compile(source, f"{__file__}, _EAGER", "exec"), names)
    methods = {name: staticmethod(names[name]) for name in ("forward", "backward")}
    node = type(f"{operator._opname}_eager", (torch.autograd.Function,), methods)
    names["apply"] = node.apply
    eager, places = names["eager"], [every.index(x) for x in tensors]

    def call(*args):
        for place in places:
            if type(args[place]) not in PLAIN_TENSORS:
                return _sharding.call(operator, args, tables)
        return eager(*args) if is_eager() else operator(*args)

    call.eager = eager
    return call


def register_linear(
    name: str,
    fake: Callable[..., Any],
    backward_fake: Callable[..., Any],
    sharding: tuple[Rules, Rules],
) -> None:
    """As :func:`register`, for a linear operator ``(rows, views, side, rows of the result)``.

    The derivative of its backward pass is its forward pass.
    """

    def setup_context(ctx, inputs, output):
        rows, views, ctx.side, _ = inputs
        ctx.num_rows = rows.shape[0]
        ctx.save_for_backward(views)  # not as an attribute: PaddedGrids.update changes it in place

    def by(operator: str) -> Callable[..., Any]:
        def backward(ctx, grad):
            function = getattr(operators, operator)
            return function(grad, *ctx.saved_tensors, ctx.side, ctx.num_rows), None, None, None

        return backward

    twice = by(name), setup_context
    backward = by(f"_{name}_backward")
    register(name, fake, backward_fake, backward, setup_context, twice, sharding=sharding)


_load_all()
