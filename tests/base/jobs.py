"""What the workers of the tests do."""

import os
import signal
import time
from pathlib import Path

from trapline.base.errors import BadMachineError


class Echo:
    """Answers with what a job says, after a prefix; some jobs are commands."""

    def __init__(self, prefix=""):
        self.prefix = prefix

    def __call__(self, job):
        if job == "refuse":
            raise BadMachineError("no such machine.")
        if job == "mistake":
            raise ZeroDivisionError("a mistake")
        if job == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if job == "exhaust":
            raise MemoryError
        if job == "noise":
            os.write(2, b"native noise\n")
        if job == "hang":
            time.sleep(3600)
        if job.startswith("once "):
            mark = Path(job.removeprefix("once "))
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.prefix + job


def refuse_to_start():
    raise BadMachineError("no such machine.")


def die_at_start():
    os._exit(3)
