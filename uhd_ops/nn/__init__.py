# SPDX-License-Identifier: Apache-2.0
"""Modules built on the operators."""

from uhd_ops.nn.early_compressor import EarlyCompressor
from uhd_ops.nn.slice_encoder import SliceEncoder, SliceTokens

__all__ = ["EarlyCompressor", "SliceEncoder", "SliceTokens"]
