"""Start the server: `chatmill serve CHECKPOINT [--host --port --token]`.

On loopback (the default) no token is needed. On any other address one is required: --token, or CHATMILL_TOKEN in the
environment, which the process list does not show.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import sys
from pathlib import Path

from chatmill.config import ConfigError


def serve(
    checkpoint: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    max_active: int = 8,
    max_waiting: int = 64,
    max_connections: int = 512,
    timeout_s: float = 300.0,
) -> int:
    """Serve until interrupted; returns the exit code.

    A public address without a token and a port that is taken are refused before anything loads. From then on the port is held:
    clients that come while the model loads are answered when it is there.
    """
    token = token or os.environ.get("CHATMILL_TOKEN") or None
    check_address(host, token)
    if not 0 <= port < 65536 or min(max_active, max_waiting, max_connections) < 1 or not timeout_s > 0:
        text = (
            "serve: expected port 0..65535, timeout_s above 0, and at least 1 for max_active, max_waiting and max_connections."
        )
        raise ConfigError(text)
    try:
        from .completion import Limits
        from .listening import make_server, open_sockets
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi", "starlette"):
            raise
        raise ConfigError(f"chatmill serve needs {error.name}, which is not installed: pip install 'chatmill[serve]'") from None
    sockets = open_sockets(host, port)
    try:
        from ..chat_model import load_chat_model
        from .batcher import Batcher

        print(f"loading {checkpoint} ...", file=sys.stderr, flush=True)
        batcher = Batcher(load_chat_model(checkpoint), max_active=max_active, max_waiting=max_waiting)
        server = make_server(batcher, token=token, limits=Limits(max_connections=max_connections, timeout_s=timeout_s))
    except BaseException:
        for opened in sockets:
            opened.close()
        raise
    if (most := server.limits.max_connections) < max_connections:
        print(f"at most {most} connections, not {max_connections}: ulimit -n allows no more.", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # what the model needs is never looked through again, which would hold up every reply
    name = batcher.chat.name
    place = f"http://{f'[{host}]' if ':' in host else host}:{sockets[0].getsockname()[1]}"
    print(f"{name}: {place}/  (API: {place}/v1, model {name!r}; Ctrl-C ends)", file=sys.stderr, flush=True)
    server.run(sockets=sockets)
    batcher.close()
    return 0 if server.started else 2


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
