"""A real Slurm on this machine's loopback, started in about a second: munged, slurmctld and several slurmd as children.

    with SlurmCluster(folder, nodes=4) as cluster:
        job = cluster.sbatch("--nodes=2", "slurm/train.sh", "tiny")
        cluster.wait(job)

Needs root and Debian's slurm-wlm and munge (tests/launcher/install_slurm.sh), but no systemd; touches nothing outside `folder`.
Each node n1, n2 ... has 8 CPUs and 4 GPUs of type h100. They are char devices like /dev/null: with plain files Slurm would set
no CUDA_VISIBLE_DEVICES. Partitions: `gpu` (the default) and `urgent`, whose jobs preempt those of `gpu` by requeueing them.

With isolated=True every node has a network namespace, a host name and an address (10.77.0.1x) of its own behind one bridge, and
cut(node) takes its cable out.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

CONF = """\
ClusterName=ci
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait={kill_wait_s}
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout_s}
SlurmdParameters=config_overrides
GresTypes=gpu
MailProg=/bin/true
PropagateResourceLimits=NONE
"""


def missing_network() -> str:
    """Why nodes cannot have networks of their own here, in words; empty where they can."""
    absent = [name for name in ("ip", "nsenter", "unshare") if _which(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: install Debian's iproute2 and util-linux"
    made = subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False)
    return "" if made.returncode == 0 else "this machine does not allow network namespaces"


def missing_programs() -> str:
    """Why a cluster cannot be started here, in words; empty where it can."""
    absent = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if _which(name) is None]
    if absent:
        return f"no {', '.join(absent)} on this machine: install Debian's slurm-wlm and munge (tests/launcher/install_slurm.sh)"
    return "" if os.geteuid() == 0 else "starting slurmd needs root"


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def free_base_port(count: int) -> int:
    """First of `count` neighbouring ports that are all free."""
    for base in range(17000, 19900, count):
        sockets = []
        try:
            for port in range(base, base + count):
                probe = socket.socket()
                sockets.append(probe)
                probe.bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
        finally:
            for probe in sockets:
                probe.close()
    raise OSError("no free range of ports for a Slurm")


class Network:
    """Namespaces PREFIXctl and PREFIXn1, n2 ... on a bridge inside the first: the machine's own network is not touched."""

    def __init__(self, prefix: str, folder: Path, nodes: int) -> None:
        self.prefix, self.folder, self.nodes = prefix, folder, nodes
        self.hosts = ["ctl", *(f"n{i + 1}" for i in range(nodes))]

    def build(self) -> None:
        """Make namespaces, bridge and cables."""
        addresses = ["127.0.0.1 localhost", "10.77.0.1 ctl", *(f"10.77.0.{10 + i} n{i}" for i in range(1, self.nodes + 1))]
        (self.folder / "hosts").write_text("\n".join(addresses) + "\n")
        for host in self.hosts:
            _ip("netns", "add", self.prefix + host)
            _ip("-n", self.prefix + host, "link", "set", "lo", "up")
        control = self.prefix + "ctl"
        _ip("-n", control, "link", "add", "br0", "type", "bridge")
        _ip("-n", control, "addr", "add", "10.77.0.1/24", "dev", "br0")
        _ip("-n", control, "link", "set", "br0", "up")
        for i in range(1, self.nodes + 1):
            node = f"{self.prefix}n{i}"
            _ip("-n", control, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", node)
            _ip("-n", control, "link", "set", f"v{i}", "master", "br0", "up")
            _ip("-n", node, "addr", "add", f"10.77.0.{10 + i}/24", "dev", "eth0")
            _ip("-n", node, "link", "set", "eth0", "up")

    def inside(self, host: str, words: list[str]) -> list[str]:
        """Words that run a command on a host, under its name. (`ip netns exec` would remount /sys, and slurmd dies of it.)"""
        prepare = f'hostname {host}; mount --bind {self.folder}/hosts /etc/hosts; exec "$@"'
        return ["nsenter", f"--net=/run/netns/{self.prefix}{host}", "unshare", "-um", "bash", "-c", prepare, "bash", *words]

    def cut(self, i: int) -> None:
        """The bridge's end of node i's cable goes down."""
        _ip("-n", self.prefix + "ctl", "link", "set", f"v{i}", "down")

    def remove(self) -> None:
        """End what still runs in the namespaces (jobs on a node that was cut off), and the namespaces."""
        for host in self.hosts:
            pids = subprocess.run(["ip", "netns", "pids", self.prefix + host], capture_output=True, text=True, check=False)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.prefix + host], capture_output=True, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class SlurmCluster:
    """Context manager around the daemons. `environment` is what Slurm's commands need to find them."""

    def __init__(self, folder: Path, nodes: int = 4, gpus: int = 4, kill_wait_s: int = 20, isolated: bool = False) -> None:
        self.folder, self.nodes, self.gpus, self.kill_wait_s = folder, nodes, gpus, kill_wait_s
        self.network = Network(f"cm{os.getpid()}", folder, nodes) if isolated else None
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TIME_FORMAT": "%s"}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.start_seconds = 0.0

    def __enter__(self) -> Self:
        began = time.monotonic()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.network:
                self.network.build()
            self._write_files()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - began
        return self

    def _write_files(self) -> None:
        for name in ("state", "run", "log", *(f"spool/n{i + 1}" for i in range(self.nodes))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        port = free_base_port(self.nodes + 1)
        controller, timeout_s = ("ctl(10.77.0.1)", 10) if self.network else ("localhost(127.0.0.1)", 30)
        values = {"controller": controller, "slurmd_timeout_s": timeout_s, "kill_wait_s": self.kill_wait_s}
        conf, gres = CONF.format(port=port, folder=self.folder, **values), ""
        for i in range(1, self.nodes + 1):
            for g in range(self.gpus):
                os.mknod(self.folder / f"gpu{i}-{g}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            conf += (
                f"NodeName=n{i} {self._address(i)} Port={port + i} CPUs=8 Boards=1 SocketsPerBoard=1 "
                f"CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:h100:{self.gpus} State=UNKNOWN\n"
            )
            gres += f"NodeName=n{i} Name=gpu Type=h100 Count={self.gpus} File={self.folder}/gpu{i}-[0-{self.gpus - 1}]\n"
        conf += f"PartitionName=gpu Nodes=n[1-{self.nodes}] Default=YES MaxTime=INFINITE PriorityTier=1 State=UP\n"
        conf += f"PartitionName=urgent Nodes=n[1-{self.nodes}] MaxTime=INFINITE PriorityTier=9 State=UP\n"
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(gres)

    def _address(self, i: int) -> str:
        return f"NodeAddr=10.77.0.{10 + i}" if self.network else "NodeHostname=localhost NodeAddr=127.0.0.1"

    def cut(self, node: str) -> None:
        """Take the network cable of an isolated node out."""
        assert self.network is not None
        self.network.cut(int(node.removeprefix("n")))

    def _start_daemons(self) -> None:
        run = self.folder / "run"
        munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--socket={run}/munge.sock"]
        munged += [f"--key-file={self.folder}/munge.key", f"--pid-file={run}/munged.pid"]
        self._spawn([*munged, f"--seed-file={run}/munge.seed"], "munged")
        self._until("munged", lambda: (run / "munge.sock").exists())
        self._spawn(["slurmctld", "-D", "-c"], "slurmctld", "ctl")
        for i in range(1, self.nodes + 1):
            self._spawn(["slurmd", "-D", "-N", f"n{i}"], f"slurmd.n{i}", f"n{i}")
        self._until(
            "all nodes idle", lambda: self.call("sinfo", "-h", "-t", "idle", "-o", "%D", check=False) == str(self.nodes)
        )

    def _spawn(self, command: list[str], name: str, host: str = "") -> None:
        program = _which(command[0])
        assert program is not None
        words = [program, *command[1:]]
        if self.network and host:
            words = self.network.inside(host, words)
        with (self.folder / "log" / name).open("wb") as log:
            self._daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=subprocess.STDOUT))

    def _until(self, what: str, done: object, timeout_s: float = 600.0) -> None:
        assert callable(done)
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                logs = "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in sorted((self.folder / "log").iterdir()))
                raise TimeoutError(f"{what}: not within {timeout_s} s\n{logs}")
            time.sleep(0.05)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End all jobs and daemons."""
        if len(self._daemons) > 1:
            self.call("scancel", "--user=root", check=False)
            deadline = time.monotonic() + 10
            while (
                self.call("squeue", "-h", "-t", "running,completing", "-o", "%i", check=False) and time.monotonic() < deadline
            ):
                self.call("scancel", "--signal=KILL", "--full", "--user=root", check=False)
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
        if self.network:
            self.network.remove()

    def call(self, *command: str, cwd: Path | None = None, extra: Mapping[str, str] | None = None, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        words = self.network.inside("ctl", list(command)) if self.network else list(command)
        done = subprocess.run(
            words, env=self.environment | dict(extra or {}), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()

    def sbatch(self, *words: str, cwd: Path, extra: Mapping[str, str] | None = None) -> str:
        """Submit; returns the job id."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, extra=extra).split(";")[0]

    def state(self, job: str) -> str:
        """Slurm's word for the job's state, such as RUNNING."""
        shown = self.call("scontrol", "show", "job", "-o", job)
        return shown.partition("JobState=")[2].split()[0]

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        return self.call("scontrol", "show", "job", "-o", job).partition(f" {name}=")[2].split(" ")[0]

    def wait_until(self, job: str, states: tuple[str, ...], timeout_s: float = 600.0) -> str:
        """Poll until the job is in one of the states (sbatch --wait backs off for most of a minute)."""
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {timeout_s} s, expected {' or '.join(states)}")
            time.sleep(0.1)
        return state

    def wait(self, job: str, timeout_s: float = 600.0) -> str:
        """Until the job is over for good; returns its state."""
        return self.wait_until(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"), timeout_s)
