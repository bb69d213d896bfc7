"""Start the server: `chatmill serve CHECKPOINT... [--host --port --token --open]`.

Several checkpoints are several models, whose replies the page shows side by side. Adapters on one base share it in memory:

    chatmill serve before=runs/smollm2 after=runs/demo                    # `model` of a request is "before" or "after"
    chatmill serve base=runs/smollm2 a=runs/lora-a b=runs/lora-b          # one base in memory, one batch

On loopback (the default) no token is needed. On any other address one is required: --token, or CHATMILL_TOKEN in the
environment, which the process list does not show.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import re
import sys
import threading
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from chatmill.config import ConfigError

from ....data.tokenizer.calls.forms import FORMS

NAMED = re.compile(r"([\w.-]{1,64})=(.+)")


def serve(
    *checkpoints: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_active: int = 8,
    max_waiting: int = 64,
    max_connections: int = 512,
    timeout_s: float = 300.0,
    open_page: bool = False,
    call_form: str | None = None,
) -> int:
    """Serve until interrupted; returns the exit code. checkpoints: folders, or NAME=FOLDER. open_page: in the browser.

    call_form: in which form the models write calls of tools; None: what their templates say.

    A public address without a token and a port that is taken are refused before anything loads. From then on the port is held:
    clients that come while the model loads are answered when it is there.
    """
    named = names_of(checkpoints)
    token = token or os.environ.get("CHATMILL_TOKEN") or None
    check_address(host, token)
    if not 0 <= port < 65536 or min(max_active, max_waiting, max_connections) < 1 or not timeout_s > 0:
        text = (
            "serve: expected port 0..65535, timeout_s above 0, and at least 1 for max_active, max_waiting and max_connections."
        )
        raise ConfigError(text)
    try:
        from .bodies import set_large_blocks_apart
        from .completion import Limits
        from .listening import make_server, open_sockets
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi", "starlette"):
            raise
        raise ConfigError(f"chatmill serve needs {error.name}, which is not installed: pip install 'chatmill[serve]'") from None
    if call_form is not None and call_form not in FORMS:
        raise ConfigError(f"serve: --call-form {call_form!r}: expected one of {', '.join(FORMS)}.")
    sockets = open_sockets(host, port)
    try:
        from ..chat_model import load_chat_models
        from .batcher import Batcher

        groups = load_chat_models(named, on_note=lambda note: print(note, file=sys.stderr, flush=True))
        groups = [[replace(chat, call_form=call_form) for chat in group] for group in groups]
        chats = [chat for group in groups for chat in group]
        if twice := sorted({chat.name for chat in chats if sum(chat.name == other.name for other in chats) > 1}):
            raise ConfigError(
                f"serve: two of the checkpoints would be called {twice[0]!r}. Name them: chatmill serve one=FOLDER two=FOLDER."
            )
        batchers = [Batcher(*group, max_active=max_active, max_waiting=max_waiting) for group in groups]
        server = make_server(*batchers, token=token, limits=Limits(max_connections=max_connections, timeout_s=timeout_s))
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    if (most := server.limits.max_connections) < max_connections:
        print(f"at most {most} connections, not {max_connections}: ulimit -n allows no more.", file=sys.stderr, flush=True)
    set_large_blocks_apart()
    gc.collect()
    gc.freeze()  # what the model needs is never looked through again, which would hold up every reply
    names, models = " and ".join(c.name for c in chats), " or ".join(repr(c.name) for c in chats)
    place = f"http://{f'[{host}]' if ':' in host else host}:{sockets[0].getsockname()[1]}"
    print(f"{names}: {place}/  (API: {place}/v1, model {models}; Ctrl-C ends)", file=sys.stderr, flush=True)
    if open_page:  # the sockets are open: a browser that is quicker than the server waits
        threading.Thread(target=webbrowser.open, args=(f"{place}/",), daemon=True).start()
    server.run(sockets=sockets)
    for batcher in batchers:
        batcher.close()
    return 0 if server.started else 2


def names_of(checkpoints: Sequence[str | Path]) -> list[tuple[str | None, Path]]:
    """(name or None, folder) of each; a folder whose name has a = in it is taken as it is."""
    found: list[tuple[str | None, Path]] = []
    for checkpoint in map(str, checkpoints):
        match = None if Path(checkpoint).exists() else NAMED.fullmatch(checkpoint)
        found.append((match[1], Path(match[2])) if match else (None, Path(checkpoint)))
    return found


def can_open_pages(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Whether somebody sits at a screen of this machine who can be shown a page: not in CI, over ssh or without a display."""
    if environment.get("CI") or environment.get("SSH_CONNECTION") or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    return platform in ("darwin", "win32") or bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def check_address(host: str, token: str | None) -> None:
    """Raise ConfigError for an address beyond loopback without a token."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not token:
        raise ConfigError(
            f"serve: {host} can be reached by other machines, so a token is required.\n"
            "Set CHATMILL_TOKEN or give --token; or stay on 127.0.0.1."
        )
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("serve: the token must have at least 8 printable ASCII characters and no blanks.")
