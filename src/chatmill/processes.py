"""Whether the process that wrote something is still alive. A process number alone does not tell: it may have been reused.

    mark = own_process()           # JSON-ready; kept in a run's environment.json
    is_running(mark)               # True, False, or None if this machine cannot tell
    send_signal(mark, SIGTERM)     # to that process or to none

A mark holds the machine, boot, process namespace (of a container), process number, and the clock tick at which the process
started. Linux only: on other systems, and for a process of another machine, the answer is None. Standard library only: psutil
knows neither boot nor namespace, and gives the start by a clock that may be adjusted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def own_process() -> dict[str, Any]:
    """The mark of this process."""
    return process_mark(os.getpid())


def process_mark(pid: int) -> dict[str, Any]:
    """The mark of a process of this machine."""
    return _place() | {"pid": pid, "started": _started(pid)}


def is_running(mark: object) -> bool | None:
    """Whether that process is alive; None if it belongs to another machine or container, or if the mark is empty."""
    if not isinstance(mark, Mapping) or not isinstance(mark.get("pid"), int) or not isinstance(mark.get("started"), int):
        return None
    here = _place()
    if here["boot"] is None or any(mark.get(key) != value for key, value in here.items()):
        return None
    return _started(mark["pid"]) == mark["started"]


def send_signal(mark: Mapping[str, Any], number: int) -> bool:
    """Signal that process; False, and nothing is signalled, where it is gone or this machine cannot tell."""
    if not is_running(mark):
        return False
    try:
        handle = os.pidfd_open(mark["pid"])  # names the process, not its number, from here on
    except ProcessLookupError:
        return False
    except OSError:  # a kernel before 5.3, or a sandbox that forbids the call
        os.kill(mark["pid"], number)
        return True
    try:
        if not is_running(mark):
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def _place() -> dict[str, Any]:
    boot: str | None
    namespace: str | None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = namespace = None
    return {"host": os.uname().nodename, "boot": boot, "namespace": namespace}


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if it is gone, or dead and not yet waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the process name before it may contain anything
    return None if fields[0] in "ZX" else int(fields[19])
