"""Data sets built by job arrays of a real Slurm: the bytes of a local build, also when everything is killed on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.data.build_cases import chats, tree, write_jsonl
from tests.launcher.slurm_cluster import SlurmCluster, missing_programs
from tests.launcher.tiny_run import wait_until

from chatmill.config import ConfigError
from chatmill.data.pipeline import stages
from chatmill.data.pipeline.datatrove_steps import run_stage
from chatmill.data.pipeline.inputs import template_tokenizer
from chatmill.data.pipeline.pipeline import build_dataset
from chatmill.data.pipeline.work_folder import WorkFolder
from chatmill.data.recipe import ExecutorSection, load_data_recipe

ROOT = Path(__file__).resolve().parents[3]
REASON = missing_programs()
FILES = 3
# Every array asks for little: the nodes of the cluster have 8 CPUs each.
ARRAYS = ["executor.tasks=2", "executor.poll_s=0.5"]

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("cluster"), nodes=2) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with several raw files, so that each stage has several tasks, and its local build."""
    place = tmp_path_factory.mktemp("sets")
    for part in range(FILES):
        write_jsonl(place / f"raw{part}.jsonl", chats(120, seed=part))
    fields = {
        "name": "small",
        "sources": [{"format": "openai", "path": str(place / "raw*.jsonl")}],
        "tokenizer": {"train": {"vocab_size": 300}},
        "split": {"validation": 0.2},
    }
    (place / "small.yaml").write_text(json.dumps(fields))
    build_dataset(load_data_recipe(str(place / "small.yaml"), ["workers=1"]), place / "local")
    return place


def test_a_build_killed_with_its_arrays_goes_on_to_the_bytes_of_a_local_one(cluster: SlurmCluster, folder: Path) -> None:
    """Once the build alone dies and its array works on; once the array dies too."""
    out = folder / "cluster"
    words = ["data", "build", str(folder / "small.yaml"), "executor.kind=slurm", *ARRAYS, "--out", str(out)]
    environment = cluster.environment | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "chatmill.launcher", *words]

    def kill_in(stage: str) -> None:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        logs = f".cluster.work-*/{stage}/slurm/001/launch_script.slurm"
        wait_until(f"{stage} submitted", lambda: process.poll() is not None or bool(list(folder.glob(logs))))
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1].decode()
        assert process.returncode == -signal.SIGKILL, said

    for stage in ("import", "prepare"):
        kill_in(stage)
        if stage == "prepare":
            cluster.call("scancel", "--user=root")
            wait_until("the queue is empty", lambda: not cluster.call("squeue", "-h", "-o", "%i"))
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert tree(out) == tree(folder / "local")


def test_prepare_sh_builds_one_data_set_per_element_and_each_stage_as_an_array(cluster: SlurmCluster, folder: Path) -> None:
    for name in ("first", "second"):
        fields = json.loads((folder / "small.yaml").read_text()) | {"name": name, "out": str(folder / name)}
        (folder / f"{name}.yaml").write_text(json.dumps(fields))
    recipes = [str(folder / f"{name}.yaml") for name in ("first", "second")]
    words = ["--array=0-1", f"--output={folder}/build-%a.out", "slurm/prepare.sh", *recipes, *ARRAYS]
    job = cluster.sbatch(*words, cwd=ROOT, extra={"CHATMILL_PYTHON": sys.executable})
    wait_until("both data sets", lambda: not cluster.call("squeue", "-h", "-j", job, "-t", "pending,running", "-o", "%i"))
    for i, name in enumerate(("first", "second")):
        said = (folder / f"build-{i}.out").read_text()
        assert (folder / name / "manifest.json").is_file(), said
        # `name` is a fact of the manifest; the tokens are those of the local build.
        assert (folder / name / "train/train-00000.index.npz").read_bytes() == (
            folder / "local/train/train-00000.index.npz"
        ).read_bytes()
        arrays = [cluster.call("scontrol", "show", "job", "-o", found) for found in arrays_in(said)]
        assert len(arrays) == 3 and all("ArrayTaskId=" in shown for shown in arrays), said
        assert all(shown.count("ArrayTaskId=") == 2 for shown in arrays), arrays


def arrays_in(said: str) -> list[str]:
    return [line.rpartition("id=")[2].rstrip(".") for line in said.split("\n") if "Slurm job launched successfully" in line]


def test_a_task_that_fails_in_an_array_is_shown_with_its_cause(
    cluster: SlurmCluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    work = WorkFolder(tmp_path, load_data_recipe(str(folder / "small.yaml")))
    for stage in ("import", "prepare"):
        (tmp_path / stage).mkdir()
    template_tokenizer(work.recipe, None).save(tmp_path / "template")
    for name in ("a", "c"):
        (tmp_path / f"import/{name}.jsonl").touch()
    section = ExecutorSection(kind="slurm", tasks=3, poll_s=0.2)
    with pytest.raises(ConfigError, match=r"(?s)1 of 3 tasks did not finish on Slurm.*FileNotFoundError.*import/b\.jsonl"):
        run_stage(tmp_path / "prepare", ["a", "b", "c"], stages.PrepareChunk(work), section, 1, lambda done: None)
    assert sorted(path.name for path in (tmp_path / "prepare").glob("*.done")) == ["a.done", "c.done"]
