"""What a data set is made from: raw files and their formats, the tokenizer, and one sha256 of all that shapes its bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatmill.config import ConfigError

from ..importers.registry import importer, is_recognised, recognise, source_files
from ..raw.files import RawFile
from ..raw.finding import distinct, uploads
from ..recipe import DataRecipe, SourceSection
from ..remote.files import RemotePath
from ..samples.decontaminate import benchmark_files
from ..shards.manifest import FORMAT_VERSION
from ..tokenizer.calls.arguments import with_arguments
from ..tokenizer.new_tokens import with_special_tokens
from ..tokenizer.template import TEMPLATES
from ..tokenizer.tokenizer import SPECIAL_TOKENS, ChatTokenizer, train_bpe
from .seen import SeenFiles

# Raised whenever the same recipe would now give other bytes, so that old data sets are rebuilt.
BUILD_VERSION = 7


def raw_files(
    recipe: DataRecipe, known: Callable[[int, RawFile], bool] = lambda number, file: False
) -> tuple[list[tuple[int, RawFile]], list[str]]:
    """(source number, file) of all raw files that are read, and the labels of those of a folder or glob that no format fits.

    A file that a source names must be readable; in a folder, a picture or a README is not an error. What people uploaded to
    ChatGPT, in its export, is left out, too. known: a file whose format need not be found out.
    """
    found = [(number, file) for number, source in enumerate(recipe.sources) for file in source_files(source)]
    labelled = zip((number for number, _ in found), distinct([file for _, file in found]), strict=True)
    files, left_out = list[tuple[int, RawFile]](), list[str]()
    per_source = Counter(number for number, _ in found)
    aside = uploads(file for number, file in found if recipe.sources[number].format in ("auto", "chatgpt"))
    for number, file in labelled:
        source = recipe.sources[number]
        guessed = per_source[number] > 1 and source.format == "auto" and not known(number, file)
        if replace(file, folders=0) in aside or (guessed and not is_recognised(file, source.columns)):
            left_out.append(file.label)
        else:
            files.append((number, file))
    for number in sorted(set(per_source) - {number for number, _ in files}):
        recognise(
            next(file for n, file in found if n == number), recipe.sources[number].columns
        )  # says what is wrong with the first
    return files, left_out


def describe_inputs(
    recipe: DataRecipe,
    files: list[tuple[int, RawFile]],
    seen: SeenFiles | None = None,
    known: Callable[[int, RawFile], str | None] = lambda number, file: None,
) -> list[dict[str, Any]]:
    """One record per raw file: source, file, format, bytes, sha256; each file is hashed once. known: its format, if it is."""
    hashes = hash_files((file for _, file in files), seen or SeenFiles())
    records: list[dict[str, Any]] = []
    for number, file in files:
        given = recipe.sources[number].format
        kind = given if given != "auto" else known(number, file) or recognise(file, recipe.sources[number].columns)
        importer(kind)
        record = {"source": number, "file": file.label, "format": kind, "bytes": input_bytes(file), "sha256": hashes[file.path]}
        records.append(record | ({"member": file.member_path} if file.member is not None else {}))
    return records


@dataclass(frozen=True)
class Sources:
    """What a data set is made from. digest: recipe_sha256; inputs: a record per raw file of the set; read: those read now;
    given: given_facts; left_out: labels of files that no format fits; seen: which files were hashed.
    """

    digest: str
    inputs: list[dict[str, Any]]
    read: list[dict[str, Any]]
    given: dict[str, Any]
    left_out: list[str]
    seen: SeenFiles


def hash_files(files: Iterable[RawFile], seen: SeenFiles) -> dict[Path | RemotePath, str]:
    """sha256 by path, each path once."""
    once = {file.path: file for file in files}
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(once, pool.map(lambda file: input_sha256(file, seen), once.values()), strict=True))


def input_sha256(file: RawFile, seen: SeenFiles) -> str:
    """sha256 of a raw file; of a folder, over the names and hashes of its files."""
    if not file.path.is_dir():
        return seen.sha256(file.path)
    lines = [f"{part.path.name} {seen.sha256(part.path)}" for part in file.parts()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def input_bytes(file: RawFile) -> int:
    """Size of a raw file or of all files of a folder."""
    return sum(part.path.stat().st_size for part in RawFile(file.path).parts())


def given_tokenizer(recipe: DataRecipe) -> ChatTokenizer | None:
    """The tokenizer that the recipe names; None where the build trains one."""
    if recipe.tokenizer.path is None:
        return None
    try:
        tokenizer = ChatTokenizer.load(recipe.tokenizer.path, template_source(recipe.tokenizer.template))
        if arguments := recipe.tokenizer.template_arguments:
            tokenizer = tokenizer.with_template(with_arguments(tokenizer.template.source, arguments))
    except ConfigError as error:
        raise ConfigError(
            f"{error}\nIt is named by tokenizer.path; `chatmill import` makes one from a downloaded model."
        ) from error
    _ = tokenizer.template  # fails now, not after the cleaning
    return with_special_tokens(tokenizer, recipe.tokenizer.add_special_tokens)


def trained_template(recipe: DataRecipe) -> str:
    """The chat template of a tokenizer that the build trains."""
    return with_arguments(
        template_source(recipe.tokenizer.template) or TEMPLATES["chatml"], recipe.tokenizer.template_arguments
    )


def trained_tokens(recipe: DataRecipe) -> tuple[str, ...]:
    """The special tokens of a tokenizer that the build trains."""
    return tuple(dict.fromkeys((*SPECIAL_TOKENS, *recipe.tokenizer.add_special_tokens)))


def template_tokenizer(recipe: DataRecipe, given: ChatTokenizer | None) -> ChatTokenizer:
    """A tokenizer with the chat template and the special tokens of the one to come, for the stages before it is trained."""
    tokens = trained_tokens(recipe)
    return given or train_bpe(iter(()), 256 + len(tokens), tokens, trained_template(recipe))


def template_source(name: str | None) -> str | None:
    """Text of a chat template given by name or file."""
    if name is None or name in TEMPLATES:
        return None if name is None else TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"tokenizer.template={name!r}: neither a file nor one of {', '.join(TEMPLATES)}")
    return path.read_text(encoding="utf-8")


def build_digest(
    recipe: DataRecipe, files: list[tuple[int, RawFile]], tokenizer: ChatTokenizer | None, seen: SeenFiles
) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """(sha256 of all that shapes the bytes, one record per raw file, given_facts)."""
    inputs, given = describe_inputs(recipe, files, seen), given_facts(recipe, tokenizer)
    return digest_of(recipe, inputs, given), inputs, given


def digest_of(recipe: DataRecipe, inputs: list[dict[str, Any]], given: dict[str, Any]) -> str:
    """sha256 of all that shapes the bytes."""
    facts = [FORMAT_VERSION, recipe_facts(recipe), inputs, given]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def given_facts(recipe: DataRecipe, tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """What shapes the bytes and stands neither in the recipe nor in the raw files.

    version: BUILD_VERSION; tokenizer: of the one that is given, or template: of the one to be trained; benchmarks: sha256 of
    each evaluation set.
    """
    given: dict[str, Any] = {"version": BUILD_VERSION}
    given["benchmarks"] = [input_sha256(file, SeenFiles()) for file in benchmark_files(recipe.dedup.decontaminate)]
    if tokenizer is None:
        return given | {"template": template_source(recipe.tokenizer.template)}
    return given | {"tokenizer": tokenizer.fingerprint}


def recipe_facts(recipe: DataRecipe) -> dict[str, Any]:
    """The recipe without what does not shape the bytes: where files lie and how many processes work."""
    facts = recipe.model_dump(mode="json", exclude={"out", "workers", "executor"})
    facts["sources"] = [source_facts(source) for source in recipe.sources]
    facts["tokenizer"].pop("path")
    if recipe.pair.system is None:
        facts["pair"].pop("system")
    if not recipe.tokenizer.add_special_tokens:  # as before there were any
        facts["tokenizer"].pop("add_special_tokens")
    facts["dedup"].pop("decontaminate")
    return facts


def source_facts(source: SourceSection) -> dict[str, Any]:
    """A source without where its files lie."""
    facts = source.model_dump(mode="json", exclude={"path"})
    if not source.mix_speakers:  # as before it could be set
        facts.pop("mix_speakers")
    return facts
