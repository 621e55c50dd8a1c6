"""How worker processes start and end; here, because several layers have some."""

import signal
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable
    from multiprocessing.process import BaseProcess

PATIENCE: Final = 5.0  # seconds for a process to end after SIGTERM


def start(process: "BaseProcess") -> None:
    """Start a worker process ("spawn") with SIGINT blocked.

    Ctrl-C goes to the whole terminal group. A worker ignores it, for its parent decides and ends
    its workers; but one that still loads its libraries would show a traceback of its own. So the
    worker's first act is to ignore SIGINT, and none comes before.
    """
    # The tracker, which the first start brings along, unblocks SIGINT here; so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(processes: "Iterable[BaseProcess]") -> None:
    """End and close worker processes, by SIGKILL where SIGTERM does not do.

    One whose start was interrupted has no PID, and is left alone.
    """
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
