"""The chat page in a real browser: headless Chromium, driven over its debugging pipe."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatmill.data.tokenizer.tokenizer import train_bpe
from chatmill.trainer.chat.chat_model import ChatModel
from chatmill.trainer.config import ModelConfig
from chatmill.trainer.model.decoder import Decoder

pytest.importorskip("fastapi", reason="needs the extra `serve`")
pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from chatmill.trainer.chat.serve.batcher import Batcher

from .server import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]
QUIET = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe"),
]


class Browser:
    """One tab of Chromium. The protocol is JSON messages that end in a zero byte, on file descriptors 3 and 4."""

    def __init__(self, profile: Path, width: int = 1100, height: int = 800) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def place_pipes() -> None:
            here, there = os.dup(read_there), os.dup(write_there)
            os.dup2(here, 3)
            os.dup2(there, 4)

        assert CHROMIUM is not None
        command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=place_pipes, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_there)
        os.close(write_there)
        self._in, self._out, self._number, self._rest = write_here, read_here, 0, b""
        self._session: str | None = None
        self.problems: list[str] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                chunk = os.read(self._out, 1 << 20)
                assert chunk, "Chromium ended"
                self._rest += chunk
            raw, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(raw)
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(answer["params"]["exceptionDetails"]))
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.problems.append(answer["params"]["entry"]["text"])
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def js(self, code: str) -> Any:
        """Value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, code: str, timeout_s: float = 600) -> None:
        until = time.monotonic() + timeout_s
        while not self.js(code):
            assert time.monotonic() < until, f"{code}\n{self.js('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && typeof turns !== 'undefined'")

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        extra = {"text": "\r", "windowsVirtualKeyCode": 13} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def shape(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Brake:
    """Lets a reply begin and then holds it, however slow or fast the machine is."""

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self._left = 0

    def hold(self, after: int) -> None:
        self._left = after
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def step(self) -> None:
        if self._left > 0:
            self._left -= 1
        else:
            self._go.wait(120)


BRAKE = Brake()


@pytest.fixture(scope="module")
def batcher() -> Batcher:
    tokenizer = train_bpe(iter(["hello there, how are you? I am fine."] * 20), 300)
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "context": 1024}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, initializer_range=0.3, **shape))
    model.init_weights(3)
    forward = model.cached_logits

    def slower(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.01)  # so that there is something to stop
        BRAKE.step()
        return forward(*arguments, **options)

    model.cached_logits = slower  # type: ignore[method-assign]
    return Batcher(ChatModel(model.eval().requires_grad_(False), tokenizer, Path("tiny"), "tiny"))


@pytest.fixture(scope="module")
def address(batcher: Batcher) -> Iterator[str]:
    served = Served(batcher)
    yield f"http://127.0.0.1:{served.port}/"
    served.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Browser:
    browser.shape(1100, 800)
    browser.open(address)
    browser.js("removeEventListener('pagehide', keep), sessionStorage.clear()")
    browser.open(address)
    browser.js("$('max_tokens').value = 30, $('temperature').value = 0, input.focus()")
    return browser


