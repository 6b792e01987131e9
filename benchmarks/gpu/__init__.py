# SPDX-License-Identifier: Apache-2.0
"""Measuring on a GPU: the stages of one call, the cases, how they are timed, and the rivals."""
