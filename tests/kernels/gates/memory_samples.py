"""What test_memory_check.py reads, in a process without the interpreter: shipped kernels executed by ttsem, and broken ones."""

import importlib.util
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import torch
from ttsem import sanitize

from chatmill.kernels.gates.memory_check import checked
from chatmill.kernels.layer import rms_norm_triton, swiglu_triton

# one of each kind: products by pointers and by tensor maps, a merge of parts, a persistent grid, masks in both directions
SHIPPED = (
    r"^attention D64 bf16 long|^decode D64 group|^loss bf16 in two chunks|^rms_norm 1021 bf16 res|^rope 80 .* norm|^swiglu 1021"
)


def broken(module: ModuleType, good: str, bad: str, folder: Path) -> ModuleType:
    """The module with one piece of its source replaced."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(good) == 1, good
    name = f"broken_{len(list(folder.iterdir()))}"
    (folder / f"{name}.py").write_text(source.replace(good, bad), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{name}", folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def faults(folder: Path) -> dict[str, str]:
    """What each planted fault was reported as; "" if it was not seen."""
    x = torch.randn(37, 123)
    load = "mask=mask, other=0.0).to(WIDE)\n    y ="
    read = broken(swiglu_triton, load, load.replace("mask=mask", "mask=columns < width"), folder)
    store = "tl.store(Y + row * width + columns, y.to(Y.dtype.element_ty), mask=mask)"
    write = broken(swiglu_triton, store, store.replace("mask=mask", "mask=columns < width"), folder)
    partial = "tl.store(PARTIAL + tl.program_id(0).to(tl.int64) * width + columns"
    race = broken(rms_norm_triton, partial, "tl.store(PARTIAL + columns", folder)
    weight, scale = torch.ones(123), torch.ones(370)
    calls = {
        "read outside": lambda: read.forward(x, x),
        "write outside": lambda: write.forward(x, x),
        "race": lambda: race.backward(x.repeat(10, 1), weight, scale, x.repeat(10, 1), None, True, True),
    }
    found = {}
    for name, call in calls.items():
        try:
            with sanitize.session(90):
                call()
        except sanitize.KernelFault as fault:
            found[name] = f"{fault.fault.kind}: {fault}"
        else:
            found[name] = ""
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps({"cases": [asdict(verdict) for verdict in checked(90, SHIPPED)], "faults": faults(Path(place))}))
