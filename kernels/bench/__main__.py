"""`python -m chatmill.kernels.bench`: see harness.py."""

import sys

from .harness import main

sys.exit(main())
