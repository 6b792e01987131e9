# SPDX-License-Identifier: Apache-2.0
"""Modules built on the operators."""

from uhd_ops.nn.ablation import ABLATION
from uhd_ops.nn.block_spec import AttentionSpec, BlockSpec, MlpSpec, OwnAttentionSpec
from uhd_ops.nn.early_compressor import CompressorConfig, EarlyCompressor
from uhd_ops.nn.modules import LinearView, ScaleView, WeightView
from uhd_ops.nn.pixel_unshuffle_connector import PixelUnshuffleConnector
from uhd_ops.nn.query_resampler import QueryResampler
from uhd_ops.nn.slice_encoder import SliceEncoder, SliceTokens
from uhd_ops.nn.training import freeze_for_stage, param_groups
from uhd_ops.nn.view_ratios import ViewRatios, choose_ratios, merge_by_ratio, token_variance
from uhd_ops.nn.view_shares import ViewShares
from uhd_ops.nn.window_token_compressor import WindowTokenCompressor

__all__ = [
    "ABLATION",
    "AttentionSpec",
    "BlockSpec",
    "CompressorConfig",
    "EarlyCompressor",
    "LinearView",
    "MlpSpec",
    "OwnAttentionSpec",
    "PixelUnshuffleConnector",
    "QueryResampler",
    "ScaleView",
    "SliceEncoder",
    "SliceTokens",
    "ViewRatios",
    "ViewShares",
    "WeightView",
    "WindowTokenCompressor",
    "choose_ratios",
    "freeze_for_stage",
    "merge_by_ratio",
    "param_groups",
    "token_variance",
]
