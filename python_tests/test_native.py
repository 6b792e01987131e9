# SPDX-License-Identifier: Apache-2.0
"""The native libraries: present, self-contained, switchable, and dispensable."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from battery import ISAS
from battery.marks import native_only
from families.case import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import uhd_ops
from uhd_ops import _native

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PACKAGE = Path(uhd_ops.__file__).resolve().parent
LIBRARY = PACKAGE / "libuhd_cpu.so"
CALL = "uhd_ops.window_attention(*torch.ones(3, 6, 1, 2), [(2, 3)])"

needs_library = native_only("UHD_OPS_DISABLE_NATIVE is set")


def run_python(code, *options, package=PACKAGE.parent, **environment):
    """Run ``code`` in a fresh interpreter that finds uhd_ops under ``package``."""
    environment = {**os.environ, "PYTHONPATH": str(package), **environment}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=environment,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_library
def test_libraries_are_loaded():
    assert _native.status["cpu"] == "loaded"
    assert _native.status["host"] == "loaded"
    assert _native.has_kernels(torch.device("cpu"))
    assert not _native.has_kernels(torch.device("xpu"))


@needs_library
def test_definitions_on_request():
    x, grids = torch.randn(11, 3), [(3, 3), (1, 2)]
    expected = uhd_ops.reference.window_mean(x, grids)
    compiled = torch.compile(uhd_ops.window_mean, backend="aot_eager")
    with uhd_ops.definitions(), uhd_ops.definitions(), torch.profiler.profile() as profile:
        assert not _native.has_kernels(torch.device("cpu"))
        assert torch.equal(uhd_ops.window_mean(x, grids), expected)
    assert not any("uhd_ops" in event.key for event in profile.key_averages())
    with pytest.raises(ZeroDivisionError), uhd_ops.definitions():
        _ = 1 / 0
    assert _native.has_kernels(torch.device("cpu"))
    for mode in (contextlib.nullcontext, uhd_ops.definitions, contextlib.nullcontext):
        with mode():
            assert_close(compiled(x, grids), expected, 16)


@needs_library
def test_library_uses_only_the_stable_abi():
    # A mangled name of c10, at or torch would tie the library to one version of torch.
    table = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1] for line in table.splitlines()]
    assert any(symbol.startswith(("aoti_torch_", "torch_")) for symbol in symbols)
    foreign = ("2at", "3c10", "5torch", "8caffe2")
    assert [s for s in symbols if s.startswith("_Z") and any(part in s for part in foreign)] == []


@needs_library
def test_kernels_export_no_weak_symbols():
    # The linker keeps one copy of a weak symbol. Were it the AVX-512 one, the scalar kernels would
    # stop on a processor without it. Objects of a build tree show it before the linker hides it.
    objects = [
        path
        for isa in ("scalar", "avx2", "avx512")
        for path in (ROOT / "build" / "cmake" / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o")
    ]
    tables = [["nm", "--defined-only", path] for path in objects]
    if not tables:  # an installed package: the linked library is all there is
        tables = [["nm", "-D", "--defined-only", LIBRARY]]
    for command in tables:
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in table.splitlines()]
        weak = [line[-1] for line in lines if line[-2] in "WVwvu"]
        # What is linked beside the kernels uses the standard library.
        assert [name for name in weak if objects or "uhd" in name] == [], command[-1]


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_from_the_environment(isa):
    code = f"import torch, uhd_ops; {CALL}; print(uhd_ops._native.cpu_isa())"
    result = run_python(code, UHD_OPS_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


@needs_library
def test_unknown_instruction_set():
    best = ISAS[-1]
    message = (
        "CPU instruction set must be scalar, avx2 or avx512, "
        f"and not above {best} on this processor; got sse9"
    )
    result = run_python(f"import torch, uhd_ops; {CALL}", UHD_OPS_CPU_ISA="sse9")
    assert result.returncode == 1, "no signal: an error that Python can catch"
    assert message in result.stderr
    active = _native.cpu_isa()
    with pytest.raises(RuntimeError, match=message):
        _native.set_cpu_isa("sse9")
    assert _native.cpu_isa() == active


def test_a_second_import_is_refused(tmp_path):
    copy = tmp_path / "uhd_ops"
    ignore = shutil.ignore_patterns("libuhd_cuda.so", "__pycache__")
    shutil.copytree(PACKAGE, copy, ignore=ignore)
    code = f"""
import sys, torch, uhd_ops as first
for path in ({str(PACKAGE.parent)!r}, {str(tmp_path)!r}):
    sys.path.insert(0, path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "uhd_ops"]:
        del sys.modules[name]
    try:
        import uhd_ops
    except ImportError as error:
        print(error)
