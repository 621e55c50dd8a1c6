"""Where the `trapline` program starts: what must hold before anything else is imported."""

import os
import signal
import sys

from trapline.cli.signals import leave


def main() -> None:
    """Start the program; never returns."""
    # Until there is something to clean up, Ctrl-C ends it without a word. A shell that starts it
    # in the background may want it to be ignored.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, leave)
    _open_standard_descriptors()
    from trapline.cli.main import main as program  # noqa: PLC0415 - what takes long comes now

    program()


def _open_standard_descriptors() -> None:
    """Open what the caller has closed, lest a file of ours become standard output or error."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for good
