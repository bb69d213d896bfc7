"""Start the server: `chatmill serve CHECKPOINT [--host --port --token]`.

On loopback (the default) no token is needed. On any other address one is required: --token, or CHATMILL_TOKEN in the
environment, which the process list does not show.
"""

from __future__ import annotations

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
    timeout_s: float = 300.0,
) -> int:
    """Serve until interrupted; returns the exit code. A public address without a token is refused before anything loads."""
    token = token or os.environ.get("CHATMILL_TOKEN") or None
    check_address(host, token)
    if not 0 <= port < 65536 or max_active < 1 or max_waiting < 1 or timeout_s <= 0:
        raise ConfigError("serve: expected port 0..65535, and at least 1 for max_active, max_waiting and timeout_s.")
    try:
        import uvicorn

        from .app import Limits, create_app
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi", "starlette"):
            raise
        raise ConfigError(f"chatmill serve needs {error.name}, which is not installed: pip install 'chatmill[serve]'") from None
    from ..chat_model import load_chat_model
    from .batcher import Batcher

    print(f"loading {checkpoint} ...", file=sys.stderr, flush=True)
    batcher = Batcher(load_chat_model(checkpoint), max_active=max_active, max_waiting=max_waiting)
    app = create_app(batcher, token=token, limits=Limits(timeout_s=timeout_s))
    name = batcher.chat.name
    shown = f"[{host}]" if ":" in host else host
    print(
        f"{name}: http://{shown}:{port}/  (API: http://{shown}:{port}/v1, model {name!r}; Ctrl-C ends)",
        file=sys.stderr,
        flush=True,
    )
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    server = uvicorn.Server(config)
    server.run()
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
