# SPDX-License-Identifier: Apache-2.0
"""What every test relies on: the native library is there, and no test leaves a trace."""

import os
import random
import tempfile
import warnings

import numpy as np
import pytest
import torch
from bit_comparisons import compares_bits
from hypothesis import settings
from planted_products import plant

# torch.compile keeps what it compiled between processes, by the schema of an operator but not by
# its
# fake: after an operator has changed, an old entry would be run. A folder of this run's own, then.
_COMPILE_CACHE = tempfile.TemporaryDirectory(prefix="uhd_ops-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _COMPILE_CACHE.name

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # pytest_configure says it better
    from uhd_ops import _native

pytest.register_assert_rewrite("battery")

# The same examples in every run and on every machine; a slow machine is no failure.
settings.register_profile("uhd_ops", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("uhd_ops")


# One, for small tensors and as many workers as cores, unless .ci/machines.sh wants another machine.
_THREADS = int(os.environ.get("UHD_OPS_TEST_THREADS", "1"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def pytest_configure() -> None:
    """Refuse to test the reference implementation by mistake; be the machine that is asked for."""
    if _is_set("UHD_OPS_TEST_PLANTED_PRODUCT"):
        plant()
    if _native.status["cpu"] != "loaded" and not _is_set("UHD_OPS_DISABLE_NATIVE"):
        raise pytest.UsageError(
            f"the native CPU library is not loaded ({_native.status['cpu']}): run `make build`, or "
            "set UHD_OPS_DISABLE_NATIVE=1 to test the reference implementation"
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what .ci/machines.sh runs again as on other machines."""
    if compares_bits(item):
        item.add_marker("bits")


def pytest_report_header() -> str:
    """Name what is tested."""
    isa = _native.cpu_isa() if _native.status["cpu"] == "loaded" else "no kernels"
    return f"uhd_ops: {_native.status}, {isa}; torch {torch.__version__}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a CUDA test where there is no GPU, or fail it where one is required."""
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if _is_set("UHD_OPS_REQUIRE_CUDA"):
        pytest.fail("UHD_OPS_REQUIRE_CUDA is set, but torch finds no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def isolated():
    """Seed every generator; afterwards restore it, and torch's global switches."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(_THREADS)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
