"""`python -m chatmill`: the same as `chatmill`."""

from __future__ import annotations

import sys

from chatmill.launcher.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
