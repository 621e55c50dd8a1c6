"""`open_kernel`: the kernel that all other functions are about."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trapline.base.errors import NoDebugInfoError, UsageError
from trapline.kernel.elf.file import ElfFile
from trapline.kernel.find.locate import locate

if TYPE_CHECKING:
    from trapline.api.progress import Announce
    from trapline.kernel.find.kernelfiles import KernelFiles


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel on this machine.

    `name` is what the user called it, `files` what was found: vmlinux, vmlinuz, modules,
    configuration.
    """

    name: str
    files: "KernelFiles"

    @property
    def release(self) -> str | None:
        """As `uname -r` says it, where a file tells."""
        return self.files.release

    @property
    def missing(self) -> tuple[str, ...]:
        """One sentence for each part that was not found, and where it can be had."""
        return self.files.missing

    @property
    def vmlinux(self) -> Path:
        """The vmlinux with symbols. Raises NoDebugInfoError where there is none."""
        if self.files.vmlinux is None:
            raise NoDebugInfoError(
                f"{self.name}: there is no vmlinux with symbols; install the kernel's debug "
                "package, or name one that deb: can fetch."
            )
        return self.files.vmlinux.resolve()

    @property
    def build_id(self) -> str | None:
        """The build id of the vmlinux, in hexadecimal. Raises NoDebugInfoError, BadImageError."""
        with ElfFile.open(self.vmlinux) as elf:
            return elf.build_id


AnyPath = str | os.PathLike[str]
#: A kernel, or what `open_kernel` makes one of.
AnyKernel = Kernel | AnyPath


def open_kernel(
    name: AnyPath,
    modules: AnyPath | None = None,
    *,
    announce: "Announce | None" = None,
) -> Kernel:
    """Find a kernel: a vmlinux, vmlinuz, module, folder, release, or "deb:PACKAGE".

    A folder is a build tree, an unpacked package or /lib/modules/RELEASE; a release is looked up
    where distributions put kernels and debug files; a package is fetched with apt into a cache
    ("deb:A|B" takes the first that apt knows, "deb:A@SUITE" one of that suite of Debian).
    `modules` is a folder to take the modules from instead. Nothing is read yet but what tells one
    kernel from another.

    Raises KernelNotFoundError, FetchError, BadImageError. A part that is missing is no error: see
    `Kernel.missing`.
    """
    spec = os.fspath(name)
    folder = None if modules is None else Path(modules)
    return Kernel(spec, locate(spec, folder, announce=announce))


def as_kernel(
    kernel: AnyKernel, modules: AnyPath | None = None, announce: "Announce | None" = None
) -> Kernel:
    """Open what is not open yet. Raises UsageError for modules of a kernel that is."""
    if not isinstance(kernel, Kernel):
        return open_kernel(kernel, modules, announce=announce)
    if modules is not None:
        raise UsageError("the kernel is open already; name the folder of modules to open_kernel.")
    return kernel