print({CALL.replace("uhd_ops", "first")}.sum().item())
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    *refused, total = result.stdout.splitlines()
    loaded = _native.status["cpu"] == "loaded"
    assert refused == [
        f"uhd_ops has been imported in this process before, from "
        f"{PACKAGE if loaded else 'elsewhere'}, and torch takes its operators once, so {folder} "
        "cannot be imported: keep one copy of the package, and import it again in a new process "
        "only"
        for folder in (PACKAGE, copy)
    ]
    assert float(total) == 12  # the first goes on


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"not a library", "failed: "), (None, "absent")],
    ids=["broken library", "no library"],
)
def test_without_a_usable_library_it_warns_once_and_falls_back(tmp_path, content, status):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "uhd_ops", ignore=ignore)
    if content:
        (tmp_path / "uhd_ops" / "libuhd_cpu.so").write_bytes(content)
    code = f"import torch, uhd_ops; {CALL}; print({CALL}); print(uhd_ops._native.status['cpu'])"
    result = run_python(code, package=tmp_path, UHD_OPS_DISABLE_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert f"uhd_ops has no native CPU kernels ({status}" in result.stderr
    assert result.stderr.count("RuntimeWarning") == 1
    assert result.stdout.splitlines()[-1].startswith(status)
    assert str(uhd_ops.window_attention(*torch.ones(3, 6, 1, 2), [(2, 3)])) in result.stdout


@pytest.fixture
def no_cuda_library(monkeypatch):
    monkeypatch.setitem(_native.status, "cuda", "absent")
    monkeypatch.setattr(_native, "_warned_without_cuda", False)


MISSING = (
    r"^uhd_ops has no native CUDA kernels \(absent\); its operators run on the PyTorch reference "
    r"for CUDA tensors, which is slow\. Build from the sources where nvcc is, with UHD_OPS_CUDA=1 "
    r".*, or install the wheel for Linux on x86-64"
)


@pytest.mark.usefixtures("no_cuda_library")
def test_the_first_cuda_tensor_without_kernels_warns_and_says_what_to_do():
    grids = [(3, 3), (1, 2)]
    uhd_ops.window_mean(torch.ones(11, 3), grids)  # no CUDA tensor, no word
    with FakeTensorMode():
        x = torch.empty(11, 3, device="cuda")
        with pytest.warns(RuntimeWarning, match=MISSING) as caught:
            means = [uhd_ops.window_mean(x, grids) for _ in range(2)]
    assert [mean.device.type for mean in means] == ["cuda", "cuda"]
    assert len(caught) == 1


@pytest.mark.usefixtures("no_cuda_library")
def test_a_compiled_call_without_cuda_kernels_warns_too():
    def kernels(x):
        return x + _native.has_kernels(torch.device("cuda"))

    with pytest.warns(RuntimeWarning, match=MISSING) as caught:
        assert not torch.compile(kernels, fullgraph=True, backend="eager")(torch.zeros(1))
    assert len(caught) == 1


@pytest.mark.usefixtures("no_cuda_library")
def test_info_says_what_to_do_about_cuda():
    info = uhd_ops.build_info()
    assert re.match(MISSING, info.notes[-1])
    assert re.search(rf"^  note +{re.escape(info.notes[-1])}$", repr(info), re.MULTILINE)


@pytest.mark.parametrize("status", ["loaded", "disabled", "torch has no CUDA"])
def test_nothing_is_said_of_cuda_where_nothing_is_missing(monkeypatch, status):
    monkeypatch.setitem(_native.status, "cuda", status)
    assert _native.missing("cuda") is None


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_that_is_too_old_warns_once(monkeypatch, capability, fits):
    monkeypatch.setitem(_native.status, "cuda", "loaded")
    monkeypatch.setattr(_native, "_fits", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_native.has_kernels(torch.device("cuda", 1)) for _ in range(2)] == [fits, fits]
    wanted = [] if fits else ["compute capability 8.0 or later, got 7.5"]
    assert len(caught) == len(wanted)
    assert all(text in str(warning.message) for text, warning in zip(wanted, caught, strict=True))


def test_disabled_by_the_environment_says_so_without_a_warning():
    code = f"import torch, uhd_ops; {CALL}; print(uhd_ops._native.status); uhd_ops.build_info()"
    result = run_python(code, "-W", "error", UHD_OPS_DISABLE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(dict.fromkeys(("cpu", "cuda", "host"), "disabled"))


@pytest.mark.parametrize("variable", ["0", "1"])
def test_suite_refuses_to_run_without_the_library(tmp_path, variable):
    # A package without libraries, found before the installed one.
    shutil.copytree(
        PACKAGE, tmp_path / "uhd_ops", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["--rootdir", str(TESTS), "-c", str(ROOT / "pyproject.toml"), "--collect-only"]
    result = subprocess.run(
        [*command, str(TESTS / "test_grids.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "UHD_OPS_DISABLE_NATIVE": variable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if variable == "1":
        assert result.returncode == 0, result.stdout + result.stderr
    else:
        assert result.returncode == pytest.ExitCode.USAGE_ERROR
        assert "the native CPU library is not loaded (absent): run `make build`" in result.stderr
