# SPDX-License-Identifier: Apache-2.0
"""The families of vision transformers, one file each; see ``uhd_ops/retrofit/registry.py``.

A file says how a block is read (``read``), how its model finds the grid of an image, and what
changes after the compressor (``FAMILY``). It is imported when a model or a block of its classes
turns up, so that nothing is imported which the caller does not have.
"""
