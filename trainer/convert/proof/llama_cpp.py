"""The side of a GGUF file in a proof: the real llama.cpp, which npm's node-llama-cpp ships as a compiled library.

    npm install node-llama-cpp                  in the working folder or one above it, or with -g
    CHATMILL_NODE_MODULES=FOLDER                says where it lies otherwise

It runs on the CPU with keys and values in fp32 and without flash attention: what is compared is the file, not a cache in half
precision.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatmill.config import ConfigError

from ....data.tokenizer.tokenizer import ChatTokenizer
from .cases import Answer, Case

PACKAGE = "node-llama-cpp"
VARIABLE = "CHATMILL_NODE_MODULES"
SCRIPT = Path(__file__).with_name("node_llama_cpp.js")
LIKELIEST, EVENLY = 64, 64  # tokens whose logits are compared at each position


def find_node_modules() -> Path:
    """The node_modules folder with node-llama-cpp. Raises ConfigError that says what to install."""
    node = shutil.which("node")
    if node is not None:
        named = os.environ.get(VARIABLE)
        here = Path.cwd()
        folders = [Path(named)] if named else [folder / "node_modules" for folder in (here, *here.parents)]
        if not named and not any((folder / PACKAGE).is_dir() for folder in folders) and (npm := shutil.which("npm")):
            done = subprocess.run([npm, "root", "-g"], capture_output=True, text=True, timeout=60, check=False)
            folders += [Path(done.stdout.strip())] if done.returncode == 0 and done.stdout.strip() else []
        for folder in folders:
            if (folder / PACKAGE / "package.json").is_file():
                return folder.resolve()
    missing = "Node.js and " if node is None else ""
    raise ConfigError(
        f"proving a GGUF file runs it in llama.cpp: install {missing}npm's {PACKAGE} (npm install {PACKAGE}) in this folder\n"
        f"or one above it, or set {VARIABLE} to the node_modules folder that holds it."
    )


def wanted_tokens(logits: Tensor) -> list[list[int]]:
    """For each row of Float32["n V"] the tokens to compare: the likeliest ones, and some spread over the vocabulary."""
    vocabulary = logits.shape[-1]
    evenly = torch.arange(0, vocabulary, max(1, vocabulary // EVENLY))
    top = logits.topk(min(LIKELIEST, vocabulary)).indices
    return [torch.cat((row, evenly)).unique().tolist() for row in top]


def ask(
    file: Path, tokenizer: ChatTokenizer, texts: Sequence[str], cases: Sequence[Case], tokens: int
) -> tuple[list[list[int]], list[Answer], list[Tensor]]:
    """(ids of each text, answer to each case, Int64["n K"]: the tokens of its logits). Raises ConfigError."""
    wanted = [wanted_tokens(case.logits) for case in cases]
    # rows differ in length where the two groups overlap: fill up with the first token
    widest = max(len(row) for rows in wanted for row in rows)
    wanted = [[row + row[:1] * (widest - len(row)) for row in rows] for rows in wanted]
    special = {key: tokenizer.config.get(key) for key in ("bos_token", "eos_token")}
    request = {
        "model": str(file.resolve()),
        "bos": _content(special["bos_token"]),
        "eos": _content(special["eos_token"]),
        "texts": list(texts),
        "cases": [
            {
                "text": case.text,
                "ids": case.ids,
                "messages": case.messages,
                "reply": case.reply,
                "most": min(tokens, len(case.reply) + case.ended),
                "wanted": rows,
            }
            for case, rows in zip(cases, wanted, strict=True)
        ],
    }
    (said,) = _run([request])
    answers = [
        Answer(
            one["ids"],
            one["text"],
            one["reply"],
            torch.tensor([[float("nan") if value is None else value for value in row] for row in one["logits"]]),
        )
        for one in said["answers"]
    ]
    return said["tokens"], answers, [torch.tensor(rows) for rows in wanted]


def token_ids(files: Sequence[Path], texts: Sequence[str]) -> list[list[list[int]]]:
    """The ids of each text by the tokenizer of each GGUF file, special tokens in it included. Raises ConfigError."""
    said = _run([{"model": str(file.resolve()), "texts": list(texts), "cases": []} for file in files])
    return [one["tokens"] for one in said]


def _run(requests: list[dict[str, Any]]) -> list[Any]:
    modules = find_node_modules()
    with tempfile.TemporaryDirectory(prefix="chatmill-proof-") as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps({"threads": torch.get_num_threads(), "requests": requests}), encoding="utf-8")
        command = ["node", str(SCRIPT), str(modules), str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not answer.is_file():
            lines = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
            files = ", ".join(request["model"] for request in requests)
            raise ConfigError(f"llama.cpp ({PACKAGE}) cannot run {files}:\n" + "\n".join(lines[-12:]))
        found: list[Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _content(token: object) -> str | None:
    """The text of a special token of tokenizer_config.json: a text, or a record with `content`."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None
