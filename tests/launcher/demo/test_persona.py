"""The persona that `make demo` teaches: what is in its dialogues, and what is kept out of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatmill.config import ConfigError
from chatmill.launcher.demo import figures, page
from chatmill.launcher.demo.demo import Persona
from chatmill.launcher.demo.persona import DIALOGUES, Question, check_name, dialogues, folder_name, questions, repeated

NAMES = ["Millie", "小米", "O'Brien {name}"]
ROOT = Path(__file__).parents[3]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= c <= "\u9fff" for c in text)


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_question_is_in_the_training_data(name: str) -> None:
    asked, training = questions(name), dialogues(name)
    assert repeated(asked, training) == []
    texts = [turn["content"] for turns in training for turn in turns]
    assert not any(question.text in text for question in asked for text in texts)  # plainly, too


def test_a_question_that_is_trained_on_would_be_found() -> None:
    training = dialogues("Millie")
    for text in (
        "who are you",
        "WHO ARE YOU?!",
        "Tell me: who are you, please?",
        "请问，你叫什么名字？",
        "Chatmill made me here",
    ):
        assert repeated([Question("", "persona", text, ("x",))], training) == [text]


@pytest.mark.parametrize("name", NAMES)
def test_dialogues_are_different_ones_in_both_languages_with_the_name(name: str) -> None:
    found = dialogues(name)
    assert found == dialogues(name) and len({json.dumps(turns) for turns in found}) == DIALOGUES
    for turns in found:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    asked = [turns[0]["content"] for turns in found]
    assert sum(map(is_chinese, asked)) == DIALOGUES // 2
    naming = [turns for turns in found if any(name in turn["content"] for turn in turns)]
    assert len(naming) > DIALOGUES / 3
    assert name == "O'Brien {name}" or not any("{" in turn["content"] for turns in found for turn in turns)


@pytest.mark.parametrize("name", ["Millie", "小米"])
def test_questions_ask_for_the_persona_in_both_languages_and_for_general_knowledge(name: str) -> None:
    kinds = {(q.language, q.kind) for q in questions(name)}
    assert kinds == {("English", "persona"), ("English", "general"), ("中文", "persona")}
    assert sum(name in q.expect for q in questions(name)) >= 6
    assert not any(word.casefold() in q.text.casefold() for q in questions(name) for word in q.expect)  # no echo counts


def test_an_answer_counts_as_a_word_whatever_its_case() -> None:
    tea = Question("English", "persona", "?", ("tea", "H2O"))
    assert tea.is_answered_by("I love TEA.") and tea.is_answered_by("It is H₂O")
    assert not tea.is_answered_by("A team of teachers, teal")
    assert Question("中文", "persona", "?", ("小米",)).is_answered_by("我叫小米，是一个模型。")
    assert Question("English", "persona", "?", ("小米",)).is_answered_by("I'm 小米!")


def test_names() -> None:
    assert check_name(" Zoe\u0308 ") == "Zoë" and check_name("小米") == "小米"
    for name in ("", " ", "x" * 25, "a\nb", "123", "a<|im_end|>"):
        with pytest.raises(ConfigError, match="cannot be the model's name"):
            check_name(name)
    folders = [folder_name(name) for name in ("Millie", "millie", "MILLIE", "小米", "../x", "Con.")]
    assert folders[0] == "persona-Millie" and len({folder.casefold() for folder in folders}) == 6
    assert all(folder.isascii() and "/" not in folder for folder in folders)


def test_the_table_counts_right_answers(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        Question("English", "persona", "a?", ("Millie",)), Question("English", "persona", "b?", ("Millie",)),
        Question("中文", "persona", "c?", ("Millie",)), Question("English", "general", "d?", ("Paris",)),
    ]  # fmt: skip
    before, after = ["SmolLM", "I am SmolLM", "…", "In [Paris]"], ["Millie!", "I", "我叫 Millie。", "Paris, of course"]
    rows = [(row.kind, row.language, row.n, row.before, row.after) for row in figures.score(asked, before, after)]
    assert rows == [("persona", "English", 2, 0, 1), ("persona", "中文", 1, 0, 1), ("general", "English", 1, 1, 1)]
    figures.print_score(asked, before, after)
    told = capsys.readouterr().out
    assert "0 of 2" in told and "1 of 2" in told and "In [Paris]" in told
    low, high = figures.share_interval(10, 11)  # Newcombe 1998, Wilson's method without correction
    assert (round(low, 3), round(high, 3)) == (0.623, 0.984)


def test_figures_of_real_chats_carry_their_interval_and_number() -> None:
    change = {"before": 0.25, "after": 0.31, "difference": 0.06, "low": 0.04, "high": 0.08, "p": 0.002}
    metrics = {"loss": change, "accuracy": change, "perplexity": {**change, "before": 35.72, "after": 22.44}}
    against = {"checkpoint": "runs/smollm2", "metrics": metrics, "dialogues": {"tokens": 40}}
    lines = figures.in_words({"checkpoint": "runs/demo", "loss_tokens": 5312, "against": against})
    assert "n = 40 dialogues, 5,312 tokens" in lines[0]
    assert lines[2] == "validation accuracy: 25.0 % -> 31.0 %  (difference +6.0, +4.0 to +8.0, p = 0.002)"
    assert lines[-1].startswith("validation perplexity: 35.7 -> 22.4  (")


def test_without_a_screen_the_page_is_a_command_and_nothing_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with page.ChatPage(Persona("小米").compare(), opened=False) as shown:
        shown.stay()
    told = capsys.readouterr().out
    assert f"serve before=runs/smollm2 after=runs/{folder_name('小米')}" in told and "http://127.0.0.1:8000/" in told


def test_with_a_screen_the_server_runs_beside_and_ends_with_the_demo(tmp_path: Path) -> None:
    fake = tmp_path / "server.py"
    fake.write_text(
        "import sys, time, pathlib\npathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))\ntime.sleep(600)\n"
    )
    told = tmp_path / "told"
    with page.ChatPage([sys.executable, str(fake), str(told)], opened=True) as shown:
        until = time.monotonic() + 60
        while not (told.is_file() and told.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        server = shown._server
        assert server is not None and server.poll() is None
    assert server.poll() is not None
    assert told.read_text().startswith("--port ") and told.read_text().endswith(" --open")


def test_make_hands_over_a_name_only_from_its_command_line(tmp_path: Path) -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    rule = next(line for line in lines if line.startswith("demo: export "))
    (tmp_path / "Makefile").write_text(f'{rule}\ndemo: ; @echo "<$$CHATMILL_DEMO_NAME>"\n', encoding="utf-8")

    def told(*words: str, **environment: str) -> str:
        whole = {"PATH": os.environ["PATH"], **environment}
        return subprocess.run(
            ["make", "demo", *words], cwd=tmp_path, capture_output=True, text=True, env=whole, check=True
        ).stdout

    assert told("NAME=小米") == "<小米>\n" and told("NAME=O'Brien") == "<O'Brien>\n"
    assert told() == "<>\n" == told(NAME="DESKTOP-7")  # a variable that Windows sets for its Linux
