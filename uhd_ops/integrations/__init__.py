# SPDX-License-Identifier: Apache-2.0
"""The operators inside models of other libraries; one package for each library."""
