# SPDX-License-Identifier: Apache-2.0
"""The CUDA library as nvcc made it, on a machine that need not have a GPU.

It holds the architectures that were asked for, no kernel spills, every kernel keeps to its register
budget and has the instructions that its speed rests on, and torch can load it.
"""

import os
import platform
import re
import shutil
import subprocess

import pytest
import torch
from battery.cuda_binary import LIBRARY, asked_for, assembled, contents, kernels
from battery.cuda_budgets import BUDGETS
from specs import SPECS
from torch._subclasses.fake_tensor import FakeTensorMode

import uhd_ops
from uhd_ops import _native

# Those that every build for tests must hold, and whatever else is in this one.
ARCHS = sorted({"sm_80", "sm_90a"} | {arch for arch in asked_for() if arch.startswith("sm_")})
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CI = os.environ.get("CI", "") not in ("", "0", "false")
REQUIRED = NVCC is not None or (CI and platform.machine() == "x86_64")
WHY = "no nvcc here, so there is no CUDA library (on x86-64, with CI=true, this would be an error)"

# In an emulated or sanitized build the package holds no CUDA library on purpose.
pytestmark = pytest.mark.skipif(not REQUIRED and not LIBRARY.exists(), reason=WHY)


def test_library_was_built():
    assert LIBRARY.exists(), "nvcc is here or CI is set, but libuhd_cuda.so was not built"
    assert {*ARCHS} <= contents() == asked_for()
    assert any(arch.startswith("compute_") for arch in contents()), "no PTX for what comes"


def budgets_of(name, registers):
    """Return the rows for a kernel, of which there must be one, and what is wrong."""
    rows = [row for row in BUDGETS if re.fullmatch(row.name, name)]
    bad = [
        f"{name}: {registers} registers of {r.registers}" for r in rows if registers > r.registers
    ]
    if len(rows) != 1:
        bad.append(f"{name} matches {len(rows)} rows of BUDGETS; one is wanted")
    return rows, bad


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels(arch):
    """One test, as disassembling takes half a minute; its message lists all that is wrong."""
    found, bad, used = kernels(arch), [], set()
    assert found
    for kernel in found:
        if kernel.stack or kernel.local_memory:
            bad.append(f"{kernel.name} spills: {kernel.stack} bytes, {kernel.local_memory}")
        # The emulator poisons and guards only the memory that launch() asks for: shared memory is
        # dynamic. sm_90 reserves the first KB of every block's for the system.
        if kernel.static_shared not in (0, 1024):
            bad.append(f"{kernel.name} has {kernel.static_shared} bytes of static shared memory")
        rows, complaints = budgets_of(kernel.name, kernel.registers)
        bad += complaints
        for row in rows:
            used.add(row)
            for opcode in row.opcodes:
                if not any(re.match(opcode, code) for code in kernel.opcodes):
                    bad.append(f"{kernel.name} has no {opcode} instruction")
    bad += [f"no kernel has the name {row.name}" for row in set(BUDGETS) - used]
    assert not bad, "\n".join(bad)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None and not REQUIRED, reason=WHY)
@pytest.mark.parametrize("arch", ["sm_100", "sm_120"])
def test_later_generations_take_the_kernels(arch, tmp_path):
    """Their machine code is in releases; here the assembler makes it of the library's PTX."""
    found, bad = assembled(arch, tmp_path), []
    assert found
    for name, (registers, stack) in found.items():
        bad += budgets_of(name, registers)[1]
        if stack:
            bad.append(f"{name} spills: {stack} bytes")
    assert not bad, "\n".join(bad)


def test_torch_loads_it():
    assert _native.status["cuda"] == "loaded"
    native = [name for name, spec in SPECS.items() if "native" not in spec.exempt]
    schemas = {name for name in torch._C._dispatch_get_all_op_names() if "uhd_ops::" in name}
    with_tensors = [
        name for name in schemas if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    ]
    assert {f"uhd_ops::{name}" for name in native} & set(with_tensors)
    for name in with_tensors:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


def test_it_needs_nothing_but_what_torch_has_loaded():
    wanted = subprocess.run(
        ["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", wanted))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert needed <= {"libtorch_cpu.so", "libtorch_cuda.so", *system, "libdl.so.2", "librt.so.1"}
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    assert not re.findall(r"_ZN(?:K?)(?:3c10|2at|5torch)\w+", symbols), "not the stable ABI"


@pytest.mark.parametrize("name", sorted(n for n, s in SPECS.items() if "native" not in s.exempt))
def test_fake_cuda_tensors_take_the_native_path(name):
    with FakeTensorMode() as mode:
        call = SPECS[name].make([(4, 6), (3, 5)], torch.bfloat16)
        call = call.map_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        assert _native.has_kernels(torch.device("cuda"))
        out = getattr(uhd_ops, name)(*call.args, **call.kwargs)
    assert out.device.type == "cuda"
    assert mode is not None
