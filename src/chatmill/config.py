"""Validated YAML configs with dotted overrides: what the recipes of data and trainer share.

    load_section(Recipe, "tiny", ["optimizer.lr=3e-4"], folder)

Imports neither torch nor numpy: login nodes and `chatmill --help` use this module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from chatmill.formatting import counted
from chatmill.recipe_names import UnknownRecipeError, recipe_file


class ConfigError(ValueError):
    """A recipe, override or input file that cannot be used. The message says what to change."""


class Section(BaseModel):
    """Base of all sections: frozen, with unknown keys, NaN and infinite numbers refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


S = TypeVar("S", bound=Section)


def find_recipe(name: str, folder: Path) -> Path:
    """Path of a recipe given as a file or as the name of a shipped one."""
    try:
        return recipe_file(name, folder)
    except UnknownRecipeError as error:
        raise ConfigError(str(error)) from None


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """`a.b=c` words as a nested dict; values are read as YAML (numbers, true, null, [lists])."""
    tree: dict[str, Any] = {}
    for word in overrides:
        key, eq, text = word.partition("=")
        if not eq or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override {word!r}: expected section.field=value, for example optimizer.lr=3e-4")
        try:
            value = parse_yaml(text) if text else ""
        except ValueError as error:
            raise ConfigError(f"override {word!r}: the value is not YAML ({error})") from error
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {word!r}: {parent!r} was already given a plain value")
        node[leaf] = value
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """base, overridden by over section by section; in a list, `0` is the first item. Raises ConfigError for no such item."""
    out = dict(base)
    for key, value in over.items():
        out[key] = _merged(out.get(key), value, f"{above}{key}") if isinstance(value, Mapping) else value
    return out


def _merged(below: Any, over: Mapping[str, Any], where: str) -> Any:
    if isinstance(below, Mapping):
        return merge(below, over, f"{where}.")
    if not isinstance(below, list) or not over or not all(key.isdecimal() for key in over):
        return over
    out = list(below)
    for key, value in over.items():
        if int(key) >= len(out):
            raise ConfigError(f"override {where}.{key}: {where} has {counted(len(out), 'item')}, and the first is {where}.0")
        out[int(key)] = _merged(out[int(key)], value, f"{where}.{key}") if isinstance(value, Mapping) else value
    return out


MAX_YAML_CHARACTERS = 4 << 20
MAX_YAML_VALUES = 1 << 20  # once every alias stands for what it names: a file of 1 KB can mean a billion


class _YamlLoader(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping: of two, the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, also for one that repeats a key or grows beyond all use."""
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; expected at most {MAX_YAML_CHARACTERS:,}")
    try:
        value = yaml.load(text, _YamlLoader)  # a SafeLoader
        size = _count_values(value, {})
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if size > MAX_YAML_VALUES:
        raise ValueError(f"its aliases stand for {size:,} values; expected at most {MAX_YAML_VALUES:,}")
    return value


def _count_values(value: Any, known: dict[int, int]) -> int:
    """Values in `value`, those behind an alias counted at each place. known: counts by id; 0 while one is being made."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count_values(item, known) for item in items)
    elif known[id(value)] == 0:
        raise ValueError("an alias names what it is part of")
    return known[id(value)]


YAML_HINT = "Values that contain [ ] { } : # or begin with * & ! % @ need quotes. Indent with spaces, not tabs."


def read_yaml(path: Path, empty: dict[str, Any] | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, `empty` where it holds nothing. Raises ConfigError."""
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}\n{YAML_HINT}") from error
    raw = empty if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping, got {'an empty file' if raw is None else type(raw).__name__}")
    return raw


def read_json(path: Path, expected: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError, also for a missing file. expected: what it should be part of."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing." + (f" Expected {expected}." if expected else "")) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def load_section(kind: type[S], name: str, overrides: Iterable[str], folder: Path) -> S:
    """Read, override and validate any YAML config of this project. Raises ConfigError."""
    path, words = find_recipe(name, folder), list(overrides)
    return validate(kind, merge(read_yaml(path), parse_overrides(words)), str(path), words)


def validate(kind: type[S], raw: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> S:
    """kind(**raw). Raises ConfigError with pydantic's findings in plain words, and the nearest valid key for an unknown one.

    where: the file that raw was read from. overrides: the words that changed it, which then answer for what they say.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors()]
        where = _blamed([item["loc"] for item in error.errors()], where, overrides)
        raise ConfigError(f"{where}: {counted(len(lines), 'problem')}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _blamed(locations: list[tuple[Any, ...]], file: str, overrides: Sequence[str]) -> str:
    """The file, the overrides that set what is wrong, or both."""
    parts = [[str(part) for part in location] for location in locations]
    keys = {word: word.partition("=")[0].split(".") for word in overrides}

    def says(key: list[str], place: list[str]) -> bool:
        return key[: len(place)] == place[: len(key)]

    guilty = [word for word, key in keys.items() if any(says(key, place) for place in parts)]
    if not guilty:
        return file
    sure = all(any(key == place[: len(key)] for key in keys.values()) for place in parts)
    return f"override{'s' * (len(guilty) > 1)} {' '.join(guilty)}" if sure else f"{file} with {' '.join(guilty)}"


def dump_yaml(config: Section) -> str:
    """The resolved config as YAML, which loads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


# name in other trainers -> name here
ELSEWHERE = {
    "learning_rate": "lr",
    "max_lr": "lr",
    "max_grad_norm": "clip_norm",
    "gradient_clipping": "clip_norm",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "batch_size": "micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "max_seq_length": "sequence_length",
    "seq_len": "sequence_length",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "save_steps": "every_steps",
    "eval_steps": "every_steps",
}


def _explain(kind: type[Section], item: Any) -> str:
    location = ".".join(str(part) for part in item["loc"]) or "(recipe)"
    if item["type"] == "extra_forbidden":
        valid = _keys_at(kind, item["loc"][:-1])
        name = str(item["loc"][-1])
        ours = ELSEWHERE.get(name, name)
        near = [ours] if ours in valid else difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        near = near or [f"{section}.{ours}" for section in kind.model_fields if ours in _keys_at(kind, (section,))]
        hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(valid)}"
        return f"{location}: unknown key; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    got = "" if isinstance(value, dict | Section) else f" (got {value!r})"
    return f"{location}: {message}{got}"


def _keys_at(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """Names of the fields at a place of a config; none where no section is there."""
    for part in location:
        kind = _choice(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(part))
            kind = field.annotation if field else None
        else:  # an item of a list, or a value of a mapping
            kind = get_args(kind)[-1] if get_origin(kind) in (list, tuple, dict) else None
    kind = _choice(kind)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _choice(kind: Any) -> Any:
    """What a union (`Section | None`) or Annotated holds that has fields or items."""
    if get_origin(kind) not in (Union, UnionType, Annotated):
        return kind
    found = (_choice(choice) for choice in get_args(kind))
    return next(
        (c for c in found if get_origin(c) in (list, tuple, dict) or (isinstance(c, type) and issubclass(c, BaseModel))), None
    )
