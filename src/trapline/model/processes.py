"""How worker processes start; here, because processes of all layers do."""

import signal
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


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
