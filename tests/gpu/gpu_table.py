"""The tables that the figures of a visit justify: which implementation runs on this GPU, and who multiplies in the loss.

    python tests/gpu/gpu_table.py results/gpu.json        writes results/dispatch.json and results/linear_cross_entropy.json

Copy them to kernels/tuning/ after a look. Only what was timed is moved, only rules of this GPU's generation change, and what
gave a wrong result at real size (part `smoke`) is taken out. The rest keeps its order behind what was timed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TUNING = Path(__file__).resolve().parents[2] / "kernels" / "tuning"
MARGIN = 0.99  # a change must be worth more than the noise of two measurements
# contender of the benchmark -> name in the table
NAMES = {"hopper fused": "hopper", "sdpa-cudnn": "sdpa", "sdpa-flash": "sdpa"}
# operations of the table -> their part of the visit, kernel, and operations of the smoke
LAYER = {"rms_norm": "rms_norm", "swiglu": "swiglu", "rope": "rope"}


def wrong_operations(content: Mapping[str, Any]) -> set[str]:
    """Names of smoke operations that failed or never ended."""
    found = content.get("parts", {}).get("smoke", {})
    return {name for name, run in found.items() if isinstance(run, Mapping) and not run.get("ok")}


def times(content: Mapping[str, Any], part: str, kernel: str, phase: str, kind: str = "") -> dict[str, dict[str, float]]:
    """contender -> case -> milliseconds, of cases whose name starts with kind."""
    found: dict[str, dict[str, float]] = {}
    bench = content.get("parts", {}).get(part, {}).get("bench", {}).get("figures") or {}
    for row in bench.get("results", []):
        if row["kernel"] == kernel and row["phase"] == phase and row.get("ms") and row["case"].startswith(kind):
            found.setdefault(row["contender"], {})[row["case"]] = row["ms"]
    return found


def fastest_first(took: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Contenders that have a time for every case, by their sum."""
    cases = {case for by_case in took.values() for case in by_case}
    whole = {name: sum(by_case.values()) for name, by_case in took.items() if set(by_case) == cases}
    return sorted(whole, key=lambda name: whole[name])


def attention_order(content: Mapping[str, Any], packed: bool, before: Sequence[str], wrong: set[str]) -> list[str] | None:
    """choose of a rule, or None where nothing was timed."""
    order = fastest_first(times(content, "attention", "attention", "both", "packed" if packed else "causal"))
    bad = {
        tier
        for tier in ("triton", "hopper")
        if any(op.startswith((f"attention {tier} ", f"attention {tier}-")) for op in wrong)
    }
    names = [name for name in dict.fromkeys(NAMES.get(contender, contender) for contender in order) if name not in bad]
    names = [name for name in names if name in before or name in ("hopper", "sdpa", "flash2", "flash3", "flash4")]
    if not order:
        return None
    return names + [name for name in before if name not in names and name not in bad]


def dispatch_table(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """tuning/dispatch.json with the order that was measured; None where nothing was timed."""
    table: dict[str, Any] = json.loads((TUNING / "dispatch.json").read_text(encoding="utf-8"))
    number, wrong, changed = _capability(content), wrong_operations(content), False
    for rule in _rules_of(table["attention"], number):
        order = attention_order(content, rule["packed"], rule["choose"], wrong)
        if order is not None:
            rule["choose"], rule["timed"], changed = order, True, True
    single = {"linear_cross_entropy": "loss", **dict.fromkeys(LAYER, "layer")}
    for kernel, part in single.items():
        took = times(content, part, kernel, "both") or times(content, part, kernel, "backward")
        bad = any(op == kernel or (kernel == "linear_cross_entropy" and op.startswith("loss ")) for op in wrong)
        both_forms_bad = kernel != "linear_cross_entropy" or not set(_right_forms(wrong))
        for rule in _rules_of(table[kernel], number):
            if bad and both_forms_bad:
                rule["choose"], changed = [name for name in rule["choose"] if name != "triton"], True
            elif any(name.startswith("triton") for name in took):
                rule["timed"], changed = True, True
    return table if changed else None


def loss_table(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """tuning/linear_cross_entropy.json with the faster of the two right forms; None where there is nothing to say."""
    table: list[dict[str, Any]] = json.loads((TUNING / "linear_cross_entropy.json").read_text(encoding="utf-8"))
    right = _right_forms(wrong_operations(content))
    contenders = {"triton": "triton", "triton by torch": "torch"}
    took = {
        contenders[name]: t for name, t in times(content, "loss", "linear_cross_entropy", "both").items() if name in contenders
    }
    order = [form for form in fastest_first(took) if form in right]
    if not order:
        return None
    machine, number = content.get("machine", {}), _capability(content)
    for row in table:
        if row["arch"][0] <= number <= row["arch"][1] and row["bytes"] == 2:
            before = row["products"]
            total = {form: sum(t.values()) for form, t in took.items()}
            keeps = before in order and total[order[0]] >= MARGIN * total[before]
            row["products"] = before if keeps else order[0]
            row["timed"] = f"{machine.get('date')} {machine.get('gpu')}"
    return table


def _right_forms(wrong: set[str]) -> list[str]:
    return [form for form in ("triton", "torch") if not any(op.startswith(f"loss products {form}") for op in wrong)]


def _rules_of(rules: Iterable[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Rules of a table for CUDA GPUs of this generation alone."""
    return [rule for rule in rules if "capability" in rule and rule["capability"][0] <= number <= rule["capability"][1]]


def _capability(content: Mapping[str, Any]) -> int:
    major, _, minor = str(content.get("machine", {}).get("capability", "0.0")).partition(".")
    return 10 * int(major) + int(minor or 0)


def write_tables(content: Mapping[str, Any], out: Path) -> list[str]:
    """Write what can be said; returns the names of the files."""
    dispatch, loss = dispatch_table(content), loss_table(content)
    written = []
    if dispatch is not None:
        rules = {name: value if name == "note" else [json.dumps(rule) for rule in value] for name, value in dispatch.items()}
        lines = [
            f'  "{name}": ' + (json.dumps(v) if name == "note" else "[\n    " + ",\n    ".join(v) + "\n  ]")
            for name, v in rules.items()
        ]
        (out / "dispatch.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        written.append("dispatch.json")
    if loss is not None:
        rows = ",\n".join("  " + json.dumps(row) for row in loss)
        (out / "linear_cross_entropy.json").write_text("[\n" + rows + "\n]\n", encoding="utf-8")
        written.append("linear_cross_entropy.json")
    return written


if __name__ == "__main__":
    figures = Path(sys.argv[1])
    print(write_tables(json.loads(figures.read_text(encoding="utf-8")), figures.parent) or "nothing was timed")
