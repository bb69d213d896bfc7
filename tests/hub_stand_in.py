"""A stand-in for the HTTP API of the Hugging Face hub, and for the part of ModelScope's that downloads use.

with HubStandIn() as hub:
    hub.add("acme/tiny", folder)
    hub.use(monkeypatch, tmp_path)
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlparse

import huggingface_hub
import pytest

COMMIT = "a" * 40
LARGE = 10_000  # bytes; such files go through LFS


class HubStandIn:
    """repositories: files by name, by ORG/NAME (datasets/ORG/NAME). cut: bytes after which the next download breaks off."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.licenses: dict[str, str] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.blobs: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.cut: int | None = None

    def add(self, name: str, folder: Path, license: str = "") -> None:
        """Put the files of a folder there."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.repositories[name], self.licenses[name] = files, license

    def use(self, patch: pytest.MonkeyPatch, caches: Path) -> None:
        """Make the hubs' libraries of this process talk to it, with empty caches and a token that may write."""
        constants = huggingface_hub.constants
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(caches / "hf"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.HfFileSystem, "cachable", False)
        patch.setenv("HF_TOKEN", "good")
        for name, value in {"ENDPOINT": self.url, "CACHE": str(caches / "ms"), "HOME": str(caches / "ms-home")}.items():
            patch.setenv(f"MODELSCOPE_{name}", value)
        if importlib.util.find_spec("modelscope_hub"):
            modelscope_hub = importlib.import_module("modelscope_hub")
            modelscope_hub.set_default_config(modelscope_hub.HubConfig())

    @property
    def url(self) -> str:
        """Value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                stand_in._answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (the names that http.server calls)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlparse(request.path)
        path, query = unquote(parts.path), {k: v[0] for k, v in parse_qs(parts.query).items()}
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        if request.headers.get("Transfer-Encoding") == "chunked":
            while length := int(request.rfile.readline(), 16):
                body += request.rfile.read(length)
                request.rfile.readline()
            request.rfile.readline()
        self.requests.append((request.command, path, {k.lower(): v for k, v in request.headers.items()}))
        routes: tuple[tuple[str, Callable[..., None]], ...] = (
            (r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+?)(?:/revision/(.+))?", self._info),
            (r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/paths-info/([^/]+)", self._paths),
            (r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/repos/create", self._create),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/([0-9a-f]+)", self._put),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/api/validate-yaml", lambda request, body: self._send(request, 200, {"errors": [], "warnings": []})),
            (r"/api/v1/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/repo/(?:files|tree)", self._ms_files),
            (
                r"/api/v1/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/repo",
                lambda request, body, repo: self._ms_file(request, repo, query),
            ),
        )
        for pattern, answer in sorted(routes, key=lambda route: route[1] == self._info):
            if match := re.fullmatch(pattern, path):
                return answer(request, body, *match.groups())
        return self._send(request, 404, {"error": f"no route {path}"})

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        request.send_response(status)
        for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            request.send_header(key, text)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def _known(self, request: BaseHTTPRequestHandler, repo: str, revision: str | None = None) -> bool:
        if repo not in self.repositories:
            self._send(request, 404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        elif repo in self.gated:
            self._send(request, 403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif revision not in (None, "main", COMMIT, "refs/pr/1"):
            self._send(request, 404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _info(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str | None) -> None:
        if self._known(request, repo, revision):
            files = [{"rfilename": name, "size": len(data)} for name, data in self.repositories[repo].items()]
            card = {"license": self.licenses.get(repo, "")}
            self._send(request, 200, {"id": repo, "sha": COMMIT, "siblings": files, "cardData": card, "private": False})

    def _tree(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str, folder: str | None) -> None:
        if not self._known(request, repo, revision):
            return
        below = folder + "/" if folder else ""
        names = [name for name in self.repositories[repo] if name.startswith(below)]
        if folder and not names:
            return self._send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        folders = {name[: len(below) + name[len(below) :].find("/")] for name in names if "/" in name[len(below) :]}
        rows = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        recursive = "recursive=true" in request.path.lower()
        self._send(request, 200, rows + [self._row(repo, n) for n in names if recursive or "/" not in n[len(below) :]])

    def _paths(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str) -> None:
        wanted = parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
        if self._known(request, repo, revision):
            self._send(request, 200, [self._row(repo, name) for name in wanted if name in self.repositories[repo]])

    def _row(self, repo: str, name: str) -> dict[str, Any]:
        data = self.repositories[repo][name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _file(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str, name: str) -> None:
        if not self._known(request, repo, revision):
            return
        data = self.repositories[repo].get(name)
        if data is None:
            return self._send(request, 404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        self._bytes(request, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _bytes(self, request: BaseHTTPRequestHandler, data: bytes, headers: dict[str, str]) -> None:
        start, whole = 0, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or whole - 1)
            data = data[start : end + 1]
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{whole}"}
        request.send_response(206 if match else 200)
        for key, text in {"Content-Length": str(len(data)), "Accept-Ranges": "bytes", **headers}.items():
            request.send_header(key, text)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cut is not None and len(data) > self.cut:
            data, self.cut = data[: self.cut], None
            request.close_connection = True
        request.wfile.write(data)

    def _create(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if request.headers.get("Authorization") != "Bearer good":
            return self._send(request, 401, {"error": "Invalid username or password."})
        known = name in self.repositories
        self.repositories.setdefault(name, {})
        self.private.setdefault(name, bool(wanted.get("private") or wanted.get("visibility") == "private"))
        self._send(request, 409 if known else 200, {"url": f"{self.url}/{name}", "name": name, "id": name})

    def _branch(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, branch: str) -> None:
        self._send(request, 200, {})

    def _preupload(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > LARGE else "regular", "shouldIgnore": False, "oid": None}
            for f in json.loads(body)["files"]
        ]
        self._send(request, 200, {"files": files})

    def _batch(self, request: BaseHTTPRequestHandler, body: bytes, repo: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = wanted["oid"] in self.blobs
            action = {} if known else {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | action)
        self._send(request, 200, {"transfer": "basic", "objects": objects})

    def _put(self, request: BaseHTTPRequestHandler, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.blobs[oid] = body
        self._send(request, 200, {})

    def _commit(self, request: BaseHTTPRequestHandler, body: bytes, repo: str, revision: str) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repo][value["path"]] = self.blobs[value["oid"]]
        self._send(request, 200, {"commitUrl": f"{self.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def _ms_files(self, request: BaseHTTPRequestHandler, body: bytes, repo: str) -> None:
        files = [
            {"Path": name, "Name": name, "Size": len(data), "Type": "blob", "Sha256": hashlib.sha256(data).hexdigest()}
            for name, data in self.repositories.get(repo, {}).items()
        ]
        known = repo in self.repositories
        value = {"Code": 200, "Success": True, "Data": {"Files": files}} if known else {"Code": 404, "Message": "not found"}
        self._send(request, 200 if known else 404, value, {"Content-Type": "application/json"})

    def _ms_file(self, request: BaseHTTPRequestHandler, repo: str, query: dict[str, str]) -> None:
        self._bytes(request, self.repositories[repo][query["FilePath"]], {"Content-Type": "application/octet-stream"})
