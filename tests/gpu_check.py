"""Everything that needs a GPU, in one go: `make gpu`.

Runs all tests marked `gpu`, the kernel benchmarks and a short real training with throughput and MFU, and writes
results/{machine,tests,training}.json and the benchmarks' own JSON. Where there is no GPU it says so and exits 0.
Missing pure-Python packages are installed from --wheels (built elsewhere by `pip download`) into --site; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run all parts, each bounded in time; a part that fails does not stop the next. Exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--wheels", type=Path, default=Path("wheels"))
    parser.add_argument("--site", type=Path, default=Path(".gpu-site"))
    parser.add_argument("--only", choices=("tests", "bench", "train"), help="one part alone")
    parser.add_argument("--part-timeout-s", type=float, default=420.0)
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("make gpu: this python has no torch; set GPU_PYTHON to one that has. Nothing was run.")
        return 0
    if not torch.cuda.is_available():
        print(
            "make gpu: no CUDA GPU here, so nothing was run.\n"
            "On a GPU machine this runs the gpu tests, the kernel benchmarks and a short training."
        )
        return 0
    wheels = sorted(options.wheels.glob("*.whl"))
    if wheels:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--upgrade",
            "--target",
            str(options.site),
        ]
        subprocess.run([*pip, *map(str, wheels)], check=True)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe(torch)
    (options.out / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    print(json.dumps(machine, indent=2), flush=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    parts = {
        "tests": [*pytest, f"--junitxml={options.out / 'tests.xml'}"],
        "bench": [sys.executable, "-m", "chatmill.kernels.bench", "all", "--json", str(options.out / "kernels.json")],
        "train": [sys.executable, str(ROOT / "tests" / "gpu_training.py"), "--out", str(options.out)],
    }
    outcome = {}
    for name, command in parts.items():
        if options.only not in (None, name):
            continue
        print(f"\n== {name}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run(command, check=False, timeout=options.part_timeout_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
        outcome[name] = {"exit_code": code, "seconds": round(time.monotonic() - began, 1)}
        (options.out / "outcome.json").write_text(json.dumps(outcome, indent=2) + "\n")
    print(json.dumps(outcome, indent=2))
    return int(any(part["exit_code"] for part in outcome.values()))


def describe(torch) -> dict[str, object]:
    """Machine and versions, for the head of every result."""
    versions = {}
    for name in ("torch", "triton", "numpy", "accelerate", "deepspeed", "flash-attn", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu.name,
        "gpus": torch.cuda.device_count(),
        "memory_bytes": gpu.total_memory,
        "capability": f"{gpu.major}.{gpu.minor}",
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
