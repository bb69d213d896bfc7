"""The Chinese tutorial works as it is written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "zh" / "tutorial.md"


def commands(path: Path) -> list[str]:
    """Lines of the fenced blocks that have no language, without their comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].strip() for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.slow
def test_the_tutorial_trains_a_model_that_answers_in_chinese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra chatmill[eval]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    said: dict[str, str] = {}
    for command in commands(TUTORIAL):
        words = shlex.split(command)
        assert words[0] == "chatmill"
        assert main(words[1:]) == 0, command
        said[" ".join(words[1:3])] = capsys.readouterr().out
    shown = said["data inspect"]  # of the data set: the second command of this name
    built = json.loads(Path("corpora/zh/report.json").read_text(encoding="utf-8"))
    assert {"chatgpt", "qq", "wechat", "whatsapp"} == set(built["texts"]["train"]["sources"])
    assert set(built["texts"]["train"]["languages"]) <= {"zh-hans", "zh"} and "⟦" in shown
    assert [stage["kept"] for stage in built["stages"] if stage["name"] == "import"] == [240]
    cleaned = [json.loads(line) for line in Path("cleaned.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(cleaned) == 240 and all(record["messages"] for record in cleaned)
    figures = json.loads(Path("runs/zh/evaluation.json").read_text(encoding="utf-8"))
    bleu = re.search(r"BLEU +([\d.]+)", said["eval runs/zh"])
    assert "tok:zh" in json.dumps(figures) and bleu is not None and float(bleu[1]) > 0
    assert re.search("[\u4e00-\u9fff]{2}", said["generate runs/zh"])


def test_the_recipe_of_the_tutorial_is_the_file_beside_it() -> None:
    shown = re.findall(r"^```yaml\n(.*?)^```", TUTORIAL.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    recipe = (TUTORIAL.parent / "recipe.yaml").read_text(encoding="utf-8")
    assert shown == [recipe] and len(recipe.splitlines()) == 5
