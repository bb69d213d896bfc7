"""The promises of the layout: nothing shadows, nothing heavy is imported early, dependencies point one way."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("data", "kernels", "trainer", "launcher")
WELL_KNOWN = {
    "accelerate", "attr", "click", "datasets", "deepspeed", "evaluate", "gguf", "jinja2", "numpy", "optuna", "peft", "pydantic",
    "pytest", "regex", "requests", "rich", "safetensors", "tensorboard", "tokenizers", "torch", "transformers", "triton", "trl",
    "wandb", "webdataset", "xxhash", "yaml", "openai", "fastapi", "uvicorn", "psutil", "packaging", "hypothesis",
}  # fmt: skip
SHARED = {"config", "files", "processes", "run_files"}
MAY_IMPORT = {
    "data": {"data", *SHARED},
    "kernels": {"kernels"},
    "trainer": {"data", "kernels", "trainer", *SHARED},
    "launcher": {"data", "kernels", "trainer", "launcher", *SHARED},
}


def modules(part: str) -> list[Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("part", PARTS)
def test_the_four_parts_have_no_init_file(part: str) -> None:
    assert not (ROOT / part / "__init__.py").exists(), "a checkout on sys.path would shadow other packages"
    assert (ROOT / "src/chatmill" / part).is_symlink()


@pytest.mark.parametrize("part", PARTS)
def test_no_module_shadows_the_standard_library_or_a_well_known_package(part: str) -> None:
    top = {path.stem for path in (ROOT / part).glob("*.py")} | {p.name for p in (ROOT / part).iterdir() if p.is_dir()}
    taken = (set(sys.stdlib_module_names) | WELL_KNOWN) - {"__main__"}
    assert not top & taken


@pytest.mark.parametrize("part", PARTS)
def test_dependencies_point_one_way(part: str) -> None:
    wrong = []
    for path in modules(part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] if node.module != "chatmill" else [f"chatmill.{a.name}" for a in node.names]
            for name in names:
                words = name.split(".")
                if words[0] == "chatmill" and len(words) > 1 and words[1] not in MAY_IMPORT[part] | {"__version__"}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {name}")
    assert not wrong


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_heavy() -> None:
    loaded = imported_by(
        "import contextlib\nfrom chatmill.launcher.__main__ import main\nwith contextlib.suppress(SystemExit): main(['--help'])"
    )
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "triton", "rich"}


def test_recipes_load_without_torch() -> None:
    loaded = imported_by("from chatmill.trainer.config import load_recipe\nload_recipe('tiny')")
    assert not loaded & {"torch", "numpy", "triton"}


def test_data_needs_no_torch_outside_its_stream() -> None:
    names = [f"chatmill.data.{p.stem}" for p in (ROOT / "data").glob("*.py") if not p.stem.startswith("stream")]
    loaded = imported_by("\n".join(f"import {name}" for name in names))
    assert "torch" not in loaded


def test_kernels_import_without_triton() -> None:
    names = [f"chatmill.kernels.{p.stem}" for p in (ROOT / "kernels").glob("*.py")]
    public = [n for n in names if n.rsplit(".", 1)[1] in ("attention", "linear_cross_entropy", "rms_norm", "rope", "swiglu")]
    blocked = "sys.modules['triton'] = None\n" + "\n".join(f"import {name}" for name in public)
    loaded = imported_by(blocked)
    assert "chatmill.kernels.attention" in loaded


@pytest.mark.slow
def test_the_wheel_holds_all_parts_under_one_name(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"chatmill"}
    for needed in (
        "chatmill/data/stream.py",
        "chatmill/kernels/attention.py",
        "chatmill/trainer/recipes/tiny.yaml",
        "chatmill/py.typed",
    ):
        assert needed in names
