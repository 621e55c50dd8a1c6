"""The scan in which another function looks things up: a document, a file, or made once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trapline.api.allow import allow_list
from trapline.api.kernel import as_kernel
from trapline.api.progress import steps
from trapline.results.scan import ScanResult
from trapline.scan.stored import read_scan, require_same_kernel, scan_once

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trapline.api.allow import AnyAllowList
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.progress import Announce, OnProgress
    from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile

#: A scan, the file of one (JSON), True for one that is made once and cached, False for none.
AnyScan = ScanResult | str | os.PathLike[str] | bool


def scanned(
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    allow: "AnyAllowList" = None,
    workers: int | None = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> ScanResult:
    """Scan a kernel with all its modules, or take the scan from the cache.

    Raises what `scan` raises.
    """
    allowed = allow_list(allow)
    opened = as_kernel(kernel, modules, announce)
    files = opened.files
    build_id = None if files.vmlinux is None else opened.build_id
    return scan_once(
        files, files.modules, allowed, build_id, steps("scanned", progress), workers=workers
    )


@dataclass(frozen=True, slots=True)
class KnownScan:
    """What a caller said of a scan; `given` is None where one is to be made."""

    given: ScanResult | None
    name: str
    wanted: bool

    @classmethod
    def of(cls, scan: AnyScan) -> "KnownScan":
        """Read the file, if it is one. Raises BadInputFileError."""
        if isinstance(scan, bool):
            return cls(None, "", scan)
        if isinstance(scan, ScanResult):
            return cls(scan, "scan", wanted=True)
        return cls(read_scan(Path(scan)), os.fspath(scan), wanted=True)

    def require(self, build_id: str | None) -> None:
        """Refuse a scan of another build. Raises BadInputFileError."""
        if self.given is not None:
            require_same_kernel(self.given, Path(self.name), build_id)

    def make(
        self,
        files: "KernelFiles",
        modules: "Iterable[ModuleFile]",
        build_id: str | None,
        progress: "OnProgress | None" = None,
    ) -> ScanResult | None:
        """Give the scan, making it if need be; None where none is wanted."""
        if self.given is not None or not self.wanted:
            return self.given
        return scan_once(files, modules, allow_list(), build_id, steps("scanned", progress))
