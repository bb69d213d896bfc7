"""kill -9 at a few of the moments of kills.py; `make fuzz` kills 100 times each. The build has tests of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_save_an_import_and_a_rollback_survive_kill_minus_nine_at_any_moment() -> None:
    """In a process of its own, which forks: this one may have threads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainer.checkpoint.kills", "1", "save", "import", "rollback"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("whole, and the same end") == 3
