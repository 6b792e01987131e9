# SPDX-License-Identifier: Apache-2.0
"""What is installed, how it was built, and which implementation every operator would run."""

from __future__ import annotations

import dataclasses
import importlib
import platform
from typing import Any

import numpy as np
import torch

from uhd_ops import _native

_DEVICES = ("cpu", "cuda")
_OPERATORS = (
    "pixel_unshuffle",
    "pixel_unshuffle_mlp",
    "reorder_tokens",
    "tile_average",
    "tile_block_diagonal",
    "tile_vector",
    "view_attention",
    "window_attention",
    "window_attention_qkvpacked",
    "window_mean",
    "window_pool",
)
# Operators that have no native operator of their own name.
_TORCH_ONLY = {"view_attention": "torch scaled_dot_product_attention"}
# Likewise, but they need the tables of the native library.
_TORCH_ON_TABLES = {"reorder_tokens": "torch index_select"}
# The native operators behind those of another name.
_PARTS = {
    "pixel_unshuffle_mlp": ("_unshuffle_norm", "_linear_activation"),
    "tile_average": ("tile_weight",),
    "tile_block_diagonal": ("tile_weight",),
    "tile_vector": ("tile_weight",),
}


@dataclasses.dataclass(frozen=True, repr=False)
class BuildInfo:
    """Versions, native libraries and backends; see :func:`build_info`.

    Attributes:
        versions: Version of ``uhd_ops``, ``torch``, ``numpy`` and ``python``.
        native: State of the native libraries ``cpu``, ``cuda`` and ``host``: ``"loaded"`` or why
            not.
        cpu_isa: Instruction set that the CPU kernels use now; None without native CPU kernels.
        cpu_isas_available: Those that were built and that this processor has, slowest first.
        cpu_isas_built: Those that were built.
        cuda_archs: CUDA architectures that were built; empty for a build without CUDA.
        cublaslt: Whether a linear layer and its GELU run on CUDA as one call of cuBLASLt: ``"on:
            <version>"``, ``"off: <version>"`` (set ``UHD_OPS_CUBLASLT=1`` before the import; off by
            default because it has not been measured), or ``"absent: <why>"``.
        torch_target: Oldest torch that the native libraries load on, such as ``"2.10"``; None
            without them.
        compiler: Compiler of the native libraries; None without them.
        notes: What is missing on this machine, and what to do about it.
        backends: For every operator and device, what would run and, if it is not native, why.
    """

    versions: dict[str, str]
    native: dict[str, str]
    cpu_isa: str | None
    cpu_isas_available: tuple[str, ...]
    cpu_isas_built: tuple[str, ...]
    cuda_archs: tuple[str, ...]
    cublaslt: str
    torch_target: str | None
    compiler: str | None
    notes: tuple[str, ...]
    backends: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as dicts, lists, strings and None, ready for JSON."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    def __repr__(self) -> str:
        rows = [
            ("versions", _pairs(self.versions)),
            ("native libraries", _pairs(self.native, ": ")),
            ("CPU instruction set", f"{self.cpu_isa or 'none'}{self._available()}"),
            ("CUDA architectures", ", ".join(self.cuda_archs) or "none built"),
            ("cuBLASLt", self.cublaslt),
            ("built for", f"torch >= {self.torch_target}" if self.torch_target else "not built"),
            ("compiler", self.compiler or "none"),
            *(("note", note) for note in self.notes),
        ]
        for op, devices in self.backends.items():
            rows += [(f"{op} on {device}", backend) for device, backend in devices.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(["uhd_ops.build_info():", *(f"  {n:<{width}}  {v}" for n, v in rows)])

    def _available(self) -> str:
        return f" (available: {', '.join(self.cpu_isas_available)})" if self.cpu_isa else ""


def build_info() -> BuildInfo:
    """Report versions, native libraries, instruction sets, and the backend of every operator.

    Returns:
        A record whose text form is meant for bug reports; ``to_dict()`` is ready for JSON.

    Example:
        >>> list(uhd_ops.build_info().backends["window_attention"])
        ['cpu', 'cuda']
    """
    build = _host_build_info()
    built = tuple(build.get("cpu_isas", "").split())
    has_cpu = _native.status["cpu"] == "loaded"
    best = torch.ops.uhd_ops._best_cpu_isa() if has_cpu else None
    return BuildInfo(
        versions={
            "uhd_ops": importlib.import_module("uhd_ops").__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        native=dict(_native.status),
        cpu_isa=_native.cpu_isa() if has_cpu else None,
        cpu_isas_available=built[: built.index(best) + 1] if best in built else (),
        cpu_isas_built=built,
        cuda_archs=tuple(build.get("cuda_archs", "").split()),
        cublaslt=_native.cublaslt,
        torch_target=_torch_version(build.get("torch_target")),
        compiler=build.get("compiler"),
        notes=tuple(filter(None, map(_native.missing, _DEVICES))),
        backends={op: {device: _backend(op, device) for device in _DEVICES} for op in _OPERATORS},
    )


def _host_build_info() -> dict[str, str]:
    if _native.status["host"] != "loaded":
        return {}
    return importlib.import_module("uhd_ops._host").build_info()


def _torch_version(target: str | None) -> str | None:
    """Decode ``TORCH_TARGET_VERSION``: major and minor in the two highest bytes."""
    if target is None:
        return None
    value = int(target, 16)
    return f"{value >> 56}.{value >> 48 & 0xFF}"


def _backend(op: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return f"none: {_no_cuda()}"
    if op in _TORCH_ONLY:
        return _TORCH_ONLY[op]
    status = _native.status[device]
    if status != "loaded":
        return f"reference: native {device} library {status}"
    if op in _TORCH_ON_TABLES:
        return _TORCH_ON_TABLES[op]
    parts = _PARTS.get(op, (op,))
    if not all(_has_kernel(part, device) for part in parts):
        return f"reference: no {device} kernel"
    kernels = f"native {_native.cpu_isa()}" if device == "cpu" else "native cuda"
    if "_linear_activation" not in parts:
        return kernels
    # Its parts may use it where ops/pixel_unshuffle_mlp.py says so.
    gelu = " and cuBLASLt" if device == "cuda" and _native.cublaslt_enabled else ""
    return f"{kernels}, matrix products by torch{gelu}"


def _no_cuda() -> str:
    return "torch has no CUDA" if torch.version.cuda is None else "no CUDA device"


def _has_kernel(op: str, device: str) -> bool:
    name = f"uhd_ops::{op}"
    if name not in torch._C._dispatch_get_all_op_names():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper())


def _pairs(items: dict[str, str], separator: str = " ") -> str:
    return ", ".join(f"{name}{separator}{value}" for name, value in items.items())
