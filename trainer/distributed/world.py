"""Who is training: the process group, the device, and checks that they are what the recipe asks for.

Works under torchrun, `accelerate launch` and plain python. Three silent failures are known and each is caught here:
- `accelerate launch --num_processes N` without a GPU starts ONE process: it is replaced by a torchrun of N.
- several independent runs of world size 1 write the same folder (a launcher's variables were lost): refused.
- accelerate was told (by flag or config file) something that the recipe does not say: refused (accelerate.py).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatmill.config import ConfigError

from ..config import Recipe
from ..parallel_config import grid_of
from .accelerate import check_accelerate, given_settings, option_of, read_config


@dataclass(frozen=True)
class World:
    """This process among all processes of the run. context: so many neighbouring ranks divide the same batches."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str
    context: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def batches(self) -> int:
        """Batches that are trained at the same time: groups of `context` ranks."""
        return self.world_size // self.context

    @property
    def batch_rank(self) -> int:
        """Which of these batches this rank works on."""
        return self.rank // self.context

    @property
    def context_rank(self) -> int:
        """Its place among the ranks that divide this batch."""
        return self.rank % self.context

    def place(self) -> dict[str, Any]:
        """The keywords of a PackedStream that give this rank its part."""
        place = {"rank": self.batch_rank, "world_size": self.batches}
        return place | {"context": self.context, "context_rank": self.context_rank}

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks in float64; host to host."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank (for small values, outside the step)."""
        if self.world_size == 1:
            return [value]
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value)
        return out

    def any(self, flag: bool) -> bool:
        """Whether any rank raised the flag; every rank gets the same answer."""
        return self.sum([float(flag)])[0] > 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            self.sum([0.0])


def requested_processes(environment: Mapping[str, str], parent_command: list[str], default_config: Path) -> int | None:
    """How many processes accelerate's one-process launcher was asked for; None where it was not used, or asked for one.

    That launcher sets MASTER_ADDR only when more than one process was requested, and never RANK.
    """
    if "RANK" in environment or "ACCELERATE_MIXED_PRECISION" not in environment or "MASTER_ADDR" not in environment:
        return None
    asked = option_of(parent_command, "num_processes")
    try:
        return int(asked or read_config(parent_command, default_config)["num_processes"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            "accelerate started one process although more were requested, and their number cannot be told.\n"
            "On a machine without a GPU start with: torchrun --nproc-per-node N -m chatmill.trainer.train RECIPE"
        ) from None


def relaunch_if_alone(arguments: list[str]) -> None:
    """If `accelerate launch` started one process of several, replace this process by a torchrun of that many."""
    if "RANK" in os.environ:
        return
    wanted = requested_processes(os.environ, _parent_command(), _default_config())
    if wanted is None or wanted < 2:
        return
    print(
        f"accelerate launch started 1 process for --num_processes {wanted}: continuing as torchrun --nproc-per-node {wanted}."
    )
    sys.stdout.flush()
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    asked = asked_threads(os.environ, _launcher_environment())  # accelerate has set it to 1
    os.environ.pop("OMP_NUM_THREADS", None)
    if asked is not None:
        os.environ["OMP_NUM_THREADS"] = str(asked)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={wanted}"]
    os.execv(sys.executable, [*command, "-m", "chatmill.trainer.train", *arguments])


def check_launch(recipe: Recipe, environment: Mapping[str, str], given: frozenset[str] = frozenset()) -> None:
    """Refuse a launch that disagrees with the recipe. Raises ConfigError with the command to use instead.

    given: what accelerate's command line and config file name (given_settings).
    """
    strategy = recipe.parallel.strategy
    launched = "RANK" in environment
    world_size = int(environment.get("WORLD_SIZE", "1"))
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"parallel.strategy=single, but {world_size} processes were started:\n"
            "each would train alone and write the same folder.\n"
            "Set parallel.strategy=ddp (or fsdp2), or start one process."
        )
    if strategy != "single" and not launched:
        raise ConfigError(
            f"parallel.strategy={strategy}, but this process was started alone (no RANK in the environment).\n"
            "Start with: torchrun --nproc-per-node N -m chatmill.trainer.train RECIPE, or set parallel.strategy=single."
        )
    if not launched and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError(
            f"srun started {environment['SLURM_STEP_NUM_TASKS']} copies that know nothing of each other (no RANK).\n"
            "Use slurm/train.sh, or `chatmill launch RECIPE --on slurm`: srun starts one torchrun per node."
        )
    grid_of(recipe.parallel, world_size)
    check_accelerate(recipe, environment, given)


