# SPDX-License-Identifier: Apache-2.0
"""``python -m uhd_ops`` is the command line ``uhd-ops``."""

import sys

from uhd_ops.cli import main

sys.exit(main())
