# SPDX-License-Identifier: Apache-2.0
"""Several ranks do what one process does: data_parallel.py and tensor_parallel.py, in one spawn."""

import data_parallel
import pytest
import tensor_parallel
from ranks import process_group, run_checks

MODULES = data_parallel, tensor_parallel
CASES = [(module.__name__, name) for module in MODULES for name in module.CHECKS]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with process_group(0, 1, folder / "rendezvous to save"):
        data_parallel.save_alone(folder)
    return folder, run_checks([module.__name__ for module in MODULES], 2, folder)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_ranks(two_ranks, case):
    _, reports = two_ranks
    assert not reports[case], "\n".join(reports[case])


def test_one_process_loads_what_two_saved(two_ranks):
    folder, _ = two_ranks
    with process_group(0, 1, folder / "rendezvous to load"):
        data_parallel.load_alone(folder)


def test_one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "rendezvous"):
        data_parallel.check_sharded(0, 1, tmp_path)
        data_parallel.check_insertion_behind_data_parallel()


@pytest.mark.slow
def test_compiled_on_one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "rendezvous"):
        tensor_parallel.check_compiled(0, 1, tmp_path)
