# SPDX-License-Identifier: Apache-2.0
"""What every test relies on: the native library is there, and no test leaves a trace."""

import os
import random
import sys
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

# Without it torch refuses matrix products on a GPU while deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)  # pytest_configure says it better
    from uhd_ops import _native, grids

pytest.register_assert_rewrite("battery")

# The same examples in every run and on every machine; a slow machine is no failure.
settings.register_profile("uhd_ops", derandomize=True, deadline=None, max_examples=20)
settings.load_profile("uhd_ops")


# One, for small tensors and as many workers as cores, unless .ci/machines.sh wants another machine.
_THREADS = int(os.environ.get("UHD_OPS_TEST_THREADS", "1"))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


HAS_GPU = torch.cuda.is_available()
_UNCOLLECTED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--op``, which keeps the tests of one operator."""
    parser.addoption("--op", metavar="NAME", help="run the tests of this operator only")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to test the definitions, or no GPU, by mistake; be the machine that is asked for."""
    config.stash[_UNCOLLECTED] = 0
    if _is_set("UHD_OPS_TEST_PLANTED_PRODUCT"):
        plant()
    if _is_set("UHD_OPS_REQUIRE_CUDA") and not HAS_GPU:
        raise pytest.UsageError(f"UHD_OPS_REQUIRE_CUDA is set, but {_no_gpu()}")
    if _native.status["cpu"] != "loaded" and not _is_set("UHD_OPS_DISABLE_NATIVE"):
        raise pytest.UsageError(
            f"the native CPU library is not loaded ({_native.status['cpu']}): run `make build`, or "
            "set UHD_OPS_DISABLE_NATIVE=1 to test the reference implementation"
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what .ci/machines.sh runs again as on other machines."""
    if compares_bits(item):
        item.add_marker("bits")


def pytest_runtest_teardown() -> None:
    """Forget where grids were moved.

    Equal grids of later tests are the same objects while anything holds one, if only a cycle, and
    compiled graphs take moved grids for others.
    """
    for kept in list(grids._known.values()):
        kept._moved.clear()


def pytest_report_header() -> str:
    """Name what is tested."""
    isa = _native.cpu_isa() if _native.status["cpu"] == "loaded" else "no kernels"
    gpu = torch.cuda.get_device_name() if HAS_GPU else f"no GPU cases, {_no_gpu()}"
    return f"uhd_ops: {_native.status}, {isa}; torch {torch.__version__}; {gpu}"


def _no_gpu() -> str:
    return "this torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the GPU cases where there is no GPU, and what --op does not name."""
    chosen, op = items[:], config.getoption("--op")
    if op is not None:
        chosen = [item for item in chosen if _is_about(item, op)]
        if items and not chosen:
            raise pytest.UsageError(f"--op {op}: no test of such an operator")
    if not HAS_GPU:
        on_gpu = [item for item in chosen if item.get_closest_marker("cuda")]
        config.stash[_UNCOLLECTED] = len(on_gpu)
        chosen = [item for item in chosen if not item.get_closest_marker("cuda")]
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def _is_about(item: pytest.Item, op: str) -> bool:
    parameters = getattr(item, "callspec", None)
    name = parameters and parameters.params.get("name")
    return name == op or item.path.stem in (f"test_{op}", f"test_{op}_kernels")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the number of GPU cases to the process that reports it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["uncollected"] = session.config.stash[_UNCOLLECTED]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Take that number from a worker; every worker collects the same tests."""
    node.config.stash[_UNCOLLECTED] = getattr(node, "workeroutput", {}).get("uncollected", 0)


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    """Say once what a skip for each GPU case would say, and how to make it an error."""
    count = config.stash[_UNCOLLECTED]
    if count:
        terminalreporter.line(
            f"{count} GPU cases were not collected: {_no_gpu()} "
            "(with UHD_OPS_REQUIRE_CUDA=1 this is an error)"
        )


@pytest.fixture(autouse=True)
def isolated():
    """Seed every generator; afterwards restore it and torch's global switches, close figures."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(_THREADS)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in order."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def note(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)
    return figures
