"""What Ctrl-C does while there is nothing to clean up."""

import os
import signal
from typing import NoReturn


def leave(*_: object) -> NoReturn:
    """End at once, as interrupted."""
    os._exit(128 + signal.SIGINT)
