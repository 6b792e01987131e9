# SPDX-License-Identifier: Apache-2.0
"""Build driver. CMakeLists.txt is the only description of the native build.

This file decides whether CMake runs, hands it the environment's wishes, and puts the libraries into
the package. The switches: UHD_OPS_NO_NATIVE, UHD_OPS_REQUIRE_NATIVE, UHD_OPS_CUDA (auto, 0, 1),
UHD_OPS_CUDA_ARCHS, UHD_OPS_TORCH_INCLUDE, UHD_OPS_BUILD_DIR, UHD_OPS_SANITIZE, UHD_OPS_WERROR,
CXX, CUDACXX, MAX_JOBS.

A package without kernels has the version "<version>+reference": a local version, which the public
index refuses, and which pip refuses where an index promised the plain one. Source archives have
the plain one, as they may be built anywhere.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = "uhd_ops"
OLDEST_TORCH = (2, 10)
VERSION_HEADER = "torch/headeronly/version.h"
FIND_TORCH = """if True:
    import importlib.util
    spec = importlib.util.find_spec("torch")
    print(*(spec and spec.submodule_search_locations or ()), sep="\\n")
"""


def switch(name):
    """True, False, or None for unset and "auto"."""
    value = os.environ.get(name, "").strip().lower()
    return None if value in ("", "auto") else value not in ("0", "no", "off", "false")


def torch_folders():
    """Yield where this Python finds torch, without importing it.

    pip's isolated build hides it: PYTHONPATH leads to a sitecustomize.py that takes site-packages
    and what their .pth files name off the path. A child without that sees what a user's Python
    does: the environment itself, the packages of the system, .pth files, the user's own folder.
    """
    spec = importlib.util.find_spec("torch")
    if spec:
        yield from spec.submodule_search_locations or ()
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
    seen = {name: value for name, value in os.environ.items() if name not in hiding}
    command = [sys.executable, "-c", FIND_TORCH]
    # Not in the checkout, whose folders an empty entry of the path would make importable.
    done = subprocess.run(command, env=seen, cwd=os.sep, capture_output=True, text=True)
    yield from filter(None, done.stdout.splitlines())


def torch_include():
    """Find torch's headers, or say what to do.

    Only headers are needed, and their version does not matter from the oldest on (stable ABI).
    """
    named = os.environ.get("UHD_OPS_TORCH_INCLUDE")
    folders = [named] if named else [os.path.join(folder, "include") for folder in torch_folders()]
    oldest = ".".join(map(str, OLDEST_TORCH))
    older = []
    for folder in folders:
        header = Path(folder, VERSION_HEADER)
        numbers = re.findall(r"#define TORCH_VERSION_M\w+ (\d+)", _text(header))
        if tuple(map(int, numbers)) >= OLDEST_TORCH:
            return folder
        older.append(f"{folder} ({'.'.join(numbers) or 'no ' + VERSION_HEADER})")
    found = f"only {', '.join(older)}" if older else f"no torch that {sys.executable} sees"
    raise SystemExit(
        f"{PACKAGE}: the kernels are built with the headers of torch >= {oldest}, but there is "
        f"{found}. Install torch first: none is downloaded for the build. Where it is installed, "
        "the build cannot see it: add --no-build-isolation, with cmake, ninja and wheel "
        "installed, or set UHD_OPS_TORCH_INCLUDE to its include folder. UHD_OPS_NO_NATIVE=1 "
        "installs without kernels (slow)."
    )


def _text(path):
    return path.read_text(encoding="utf-8") if path.exists() else ""


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
    named = os.environ.get("CXX")
    compilers = [named] if named else ["c++", "g++", "clang++"]
    there = [compiler for compiler in compilers if shutil.which(shlex.split(compiler)[0])]
    if not there:
        return f"no C++ compiler found (looked for {', '.join(compilers)}; set CXX)"
    command = [*shlex.split(there[0]), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    program = "#include <string_view>\nint main() {}\n"
    if subprocess.run(command, input=program, capture_output=True, text=True).returncode:
        return f"the C++ compiler {there[0]} does not compile a program in C++17 (set CXX)"
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
        return {*self.destination().glob("*.so")}

    def run(self):
        installed = set()
        try:
            installed = self.cmake_with_or_without_cuda()
        except (subprocess.CalledProcessError, OSError) as error:
            # Without kernels it would be another package, of another version.
            raise SystemExit(
                f"{PACKAGE}: the native build FAILED ({error}). UHD_OPS_NO_NATIVE=1 installs "
                "without kernels; the operators then run on the PyTorch reference (slow)."
            ) from error
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
        include = torch_include()
        for tool in ("cmake", "ninja"):
            if not shutil.which(tool):
                raise OSError(f"{tool} is not on PATH (pip install {tool})")

        yield from ("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja")
        # Said every time: the ninja of an isolated build is gone when the next one reads the cache.
        yield f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"
        yield f"-DUHD_TORCH_INCLUDE={include}"
        yield f"-DUHD_CUDA={'ON' if nvcc else 'OFF'}"
        yield f"-DUHD_SANITIZE={'ON' if switch('UHD_OPS_SANITIZE') else 'OFF'}"
        yield f"-DUHD_WERROR={'ON' if switch('UHD_OPS_WERROR') else 'OFF'}"
        yield f"-DUHD_VERSION={VERSION}"
        if nvcc:
            yield f"-DCMAKE_CUDA_COMPILER={nvcc}"
        yield f"-DUHD_CUDA_ARCHS={os.environ.get('UHD_OPS_CUDA_ARCHS', '')}"

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


VERSION = re.search(r'^__version__ = "(.+)"$', _text(ROOT / PACKAGE / "__init__.py"), re.M)[1]
reason = why_not_native()
if reason:
    if switch("UHD_OPS_REQUIRE_NATIVE"):
        raise SystemExit(f"{PACKAGE}: UHD_OPS_REQUIRE_NATIVE=1 but {reason}")
    boxed_warning(
        f"building WITHOUT native kernels: {reason}. The operators will run on the PyTorch "
        "reference (slow)."
    )
elif "dist_info" in sys.argv:
    torch_include()  # pip asks for the metadata, and downloads what they require before it builds


def package_page(readme):
    """README.md as the page of a package: an index has no files that a relative address could mean.

    Images with one are left out, and of links the text is kept.
    """
    relative = r"\((?![a-z]+:|#)[^()\s]+\)"
    readme = re.sub(rf"^!\[[^\]]*\]{relative}\n+", "", readme, flags=re.M)
    return re.sub(rf"(?<!!)\[([^\]]+)\]{relative}", r"\1", readme)


class AnyPython(bdist_wheel):
    """A wheel for every version of Python: the libraries know none."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return reason is None


# Said here, where the setuptools of a fresh Python 3.11 (65.5) understands it too: pyproject.toml
# would need a table for setuptools < 77, and a string from there on.
before_expressions = int(setuptools.__version__.split(".")[0]) < 77
license_field = "license" if before_expressions else "license_expression"
setup(
    version=VERSION + ("+reference" if reason and "sdist" not in sys.argv else ""),
    **{license_field: "Apache-2.0"},
    long_description=package_page(_text(ROOT / "README.md")),
    long_description_content_type="text/markdown",
    # uhd_ops_cli is uhd_ops.cli.arguments once more, to be imported without uhd_ops, and so without
    # torch: `uhd-ops --help` takes a tenth of a second.
    packages=[*setuptools.find_packages(include=[f"{PACKAGE}*"]), "uhd_ops_cli"],
    package_dir={"uhd_ops_cli": "uhd_ops/cli/arguments"},
    distclass=NativeDistribution,
    ext_modules=[] if reason else [Extension(f"{PACKAGE}.libuhd", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPython},
)
