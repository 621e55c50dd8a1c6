"""Scans that are made once: kept in the cache by build id, for commands that only look things up.

The cache is an optimisation: what cannot be read or written there is scanned again.
"""

import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from trapline.base import decode, encode, files
from trapline.base.errors import BadInputFileError, OutputError
from trapline.base.version import __version__
from trapline.kernel.find.deb import cache_folder
from trapline.results.scan import VERSION, ScanResult
from trapline.scan.wholekernel import scan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.allowlist.entries import AllowList
    from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
    from trapline.scan.pool import Progress

_MAX_SIZE: Final = 1 << 30  # bytes; the full Debian flavour with all modules has 60 MB
# The packages that a scan's result depends on.
_MAKERS: Final = ("allowlist", "base", "isa", "kernel", "linux", "results", "scan")


def read_scan(path: Path) -> ScanResult:
    """Read a scan that was written as JSON; raises BadInputFileError."""
    data = files.read(path, limit=_MAX_SIZE, what="the result of a scan")
    return decode.json(data, ScanResult, str(path), "the result of `trapline scan --format json`")


def require_same_kernel(known: ScanResult, path: Path, build_id: str | None) -> None:
    """Refuse a scan of another build, whose sites would be counted for this one.

    Raises BadInputFileError. What has no build id is believed.
    """
    theirs = known.kernel.build_id
    if build_id and theirs and theirs != build_id:
        raise BadInputFileError(
            f"{path}: is the scan of another kernel, with build id {theirs} and not {build_id}; "
            "scan this one, or leave --scan out."
        )


def scan_once(
    kernel: "KernelFiles",
    modules: "Iterable[ModuleFile]",
    allow: "AllowList",
    build_id: str | None,
    progress: "Progress | None" = None,
    *,
    workers: int | None = None,
) -> ScanResult:
    """Return the scan of vmlinux and some of its modules, from the cache if it is there.

    Without a build id nothing is cached. Raises what `scan` raises.
    """
    part = replace(kernel, modules=tuple(modules))
    path = None if build_id is None else _place(part, build_id, allow)
    if path is not None:
        with suppress(BadInputFileError):
            return read_scan(path)
    result = scan(part, allow, progress, workers=workers)
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, [encode.json(result)])
    return result


@cache
def _program() -> str:
    """Identify what makes a scan: between releases the version alone does not tell."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=16)
    package = Path(__file__).parents[1]
    for path in sorted(path for part in _MAKERS for path in (package / part).rglob("*.py")):
        digest.update(files.read(path, limit=_MAX_SIZE, what="a module of ours"))
    return digest.hexdigest()


def _state(path: Path | None) -> str:
    """Name a file and its state: a module that is built anew keeps its kernel's build id."""
    if path is None:
        return ""
    try:
        status = path.stat()
    except OSError:
        return str(path)
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def _place(kernel: "KernelFiles", build_id: str, allow: "AllowList") -> Path | None:
    """Name the file of a scan; None where there is no cache folder."""
    sources = [kernel.vmlinux, kernel.vmlinuz]
    # A debug file that is installed later shows more.
    sources += [path for module in kernel.modules for path in (module.path, module.debug)]
    sources += [kernel.builtin_list, kernel.builtin_modinfo]
    said = (*kernel.missing, *(f"{name}={value}" for name, value in kernel.config.items()))
    names = "\0".join([_program(), str(VERSION), build_id, *map(_state, sources), *said])
    digest = hashlib.blake2b(
        names.encode("utf-8", "surrogateescape") + encode.json(allow), digest_size=16
    ).hexdigest()
    try:
        return cache_folder() / "scans" / f"{digest}.json"
    except OutputError:
        return None
