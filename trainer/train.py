"""Entry point of a training run.

chatmill train RECIPE [section.field=value ...]
accelerate launch trainer/train.py RECIPE ...
torchrun --nproc-per-node N -m chatmill.trainer.train RECIPE ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import record

from chatmill.config import ConfigError
from chatmill.files import disk_problem
from chatmill.run_files import PREEMPTED, leave_refusal
from chatmill.shell import in_this_shell
from chatmill.trainer.config import load_recipe
from chatmill.trainer.distributed.world import relaunch_if_alone
from chatmill.trainer.loop.loop import train


def main(arguments: list[str] | None = None) -> int:
    """Train; returns 0, 2 where recipe, data or launch cannot work (the message says why), or 130 after Ctrl-C.

    After Ctrl-C the run is saved, but not finished: `chatmill train X && chatmill chat X` must not go on. A launcher that
    supervises this process gets 0, because it goes by the mark that the run leaves.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words else 2
    try:
        with _save_on_interrupt() as interrupts:
            relaunch_if_alone(words)
            recipe = load_recipe(words[0], words[1:])
            train(recipe)
        alone = not {"RANK", "CHATMILL_LOGS"} & os.environ.keys()
        if interrupts and alone and (recipe.run_dir / PREEMPTED).is_file():
            return 130
    except ConfigError as error:
        print(in_this_shell(f"error: {error}"), file=sys.stderr)
        leave_refusal(str(error))
        return 2
    except OSError as error:
        if not (problem := disk_problem(error)):
            raise
        with contextlib.suppress(OSError):  # a log on the same disk
            # no refusal: another node, or some room made meanwhile, may let the next attempt succeed
            print(f"error: {problem}", file=sys.stderr, flush=True)
        return 2
    return 0


@contextlib.contextmanager
def _save_on_interrupt() -> Iterator[list[int]]:
    """The first Ctrl-C becomes a SIGTERM to the run, which saves at the next step boundary; the second ends it at once.

    Yields the list of interrupts so far, which grows.
    """
    interrupts: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # set by a caller, or ignored by a shell
        yield interrupts
        return

    def stop(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN):  # no step has begun: nothing to save
            raise KeyboardInterrupt
        if os.environ.get("RANK", "0") == "0":
            print(
                "\nCtrl-C: saving after this step; press again to stop at once, without a checkpoint",
                file=sys.stderr,
                flush=True,
            )
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    code = record(main)()  # torchrun then finds each rank's error in a file of its own
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the run is saved: a late signal must not turn its exit into a failure
    sys.exit(code)
