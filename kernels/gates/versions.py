"""The gates under another triton than the installed one.

    python -m chatmill.kernels.gates.versions 3.6.0 3.7.1 newest [--cache FOLDER] [--arch 90] [--quick]

For each version: pip installs it without dependencies into a folder of its own (once), then every shipped configuration is
launched dry (to tile IR) and every build cross-compiled with it, in processes that find that folder first. Torch
stays the installed one. With --quick nothing is cross-compiled: seconds a kernel become a quarter of a second. "newest" is
what pip would install now.
What differs between versions, and how it is handled:

    3.8  Gluon's tma.async_copy_global_to_shared became async_load; from 3.9 on the old name raises (hopper/forward.py)
    3.10 fusion of multiply and add is off unless asked for (triton pull request 11270): dispatch.on_its_device asks for it
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# the oldest that is supported, the one of constraints.txt, the newest that was released
SUPPORTED = ("3.6.0", "3.7.1", "3.9.0")


def use_triton(folder: str | Path) -> None:
    """Import triton from this folder. Raises ValueError where there is none, RuntimeError if triton was imported before."""
    folder = Path(folder).resolve()
    if not (folder / "triton" / "__init__.py").is_file():
        raise ValueError(f"no triton in {folder}: run pip install --no-deps --target {folder} triton==VERSION.")
    if "triton" in sys.modules:
        raise RuntimeError(f"triton was imported before {folder} was put in front of it.")
    sys.path.insert(0, str(folder))


def installed(package: str, version: str, cache: Path, *options: str) -> Path:
    """The folder below cache with that package alone, installed if it is missing. Raises CalledProcessError where pip fails."""
    folder = cache / f"{package}-{version}"
    if not (folder / package).is_dir():
        target = cache / f".{folder.name}-{os.getpid()}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *options]
        subprocess.run([*pip, "--target", str(target), f"{package}=={version}"], check=True)
        target.rename(folder)
    return folder


def newest(package: str) -> str:
    """The version that pip would install now. Raises CalledProcessError where pip fails."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--dry-run"]
    command = [*pip, "--ignore-installed", "--report", "-", package]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return str(report["install"][0]["metadata"]["version"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the gates under every version that is named; exit 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m chatmill.kernels.gates.versions", description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=SUPPORTED)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "chatmill", help="where versions are kept")
    parser.add_argument("--arch", type=int, action="append", default=[], help="only these compute capabilities")
    parser.add_argument("--quick", action="store_true", help="dry launches only")
    args = parser.parse_args(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    architectures = [word for arch in args.arch for word in ("--arch", str(arch))]
    failed = []
    for version in args.versions:
        if version == "newest":
            version = newest("triton")
        folder = str(installed("triton", version, args.cache))
        runs = [["dry_launch", "--quick"]] + ([] if args.quick else [["cross_compile"]])
        for tool, *options in runs:
            print(f"triton {version}: {tool}", flush=True)
            command = [sys.executable, "-m", f"{__package__}.{tool}", "--triton", folder, *options, *architectures]
            if subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, check=False).returncode:
                failed.append(f"{version}: {tool}")
    print("all passed" if not failed else f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
