"""What a JobSpec becomes, word for word: golden files, and names that try to be commands.

To rewrite the golden files after a wanted change:  CHATMILL_WRITE_GOLDEN=1 pytest tests/launcher/jobs/test_rendering.py
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatmill.config import ConfigError, validate
from chatmill.launcher.jobs.job import Container, JobSpec
from chatmill.launcher.jobs.slurm import render_prepare, render_sbatch, render_sweep, sbatch_command
from chatmill.launcher.jobs.torchrun import accelerate_command, accelerate_config, single_command, torchrun_command

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).resolve().parents[3]

PLAIN = {"name": "chat", "arguments": ("/shared/runs/chat/launches/001/config.yaml",), "run_dir": "/shared/runs/chat"}
PLACES = {"code": "/shared/runs/chat/launches/001/code", "python": "/opt/venv/bin/python"}
SPECS = {
    "one_node_no_gpu": JobSpec(**PLAIN, **PLACES),
    "four_gpu_nodes": JobSpec(
        **PLAIN,
        **PLACES,
        nodes=4,
        gpus_per_node=8,
        gpu_type="h100",
        cpus_per_task=96,
        memory="900G",
        time="2-00:00:00",
        partition="train",
        account="lab-7",
        qos="high",
        constraint="h100&(ib|roce)",
        exclude="gpu[03,07-09]",
        options=("--reservation=winter", "--exclusive"),
        signal_lead_s=420,
        max_no_progress=5,
        chain=10,
        modules=("cuda/12.8", "nccl"),
        environment={"NCCL_SOCKET_IFNAME": "ib0", "GREETING": 'it\'s $(date) "quoted" `x`'},
        secrets=("HF_TOKEN",),
        setup=("ulimit -n 65536",),
    ),
    "apptainer": JobSpec(**PLAIN, **PLACES, gpus_per_node=2, container=Container(kind="apptainer", image="/images/c.sif")),
    "pyxis": JobSpec(
        **PLAIN,
        **PLACES,
        nodes=2,
        gpus_per_node=8,
        container=Container(kind="pyxis", image="nvcr.io#nvidia/pytorch:26.01-py3", mounts=("/data:/data:ro",)),
    ),
}


def compare(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("CHATMILL_WRITE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{name} differs; see this file's docstring"


def test_a_job_script_is_as_agreed() -> None:
    compare("four_gpu_nodes.sh", render_sbatch(SPECS["four_gpu_nodes"]))


def test_the_other_jobs_differ_from_the_script_for_hands_in_agreed_lines() -> None:
    by_hand = (ROOT / "slurm" / "train.sh").read_text(encoding="utf-8").splitlines()
    text = ""
    for name in ("one_node_no_gpu", "apptainer", "pyxis"):
        differing = difflib.unified_diff(by_hand, render_sbatch(SPECS[name]).splitlines(), n=0, lineterm="")
        text += f"# {name}\n" + "".join(f"{line}\n" for line in differing if not line.startswith(("---", "+++", "@@")))
    compare("variants.diff", text)


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("train", render_sbatch(JobSpec())),
        ("prepare", render_prepare(JobSpec(name="chatmill-data", cpus_per_task=2, signal_lead_s=60))),
        ("sweep", render_sweep(JobSpec())),
    ],
)
def test_the_scripts_for_hands_are_what_the_launcher_renders(name: str, script: str) -> None:
    path = ROOT / "slurm" / f"{name}.sh"
    if os.environ.get("CHATMILL_WRITE_GOLDEN"):
        path.write_text(script, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == script and os.access(path, os.X_OK)
    assert (ROOT / "launcher" / "jobs" / f"{name}.sh").samefile(path)


@pytest.mark.parametrize(
    "script", [*map(render_sbatch, (JobSpec(), *SPECS.values())), render_prepare(JobSpec()), render_sweep(JobSpec())]
)
def test_bash_and_shellcheck_accept_every_script(script: str) -> None:
    checks = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        checks.append(["shellcheck", "-S", "warning", "-e", "SC2054", "-"])  # SC2054: commas between mounts are meant
    for check in checks:
        done = subprocess.run(check, input=script, text=True, capture_output=True, check=False)
        assert done.stdout + done.stderr == ""


def test_a_job_that_prepares_data_takes_the_settings_of_the_site() -> None:
    site = render_prepare(JobSpec(modules=("python",), environment={"A": "$(id)"}, partition="cpu"))
    assert "\nmodule load python\nexport A='$(id)'\n" in site and "\n#SBATCH --partition=cpu\n" in site


def test_the_example_of_a_cluster_uses_every_kind_of_field_and_renders() -> None:
    fields = yaml.safe_load((ROOT / "slurm" / "cluster.example.yaml").read_text(encoding="utf-8"))
    script = render_sbatch(validate(JobSpec, fields, "cluster.example.yaml"))
    assert "#SBATCH --time=24:00:00\n" in script and "#SBATCH --array=1-4%1\n" in script and "apptainer exec --nv" in script


def test_commands_are_as_agreed() -> None:
    spec, large = SPECS["one_node_no_gpu"], SPECS["four_gpu_nodes"]
    several = spec.model_copy(update={"processes_per_node": 2})
    lines = {
        "single": single_command(spec, python="python"),
        "torchrun, one node": torchrun_command(several, python="python", log_dir="/runs/chat/logs/attempt-001"),
        "torchrun, node 3 of 4": torchrun_command(
            large, python="python", log_dir="logs", node_rank=3, master_addr="gpu01", master_port=20451
        ),
        "accelerate, node 3 of 4": accelerate_command(large, accelerate="accelerate", config_file="a.yaml", node_rank=3),
        "sbatch": sbatch_command(large, "/shared/runs/chat/launches/001/job.sh"),
    }
    compare("commands.txt", "".join(f"# {name}\n{shlex.join(words)}\n" for name, words in lines.items()))
    configs = {"four_gpu_nodes": accelerate_config(large, master_addr="gpu01"), "cpu": accelerate_config(several)}
    compare("accelerate.yaml", yaml.safe_dump(configs, sort_keys=False))


HOSTILE = [
    "two\nlines",
    "a;rm -rf .",
    "$(touch owned)",
    "`touch owned`",
    "quote'",
    'double"',
    "comma,name",
    "sp ace",
    "naïve",
    "名前",
    "-dash",
    "",
    "a\rb",
    "back\\slash",
    "x" * 200,
]


@pytest.mark.parametrize("name", HOSTILE)
def test_job_names_that_are_more_than_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name: "):
        validate(JobSpec, {"name": name}, "test")


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "exclude", "time", "memory", "gpu_type"])
@pytest.mark.parametrize("value", ["a\n#SBATCH --uid=0", "$(id)", "a b", 'x"y', "é"])
def test_no_scheduler_field_lets_a_second_line_or_a_command_in(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=field):
        validate(JobSpec, {field: value}, "test")


@pytest.mark.parametrize(
    "fields",
    [
        {"modules": ["cuda; id"]},
        {"options": ["--uid=0 --x"]},
        {"options": ["-u0"]},
        {"container": {"kind": "pyxis", "image": "a b"}},
        {"container": {"kind": "pyxis", "image": "a", "mounts": ["/a:/b,/c:/d"]}},
        {"environment": {"A B": "1"}},
        {"environment": {"A": "one\ntwo"}},
        {"arguments": ["tiny", "run.name=a\nb"]},
        {"setup": ["one\ntwo"]},
        {"secrets": ["HF TOKEN"]},
    ],
)
def test_no_other_field_does_either(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        validate(JobSpec, fields, "test")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": ["--gres=gpu:h100:8"]}, "set gpus_per_node"),
        ({"options": ["--gpus-per-task=1"]}, "set gpus_per_node"),
        ({"options": ["--ntasks-per-node=8"]}, "set processes_per_node"),
        ({"options": ["--array=1-4"]}, "set chain"),
        ({"gpus_per_node": 2, "processes_per_node": 4}, "at most one process per GPU"),
    ],
)
def test_what_changes_the_number_of_processes_has_a_field_of_its_own(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(JobSpec, fields, "test")
    assert validate(JobSpec, {"options": ["--gres=nic:1", "--exclusive"]}, "test").options[0] == "--gres=nic:1"


def test_hostile_arguments_arrive_as_they_were_typed_and_run_nothing(tmp_path: Path) -> None:
    """The script's settings are executed for real; the arguments come out of bash unchanged."""
    words = tuple(w for w in HOSTILE if w.isprintable() and w)
    spec = JobSpec(arguments=words, environment={"SHOWN": "$(touch owned) `touch owned` '\"\\"}, code="/x y", python="/p'y")
    settings = render_sbatch(spec).partition("\nset -euo pipefail")[0]
    script = settings + '\nprintf "%s\\0" "$@" "$SHOWN" "$CHATMILL_CODE" "$CHATMILL_PYTHON"\n'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"SLURM_NNODES": "1"}, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == [*words, "$(touch owned) `touch owned` '\"\\", "/x y", "/p'y"]
    assert list(tmp_path.iterdir()) == [] and done.stderr == b""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_x"), ("WANDB_API_KEY", "k3y-9"), ("DB_PASSWORD", "p4ss-9"), ("PROXY", "http://me:hunter2@proxy:8080"),
        ("SIGNING_KEY", "k3y-9"), ("GITHUB_PAT", "p4t-9"), ("DBPWD_MAIN", "p4ss-9"), ("PGPWD", "p4ss-9"),
        ("SOURCE", "https://store/chats?X-Amz-Date=1&X-Amz-Signature=abc9"), ("SOURCE", "https://store/chats?sv=1&sig=abc9"),
        ("AZURE_SAS", "s4s-9"), ("PLAIN", "ghp_0123456789abcdefghij"),
    ],
)  # fmt: skip
def test_secrets_are_refused_as_values_and_never_rendered(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        validate(JobSpec, {"environment": {name: value}}, "test")
    assert value not in str(caught.value)
    script = render_sbatch(JobSpec(secrets=(name,)))
    done = subprocess.run(["bash", "-c", script], env={"SLURM_NNODES": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode and f"export {name} in the shell that submits this job" in done.stderr


@pytest.mark.parametrize(
    "fields",
    [
        {"setup": ["export HF_TOKEN=hunter2"]},
        {"setup": ["module load x; WANDB_API_KEY='hunter2' true"]},
        {"arguments": ["tiny", "data.path=https://store/set?X-Goog-Signature=hunter2"]},
        {"arguments": ["tiny", "data.path=https://me:hunter2@store/set"]},
    ],
)
def test_secrets_in_setup_lines_and_overrides_are_refused_without_showing_them(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"(line 1 of setup|argument 2).* looks like a secret") as caught:
        validate(JobSpec, fields, "test")
    assert "hunter2" not in str(caught.value)


def test_names_that_only_resemble_secrets_pass() -> None:
    plain = {
        "OLDPWD": "/x",
        "TOKENIZERS_PARALLELISM": "false",
        "GIT_AUTHOR_NAME": "me",
        "KEYBOARD": "us",
        "NCCL_IB_HCA": "mlx5_0",
    }
    lines = ("export HF_TOKEN=$(cat ~/.hf)", 'export HF_TOKEN="$OTHER"', "ulimit -n 65536")
    JobSpec(environment=plain, setup=lines, arguments=("tiny", "data.tokenizer=x", "optimizer.lr=1e-3"))


def test_a_job_of_gpu_nodes_starts_one_process_per_gpu() -> None:
    assert (JobSpec(nodes=4, gpus_per_node=8).world_size, JobSpec(nodes=2, processes_per_node=3).world_size) == (32, 6)
    script = render_sbatch(SPECS["four_gpu_nodes"])
    assert re.search(r"^export CHATMILL_PROCESSES=8$", script, re.M) and "#SBATCH --gpus-per-node=h100:8\n" in script


def test_accelerate_is_not_asked_for_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="use torchrun"):
        accelerate_command(JobSpec(nodes=2), accelerate="accelerate", config_file="a.yaml")
