# SPDX-License-Identifier: Apache-2.0
"""Process groups for the tests of several ranks."""

import contextlib
import os

from torch import distributed


@contextlib.contextmanager
def process_group(rank, world, file):
    """A process group that talks by gloo and needs no free port."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"init_method": f"file://{file}", "rank": rank, "world_size": world}
    distributed.init_process_group("gloo", **options)
    try:
        yield
    finally:
        distributed.destroy_process_group()
