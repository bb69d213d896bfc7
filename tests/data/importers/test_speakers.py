"""A chat between people has one assistant: the one that was named. Several are never mixed without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatmill.config import ConfigError
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.recipe import DataRecipe
from chatmill.data.tokenizer.template import TEMPLATES, ChatTemplate


def whatsapp(first: str, second: str, dialogues: int = 40, swap: bool = True) -> str:
    """A chat of two, in which every other dialogue is begun by the second one."""
    lines = []
    for k in range(dialogues):
        pair = (second, first) if swap and k % 2 else (first, second)
        for i in range(4):
            text = f"{pair[i % 2]} says {'abcdefghij'[k % 10]}{k}{i} about tea number {k * 7 + i} today"
            lines.append(f"2023/5/{1 + k // 8} 上午{1 + k % 8}:{10 + i} - {pair[i % 2]}: {text}")
    return "\n".join(lines) + "\n"


def recipe(path: Path, **more: Any) -> DataRecipe:
    source = {"path": str(path), "gap_minutes": 5} | more.pop("source", {})
    return DataRecipe.model_validate(
        {
            "name": "x",
            "sources": [source],
            "tokenizer": {"train": {"vocab_size": 300}},
            "workers": 1,
            "split": {"validation": 0.2},
        }
        | more
    )


def written(recipe: DataRecipe, folder: Path) -> list[dict[str, Any]]:
    """The samples of a recipe as OpenAI messages."""
    build_dataset(recipe, folder / "out", until="pair", dialogues=folder / "pairs.jsonl")
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("ann", "bob"), [("Ann", "Bob"), ("小明", "丽丽")])
def test_a_chat_of_two_is_refused_until_one_of_them_is_named(ann: str, bob: str, tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text(whatsapp(ann, bob))
    with pytest.raises(ConfigError, match=rf"(?s)sources.0 .*chat.txt.*({ann} 80, {bob} 80|{bob} 80, {ann} 80)"):
        build_dataset(recipe(tmp_path / "chat.txt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    samples = written(recipe(tmp_path / "chat.txt", source={"assistant": bob}), tmp_path)
    said = {(m["role"], m["content"].split(" ")[0]) for sample in samples for m in sample["messages"]}
    assert said == {("user", ann), ("assistant", bob)}


def test_people_are_mixed_on_purpose(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text(whatsapp("Ann", "Bob"))
    samples = written(recipe(tmp_path / "chat.txt", source={"mix_speakers": True}), tmp_path)
    assert {m["content"].split(" ")[0] for s in samples for m in s["messages"] if m["role"] == "assistant"} == {"Ann", "Bob"}


def test_chats_with_different_friends_are_one_source_and_one_mixture(tmp_path: Path) -> None:
    for friend in ("Bob", "Cleo"):  # who always replies: each file alone would have one assistant
        (tmp_path / f"{friend}.txt").write_text(whatsapp("Ann", friend, swap=False))
    with pytest.raises(ConfigError, match=r"Ann 160, Bob 80, Cleo 80"):
        build_dataset(recipe(tmp_path / "*.txt"), tmp_path / "out")


@pytest.mark.parametrize("names", [("Ann", "Support"), ("顾客", "小李")])
def test_names_that_say_a_role_need_no_choice(names: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text(whatsapp(*names))
    samples = written(recipe(tmp_path / "chat.txt"), tmp_path)
    assert {m["content"].split(" ")[0] for s in samples for m in s["messages"] if m["role"] == "assistant"} == {names[1]}


def test_the_one_who_always_replies_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text(whatsapp("Ann", "Bob", swap=False))
    report = build_dataset(recipe(tmp_path / "chat.txt"), tmp_path / "out", until="import")
    assert report["files"]["assistants"] == ["Bob (sources.0), who always replies"]


def test_a_recipe_sets_the_system_message_of_dialogues_without_one(tmp_path: Path) -> None:
    def chat(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"What is number {n}?"}, {"role": "assistant", "content": f"It is called {n}."}]

    own = [{"role": "system", "content": "Be kind."}]
    lines = [json.dumps({"messages": chat(n) if n else own + chat(n)}) for n in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    for mode, count in (("dialogues", 20), ("pairs", 20)):
        chosen = recipe(tmp_path / "chats.jsonl", pair={"system": "You are Ann.", "mode": mode}, source={"gap_minutes": None})
        found = [sample["messages"][0] for sample in written(chosen, tmp_path)]
        assert [m["content"] for m in found] == ["Be kind."] + ["You are Ann."] * (count - 1)
        assert {m["role"] for m in found} == {"system"}


def test_a_template_tells_its_own_system_message() -> None:
    smollm = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    )
    own = {name: ChatTemplate(text, {"bos_token": "<s>"}).own_system_message() for name, text in TEMPLATES.items()}
    assert own == dict.fromkeys(TEMPLATES) | {"qwen": "You are a helpful assistant."}
    assert ChatTemplate(smollm, {}).own_system_message() == "You are SmolLM"
    assert ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}", {}).own_system_message() is None
