# SPDX-License-Identifier: Apache-2.0
"""``uhd_ops.build_info`` says what is true."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from battery.marks import native_only
from specs import SPECS

import uhd_ops
from uhd_ops import _native

native = native_only("UHD_OPS_DISABLE_NATIVE is set")


def test_versions():
    versions = uhd_ops.build_info().versions
    assert versions["uhd_ops"] == uhd_ops.__version__
    assert versions["torch"] == torch.__version__
    assert versions["numpy"] == np.__version__


@native
def test_native_build():
    info = uhd_ops.build_info()
    assert info.native == _native.status
    assert info.native["cpu"] == info.native["host"] == "loaded"
    assert info.cpu_isas_available == info.cpu_isas_built[: len(info.cpu_isas_available)]
    assert info.cpu_isa in info.cpu_isas_available
    assert re.fullmatch(r"2\.\d+", info.torch_target)
    assert re.match(r"(GNU|Clang) \d+", info.compiler)


@native
def test_follows_the_instruction_set():
    before = _native.cpu_isa()
    try:
        for isa in uhd_ops.build_info().cpu_isas_available:
            _native.set_cpu_isa(isa)
            info = uhd_ops.build_info()
            assert info.cpu_isa == isa
            assert info.backends["window_attention"]["cpu"] == f"native {isa}"
            assert before in info.cpu_isas_available  # does not shrink with the choice
    finally:
        _native.set_cpu_isa(before)


@native
def test_every_operator_is_native_on_the_cpu():
    backends = uhd_ops.build_info().backends
    assert set(backends) == set(SPECS)
    assert backends.pop("view_attention")["cpu"] == "torch scaled_dot_product_attention"
    assert backends.pop("reorder_tokens")["cpu"] == "torch index_select"
    for op, devices in backends.items():
        assert devices["cpu"].startswith("native "), op


def test_text_and_json():
    info = uhd_ops.build_info()
    text = repr(info)
    assert text.startswith("uhd_ops.build_info():\n")
    for op, devices in info.backends.items():
        for device, backend in devices.items():
            assert re.search(rf"^  {op} on {device} +{re.escape(backend)}$", text, re.MULTILINE)
    assert json.loads(json.dumps(info.to_dict())) == info.to_dict()


def test_says_why_cuda_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend = uhd_ops.build_info().backends["window_attention"]["cuda"]
    assert backend in ("none: no CUDA device", "none: torch has no CUDA")


@native
@pytest.mark.parametrize(("value", "word"), [("1", "on"), ("0", "off"), ("", "off"), (None, "off")])
@pytest.mark.parametrize(
    ("version", "text"), [(130101, "13.1.1"), (120804, "12.8.4"), (0, None), (-1, None)]
)
def test_cublaslt(monkeypatch, version, text, value, word):
    monkeypatch.setitem(_native.status, "cuda", "loaded")
    monkeypatch.setattr(torch.ops.uhd_ops, "_cublaslt_version", lambda: version, raising=False)
    if value is None:
        monkeypatch.delenv("UHD_OPS_CUBLASLT", raising=False)
    else:
        monkeypatch.setenv("UHD_OPS_CUBLASLT", value)
    if text:
        assert _native._find_cublaslt() == f"{word}: {text}"
        return
    why = {0: "absent: not loaded by torch", -1: "absent: built without cublasLt.h"}[version]
    if word == "on":
        with pytest.warns(UserWarning, match=f"UHD_OPS_CUBLASLT has no effect.*{why}"):
            assert _native._find_cublaslt() == why
    else:
        assert _native._find_cublaslt() == why


@native
def test_cublaslt_that_refuses(monkeypatch):
    def refuse():
        raise RuntimeError("status 7")

    monkeypatch.setitem(_native.status, "cuda", "loaded")
    monkeypatch.setattr(torch.ops.uhd_ops, "_cublaslt_version", refuse, raising=False)
    monkeypatch.setenv("UHD_OPS_CUBLASLT", "0")
    assert _native._find_cublaslt() == "absent: status 7"


def test_cublaslt_of_this_installation():
    """The library looks for it among torch's own and makes a descriptor, which needs no GPU."""
    code = "import uhd_ops; print(uhd_ops.build_info().cublaslt, uhd_ops._native.cublaslt_enabled)"
    for value, word in (("0", "off"), ("1", "on")):
        environment = {**os.environ, "UHD_OPS_CUBLASLT": value}
        text = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if _native.status["cuda"] == "loaded":
            assert re.fullmatch(rf"{word}: 1[23]\.\d+\.\d+ {value == '1'}", text)
        else:
            assert text == f"absent: native cuda library {_native.status['cuda']} False"


def test_without_native_libraries():
    code = "import uhd_ops, json; print(json.dumps(uhd_ops.build_info().to_dict()))"
    environment = {**os.environ, "UHD_OPS_DISABLE_NATIVE": "1"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout
    info = json.loads(output)
    assert info["native"] == {"cpu": "disabled", "cuda": "disabled", "host": "disabled"}
    assert info["cpu_isa"] is info["compiler"] is info["torch_target"] is None
    assert info["cpu_isas_available"] == info["cpu_isas_built"] == info["cuda_archs"] == []
    expected = "reference: native cpu library disabled"
    assert all(
        info["backends"][op]["cpu"] == expected for op in info["backends"] if op != "view_attention"
    )
