"""Conversion between traditional and simplified Chinese with OpenCC's dictionaries (package opencc).

    chinese_rule("t2s")("漢字轉換")  ->  "汉字转换"

The directions are OpenCC's own names: s simplified, t traditional, tw Taiwan, hk Hong Kong, jp Japanese; a last p also swaps
regional words (软件 / 軟體). Texts with kana are Japanese, and only the directions from and to jp touch them; but a single の
does not make a Chinese text Japanese.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from chatmill.config import ConfigError

from .scripts import has_han, is_japanese


def chinese_rule(direction: str) -> Callable[[str], str]:
    """Text rule of `clean.chinese`."""
    try:
        converter = importlib.import_module("opencc").OpenCC(direction)
    except ImportError as error:
        raise ConfigError(
            f"clean.chinese={direction} needs the package opencc (pip install 'chatmill[data]'), or set clean.chinese=null"
        ) from error
    except RuntimeError as error:  # an OpenCC without this dictionary
        raise ConfigError(f"clean.chinese={direction}: the installed opencc does not know this direction ({error})") from error
    japanese = "jp" in direction

    def rule(text: str) -> str:
        if not has_han(text) or (not japanese and is_japanese(text)):
            return text
        return str(converter.convert(text))

    return rule
