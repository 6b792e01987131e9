# SPDX-License-Identifier: Apache-2.0
"""Hostile calls: each must raise an exception of the documented kinds, or be right.

``python -m fuzz`` (run.py) makes them by the thousand in child processes, from seeds.
"""
