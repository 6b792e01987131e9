# SPDX-License-Identifier: Apache-2.0
"""Installing without a compiler, with a broken one, and with native kernels required."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
USE_IT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import uhd_ops
    import torch
    q = torch.randn(15, 2, 8, requires_grad=True)
    uhd_ops.window_attention(q, q, q, [(3, 5)]).sum().backward()
    plan = uhd_ops.plan_slices(1920, 1080)
ours = [w for w in caught if "uhd_ops" in str(w.message)]
assert [w.category for w in ours] == [RuntimeWarning], [str(w.message) for w in caught]
assert "no native CPU kernels (absent)" in str(ours[0].message), ours[0].message
assert q.grad.isfinite().all() and plan.grid == (2, 4)
assert uhd_ops._native.status["cpu"] == uhd_ops._native.status["host"] == "absent"
print("imported from", uhd_ops.__file__)
"""


def pip(command, *options, env=None):
    words = [sys.executable, "-m", "pip", command, "--no-deps", "--disable-pip-version-check"]
    return subprocess.run([*words, *options], env=env, capture_output=True, text=True)


def build_wheel(tmp_path, **environment):
    """Build a wheel from a copy of the sources; return the finished process and the wheels."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    no_binaries = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("csrc", "uhd_ops"):
        shutil.copytree(ROOT / folder, source / folder, ignore=no_binaries)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("UHD_OPS_") and k != "CXX"}
    target = str(tmp_path / "wheels")
    done = pip(
        "wheel",
        "-v",
        "--no-build-isolation",
        "-w",
        target,
        str(source),
        env={**kept, **environment},
    )
    return done, sorted((tmp_path / "wheels").glob("*.whl"))


def use_wheel(wheel, tmp_path):
    """Install the wheel beside nothing and run the reference path from it."""
    target = tmp_path / "installed"
    pip("install", "-q", "--target", str(target), str(wheel)).check_returncode()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UHD_OPS_")}
    # -S: without the .pth files of the environment, one of which makes the checkout importable.
    path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", USE_IT],
        env={**environment, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler found (looked for /nonexistent/c++"),
        ({"UHD_OPS_NO_NATIVE": "1"}, "UHD_OPS_NO_NATIVE is set"),
    ],
    ids=["no compiler", "switched off"],
)
def test_without_compiler_installs_and_says_so(tmp_path, environment, reason):
    done, wheels = build_wheel(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert f"building WITHOUT native kernels: {reason}" in done.stdout + done.stderr
    assert [wheel.name.split("-", 2)[2] for wheel in wheels] == ["py3-none-any.whl"]
    use_wheel(wheels[0], tmp_path)


def test_broken_compiler_installs_and_says_so(tmp_path):
    done, wheels = build_wheel(tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "the native build FAILED" in done.stdout + done.stderr
    use_wheel(wheels[0], tmp_path)


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "/bin/false"])
def test_required_native_kernels_fail_the_install(tmp_path, compiler):
    done, wheels = build_wheel(tmp_path, CXX=compiler, UHD_OPS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert not wheels
