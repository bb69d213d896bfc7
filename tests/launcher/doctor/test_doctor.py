"""What the doctor concludes from facts, and that it can be asked on any machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chatmill.launcher.__main__ import main
from chatmill.launcher.doctor import doctor
from chatmill.launcher.supervise.node_check import BAD_NODE
from chatmill.launcher.supervise.node_check import main as node_check


def test_a_healthy_gpu_an_old_one_and_a_damaged_one_are_told_apart() -> None:
    text = "NVIDIA H100, 81559, 570.1, 9.0, 0\nTesla V100, 16384, 570.1, 7.0, 0\nNVIDIA H100, 81559, 570.1, 9.0, 3\n"
    found = doctor.gpu_findings(text)
    assert [finding.mark for finding in found] == ["ok", "warn", "bad"]
    assert "fp32" in found[1].action and "3 uncorrected" in found[2].detail


@pytest.mark.parametrize(
    ("available", "cuda", "has_gpu", "mark", "words"),
    [
        (True, "12.8", True, "ok", "NCCL"),
        (False, None, True, "bad", "CPU build"),
        (False, "12.8", True, "bad", "cannot use"),
        (False, None, False, "ok", "CPU"),
    ],
)
def test_torch_must_be_able_to_use_the_gpus_there_are(
    available: bool, cuda: str | None, has_gpu: bool, mark: str, words: str
) -> None:
    facts: dict[str, object] = {"version": "2.13.0", "cuda": cuda, "available": available, "nccl": "2.27.3"}
    finding = doctor.torch_finding(facts, has_gpu)
    assert finding.mark == mark and words in finding.detail and (mark == "ok") == (finding.action == "")


def test_a_triton_that_torch_was_not_built_with_is_pointed_out() -> None:
    needs = ["filelock", 'triton==3.7.1; platform_system == "Linux"']
    assert [f.mark for f in doctor.triton_findings("3.7.1", needs)] == ["ok"]
    (finding,) = doctor.triton_findings("3.6.0", needs)
    assert finding.mark == "warn" and "pip install triton==3.7.1" in finding.action
    assert [f.mark for f in doctor.triton_findings("3.6.0", [])] == ["ok"]
    assert [f.mark for f in doctor.triton_findings(None, needs)] == ["warn"]


def test_a_kernel_that_fails_or_is_wrong_is_bad() -> None:
    found = doctor.kernel_findings("rms_norm|1e-06\nswiglu|0.5\nattention|RuntimeError: out of resources", "compiled", 3.0)
    assert [(f.mark, f.detail.split()[0]) for f in found] == [("bad", "swiglu"), ("bad", "attention:"), ("ok", "compiled")]
    assert [f.mark for f in doctor.kernel_findings("rms_norm|nan", "compiled", 1.0)] == ["bad"]


def test_the_disk_is_written_to_and_left_clean(tmp_path: Path) -> None:
    (finding,) = doctor.check_disk(tmp_path / "new", megabytes=2)
    assert finding.mark in ("ok", "warn") and "MB/s" in finding.detail
    assert list((tmp_path / "new").iterdir()) == []


def test_an_installed_extension_that_does_not_import_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    extensions = (("no_such_module", "pytest", "x"), ("pytest", "pytest", "x"), ("x", "no-such-package", "what it gives"))
    monkeypatch.setattr(doctor, "OPTIONAL", extensions)
    found = doctor.check_extensions()
    assert [f.mark for f in found] == ["bad", "ok", "note"]
    assert "No module named" in found[0].detail and "what it gives" in found[2].detail


def test_a_slurm_that_answers_shows_its_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("sbatch", ""), ("sinfo", "echo 'gpu*|up|4|gpu:8|infinite'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (finding,) = doctor.check_slurm()
    assert finding.mark == "ok" and "partition gpu* up: 4 nodes, gpu:8" in finding.detail
    (tmp_path / "sinfo").write_text("#!/bin/sh\nexit 1\n")
    (finding,) = doctor.check_slurm()
    assert finding.mark == "warn" and finding.action


@pytest.mark.slow
def test_the_command_looks_at_this_machine_and_its_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--folder", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == int(any(f["mark"] == "bad" for f in found))
    assert {"python", "packages", "machine", "gpu", "torch", "network", "slurm", "kernels", "disk"} <= {
        f["what"] for f in found
    }
    assert all(f["action"] for f in found if f["mark"] in ("warn", "bad"))


def test_a_node_is_fit_when_its_folder_can_be_written_and_the_sites_own_check_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHATMILL_LOGS", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.delenv("CHATMILL_NODE_CHECK", raising=False)
    assert node_check(["--folder", str(tmp_path)]) == 0 and list(tmp_path.iterdir()) == []
    assert node_check(["--folder", str(tmp_path / "absent")]) == BAD_NODE
    assert "every node sees" in (tmp_path / "bad-node-n7").read_text()
    own = tmp_path / "own"
    own.write_text("#!/bin/sh\necho 'fan 3 stands still'; exit 4\n")
    own.chmod(0o755)
    monkeypatch.setenv("CHATMILL_NODE_CHECK", str(own))
    assert node_check(["--folder", str(tmp_path)]) == BAD_NODE
    assert "exit code 4: fan 3 stands still" in (tmp_path / "bad-node-n7").read_text()
    assert "n7 is not fit" in capsys.readouterr().err
