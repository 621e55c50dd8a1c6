"""What Ctrl-C does while there is nothing to clean up."""

import os
import signal
from typing import NoReturn


def leave(*_: object) -> NoReturn:
    """End at once, as interrupted."""
    os._exit(128 + signal.SIGINT)


def was_interrupted(error: BaseException) -> bool:
    """Whether it is what something made of Ctrl-C: a library's callback, or a file's `with`."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        if isinstance(each, KeyboardInterrupt):
            return True
        seen.add(id(each))
        waiting += [each.__cause__, each.__context__]
    return False
