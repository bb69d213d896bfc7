"""Attention over packed chats: the public names."""

from .interface import attention, attention_with_lse
from .reference import attention_reference
from .tile_map import TileMap, make_tile_map

__all__ = ["TileMap", "attention", "attention_reference", "attention_with_lse", "make_tile_map"]