def start_world(recipe: Recipe, timeout_s: float = 1800.0) -> World:
    """Join the process group, choose the device and check that all ranks run the same recipe in one world."""
    check_launch(recipe, os.environ, given_settings(_parent_command(), _default_config()))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    use_cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: "
            f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPU(s).\n"
            "Start at most one process per GPU."
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
        asked = recipe.train.cpu_threads or asked_threads(os.environ, _launcher_environment())
        torch.set_num_threads(asked or max(1, cores // local_world_size))
    backend = "none"
    if "RANK" in os.environ:
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        if interface := gloo_interface(os.environ, [name for _, name in socket.if_nameindex()]):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), device_id=device if use_cuda else None)
        _prove(recipe, rank, world_size)
    return World(rank, world_size, local_rank, local_world_size, device, backend, recipe.parallel.context)


def asked_threads(environment: Mapping[str, str], launcher: Mapping[str, str] | None) -> int | None:
    """OMP_NUM_THREADS as the user set it, or None.

    launcher: the environment of torchrun or accelerate, where one started this process: they set the variable to 1 themselves.
    """
    word = (environment if launcher is None else launcher).get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(word) if word.isdecimal() and int(word) > 0 else None


def _launcher_environment() -> Mapping[str, str] | None:
    import psutil

    words = _parent_command()
    if not any("torchrun" in word or "torch.distributed" in word or "accelerate" in word for word in words[:4]):
        return None
    try:
        return psutil.Process(os.getppid()).environ()
    except (psutil.Error, OSError):
        return {}


def gloo_interface(environment: Mapping[str, str], present: Sequence[str]) -> str | None:
    """Network interface for gloo, which carries the flags of every step, where only NCCL was given one; None: leave it unset.

    NCCL takes prefixes of names, `=name` for a whole name, several separated by commas, and `^` for those to avoid. Gloo takes
    whole names only. Without one it uses the address of the host's name, which on many machines is a loopback.
    """
    asked = environment.get("NCCL_SOCKET_IFNAME", "")
    if "GLOO_SOCKET_IFNAME" in environment or not asked or asked.startswith("^"):
        return None
    words, whole = asked.removeprefix("=").split(","), asked.startswith("=")
    fitting = [name for word in words for name in sorted(present) if name == word or (not whole and name.startswith(word))]
    return next(iter(fitting), None)


def _prove(recipe: Recipe, rank: int, world_size: int) -> None:
    facts: list[tuple[str, int, str]] = [("", 0, "")] * world_size
    dist.all_gather_object(facts, (socket.gethostname(), os.getpid(), recipe.model_dump_json()))
    if dist.get_world_size() != world_size or len({fact[:2] for fact in facts}) != world_size:
        raise ConfigError(f"expected {world_size} distinct processes, found {sorted({fact[:2] for fact in facts})}")
    strangers = [i for i, fact in enumerate(facts) if fact[2] != facts[0][2]]
    if strangers:
        raise ConfigError(
            f"ranks {strangers} were started with a different recipe than rank 0: check the arguments on every node"
        )


def end_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _default_config() -> Path:
    """Where `accelerate config` stores its answers."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return home / "accelerate" / "default_config.yaml"


def _parent_command() -> list[str]:
    import psutil  # a dependency of accelerate

    try:
        return list(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return []
