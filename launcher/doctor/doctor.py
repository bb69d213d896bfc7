"""`chatmill doctor`: what this machine can do, what is missing or does not fit together, and what to do about each finding.

    chatmill doctor [--folder /scratch/me] [--json] [--quick]
    chatmill doctor --parity [--full]          same losses and gradients from every engine (launcher/doctor/parity.py)

Marks: ok, note (nothing to do), warn (something will be slower or missing), bad (training will fail: exit code 1).
Every check is a function from facts to findings; heavy imports run in a process of their own, so a broken extension is
reported and does not end the doctor.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from chatmill.shell import in_this_shell

from ..programs import output_of

Mark = Literal["ok", "note", "warn", "bad"]

NEEDED = ("torch", "numpy", "webdataset", "accelerate", "safetensors", "tokenizers", "pydantic", "pyyaml", "jinja2", "xxhash")
# module, package, what is missed without it
OPTIONAL = (
    ("deepspeed", "deepspeed", "parallel.strategy=zero1, zero2, zero3"),
    ("flash_attn", "flash-attn", "kernels.attention=flash2 (our own Triton kernels are used instead)"),
    (
        "flash_attn_interface",
        "flash-attn-3",
        "kernels.attention=flash3, for Hopper GPUs (our own Triton kernels are used instead)",
    ),
    (
        "flash_attn.cute",
        "flash-attn-4",
        "kernels.attention=flash4, for Hopper and Blackwell GPUs (our own Triton kernels are used)",
    ),
    ("optuna", "optuna", "chatmill sweep"),
    ("tensorboard", "tensorboard", "curves in TensorBoard (logging.trackers)"),
)
SLOW_DISK_MB_PER_S = 100.0


@dataclass(frozen=True)
class Finding:
    """The result of one check. `action`: what to do, empty if nothing is wrong."""

    mark: Mark
    what: str
    detail: str
    action: str = ""


def doctor(folder: str = ".", *, as_json: bool = False, quick: bool = False) -> int:
    """Run all checks and print them; returns 1 if training would fail here."""
    checks: list[Callable[[], list[Finding]]] = [check_python, check_machine, check_gpus, check_torch, check_extensions]
    checks += [check_network, check_slurm]
    if not quick:
        checks += [check_kernels, lambda: check_disk(Path(folder))]
    found: list[Finding] = []
    for check in checks:
        for finding in check():
            found.append(finding)
            if not as_json:
                print(in_this_shell(show(finding)), flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        bad, warn = (sum(f.mark == mark for f in found) for mark in ("bad", "warn"))
        print(f"\n{len(found)} findings: {bad} bad, {warn} to look at" + ("" if bad else "; training works here"))
    return int(any(finding.mark == "bad" for finding in found))


def show(finding: Finding) -> str:
    """One finding for people."""
    text = f"{finding.mark:<5}{finding.what:<14}{finding.detail}"
    return text + (f"\n{'':<19}-> {finding.action}" if finding.action else "")


def check_python() -> list[Finding]:
    """Interpreter and the packages that training needs."""
    python = Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")
    versions = {name: installed(name) for name in NEEDED}
    if missing := [name for name, version in versions.items() if version is None]:
        return [python, Finding("bad", "packages", f"missing: {', '.join(missing)}", "make venv, or pip install chatmill")]
    return [python, Finding("ok", "packages", "  ".join(f"{name} {version}" for name, version in versions.items()))]


def check_machine() -> list[Finding]:
    """Cores, memory, shared memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{platform.node()}: {cores} cores, {memory / 2**30:.0f} GiB memory, {platform.platform()}"
    found = [Finding("ok", "machine", detail)]
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < 1 << 30:
        action = "NCCL needs shared memory: start the container with --shm-size=8g or --ipc=host"
        found.append(Finding("warn", "shared memory", f"/dev/shm has {free / 2**20:.0f} MiB free", action))
    return found


def check_gpus() -> list[Finding]:
    """What the driver shows."""
    fields = "name,memory.total,driver_version,compute_cap,ecc.errors.uncorrected.volatile.total"
    text = output_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
    if text is None:
        detail = "none found (nvidia-smi does not answer): training runs on the CPU, kernels are interpreted"
        return [Finding("note", "gpu", detail)]
    return gpu_findings(text)


def count_gpus() -> int:
    """CUDA devices, asked of the driver's own tool, so that this process needs no torch."""
    return sum(line.startswith("GPU ") for line in (output_of(["nvidia-smi", "-L"]) or "").splitlines())


