# SPDX-License-Identifier: Apache-2.0
"""The operators, one file each: public function, fake, autograd."""
