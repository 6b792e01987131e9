# SPDX-License-Identifier: Apache-2.0
"""Read what nvcc made of the CUDA kernels: registers, stack, instructions."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import uhd_ops

LIBRARY = Path(uhd_ops.__file__).parent / "libuhd_cuda.so"
MEMORY_OPCODES = ("LDL", "STL")  # local memory: spilled registers or arrays that did not fit


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel of one architecture."""

    name: str  # as written in C++, without parameters
    arch: str
    registers: int
    stack: int  # bytes a thread
    static_shared: int  # bytes a block
    opcodes: frozenset[str]  # such as LDG.E.128

    @property
    def local_memory(self) -> list[str]:
        return sorted(code for code in self.opcodes if code.split(".")[0] in MEMORY_OPCODES)


def tool(name: str) -> str:
    """Find a program of the CUDA toolkit; torch's triton package brings the disassemblers too."""
    found = shutil.which(name)
    if found is None:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        found = str(bundled) if bundled.exists() else None
    if found is None:
        raise FileNotFoundError(f"{name} is neither on PATH nor in the triton package")
    return found


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in /usr/local/cuda/bin")
    return found


def run(*command: str, cwd: Path | None = None) -> str:
    """Return what a program prints. The disassembler is found beside cuobjdump."""
    folders = os.pathsep.join([str(Path(tool("nvdisasm")).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=cwd, env={"PATH": folders}
    )
    return done.stdout


def contents() -> set[str]:
    """Return the architectures in the library: ``sm_80`` machine code, ``compute_100`` PTX."""
    listed = run(tool("cuobjdump"), "-lelf", "-lptx", str(LIBRARY))
    machine = {f"sm_{arch}" for arch in re.findall(r"\.sm_(\w+)\.cubin", listed)}
    return machine | {f"compute_{arch}" for arch in re.findall(r"\.sm_(\w+)\.ptx", listed)}


def asked_for() -> set[str]:
    """Return the architectures that the build was told of, in the same words."""
    found = set()
    for word in uhd_ops.build_info().cuda_archs:
        arch, _, kind = word.partition("-")
        found |= {f"sm_{arch}"} if kind != "virtual" else set()
        found |= {f"compute_{arch}"} if kind != "real" else set()
    return found


@functools.cache
def kernels(arch: str) -> tuple[Kernel, ...]:
    """Return every kernel that the library holds for ``arch``, such as sm_90a."""
    cuobjdump = tool("cuobjdump")
    usage = _usage(run(cuobjdump, "--dump-resource-usage", "-arch", arch, str(LIBRARY)))
    opcodes = _opcodes(run(cuobjdump, "-sass", "-arch", arch, str(LIBRARY)))
    assert usage.keys() == opcodes.keys(), "the two listings name different kernels"
    plain = _demangled(list(usage))
    return tuple(
        Kernel(plain[symbol], arch, *usage[symbol], opcodes[symbol]) for symbol in sorted(usage)
    )


def assembled(arch: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Assemble the library's PTX for ``arch``; return the registers and stack of each kernel."""
    run(tool("cuobjdump"), "-xptx", "all", str(LIBRARY), cwd=folder)
    usage: dict[str, tuple[int, int, int]] = {}
    for ptx in sorted(folder.glob("*.ptx")):
        cubin = ptx.with_suffix(".cubin")
        run(nvcc(), "-cubin", f"-arch={arch}", "-o", str(cubin), str(ptx))
        usage |= _usage(run(tool("cuobjdump"), "--dump-resource-usage", str(cubin)))
    plain = _demangled(list(usage))
    return {plain[symbol]: (row[0], row[1]) for symbol, row in usage.items()}


def _usage(listing: str) -> dict[str, tuple[int, int, int]]:
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {
        symbol: (int(registers), int(stack) + int(local), int(shared))
        for symbol, registers, stack, shared, local in re.findall(pattern, listing)
    }


def _opcodes(listing: str) -> dict[str, frozenset[str]]:
    functions = re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)
    return {text.split()[0]: frozenset(instruction.findall(text)) for text in functions}


def _demangled(symbols: list[str]) -> dict[str, str]:
    filt = shutil.which("c++filt")
    assert filt, "c++filt (binutils) is needed to read the kernels' names"
    lines = subprocess.run(
        [filt], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return {
        symbol: re.sub(r"\(anonymous namespace\)::|^void |\(.*", "", _without_scope(line))
        for symbol, line in zip(symbols, lines, strict=True)
    }


def _without_scope(line: str) -> str:
    return line.replace("(anonymous namespace)::", "").replace("uhd::", "")
