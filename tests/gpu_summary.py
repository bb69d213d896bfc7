"""results/gpu.json as a page for people: failures, tokens/s and MFU of each training, and each kernel beside the others.

python tests/gpu_summary.py results/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TARGETS = {"1b": 0.56, "8b": 0.578}  # MFU; the floor of the 1b is 0.50


def summary(content: Mapping[str, Any]) -> str:
    """The whole page. A part that is missing or unfinished is omitted or marked; none raises."""
    machine = content.get("machine", {})
    lines = [f"{machine.get('gpu')}, {machine.get('date')}, " + json.dumps(machine.get("versions", {}))]
    if "wheels" in content:
        lines.append(f"wheels: {content['wheels']}")
    if "visit" in content:
        lines += [f"  {step:<12}{said}" for step, said in content["visit"].items()] + [f"  tables: {content.get('tables')}"]
    for part, found in content.get("parts", {}).items():
        lines += ["", f"== {part}"]
        if "error" in found:
            lines.append(f"  {found['error']}")
        if part == "imports":
            lines.append(f"  {found.get('outcome')}")
        elif part in ("tests", "timed"):
            lines += _tests(found)
        elif part in ("train", "engines"):
            lines += _trainings(found)
        else:
            lines += _benches(found)
    return "\n".join(lines) + "\n"


def _tests(found: Mapping[str, Any]) -> list[str]:
    failed, unfinished = found.get("failed", {}), found.get("unfinished", [])
    lines = [f"  {found.get('passed', 0)} passed, {len(failed)} failed, {len(unfinished)} unfinished or hung"]
    lines += [f"  FAILED {name}: {' '.join(message.split())[-200:]}" for name, message in failed.items()]
    return lines + [f"  UNFINISHED {name}" for name in unfinished]


def _trainings(found: Mapping[str, Any]) -> list[str]:
    lines = [f"  {'':<40}{'tokens/s':>10}{'MFU':>8}{'required':>10}{'GiB':>7}{'waits':>7}  first steps"]
    for name, run in _runs(found):
        figures = run.get("figures", {})
        median = figures.get("median") if isinstance(figures, Mapping) else None
        if not median:
            lines.append(f"  {name:<40}{run.get('outcome')} after {run.get('seconds')} s")
            continue
        target = TARGETS.get(name.split()[0])
        mfu = median.get("mfu")
        reached = "" if target is None or mfu is None else f"  target {_percent(target)}{' reached' if mfu >= target else ''}"
        lines.append(
            f"  {name:<40}{median['tokens_per_s']:>10,.0f}{_percent(mfu):>8}{_percent(median.get('required_mfu')):>10}"
            f"{figures['memory_peak_bytes'] / 2**30:>7.1f}{_percent(median.get('data_wait_share')):>7}  "
            f"{figures['first_steps_s'][:2]} s{reached}"
        )
    return lines


def _benches(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, run in _runs(found):
        lines.append(f"  {name}: {run.get('outcome')} after {run.get('seconds')} s")
        figures = run.get("figures", {})
        machine = figures.get("machine", {}) if isinstance(figures, Mapping) else {}
        if "gemm_tflops" in machine:
            lines.append(f"    machine: {machine['gemm_tflops']:.0f} TFLOP/s, copies {machine['copy_gbytes_per_s']:.0f} GB/s")
        for row in figures.get("results", []) if isinstance(figures, Mapping) else []:
            if row.get("ms") is None:
                value = row.get("reason") or "no time"
            else:
                value = f"{row['ms']:9.3f} ms"
                value += f"{row['tflops']:8.1f} TFLOP/s" if row.get("tflops") else ""
                value += f"{row['gbytes_per_s']:8.0f} GB/s" if row.get("gbytes_per_s") else ""
            lines.append(f"    {row['kernel']:<22}{row['case']:<43}{row['contender']:<16}{row['phase']:<10}{value}")
    return lines


def _runs(found: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, run) for name, run in found.items() if isinstance(run, Mapping)]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
