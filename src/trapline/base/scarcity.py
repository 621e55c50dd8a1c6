"""What this machine, or a limit set on this process, has too little of."""

import errno
import resource

from trapline.base.errors import ResourceError


def scarce(error: BaseException) -> ResourceError | None:
    """Say what ran short where `error` means that, and how much is needed; None where not."""
    if isinstance(error, MemoryError):
        return out_of_memory()
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENOMEM:
        return out_of_memory()
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ResourceError(
            f"there are too many open files; this process may have {limit:,} (ulimit -n), and "
            "needs 24 and 4 more for each worker."
        )
    if error.errno == errno.EAGAIN:
        return ResourceError(
            "no more processes can be started; raise their number (ulimit -u), or give fewer "
            "--workers."
        )
    return None


def is_memory_limited() -> bool:
    """Whether somebody has bounded the memory of this process and its children."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def out_of_memory() -> ResourceError:
    """Say that memory ran short, what bounds it, and how much is needed."""
    bound = ""
    if is_memory_limited():
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        bound = f"this process may have {limit >> 20:,} MiB (ulimit -v); "
    return ResourceError(
        f"there is not enough memory: {bound}a scan needs some 1,500 MiB, a guest its own memory "
        "twice and 600 MiB, in each worker."
    )
