"""Message counts against npm's whatsapp-chat-parser and telegram-chat-parser.

Of a few exports always, by what they counted once (npm_fixture/counts.json); of real chats where node and the
packages are there (install_npm_parsers.sh).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.importers.messages import ChatMessage
from chatmill.data.importers.messengers import telegram, whatsapp
from chatmill.data.ledger import Ledger
from chatmill.data.raw.files import RawFile
from chatmill.data.recipe import SourceSection

from .importer_formats import FORMATS, real_dialogues

HERE = Path(__file__).parent
FIXTURE = HERE / "npm_fixture"
MODULES = HERE.parents[2] / ".npm-parsers" / "node_modules"
EXPORTS = sorted(path for path in FIXTURE.iterdir() if path.name != "counts.json")


def ours(path: Path) -> tuple[list[ChatMessage], Counter[str]]:
    """Messages of a chat, and what was left out why."""
    ledger, file, options = Ledger(), RawFile(path), SourceSection(path=str(path))
    if path.suffix == ".json":
        found = list(telegram.messages((entry for *_, entry in telegram.entries(file, "utf-8")), file, ledger))
    else:
        found = list(whatsapp.messages(file, options, ledger))
    return found, ledger.changed


def theirs(*paths: Path) -> dict[str, Any]:
    run = subprocess.run(
        ["node", str(HERE / "npm_counts.cjs"), str(MODULES), *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def needs_npm() -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (MODULES / "whatsapp-chat-parser").is_dir() or not (MODULES / "telegram-chat-parser").is_dir():
        pytest.skip("npm's parsers are not here; install_npm_parsers.sh fetches them")


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_we_count_the_messages_that_npm_s_parsers_counted(path: Path) -> None:
    expected = json.loads((FIXTURE / "counts.json").read_text())
    assert expected["versions"] == {"whatsapp-chat-parser": "4.0.2", "telegram-chat-parser": "1.0.7"}
    counted = expected["files"][path.name]
    found, left_out = ours(path)
    service = left_out["service line left out"] + left_out["service entry left out"]
    # Theirs keep media and, where a line has a name, WhatsApp's own notice about encryption as somebody's message.
    assert len(found) + left_out["media left out"] + service == counted["all"]
    assert sum(left_out.values()) == left_out["media left out"] + service + left_out[DAY_MONTH]
    assert 0 <= counted["said"] - len(found) - left_out["media left out"] <= service


DAY_MONTH = "day/month order not certain: day first assumed"


def test_the_committed_counts_are_those_of_the_parsers() -> None:
    needs_npm()
    assert theirs(*EXPORTS) == json.loads((FIXTURE / "counts.json").read_text())


@pytest.mark.parametrize("name", ["whatsapp android us", "whatsapp android de", "whatsapp ios", "whatsapp ios us", "telegram"])
def test_npm_s_parsers_count_the_same_messages_by_the_same_people_in_real_chats(name: str, tmp_path: Path) -> None:
    needs_npm()
    chats = real_dialogues()[:120]
    path = FORMATS[name][1](tmp_path, chats)
    counted = theirs(path)["files"][path.name]
    found, left_out = ours(path)
    senders = Counter(message.sender.removeprefix("user") for message in found)
    assert senders == counted["by"] and len(found) == counted["said"] == sum(len(chat) for chat in chats) > 400
    assert counted["all"] - counted["said"] == left_out["service entry left out"]
