# SPDX-License-Identifier: Apache-2.0
"""The operators, one file for each native one: public functions, fake, autograd."""
