# SPDX-License-Identifier: Apache-2.0
"""The vector layer under the CPU kernels, compiled alone: exp, and conversions of halves."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from battery import ISAS
from battery.halves import HALVES, check_rounding, check_widening
from battery.marks import native_only

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {  # as in CMakeLists.txt, which test_flags_are_those_of_the_build checks
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
COMMON = ["-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"]
COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)

# This module needs a build, and a build needs a compiler: it never skips where the kernels are.
pytestmark = native_only("the definitions have no vectors")


@pytest.fixture(scope="module", params=ISAS)
def vec_check(request, tmp_path_factory):
    """Return a function that runs the check program of one instruction set."""
    assert COMPILER, "no C++ compiler: set CXX"
    isa = request.param
    program = tmp_path_factory.mktemp("vec") / isa
    defines = [f"-DUHD_ISA={isa}", f"-DUHD_ISA_{isa.upper()}"]
    source = Path(__file__).parent / "battery" / "vec_check.cpp"
    flags = ["-std=c++17", "-O3", *COMMON, *FLAGS[isa], *defines, f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, source, "-o", program], check=True)

    def run(*arguments, stdin=b""):
        return subprocess.run(
            [program, *arguments], input=stdin, capture_output=True, check=True, timeout=60
        ).stdout

    return run


def test_flags_are_those_of_the_build():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    for isa in ("avx2", "avx512"):
        assert f"set(flags_{isa} {' '.join(FLAGS[isa])})" in cmake
    assert " ".join(COMMON) in " ".join(cmake.split())


def test_exp(vec_check):
    worst, *edges = map(float, vec_check("exp").split())
    # Reduction 1/2 ulp of r and polynomial 1/2 ulp, with the roundings of the last three additions
    # where p is near 1: below 2 ulp with or without fused multiply-add.
    assert worst < 2.0
    nan, *edges = edges
    assert math.isnan(nan)
    assert edges == [math.inf, 0.0, 1.0, 1.0, math.inf, 0.0, 0.0]


@pytest.mark.parametrize("check", [check_widening, check_rounding])
@pytest.mark.parametrize("kind", HALVES)
def test_halves(vec_check, kind, check):
    check(vec_check, kind)
