# SPDX-License-Identifier: Apache-2.0
"""Checks that several ranks make together, in processes that talk by gloo."""

import contextlib
import datetime
import importlib
import os
import pickle
import traceback

import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn

TIMEOUT = datetime.timedelta(seconds=60)


@contextlib.contextmanager
def process_group(rank, world, file):
    """A process group that talks by gloo and needs no free port."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"init_method": f"file://{file}", "rank": rank, "world_size": world}
    distributed.init_process_group("gloo", timeout=TIMEOUT, **options)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _work(rank, world, modules, folder):
    torch.set_num_threads(1)
    for module in modules:
        for name, check in importlib.import_module(module).CHECKS.items():
            report = None
            try:
                # A group of its own, so that ranks agree again after one has failed.
                with process_group(rank, world, folder / f"rendezvous of {module} {name}"):
                    check(rank, world, folder)
            except (Exception, pytest.fail.Exception):  # noqa: BLE001 - the test tells
                report = traceback.format_exc()
            path = folder / f"{module} {name} {rank}.pickle"
            path.write_bytes(pickle.dumps(report))


def run_checks(modules, world, folder):
    """Run ``CHECKS`` of modules, ``check(rank, world, folder)`` each, on ranks of one spawn.

    Returns:
        By module and name, what every rank that failed has to say.
    """
    spawn(_work, (world, modules, folder), nprocs=world)
    reports = {}
    for module in modules:
        for name in importlib.import_module(module).CHECKS:
            paths = (folder / f"{module} {name} {rank}.pickle" for rank in range(world))
            said = [pickle.loads(path.read_bytes()) for path in paths]
            reports[module, name] = [report for report in said if report is not None]
    return reports