def test_two_models_answer_side_by_side_and_each_leads_its_own_conversation(
    browser: Browser, batcher: Batcher, tmp_path: Path
) -> None:
    one = batcher.chat
    other = Decoder(one.model.config)
    other.init_weights(5)
    second = ChatModel(other.eval().requires_grad_(False), one.tokenizer, Path("other"), "after")
    served = Served(Batcher(dataclasses.replace(one, name="before")), Batcher(second))
    try:
        browser.shape(1100, 800)
        browser.open(f"http://127.0.0.1:{served.port}/")
        browser.wait("document.title === 'before | after'")
        browser.js("$('max_tokens').value = 8, $('temperature').value = 0, ask_text('hello')")
        browser.wait(REPLY_DONE)
        browser.js("ask_text('hello')")
        browser.wait(f"turns.length === 4 && {REPLY_DONE}")
        messages = [{"role": "user", "content": "hello"}]
        for k, name in enumerate(("before", "after")):
            led = browser.js(f"turns.filter(t => t.role === 'assistant').map(t => replies_of(t)[{k}].content)")
            first, again = messages, [*messages, {"role": "assistant", "content": led[0]}, *messages]
            for asked, reply in zip((first, again), led, strict=True):
                _, answer = served.chat(model=name, messages=asked, temperature=0, max_tokens=8)
                assert answer["choices"][0]["message"]["content"] == reply
        assert browser.js("[...document.querySelectorAll('.who')].map(e => e.textContent)") == ["before", "after"] * 2
        left, right = browser.js("[...document.querySelectorAll('.reply')].slice(0, 2).map(e => e.getBoundingClientRect().x)")
        assert right > left + 250
        browser.picture(tmp_path / "two.png")
        browser.shape(380, 700)
        assert browser.js("document.documentElement.scrollWidth") <= 380
        assert browser.js("new Set([...document.querySelectorAll('.reply')].map(e => e.getBoundingClientRect().x)).size") == 1
        assert browser.problems == []
    finally:
        served.close()


REPLY_DONE = "turns.length && !abort && turns.at(-1).role === 'assistant'"


def test_enter_sends_and_the_reply_streams_in(page: Browser) -> None:
    page.wait("document.title === 'tiny'")
    page.type("hello")
    BRAKE.hold(after=12)
    page.press("Enter")
    page.wait("send.textContent === 'Stop'")
    page.wait("turns.at(-1).content.length > 0 && !!abort")  # text shows before the reply is complete
    BRAKE.release()
    page.wait(REPLY_DONE)
    assert page.js("turns.map(t => t.role)") == ["user", "assistant"]
    assert page.js("document.querySelector('.user .text').textContent") == "hello"
    assert "per second" in page.js("document.querySelector('.assistant .tools').textContent")
    assert page.js("turns.at(-1).error ?? null") is None
    assert page.problems == []


def test_escape_stops_the_reply_and_the_work_behind_it(page: Browser, batcher: Batcher) -> None:
    page.js("$('max_tokens').value = 900, ask_text('long')")
    page.wait("turns.at(-1).content.length > 3")
    page.press("Escape")
    page.wait("turns.at(-1).note === 'stopped'")
    until = time.monotonic() + 600
    while batcher.load != (0, 0):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert page.js("send.textContent") == "Send"


def test_regenerate_and_edit_replace_what_came_after(page: Browser) -> None:
    page.js("$('temperature').value = 1.5, ask_text('one')")
    page.wait(REPLY_DONE)
    first = page.js("turns.at(-1).content")
    page.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'Regenerate').click()")
    page.wait(f"{REPLY_DONE} && turns.at(-1).note")
    assert page.js("turns.length") == 2 and page.js("turns.at(-1).content") != first
    page.js("input.focus()")
    page.press("ArrowUp")
    assert page.js("document.activeElement.className") == "edit box"
    page.js("document.activeElement.select()")
    page.type("two")
    page.press("Enter")
    page.wait(REPLY_DONE)
    assert page.js("turns.map(t => t.role + t.content).join().startsWith('usertwo,')")
    assert page.js("turns.length") == 2


def test_settings_reach_the_server(page: Browser) -> None:
    page.js("$('toggle').click(), $('seed').value = 4, $('temperature').value = 1, $('max_tokens').value = 5")
    assert page.js("!$('settings').hidden && $('toggle').getAttribute('aria-expanded') === 'true'")
    replies = []
    for seed in (4, 4, 5):
        page.js(f"$('seed').value = {seed}, $('new').click(), ask_text('same')")
        page.wait(REPLY_DONE)
        replies.append(page.js("turns.at(-1).content"))
        assert "5 tokens" in page.js("turns.at(-1).note") or "cut" not in page.js("turns.at(-1).note")
    assert replies[0] == replies[1] != replies[2]
    knobs = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2}
    page.js("".join(f"$('{name}').value = {value}, " for name, value in knobs.items()) + "0")
    assert knobs.items() <= page.js("options()").items()
    page.js("$('new').click(), ask_text('same')")
    page.wait(REPLY_DONE)
    greedy = page.js("turns.at(-1).content")  # one candidate only: the seed no longer matters
    page.js("$('seed').value = 9, $('new').click(), ask_text('same')")
    page.wait(REPLY_DONE)
    assert page.js("turns.at(-1).content") == greedy


