# SPDX-License-Identifier: Apache-2.0
"""Build driver. CMakeLists.txt is the only description of the native build.

This file decides whether CMake runs, hands it the environment's wishes, and puts the libraries into
the package. The switches: UHD_OPS_NO_NATIVE, UHD_OPS_REQUIRE_NATIVE, UHD_OPS_CUDA (auto, 0, 1),
UHD_OPS_CUDA_ARCHS, UHD_OPS_TORCH_INCLUDE, UHD_OPS_BUILD_DIR, UHD_OPS_SANITIZE, CXX, CUDACXX,
MAX_JOBS.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "uhd_ops"
STABLE_ABI_HEADER = "torch/csrc/stable/library.h"


def switch(name):
    """True, False, or None for unset and "auto"."""
    value = os.environ.get(name, "").strip().lower()
    return None if value in ("", "auto") else value not in ("0", "no", "off", "false")


def torch_include():
    """Find torch's headers without importing torch, or return None.

    Only headers are needed, and their version does not matter (stable ABI), so a build in pip's
    isolated environment may use the torch of the environment that it installs into.
    """
    candidates = [os.environ.get("UHD_OPS_TORCH_INCLUDE")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(os.path.join(next(iter(spec.submodule_search_locations)), "include"))
    for key in ("platlib", "purelib"):
        candidates.append(os.path.join(sysconfig.get_paths()[key], "torch/include"))
    return next((c for c in candidates if c and (Path(c) / STABLE_ABI_HEADER).exists()), None)


def find_nvcc():
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for key in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(key):
            candidates.insert(1, os.path.join(os.environ[key], "bin/nvcc"))
    return next((c for c in candidates if c and os.path.exists(c)), None)


def why_not_native():
    """Say why there can be no native build, or return None."""
    if switch("UHD_OPS_NO_NATIVE"):
        return "UHD_OPS_NO_NATIVE is set"
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(shutil.which(compiler) for compiler in compilers):
        return f"no C++ compiler found (looked for {', '.join(compilers)}; set CXX)"
    return None


def boxed_warning(message):
    bar = "*" * 100
    print(f"\n{bar}\n* {PACKAGE}: {message}\n{bar}\n", file=sys.stderr, flush=True)


class CMakeBuild(build_ext):
    """Run CMake and install the libraries beside the Python files."""

    def destination(self):
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / PACKAGE if in_place else Path(self.build_lib).resolve() / PACKAGE

    def present_libraries(self):
        return {*self.destination().glob("libuhd_*.so"), *self.destination().glob("_host*.so")}

    def run(self):
        installed = set()
        try:
            installed = self.cmake_with_or_without_cuda()
        except (subprocess.CalledProcessError, OSError) as error:
            if switch("UHD_OPS_REQUIRE_NATIVE") or switch("UHD_OPS_CUDA"):
                raise
            boxed_warning(
                f"the native build FAILED ({error}); the operators will run on the PyTorch "
                "reference (slow). Set UHD_OPS_REQUIRE_NATIVE=1 to make this an error."
            )
        finally:
            for stale in self.present_libraries() - installed:
                stale.unlink()  # of an earlier build that this one did not renew

    def cmake_with_or_without_cuda(self):
        cuda = switch("UHD_OPS_CUDA")
        nvcc = find_nvcc()
        if cuda and not nvcc:
            raise OSError("UHD_OPS_CUDA=1 but no nvcc was found; set CUDACXX or CUDA_HOME")
        if not nvcc or cuda is False:
            return self.cmake(None)
        try:
            return self.cmake(nvcc)
        except subprocess.CalledProcessError as error:
            if cuda or switch("UHD_OPS_REQUIRE_NATIVE"):
                raise
            boxed_warning(
                f"the build with CUDA FAILED ({error}); building without it. Operators on CUDA "
                "tensors will run on the PyTorch reference (slow). UHD_OPS_CUDA=1 makes this an "
                "error, UHD_OPS_CUDA=0 skips CUDA."
            )
            return self.cmake(None)

    def cmake(self, nvcc):
        build = Path(os.environ.get("UHD_OPS_BUILD_DIR") or ROOT / "build" / "cmake")
        try:
            subprocess.run([*self.configure_command(build, nvcc)], check=True)
        except subprocess.CalledProcessError:
            # A failed configure (a bad CXX, say) would be remembered for ever.
            (build / "CMakeCache.txt").unlink(missing_ok=True)
            shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
            raise
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        destination = str(self.destination())
        subprocess.run(["cmake", "--install", str(build), "--prefix", destination], check=True)
        manifest = (build / "install_manifest.txt").read_text().split("\n")
        return {Path(line) for line in manifest if line}

    def configure_command(self, build, nvcc):
        import pybind11

        include = torch_include()
        if include is None:
            raise OSError("no torch >= 2.10 headers found; set UHD_OPS_TORCH_INCLUDE")
        for tool in ("cmake", "ninja"):
            if not shutil.which(tool):
                raise OSError(f"{tool} is not on PATH (pip install {tool})")
        yield from ("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja")
        # Said every time: the ninja of an isolated build is gone when the next one reads the cache.
        yield f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
        yield f"-DUHD_TORCH_INCLUDE={include}"
        yield f"-DUHD_CUDA={'ON' if nvcc else 'OFF'}"
        yield f"-DUHD_SANITIZE={'ON' if switch('UHD_OPS_SANITIZE') else 'OFF'}"
        yield f"-DUHD_VERSION={self.distribution.get_version()}"
        yield f"-DPython_EXECUTABLE={sys.executable}"
        yield f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"
        if nvcc:
            yield f"-DCMAKE_CUDA_COMPILER={nvcc}"
        if os.environ.get("UHD_OPS_CUDA_ARCHS"):
            yield f"-DUHD_CUDA_ARCHS={os.environ['UHD_OPS_CUDA_ARCHS']}"

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


reason = why_not_native()
if reason:
    if switch("UHD_OPS_REQUIRE_NATIVE"):
        raise SystemExit(f"{PACKAGE}: UHD_OPS_REQUIRE_NATIVE=1 but {reason}")
    boxed_warning(
        f"building WITHOUT native kernels: {reason}. The operators will run on the PyTorch "
        "reference (slow)."
    )


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return reason is None


setup(
    distclass=NativeDistribution,
    ext_modules=[] if reason else [Extension(f"{PACKAGE}._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Where no torch can be found (`python -m build` isolates itself completely), bring one for its
    # headers.
    setup_requires=[] if reason or torch_include() else ["torch>=2.10"],
)
