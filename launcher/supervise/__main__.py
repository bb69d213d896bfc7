"""`python -m chatmill.launcher.supervise`: see supervise.py."""

import sys

from .supervise import main

sys.exit(main())