def test_a_reload_keeps_conversation_and_settings_but_not_the_token(page: Browser, address: str) -> None:
    page.js("$('system').value = 'Be kind', $('token').value = 'secret-secret', ask_text('hello')")
    page.wait(REPLY_DONE)
    said = page.js("turns.map(t => [t.role, t.content])")
    page.open(address)
    assert page.js("turns.map(t => [t.role, t.content])") == said and len(said) == 2
    assert page.js("[$('system').value, $('max_tokens').value, $('token').value]") == ["Be kind", "30", ""]
    assert "secret" not in page.js("JSON.stringify(sessionStorage)")
    page.js("$('new').click()")
    page.open(address)
    assert page.js("turns.length") == 0


def test_an_error_is_shown_and_can_be_retried(page: Browser) -> None:
    page.js("$('temperature').value = 200, ask_text('x')")
    page.wait("!!turns.at(-1).error")
    assert "temperature" in page.js("document.querySelector('.error').textContent")
    page.js("$('temperature').value = 0")
    page.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'Regenerate').click()")
    page.wait(f"{REPLY_DONE} && !turns.at(-1).error")
    page.problems.clear()  # the browser logs the refused request


def rendered(page: Browser, text: str) -> str:
    code = (
        f"(() => {{ const d = document.createElement('div'); d.append(markdown({json.dumps(text)})); return d.innerHTML; }})()"
    )
    return str(page.js(code))


def test_markdown_becomes_elements_and_html_stays_text(page: Browser) -> None:
    assert rendered(page, "a **b** *c* `d`") == "<p>a <strong>b</strong> <em>c</em> <code>d</code></p>"
    assert rendered(page, "# T\n- x\n- y\n\n3. z") == '<h3>T</h3><ul><li>x</li><li>y</li></ul><ol start="3"><li>z</li></ol>'
    assert "<code>if a:\n    b **c**</code>" in rendered(page, "```py\nif a:\n    b **c**\n```\nend")
    assert "<code>open</code>" in rendered(page, "```\nopen")
    table = "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td><strong>2</strong></td></tr><tr><td>3</td><td></td></tr></table>"
    assert table in rendered(page, "| a | b |\n|:--|--:|\n| 1 | **2** |\n| 3 |\nend")
    assert rendered(page, "a | b\nc") == "<p>a | b<br>c</p>"
    assert rendered(page, "x\n\n---\n* * *\ny") == "<p>x</p><hr><hr><p>y</p>"
    assert rendered(page, "> q\n> r") == "<blockquote>q<br>r</blockquote>"
    assert 'href="https://a.b/c"' in rendered(page, "[t](https://a.b/c)")
    for evil in ("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "[x](javascript:alert(1))", "`<b>`", "**<i>**"):
        html = rendered(page, evil)
        assert not any(f"<{tag}" in html for tag in ("img", "script", "a ", "b>", "i>")), html


def test_a_phone_in_the_dark_has_no_sideways_scroll(page: Browser, tmp_path: Path) -> None:
    page.shape(380, 700, dark=True)
    page.js("ask_text('a_very_long_word_'.repeat(12) + '\\n'.repeat(3))")
    page.wait(REPLY_DONE)
    page.js("$('toggle').click()")
    assert page.js("document.documentElement.scrollWidth") <= 380
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(18, 18, 17)"
    page.js("$('theme').click()")
    assert page.js("getComputedStyle(document.body).backgroundColor") == "rgb(246, 246, 243)"
    page.picture(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 5000


def test_nothing_is_loaded_from_elsewhere(page: Browser, address: str) -> None:
    assert page.js("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    blocked = page.js("fetch('http://127.0.0.1:9/').then(() => 'open', e => 'blocked')")
    assert blocked == "blocked"
    page.problems.clear()
