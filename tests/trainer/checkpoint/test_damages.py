"""The damages of damages.py; `make fuzz` makes 1,500 of them."""

from __future__ import annotations

from .damages import BYTES, damage


def test_every_damage_of_a_checkpoint_is_named_and_no_forged_one_is_read_wrong(capfd) -> None:
    kinds = damage(120)
    assert set(BYTES) <= set(kinds) and kinds["manifest, refused"] > 5 and kinds["header, refused"] > 5, kinds
    assert "using the older" in capfd.readouterr().err
