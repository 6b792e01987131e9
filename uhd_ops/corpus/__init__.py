# SPDX-License-Identifier: Apache-2.0
"""Encode a corpus of images once, keep the tokens, and read them in training.

An image goes through list -> plan -> shard -> encoding -> store: ``sources`` lists files,
``plan`` says what is encoded together, ``encoding`` is what a worker does, ``engines`` run workers,
``store`` writes, and ``dataset`` reads.
"""

from uhd_ops.corpus.dataset import (
    EncodedBatch,
    EncodedDataset,
    EncodedExamples,
    EncodedImage,
    open_dataset,
)
from uhd_ops.corpus.encoding import CorpusModel
from uhd_ops.corpus.run import Progress, encode_dataset

__all__ = [
    "CorpusModel",
    "EncodedBatch",
    "EncodedDataset",
    "EncodedExamples",
    "EncodedImage",
    "Progress",
    "encode_dataset",
    "open_dataset",
]
