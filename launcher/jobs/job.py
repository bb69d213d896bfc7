"""What to start and where: one typed description that every launcher renders.

    spec = JobSpec(name="chat-1b", arguments=("tiny", "optimizer.lr=1e-3"), nodes=4, gpus_per_node=8, time="24:00:00")
    render_sbatch(spec)  torchrun_command(spec)  accelerate_command(spec, ...)

Every word that reaches a shell or a #SBATCH line is either on an allow-list here or quoted by the renderer: a newline in a job
name would otherwise run as a command. Secrets have no field: they are passed by the name of an environment variable.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from chatmill.config import Section

SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|AUTH(?!OR)|API_?KEY|ACCESS_?KEY|(^|_)(KEY|PAT|SAS)$|(?<!^)(?<!^OLD)PWD",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(  # a login in an address, a signed address, and tokens whose form tells
    r"://[^/@\s]+@|[?&](X-(Amz|Goog|Ms)-(Signature|Credential|Security-Token)|sig|signature|access_token|token|api_?key|key)=[^&\s]+"
    r"|\b(hf|ghp|gho|ghs|glpat|github_pat|sk|xox[abprs])[-_][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b|BEGIN [A-Z ]*PRIVATE KEY",
    re.IGNORECASE,
)
ASSIGNMENT = re.compile(r"(?:^|[\s;&|])([A-Za-z_][A-Za-z0-9_]*)=([^\s;&|]+)")
# sbatch options that decide how many processes start or how a job ends, and the field for each: the launcher must know it
OWN_FIELDS = {
    "--nodes": "nodes",
    "--gpus-per-node": "gpus_per_node",
    "--gpus": "gpus_per_node",
    "--gpus-per-task": "gpus_per_node",
    "--gpus-per-socket": "gpus_per_node",
    "--tres-per-task": "gpus_per_node",
    "--gres": "gpus_per_node",
    "--ntasks": "processes_per_node",
    "--ntasks-per-node": "processes_per_node",
    "--ntasks-per-gpu": "processes_per_node",
    "--array": "chain",
    "--signal": "signal_lead_s",
}


def _allowed(pattern: str, what: str) -> AfterValidator:
    expression = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not expression.fullmatch(text):
            raise ValueError(f"{what}; allowed: {pattern}")
        return text

    return AfterValidator(check)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("line breaks and control characters are refused")
    return text


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable's name or value looks like a password, a key, a token, or an address with a login or a signature."""
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def shows_secret(line: str) -> bool:
    """Whether a shell line or an override holds a secret in plain text; `export KEY=$OTHER` and `KEY=$(command)` do not."""
    plain = (name for name, value in ASSIGNMENT.findall(line) if not value.lstrip("\"'").startswith("$"))
    return bool(SECRET_VALUE.search(line)) or any(SECRET_NAME.search(name) for name in plain)


JobName = Annotated[str, _allowed(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "a name of letters, digits, dot, dash and underscore")]
Word = Annotated[str, _allowed(r"[A-Za-z0-9_][A-Za-z0-9_.,+-]*", "a plain word")]
Constraint = Annotated[str, _allowed(r"[A-Za-z0-9_\[(][A-Za-z0-9_.,&|*\[\]()@:-]*", "a Slurm feature expression")]
NodeList = Annotated[str, _allowed(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*", "a Slurm node list such as gpu[01-04,07]")]
TimeLimit = Annotated[
    str, _allowed(r"\d+(:\d{2}){0,2}|\d+-\d{1,2}(:\d{2}){0,2}", "a Slurm time such as 30, 12:00:00 or 2-00:00:00")
]
Memory = Annotated[str, _allowed(r"\d+[KMGT]?", "a Slurm memory size such as 64G")]
Module = Annotated[str, _allowed(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", "an environment module such as cuda/12.8")]
Variable = Annotated[str, _allowed(r"[A-Za-z_][A-Za-z0-9_]*", "an environment variable's name")]
Option = Annotated[
    str, _allowed(r"--[a-z][a-z0-9-]*(=[A-Za-z0-9_.,:/@%+\[\]-]+)?", "one sbatch option such as --reservation=winter")
]
Image = Annotated[str, _allowed(r"[A-Za-z0-9_./][A-Za-z0-9_./:@#+-]*", "a container image's path or address")]
Mount = Annotated[str, _allowed(r"/[A-Za-z0-9_./+-]*(:/[A-Za-z0-9_./+-]*(:(ro|rw))?)?", "a mount such as /data:/data:ro")]
Text = Annotated[str, AfterValidator(_printable)]


class Container(Section):
    """Run each node's program inside an image; `mounts` are added to the run and code folders (mount the data too)."""

    kind: Literal["apptainer", "pyxis"]
    image: Image
    mounts: tuple[Mount, ...] = ()


class JobSpec(Section):
    """One training job. Slurm fields left None are left to the cluster's defaults.

    arguments: RECIPE and its overrides; empty: taken from sbatch's command line (slurm/train.sh).
    processes_per_node: None: one per GPU, or one on a node without GPUs.
    signal_lead_s: seconds before the time limit at which the run is asked to save (Slurm fires up to 60 s earlier).
    max_no_progress: attempts in a row that may fail without a newer checkpoint.
    chain: number of consecutive jobs (a job array that runs one element at a time).
    environment: plain values; `secrets`: names that must be set where the job is submitted, whose values are never written.
    setup: shell lines, run unchanged on the batch node before anything else.
    """

    name: JobName = "chatmill"
    arguments: tuple[Text, ...] = ()
    run_dir: Text | None = None
    code: Text | None = None
    python: Text | None = None
    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=0, ge=0)
    gpu_type: Word | None = None
    processes_per_node: int | None = Field(default=None, gt=0)
    cpus_per_task: int | None = Field(default=None, gt=0)
    memory: Memory | None = None
    time: TimeLimit | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Constraint | None = None
    exclude: NodeList | None = None
    options: tuple[Option, ...] = ()
    signal_lead_s: int = Field(default=180, ge=10, le=65535)
    max_no_progress: int = Field(default=3, gt=0)
    chain: int = Field(default=1, gt=0, le=1000)
    modules: tuple[Module, ...] = ()
    environment: dict[Variable, Text] = Field(default_factory=dict)
    secrets: tuple[Variable, ...] = ()
    setup: tuple[Text, ...] = ()
    container: Container | None = None

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Processes of the whole run."""
        return self.nodes * self.processes

    @model_validator(mode="after")
    def _check(self) -> JobSpec:
        hidden = [f"environment: {name}" for name, value in self.environment.items() if looks_secret(name, value)]
        hidden += [f"line {n} of setup" for n, line in enumerate(self.setup, 1) if shows_secret(line)]
        hidden += [f"argument {n}" for n, word in enumerate(self.arguments, 1) if shows_secret(word)]
        if hidden:
            raise ValueError(
                f"{'; '.join(hidden)} looks like a secret, and job scripts are kept in plain text. "
                f"Export it in your shell and list its name under secrets"
            )
        for option in self.options:
            name, _, value = option.partition("=")
            if name in OWN_FIELDS and not (name == "--gres" and not value.startswith("gpu")):
                raise ValueError(
                    f"options: {option} would start other processes than the launcher counts: set {OWN_FIELDS[name]}"
                )
        if self.processes_per_node and 0 < self.gpus_per_node < self.processes_per_node:
            raise ValueError(
                f"processes_per_node: {self.processes_per_node}, but gpus_per_node is {self.gpus_per_node}: "
                "at most one process per GPU"
            )
        return self
