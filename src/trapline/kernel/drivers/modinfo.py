"""What modules say about themselves: .modinfo of modules, modules.builtin.modinfo of vmlinux.

Sources: `__MODULE_INFO()` in include/linux/moduleparam.h; for modules.builtin.modinfo, kernel
commit 898490c010b5 (v5.2).

Aliases made from device tables (`MODULE_DEVICE_TABLE`) are in loadable modules only: built-in
code has them from v6.18 on. `trapline.kernel.drivers.devicetables` finds those of older kernels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadImageError
from trapline.base.files import read
from trapline.kernel.elf.file import ElfFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trapline.kernel.find.kernelfiles import KernelFiles

# amdgpu's .modinfo is 100 KB, modules.builtin.modinfo of an allyesconfig some megabytes.
_MAX_MODINFO: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One module. `name` is as in `lsmod`, `location` as in modules.builtin or None.

    `aliases` are patterns for modalias strings, `depends` names of modules.
    """

    name: str
    builtin: bool
    location: str | None
    aliases: tuple[str, ...]
    depends: tuple[str, ...]


def module_name(location: str) -> str:
    """Give the name in `lsmod` of the module in a file ("kernel/fs/xxx-yyy.ko" -> "xxx_yyy")."""
    return location.rpartition("/")[2].partition(".")[0].replace("-", "_")


def parse_modinfo(data: bytes | memoryview) -> "Iterator[tuple[str, str]]":
    """Yield (key, value) of NUL-separated "key=value" strings; anything else is skipped."""
    for entry in bytes(data[:_MAX_MODINFO]).split(b"\0"):
        key, equals, value = entry.partition(b"=")
        if equals:
            yield key.decode("utf-8", "replace"), value.decode("utf-8", "replace")


def module_info(elf: ElfFile, name: str, location: str | None = None) -> ModuleInfo:
    """Read the .modinfo section of a loadable module."""
    aliases: list[str] = []
    depends: list[str] = []
    for key, value in parse_modinfo(elf.contents(".modinfo")):
        if key == "alias":
            aliases.append(value)
        elif key == "depends":
            depends.extend(part.replace("-", "_") for part in value.split(",") if part)
    return ModuleInfo(name, False, location, tuple(aliases), tuple(depends))


def read_builtin(files: "KernelFiles") -> "Iterator[ModuleInfo]":
    """Read the modules that are built into vmlinux; none where the lists are missing.

    The lists hold what could have been a module (tristate options), not code that is always
    built in.
    """
    aliases: dict[str, list[str]] = {}
    if files.builtin_modinfo is not None:
        for key, value in parse_modinfo(_read(files.builtin_modinfo)):
            name, dot, field = key.partition(".")
            if dot and field == "alias":
                aliases.setdefault(name, []).append(value)
    if files.builtin_list is None:
        return
    for line in _read(files.builtin_list).decode("utf-8", "replace").splitlines():
        location = line.strip()
        if location:
            name = module_name(location)
            yield ModuleInfo(name, True, location, tuple(aliases.get(name, ())), ())


def _read(path: "Path") -> bytes:
    return read(path, limit=_MAX_MODINFO, what="a list of modules", error=BadImageError)
