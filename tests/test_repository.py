"""What the layout promises: nothing is shadowed, nothing heavy is imported early, dependencies point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("data", "kernels", "trainer", "launcher")
WELL_KNOWN = {
    "accelerate", "attr", "click", "datasets", "deepspeed", "evaluate", "gguf", "jinja2", "numpy", "optuna", "peft", "pydantic",
    "pytest", "regex", "requests", "rich", "safetensors", "tensorboard", "tokenizers", "torch", "transformers", "triton", "trl",
    "wandb", "webdataset", "xxhash", "yaml", "openai", "fastapi", "uvicorn", "psutil", "packaging", "hypothesis",
}  # fmt: skip
SHARED = {"config", "files", "formatting", "hub", "processes", "progress", "recipe_names", "run_files", "shell"}
MAY_IMPORT = {
    "data": {"data", *SHARED},
    "kernels": {"kernels"},
    "trainer": {"data", "kernels", "trainer", *SHARED},
    "launcher": {"data", "kernels", "trainer", "launcher", *SHARED},
}


NEED_TORCH = {"chatmill.data.stream", "chatmill.data.bench.stream", "chatmill.data.bench.other_loaders"}


def dotted(path: Path) -> str:
    """data/shards/index.py -> chatmill.data.shards.index"""
    words = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("chatmill", *words[: -1 if words[-1] == "__init__" else None]))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file below the root, with relative ones made absolute."""
    package = ["chatmill", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*(package[: len(package) - node.level + 1] if node.level else []), *filter(None, [node.module])]
            names = [[*base, a.name] for a in node.names] if len(base) == 1 or not node.module else [base]
            found += [(node.lineno, ".".join(words)) for words in names]
    return found


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
        for line, name in imports(path):
            words = name.split(".")
            if words[0] == "chatmill" and len(words) > 1 and words[1] not in MAY_IMPORT[part] | {"__version__"}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


# From the ground up: a room (a folder of a part, or a file beside them) imports only rooms that stand before it.
ROOMS = {
    "data": "conversation ledger recipe preference shards remote raw cleaning tokenizer importers samples report packing "
    "stream check pipeline bench",
    "kernels": "tensors eager interpreter launch dispatch layer cross_entropy attention rms_norm rope swiglu "
    "linear_cross_entropy gates bench",
    "trainer": "model_config foreign_config adapter_config parallel_config config distributed parallel model backends "
    "generation checkpoint adapters optim engine evaluation plan run loop convert chat report bench train",
    "launcher": "programs supervise jobs runs sweep doctor own_chats commands demo __main__",
}


@pytest.mark.parametrize("part", PARTS)
def test_rooms_import_only_rooms_below_them(part: str) -> None:
    floor = {name: number for number, name in enumerate(ROOMS[part].split())}
    wrong = []
    for path in modules(part):
        room = path.relative_to(ROOT / part).with_suffix("").parts[0]
        ours = [(line, name) for line, name in imports(path) if name.startswith(f"chatmill.{part}.")]
        wrong += [f"{path}:{line} imports {name}" for line, name in ours if floor[name.split(".")[2]] > floor[room]]
    assert not wrong


@pytest.mark.parametrize("part", PARTS)
def test_the_architecture_lists_every_room_above_those_it_stands_on(part: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition(f"\n| {part} | |\n")[2].partition("\n\n")[0]
    folders = [room for room in ROOMS[part].split() if (ROOT / part / room).is_dir()]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == folders[::-1]


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = {dotted(path): path for part in PARTS for path in modules(part)}
    graph = {name: {found for _, found in imports(path)} & paths.keys() - {name} for name, path in paths.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("part", [*PARTS, "src/chatmill", "tests"])
def test_no_file_and_no_room_is_too_large(part: str) -> None:
    """What CONTRIBUTING.md promises; long tests may be long."""
    files = list((ROOT / part).rglob("*.py"))
    rooms = Counter(path.parent for path in files)
    assert not {str(room): n for room, n in rooms.items() if n > 14}
    if part != "tests":
        assert not {str(path): n for path in files if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}


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
    names = [name for name in map(dotted, modules("data")) if name not in NEED_TORCH]
    loaded = imported_by("\n".join(f"import {name}" for name in names))
    assert "torch" not in loaded


def test_kernels_import_without_triton() -> None:
    public = (
        "attention.attention",
        "linear_cross_entropy.linear_cross_entropy",
        "rms_norm.rms_norm",
        "rope.rope",
        "swiglu.swiglu",
    )
    names = [name.rpartition(".") for name in public]
    loaded = imported_by(
        "sys.modules['triton'] = None\n"
        + "\n".join(f"from chatmill.kernels.{module} import {name}; assert callable({name})" for module, _, name in names)
    )
    assert "chatmill.kernels.attention.interface" in loaded


@pytest.mark.slow
def test_a_wheel_made_from_the_sdist_holds_all_parts_under_one_name(tmp_path: Path) -> None:
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    sdist = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "Makefile",
        "docs/data.md",
        "slurm/train.sh",
        "tests/test_repository.py",
        "tests/launcher/slurm_cluster.py",
    } <= sources
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info" not in name}
        assert wheel.read("chatmill/launcher/jobs/train.sh") == (ROOT / "slurm" / "train.sh").read_bytes()
    kinds = {".py", ".typed", ".yaml", ".json", ".html", ".css", ".js", ".sh"}
    files = [ROOT / "src/chatmill" / name for name in ("__init__.py", "config.py", "py.typed")]
    files += [path for part in PARTS for path in (ROOT / "src/chatmill" / part).resolve().rglob("*") if path.suffix in kinds]
    wanted = {str(path.relative_to(ROOT)).removeprefix("src/chatmill/") for path in files}
    assert {f"chatmill/{name}" for name in wanted} <= packed
    assert {name.partition("/")[0] for name in packed} == {"chatmill"}
