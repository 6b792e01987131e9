# SPDX-License-Identifier: Apache-2.0
import sys

from fuzz.run import main

sys.exit(main())