def gpu_findings(text: str) -> list[Finding]:
    """From nvidia-smi's csv: name, MiB, driver, compute capability, memory errors."""
    found = []
    for i, line in enumerate(text.strip().splitlines()):
        name, memory, driver, capability, errors = (part.strip() for part in line.split(","))
        detail = f"{i}: {name}, {float(memory) / 1024:.0f} GiB, driver {driver}, compute {capability}"
        if errors not in ("0", "[N/A]"):
            action = "nvidia-smi -q -d ECC; have the node drained, results may be wrong"
            found.append(Finding("bad", "gpu", f"{detail}, {errors} uncorrected memory errors", action))
        elif float(capability) < 8.0:
            found.append(Finding("warn", "gpu", detail, "no bf16 before compute 8.0: set train.precision=fp32"))
        else:
            found.append(Finding("ok", "gpu", detail))
    return found


TORCH_FACTS = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available(), "nccl": None}
if facts["available"]:
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    facts["capability"] = ["%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    facts["architectures"] = torch.cuda.get_arch_list()
print(json.dumps(facts))
"""


def check_torch() -> list[Finding]:
    """torch, its CUDA, the triton it was built with."""
    done = subprocess.run([sys.executable, "-c", TORCH_FACTS], capture_output=True, text=True, check=False)
    if done.returncode:
        return [Finding("bad", "torch", last_line(done.stderr), "make venv, or install torch from https://pytorch.org")]
    facts = json.loads(done.stdout.splitlines()[-1])
    has_gpu = count_gpus() > 0
    found = [torch_finding(facts, has_gpu)]
    requirements = metadata.requires("torch") or []
    return [*found, *triton_findings(installed("triton"), requirements)]


def torch_finding(facts: dict[str, object], has_gpu: bool) -> Finding:
    """Whether torch can use the GPUs that the driver shows."""
    if facts["available"]:
        return Finding("ok", "torch", f"{facts['version']}, CUDA {facts['cuda']}, NCCL {facts['nccl']}")
    if has_gpu and facts["cuda"] is None:
        detail = f"{facts['version']} is a CPU build, but there are GPUs"
        return Finding("bad", "torch", detail, "install a CUDA build of torch")
    if has_gpu:
        action = "the driver is too old for this CUDA, or CUDA_VISIBLE_DEVICES hides the GPUs: compare with nvidia-smi"
        return Finding("bad", "torch", f"{facts['version']} (CUDA {facts['cuda']}) cannot use the GPUs", action)
    return Finding("ok", "torch", f"{facts['version']}, CPU")


def triton_findings(version: str | None, torch_requires: Sequence[str]) -> list[Finding]:
    """Whether triton is the one that torch pins."""
    if version is None:
        return [Finding("warn", "triton", "not installed", "pip install triton: without it only the torch kernels run")]
    pinned = [r.split(";")[0].strip().removeprefix("triton==") for r in torch_requires if r.startswith("triton==")]
    if pinned and version.split("+")[0] != pinned[0]:
        detail = f"{version}, but this torch was built with {pinned[0]}"
        return [Finding("warn", "triton", detail, f"pip install triton=={pinned[0]} (torch.compile may fail otherwise)")]
    return [Finding("ok", "triton", version + ("" if pinned else " (this torch pins none)"))]


def check_extensions() -> list[Finding]:
    """Optional packages: absent is a note, installed but not importable is bad (training passes a broken flash-attn over)."""
    found = []
    for module, package, missed in OPTIONAL:
        version = installed(package)
        if version is None:
            found.append(Finding("note", package, f"not installed: no {missed}"))
            continue
        done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
        if done.returncode:
            action = f"built for another torch? pip install --no-build-isolation --force-reinstall --no-deps {package}"
            mark: Mark = "warn" if module.startswith("flash_attn") else "bad"
            found.append(Finding(mark, package, f"{version} does not import: {last_line(done.stderr)}", action))
        else:
            found.append(Finding("ok", package, version))
    return found


def check_network() -> list[Finding]:
    """Whether this host's name resolves, which the rendezvous of several nodes needs."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        action = f"add {name} to /etc/hosts or DNS; one-node runs are not affected"
        return [Finding("warn", "network", f"this host's own name {name} does not resolve", action)]
    interface = os.environ.get("NCCL_SOCKET_IFNAME")
    return [Finding("ok", "network", f"{name} is {address}" + (f", NCCL_SOCKET_IFNAME={interface}" if interface else ""))]


def check_slurm() -> list[Finding]:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return [Finding("note", "slurm", "no sbatch here: chatmill launch --on slurm works from a cluster's login node")]
    text = output_of(["sinfo", "-h", "-o", "%P|%a|%D|%G|%l"], timeout_s=20)
    if text is None:
        action = "is this a login node? sinfo fails; check SLURM_CONF, munge and slurmctld"
        return [Finding("warn", "slurm", "sbatch is here, but the controller does not answer", action)]
    found = []
    for line in text.splitlines():
        partition, state, nodes, gres, limit = line.split("|")
        found.append(Finding("ok", "slurm", f"partition {partition} {state}: {nodes} nodes, {gres}, time limit {limit}"))
    return found


KERNEL_CHECK = """
import torch
from chatmill.kernels.layer.rms_norm import rms_norm
from chatmill.kernels.layer.swiglu import swiglu
from chatmill.kernels.cross_entropy.interface import linear_cross_entropy
from chatmill.kernels.attention.interface import attention
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
x, w = torch.randn(6, 64, device=device), torch.randn(64, device=device)
head, targets = torch.randn(50, 64, device=device), torch.randint(0, 50, (6,), device=device)
q, k, v = (torch.randn(6, 2, 16, device=device) for _ in range(3))
cases = {
    "rms_norm": lambda impl: rms_norm(x, w, impl=impl),
    "swiglu": lambda impl: swiglu(x, x.flip(0), impl=impl),
    "linear_cross_entropy": lambda impl: linear_cross_entropy(x, head, targets, impl=impl),
    "attention": lambda impl: attention(q, k, v, impl=impl),
}
for name, call in cases.items():
    try:
        worst = float((call("triton") - call("reference")).abs().max())
        print(f"{name}|{worst:.3g}")
    except Exception as error:
        print(f"{name}|{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
"""


def check_kernels() -> list[Finding]:
    """Each Triton kernel against its reference: compiled on a GPU, in Triton's interpreter without one."""
    has_gpu = count_gpus() > 0
    variables = dict(os.environ) | ({} if has_gpu else {"TRITON_INTERPRET": "1"})
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", KERNEL_CHECK], env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        return [Finding("bad", "kernels", last_line(done.stderr), "chatmill bench kernels shows the whole error")]
    return kernel_findings(done.stdout, "compiled" if has_gpu else "interpreted", time.monotonic() - began)


def kernel_findings(text: str, how: str, seconds: float, tolerance: float = 2e-2) -> list[Finding]:
    """From lines `name|largest difference` or `name|error`."""
    found, good = [], []
    for line in text.splitlines():
        name, _, value = line.partition("|")
        try:
            worst = float(value)
        except ValueError:
            found.append(
                Finding("bad", "kernels", f"{name}: {value}", "kernels.* = reference or torch in the recipe avoids it")
            )
            continue
        if worst <= tolerance:
            good.append(f"{name} {worst:.1g}")
        else:
            action = "do not train with it; set the kernel to reference and report the figures"
            found.append(Finding("bad", "kernels", f"{name} differs from its reference by {worst:.3g}", action))
    if good:
        found.append(Finding("ok", "kernels", f"{how} in {seconds:.0f} s, largest difference: {', '.join(good)}"))
    return found


def check_disk(folder: Path, megabytes: int = 256) -> list[Finding]:
    """Sequential write (to the disk, not the cache) where runs are kept, and the space there."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".chatmill-doctor-{os.getpid()}"
    block = os.urandom(1 << 20)
    try:
        began = time.monotonic()
        with probe.open("wb") as handle:
            for _ in range(megabytes):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
        rate = megabytes * 1.048576 / (time.monotonic() - began)
    except OSError as error:
        return [Finding("bad", "disk", f"{folder.absolute()}: {error.strerror}", "choose another run.dir")]
    finally:
        probe.unlink(missing_ok=True)
    usage = shutil.disk_usage(folder)
    detail = f"{folder.absolute()}: writes {rate:.0f} MB/s, {usage.free / 1e9:.0f} of {usage.total / 1e9:.0f} GB free"
    if usage.free < 5e9:
        return [Finding("warn", "disk", detail, "make room: a checkpoint of 1 B parameters with its optimizer takes 12 GB")]
    if rate < SLOW_DISK_MB_PER_S:
        return [Finding("warn", "disk", detail, "slow: saving will hold up training; use a faster run.dir or save less often")]
    return [Finding("ok", "disk", detail)]


def installed(package: str) -> str | None:
    """Version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def last_line(text: str) -> str:
    """The last line that says something: a traceback's error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
