"""From an export to two recipes that work as they are: who speaks is shown, who the assistant is must be said."""

from __future__ import annotations

import json
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.recipe import load_data_recipe
from chatmill.launcher.__main__ import main
from chatmill.launcher.own_chats import new as module
from chatmill.launcher.own_chats.recipes import Plan, data_recipe, train_recipe
from chatmill.trainer.config import load_recipe


def whatsapp(*names: str) -> str:
    """An export of 30 dialogues; everybody begins some."""
    lines = []
    for k in range(30):
        for i in range(4):
            name = names[(k + i) % len(names)]
            lines.append(
                f"2023/5/{1 + k // 8} 上午{1 + k % 8}:{10 + i} - {name}: {name} says {chr(97 + k)}{i} of tea {k * 7 + i} :)"
            )
    return "\n".join(lines) + "\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "visible_gpus", lambda: None)
    return tmp_path


@pytest.mark.parametrize(("ann", "bob"), [("Ann", "Bob"), ("小明", '丽丽: #1 "x"'.replace(":", ""))])
def test_a_chat_becomes_recipes_that_build_what_was_chosen(
    ann: str, bob: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chat.txt").write_text(whatsapp(ann, bob))
    assert main(["new", "chat.txt", "gap_minutes=9", "--from-scratch", "--seed", "1"]) == 2  # nobody to ask
    said = capsys.readouterr()
    assert f"{ann} 60" in said.out and "--assistant" in said.err and f"{bob} 60" in said.err
    assert [path.name for path in here.iterdir()] == ["chat.txt"]
    words = ["new", "chat.txt", "gap_minutes=9", "--assistant", bob, "--from-scratch", "--system", "You're B.", "--seed", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    commands = [line.split("chatmill ")[1] for line in printed.partition("Next:")[2].splitlines() if "chatmill " in line]
    assert commands == [
        "data build chat-data.yaml",
        "train chat-train.yaml",
        f"chat runs/chat --system {shlex.quote(words[7])}",
    ]
    assert "whatsapp, 30 dialogues" in printed and "says" in printed
    assert main([*shlex.split(commands[0]), "--out", "built"]) == 0
    assert main([*shlex.split(commands[0].replace("build", "pair")), "--out", "pairs.jsonl"]) == 0
    samples = [json.loads(line)["messages"] for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {(m["role"], m["content"].partition(" says")[0]) for sample in samples for m in sample} == {
        ("system", words[7]), ("user", ann), ("assistant", bob),
    }  # fmt: skip
    recipe = load_recipe(*shlex.split(commands[1])[1:])
    assert recipe.data.path == load_data_recipe("chat-data.yaml").place and len(recipe.evaluation.prompts) == 3
    assert recipe.model.vocab_size >= json.loads(Path("built/manifest.json").read_text())["vocab_size"]
    assert main(words) == 2 and "exists already" in capsys.readouterr().err


def test_the_question_is_asked_until_it_is_answered(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chat.txt").write_text(whatsapp("Ann", "Bob", "Cleo"))
    answers = iter(["7", "Anna", "2"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert main(["new", "chat.txt", "--from-scratch", "--samples", "0"]) == 0
    assert "Did you mean 'Ann'" in capsys.readouterr().out
    assert load_data_recipe("chat-data.yaml").sources[0].assistant == "Bob"


def test_a_folder_says_who_is_meant_only_where_a_file_leaves_it_open(here: Path) -> None:
    Path("exports").mkdir()
    Path("exports/a.txt").write_text(whatsapp("Ann", "Bob"))
    Path("exports/b.txt").write_text(whatsapp("Customer", "Support"))
    Path("exports/c.txt").write_text(whatsapp("小明", "丽丽"))
    words = ["new", "exports", "--assistant", "Bob", "--assistant", "丽丽", "--from-scratch", "--name", "all", "gap_minutes=9"]
    assert main(words) == 0
    sources = load_data_recipe("all-data.yaml").sources
    assert [(s.path, s.assistant) for s in sources] == [
        ("exports/a.txt", "Bob"),
        ("exports/b.txt", None),
        ("exports/c.txt", "丽丽"),
    ]
    assert {s.gap_minutes for s in sources} == {9}


def test_a_zip_is_read_and_labels_need_no_choice(here: Path) -> None:
    with zipfile.ZipFile("WhatsApp Chat.zip", "w") as archive:
        archive.writestr("_chat.txt", whatsapp("Customer", "Support"))
    assert main(["new", "WhatsApp Chat.zip", "--from-scratch"]) == 0
    assert load_data_recipe("whatsapp-chat-data.yaml").sources[0].assistant is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.txt"], "does not exist"),
        (["chat.txt", "--assistant", "Bop"], "Did you mean 'Bob'"),
        (["chat.txt", "--assistant", "Bob", "--model", "nowhere"], "no checkpoint there"),
        (["chat.txt", "--assistant", "Bob", "fromat=whatsapp"], "did you mean 'format'"),
        (["alone.txt"], "no dialogue in it"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("chat.txt").write_text(whatsapp("Ann", "Bob"))
    Path("alone.txt").write_text("".join(f"2023/5/1 上午9:{n} - Ann: hello {n}\n" for n in range(10, 20)))
    assert main(["new", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["alone.txt", "chat.txt"]


def mailbox(*addresses: str) -> str:
    """Ten threads of four mails; everybody begins some."""
    mails = []
    for k in range(10):
        for i in range(4):
            who = addresses[(k + i) % len(addresses)]
            answers = f"In-Reply-To: <{k}.{i - 1}@x>\n" if i else ""
            head = f"From {who} Mon May  {1 + k} 09:0{i}:00 2023\nFrom: {who}\nMessage-ID: <{k}.{i}@x>\n{answers}"
            mails.append(f"{head}Date: {1 + k} May 2023 09:0{i}:00 +0000\nSubject: tea {k}\n\nMail {k} {i} about tea.\n\n")
    return "".join(mails)


def test_a_mailbox_asks_whom_the_model_is_to_become(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all.mbox").write_text(mailbox("ann@x.org", "bob@y.org", "cy@z.org"))
    assert main(["new", "all.mbox", "--from-scratch", "--seed", "1"]) == 2
    said = capsys.readouterr()
    assert "mbox, 10 dialogues" in said.out and "--assistant" in said.err and "ann@x.org 14" in said.err
    assert main(["new", "all.mbox", "--assistant", "Bob@y.org", "--from-scratch", "--seed", "1"]) == 0
    data = load_data_recipe("all-data.yaml")
    assert data.sources[0].assistant == "bob@y.org"
    text = Path("all-data.yaml").read_text()
    Path("mixed.yaml").write_text("".join(line for line in text.splitlines(True) if "assistant:" not in line))
    capsys.readouterr()
    assert main(["data", "import", "mixed.yaml"]) == 2
    assert "is a chat between people" in capsys.readouterr().err
    assert main(["data", "import", "mixed.yaml", "sources.0.mix_speakers=true"]) == 0


def test_in_a_forum_whoever_answers_is_the_assistant_and_that_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    posts = []
    for k in range(12):
        post = {"id": f"p{k}", "name": f"t3_p{k}", "author": f"asks{k}", "title": f"How is tea number {k} made?"}
        posts.append(post | {"selftext": f"I have tried {k} times.", "subreddit": "tea", "created_utc": 1.6e9 + k, "score": 3})
        answer = {"id": f"c{k}", "link_id": f"t3_p{k}", "parent_id": f"t3_p{k}", "author": f"knows{k % 5}", "score": 2}
        posts.append(answer | {"body": f"With water, {k} minutes of it.", "created_utc": 1.6e9 + 100 + k})
    Path("dump.jsonl").write_text("".join(json.dumps(post) + "\n" for post in posts))
    assert main(["new", "dump.jsonl", "--from-scratch", "--seed", "1"]) == 0
    assert "the assistant is whoever answers a post; assistant=NAME takes one of them" in capsys.readouterr().out
    assert main(["data", "import", "dump-data.yaml"]) == 0
    assert "assistant: whoever answers a post (sources.0)" in capsys.readouterr().out
    assert main(["new", "dump.jsonl", "--assistant", "knows1", "--from-scratch", "--seed", "1", "--force"]) == 0
    assert load_data_recipe("dump-data.yaml").sources[0].assistant == "knows1"


@pytest.mark.parametrize("base", [None, "runs/base"])
@pytest.mark.parametrize("tokens", [10, 3_000, 5_000_000])
@pytest.mark.parametrize("has_gpu", [False, True])
def test_recipes_fit_the_amount_of_data(base: str | None, tokens: int, has_gpu: bool, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"name": "x", "source": "a b.txt", "sources": [{"path": "a b.txt"}], "dialogues": tokens // 50}
    plan = Plan(
        **facts, tokens=tokens, prompts=['"Hi": # {x}'], base=base, context=512, own_system="Be\nkind.", has_gpu=has_gpu
    )
    for kind, text in (("data", data_recipe(plan)), ("train", train_recipe(plan))):
        (tmp_path / f"{kind}.yaml").write_text(text)
    recipe, data = load_recipe(str(tmp_path / "train.yaml")), load_data_recipe(str(tmp_path / "data.yaml"))
    assert recipe.evaluation.prompts == ('"Hi": # {x}',) and recipe.data.sequence_length <= 512
    assert 20 <= recipe.train.steps <= 2000 and recipe.schedule.warmup_steps < recipe.train.steps
    assert recipe.model.checkpoint == base == data.tokenizer.path and data.pair.system is None
