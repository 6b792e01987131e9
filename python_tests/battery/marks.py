# SPDX-License-Identifier: Apache-2.0
"""Which tests need the native library."""

import pytest

from uhd_ops import _native


def native_only(reason: str) -> pytest.MarkDecorator:
    """Mark tests that say nothing about the definitions, and why.

    conftest.py refuses to run at all without the native library, unless UHD_OPS_DISABLE_NATIVE is
    set; so these are skipped only in the run on the definitions that test_native.py starts.
    """
    return pytest.mark.skipif(_native.status["cpu"] == "disabled", reason=reason)
