"""docs/kernels-correctness.md names only tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_named_in_the_dossier_exists() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "kernels").rglob("test_*.py")}
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "kernels-correctness.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in files.get(file, "")]
    assert not missing
