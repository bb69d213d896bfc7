"""Recompute what a data-set folder promises: hashes, blocks, masks, and that the split does not leak.

    problems = verify_dataset(Path("corpora/chitchat"))     # [] when all is well

Only the hashes in the manifest are trusted: tars are walked, every token block is decoded, dialogues are
encoded again with the tokenizer in the folder and compared token by token, some masks are proven by prefix rendering, the
certificate is recomputed from the texts in the dialogue shards, and where the recipe took private data out, they are
searched for it again. Blocks in the quarantine are known to be damaged: they are not reported again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chatmill.config import ConfigError
from chatmill.files import sha256_file
from chatmill.progress import Report, silent

from ..cleaning.privacy import Privacy
from ..conversation import Conversation, TokenizedDialogue
from ..recipe import PrivacySection
from ..remote.files import is_url, local_copy
from ..samples.split import Facts, certificate
from ..shards.dataset import TokenDataset
from ..shards.dialogues import read_dialogues
from ..shards.index import TAR_END, ShardIndex, TokenBlock, block_hash, check_mask, decode_block, walk_members
from ..shards.manifest import MANIFEST, SEEN, dropped, fingerprints, read_manifest
from ..shards.quarantine import QUARANTINE, HeldBlock, Quarantine, find_damage, read_quarantine, write_quarantine
from ..tokenizer.tokenizer import ChatTokenizer

MAX_PROBLEMS = 50
PHASES = ("hashes", "train", "validation", "certificate")  # what verify_dataset reports
FREE_FILES = {MANIFEST, QUARANTINE, SEEN, "timings.json"}


def verify_dataset(path: str | Path, encoded: int = 20_000, proven: int = 64, progress: Report = silent) -> list[str]:
    """Problems found, each a line that names the file; empty when the data set is what its manifest says.

    encoded: largest number of dialogues per split that are tokenised again; proven: of masks proven by prefix rendering.
    """
    if is_url(path):
        with local_copy(str(path)) as copy:
            return [line.replace(str(copy), str(path)) for line in verify_dataset(copy, encoded, proven, progress)]
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
        expected = expected_files(manifest)
    except ConfigError as error:
        return [str(error)]
    except (KeyError, TypeError) as error:
        return [f"{folder / MANIFEST}: incomplete, {error} is missing. Rebuild the data set."]
    problems: list[str] = []
    held: Quarantine = {}
    try:
        held = read_quarantine(folder, fingerprints(manifest))
    except ConfigError as error:
        problems.append(str(error))
    excused = {f"{split}/{block.shard}" for split, blocks in held.items() for block in blocks}
    problems += _check_files(folder, expected, excused, progress)
    damaged = {line.split(":")[0] for line in problems}
    tokenizer = None
    try:
        tokenizer = ChatTokenizer.load(folder / "tokenizer")
        for name in ("tokenizer_sha256", "template_sha256"):
            if getattr(tokenizer, name) != manifest[name]:
                problems.append(f"tokenizer: {name} is not the manifest's")
        if tokenizer.vocab_size != manifest["vocab_size"]:
            problems.append(f"tokenizer: {tokenizer.vocab_size} tokens, the manifest says {manifest['vocab_size']}")
    except ConfigError as error:
        problems.append(str(error))
    near = manifest["certificate"].get("near")
    facts = {split: Facts(near=near is not None) for split in manifest["splits"]}
    for split in manifest["splits"]:
        known = {(block.shard, block.block) for block in held.get(split, ())}
        limits = (encoded, proven)
        problems += _check_split(folder, manifest, split, tokenizer, facts[split], limits, damaged, known, progress)
    progress(PHASES[-1], 0, 1)
    if len(facts) == 2:
        found = certificate(facts["train"], facts["validation"], "authors" in manifest["certificate"]["asked"], near)
        if not found["valid"]:
            shared = ", ".join(f"{found['shared'][name]} {name}" for name in found["asked"] if found["shared"][name])
            problems.append(f"split: train and validation share {shared.replace('_', ' ')}")
        elif not manifest["certificate"]["valid"]:
            problems.append("split: the manifest's own certificate says that it leaks")
    progress(PHASES[-1], 1, 1)
    return problems[:MAX_PROBLEMS]


def expected_files(manifest: dict[str, Any]) -> dict[str, str]:
    """sha256 of every file the manifest names."""
    files = dict(manifest["files"])
    for split, part in manifest["splits"].items():
        for record in part["shards"]:
            files[f"{split}/{record['name']}"] = record["sha256"]
            files[f"{split}/{record['index']}"] = record["index_sha256"]
    for records in manifest["dialogues"].values():
        for record in records:
            files[f"dialogues/{record['name']}"] = record["sha256"]
    return files


def _check_files(folder: Path, expected: dict[str, str], excused: set[str], progress: Report) -> list[str]:
    problems = []
    for number, (name, sha) in enumerate(sorted(expected.items())):
        file = folder / name
        if name in excused:  # its other blocks are checked one by one
            pass
        elif not file.is_file():
            problems.append(f"{name}: missing")
        elif sha256_file(file) != sha:
            problems.append(f"{name}: sha256 is not the manifest's")
        progress("hashes", number + 1, len(expected))
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    problems += [f"{name}: not in the manifest" for name in sorted(present - set(expected) - FREE_FILES)]
    return problems


def _check_split(
    folder: Path,
    manifest: dict[str, Any],
    split: str,
    tokenizer: ChatTokenizer | None,
    facts: Facts,
    limits: tuple[int, int],
    damaged: set[str],
    known: set[tuple[str, int]],
    progress: Report,
) -> list[str]:
    """Blocks against their index, dialogues against their tokens; fills facts from the dialogues' texts."""
    problems: list[str] = []
    private = _privacy(manifest)
    total = sum(record["dialogues"] for record in manifest["splits"][split]["shards"])
    strides = [max(1, -(-total // limit)) if limit else 0 for limit in limits]
    tokens = _tokens(folder, manifest, split, problems, known)
    texts = read_dialogues(folder, manifest["dialogues"][split])
    number, gone = 0, set(dropped(manifest, split))
    while len(problems) < MAX_PROBLEMS:
        progress(split, min(number, total - 1), total)
        try:
            conversation = next(texts, None)
        except ConfigError as error:
            problems.append(str(error))
            break
        dialogue = next(tokens, None)
        if conversation is None and dialogue is None:
            break
        if conversation is not None:
            if number not in gone:  # else a longer export has replaced it
                facts.add(conversation)
            problems += _private(split, conversation, private, number)
        if dialogue is UNREADABLE:  # its block was named
            number += 1
            continue
        if conversation is None or dialogue is None:
            # The damage itself was named above; count on only for the certificate.
            if not problems and not damaged:
                problems.append(f"{split}: dialogue and token shards hold different numbers of samples (after {number})")
            if conversation is None:
                break
            continue
        assert isinstance(dialogue, TokenizedDialogue)
        problems += _compare(split, conversation, dialogue, tokenizer, number, strides)
        number += 1
    progress(split, total, total)
    return problems


def _privacy(manifest: dict[str, Any]) -> Privacy | None:
    """The search for private data as the recipe made it; None where it left them in."""
    fields = manifest.get("recipe", {}).get("clean", {}).get("privacy", {})
    known = {name: fields[name] for name in PrivacySection.model_fields if name in fields}
    section = PrivacySection.model_validate(known)
    return None if section.mode == "off" else Privacy(section)


def _private(split: str, conversation: Conversation, privacy: Privacy | None, number: int) -> list[str]:
    """Private data that should be gone; what was found is never quoted."""
    if privacy is None:
        return []
    texts = [text for turn in conversation.turns for text in (turn.content, turn.reasoning) if text]
    found = sorted({finding.kind for text in texts for finding in privacy.leftovers(text)})
    where = f"{split}, dialogue {number} ({conversation.uid}, {conversation.origin})"
    return [f"{where}: private data that the recipe says is removed: {', '.join(found)}"] if found else []


def _compare(
    split: str,
    conversation: Conversation,
    dialogue: TokenizedDialogue,
    tokenizer: ChatTokenizer | None,
    number: int,
    strides: list[int],
) -> list[str]:
    where = f"{split}, dialogue {number} ({conversation.uid})"
    if conversation.uid != dialogue.uid:
        return [f"{where}: the token shard holds {dialogue.uid} at this place"]
    try:
        check_mask(dialogue)
        if tokenizer is not None and strides[0] and number % strides[0] == 0:
            again = tokenizer.encode_dialogue(conversation)
            if not np.array_equal(again.ids, dialogue.ids):
                return [f"{where}: token ids are not those of its text"]
            if not np.array_equal(again.loss_mask, dialogue.loss_mask):
                return [f"{where}: the loss mask is not that of its turns"]
        if tokenizer is not None and strides[1] and number % strides[1] == 0:
            found = tokenizer.prove_mask(conversation)
            return [f"{where}: {found}"] if found else []
    except ConfigError as error:
        return [f"{where}: {error}"]
    return []


UNREADABLE: Literal["unreadable"] = "unreadable"


def _tokens(
    folder: Path, manifest: dict[str, Any], split: str, problems: list[str], known: set[tuple[str, int]]
) -> Iterator[TokenizedDialogue | Literal["unreadable"]]:
    """Dialogues of all readable blocks, UNREADABLE for every other one; what cannot be read is added to problems.

    known: (shard, block) in the quarantine.
    """
    for record in manifest["splits"][split]["shards"]:
        file, name = folder / split / record["name"], f"{split}/{record['name']}"
        try:
            index = ShardIndex.from_bytes((folder / split / record["index"]).read_bytes(), str(file))
        except (ConfigError, OSError) as error:
            problems.append(f"{name}: {error}")
            yield from [UNREADABLE] * record["dialogues"]
            continue
        data = b""
        try:
            data = file.read_bytes() if file.is_file() else b""
            if data and not any(shard == record["name"] for shard, _ in known):
                _check_members(data, name, index, problems)
        except (ConfigError, OSError) as error:
            problems.append(str(error))
        first, bad = 0, list[str]()
        for b in range(len(index.offset)):
            where = f"{name}, block {b}"
            start, size, count = int(index.offset[b]), int(index.size[b]), int(index.dialogues[b])
            piece = data[start : start + size]
            first += count
            if (record["name"], b) in known:
                yield from [UNREADABLE] * count
            elif block_hash(piece) != int(index.xxh3[b]):
                bad.append(str(b))
                yield from [UNREADABLE] * count
            else:
                try:
                    block = decode_block(piece, where)
                except ConfigError as error:
                    problems.append(str(error))
                    yield from [UNREADABLE] * count
                    continue
                yield from _block_dialogues(block, index, first - count, where, problems)
        if bad and file.is_file():  # a missing shard was named as such
            numbers = ", ".join(bad[:8]) + (", …" if len(bad) > 8 else "")
            problems.append(f"{name}, block{'s' if len(bad) > 1 else ''} {numbers}: xxh3 is not the index's")


def _check_members(data: bytes, name: str, index: ShardIndex, problems: list[str]) -> None:
    """The tar as a whole: every header, the number of members, the end marker."""
    names = [member for member, _, _ in walk_members(data, name)]
    if not data.endswith(TAR_END):
        problems.append(f"{name}: the end marker is missing; the file is cut short")
    if len(names) != 5 * len(index.offset) + 1:
        problems.append(f"{name}: {len(names)} members, the index knows {5 * len(index.offset) + 1}")


def _block_dialogues(
    block: TokenBlock, index: ShardIndex, first: int, where: str, problems: list[str]
) -> Iterator[TokenizedDialogue]:
    for j, uid in enumerate(block.uids):
        span = slice(int(block.offsets[j]), int(block.offsets[j + 1]))
        ids, mask = block.ids[span].astype(np.uint32), block.loss_mask[span]
        if len(ids) != index.lengths[first + j] or int(mask.sum()) != index.loss_tokens[first + j]:
            problems.append(f"{where}: dialogue {j} has other lengths than the index")
        yield TokenizedDialogue(uid, ids, mask)


def quarantine_dataset(path: str | Path, budget: float) -> list[str]:
    """Name the damaged blocks of every split in quarantine.json; ConfigError, and nothing written, above the budget.

    budget: largest share of a split's blocks. Returns a line per block; where none is damaged an older list goes.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    found = {split: tuple(find_damage(folder, manifest, split)) for split in manifest["splits"]}
    for split, blocks in found.items():
        total = sum(record["blocks"] for record in manifest["splits"][split]["shards"])
        if len(blocks) > budget * total:
            names = "; ".join(f"{block.where}: {block.reason}" for block in blocks[:5])
            share = len(blocks) / total
            raise ConfigError(
                f"{split}: {len(blocks)} of {total} blocks ({share:.3%}) are damaged, the budget is {budget:.3%}: {names}.\n"
                "Nothing was written. Try --repair, give a larger budget, or rebuild the data set."
            )
    write_quarantine(folder, found, fingerprints(manifest))
    return quarantine_lines(found)


def listed_quarantine(path: str | Path) -> list[str]:
    """quarantine_lines of a data-set folder; empty where the list cannot be read, which verify_dataset reports."""
    try:
        return quarantine_lines(read_quarantine(Path(path), fingerprints(read_manifest(Path(path)))))
    except ConfigError:
        return []


def quarantine_lines(held: Mapping[str, Sequence[HeldBlock]]) -> list[str]:
    """What a quarantine holds, for people."""
    return [
        f"{split}/{block.where}: in quarantine, {block.dialogues} dialogues, {block.tokens} tokens ({block.reason})"
        for split, blocks in held.items()
        for block in blocks
    ]


def open_splits(path: str | Path) -> dict[str, TokenDataset]:
    """Every split of a data set that holds dialogues, whatever its quarantine holds back."""
    folder = Path(path)
    splits = read_manifest(folder)["splits"]
    return {split: TokenDataset.open(folder, split, damaged_blocks=1.0) for split, part in splits.items() if part["dialogues"]}
