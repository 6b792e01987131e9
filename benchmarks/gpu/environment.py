# SPDX-License-Identifier: Apache-2.0
"""Print what this machine is, as JSON: versions, tools, and the GPU or why there is none.

A process of its own, so that a driver that hangs or a torch that does not load ends one stage only.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata

PACKAGES = ("torch", "triton", "timm", "transformers", "numpy", "hypothesis", "pytest", "cmake")
TOOLS = ("nvcc", "ninja", "cmake", "compute-sanitizer", "ncu", "nvidia-smi")
# CUDA's own tools are often not on PATH.
TOOL_FOLDERS = (
    "/usr/local/cuda/bin",
    "/usr/local/cuda/compute-sanitizer",
    "/usr/local/cuda/nsight-compute",
)
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,mig.mode.current"


def find_tool(name: str) -> str | None:
    """Return the path of a program on PATH or in CUDA's folders, or None."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *TOOL_FOLDERS])
    return shutil.which(name, path=path)


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def first_line(*command: str) -> str:
    """Return the last line that names a release or version, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    named = [line for line in lines if "release" in line or "ersion" in line]
    return (named or lines or [f"exit code {done.returncode}"])[-1].strip()


def describe_gpu() -> dict[str, object]:
    """Return ``{"gpu": facts}`` or ``{"gpu": None, "why_no_gpu": reason}``."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return {"gpu": None, "why_no_gpu": f"torch cannot be imported: {error}"}
    if torch.version.cuda is None:
        return {"gpu": None, "why_no_gpu": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        smi = "found" if find_tool("nvidia-smi") else "not found"
        return {
            "gpu": None,
            "why_no_gpu": "no CUDA device: torch.cuda.is_available() is False, "
            f"nvidia-smi is {smi}",
        }
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": {
            "name": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda_of_torch": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    }


def describe() -> dict[str, object]:
    """Return everything that a result has to be read with."""
    tools = {name: find_tool(name) for name in TOOLS}
    facts = {
        "versions": versions(),
        "tools": tools,
        "kernel": platform.release(),
        "logical_cpus": os.cpu_count(),
        **describe_gpu(),
    }
    if tools["nvcc"]:
        facts["nvcc"] = first_line(tools["nvcc"], "--version")
    if tools["nvidia-smi"]:
        command = (tools["nvidia-smi"], f"--query-gpu={QUERY}", "--format=csv,noheader")
        facts["nvidia_smi"] = first_line(*command)
    return facts


if __name__ == "__main__":
    print(json.dumps(describe()))
