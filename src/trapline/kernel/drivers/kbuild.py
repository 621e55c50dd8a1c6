"""Which Kbuild module a compilation unit of vmlinux belongs to.

Makefiles are not part of a compiled kernel, so that "drivers/nvme/host/pci.c is in nvme.ko" has
to be read off what is: modules.builtin names the modules, the dynamic-debug descriptors of the
kernel hold pairs of file and module (`struct _ddebug`, include/linux/dynamic_debug.h), and the
symbol of an initcall holds the module's name (`__initcall__kmod_nvme__332_3523_nvme_init6`,
include/linux/init.h) behind the STT_FILE symbol of its file.
"""

import posixpath
import re
from typing import TYPE_CHECKING, Final

from trapline.kernel.drivers.modinfo import module_name
from trapline.kernel.elf.symtab import STT_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from trapline.kernel.elf.file import ElfFile

# sizeof(struct _ddebug) depends on the configuration: four pointers, one word of bit fields,
# and a static key with CONFIG_JUMP_LABEL.
_DDEBUG_SIZES: Final = (56, 40, 48, 64)
_INITCALL: Final = "__initcall__kmod_"
_INITCALL_NAME: Final = re.compile(_INITCALL + r"(.+?)__\d+_\d+_")
_MAX_STRING: Final = 512
_MAX_DESCRIPTORS: Final = 200_000


class UnitMap:
    """Maps source files to the modules built into vmlinux.

    `locations` are the lines of modules.builtin; `known` pairs of source file and KBUILD_MODNAME
    from the kernel itself, which take precedence over what names suggest; `initcalls` pairs of
    file name without folder and KBUILD_MODNAME.
    """

    def __init__(
        self,
        locations: "Iterable[str]",
        known: "Mapping[str, str] | None" = None,
        initcalls: "Iterable[tuple[str, str]]" = (),
    ) -> None:
        self._by_folder: dict[str, list[str]] = {}
        for location in locations:
            folder = posixpath.dirname(location.removeprefix("kernel/"))
            self._by_folder.setdefault(folder, []).append(module_name(location))
        self._initcalls = set(initcalls)
        self._modules = {name for names in self._by_folder.values() for name in names}
        self._known = {
            file: name.replace("-", "_")
            for file, name in (known or {}).items()
            if name.replace("-", "_") in self._modules
        }

    def module_of(self, unit: str) -> str | None:
        """Return the module of a source file or object below the tree's top, None for none.

        In order: what the kernel itself says; the module of the same name in the same folder;
        the longest module name there that is a prefix up to an underscore
        (virtio_pci_common.c -> virtio_pci); the one module there that has an initcall in a file
        of this name.
        """
        stem, _ = posixpath.splitext(unit)
        for suffix in (".c", ".S"):
            if name := self._known.get(stem + suffix):
                return name
        folder, _, base = stem.rpartition("/")
        names = self._by_folder.get(folder)
        if not names:
            return None
        base = base.replace("-", "_")
        fitting = [name for name in names if base == name or base.startswith(name + "_")]
        if fitting:
            return max(fitting, key=len)
        file = posixpath.basename(stem) + ".c"
        calling = [name for name in names if (file, name) in self._initcalls]
        return calling[0] if len(calling) == 1 else None


def debug_descriptors(elf: "ElfFile") -> dict[str, str]:
    """Return source file -> module name from the dynamic-debug descriptors of vmlinux.

    Empty where the kernel has none, or no symbols to find them by.
    """
    start = elf.symbols.address("__start___dyndbg")
    stop = elf.symbols.address("__stop___dyndbg")
    if start is None or stop is None or stop <= start:
        return {}
    for size in _DDEBUG_SIZES:
        if (stop - start) % size == 0 and (stop - start) // size <= _MAX_DESCRIPTORS:
            pairs = list(_pairs(elf, start, stop, size))
            if len(pairs) == (stop - start) // size:
                return dict(pairs)
    return {}


def initcall_files(elf: "ElfFile") -> set[tuple[str, str]]:
    """Return (file name without folder, module name) for each initcall in the symbol table."""
    found: set[tuple[str, str]] = set()
    file = ""
    symbols = elf.symbols
    for name, kind in zip(symbols.names, symbols.kinds.tolist(), strict=True):
        if kind == STT_FILE:
            file = posixpath.basename(name)
        elif (module := initcall_module(name)) is not None:
            found.add((file, module))
    return found


def initcall_module(symbol: str) -> str | None:
    """Return the module that an initcall's symbol names, None for other symbols."""
    if not symbol.startswith(_INITCALL):
        return None
    match = _INITCALL_NAME.match(symbol)
    return None if match is None else match.group(1).replace("-", "_")


def _pairs(elf: "ElfFile", start: int, stop: int, size: int) -> "Iterator[tuple[str, str]]":
    data = _bytes_at(elf, start, stop - start)
    if len(data) != stop - start:
        return
    for offset in range(0, len(data), size):
        module = _string_at(elf, int.from_bytes(data[offset : offset + 8], "little"))
        file = _string_at(elf, int.from_bytes(data[offset + 16 : offset + 24], "little"))
        if not module or not file:
            return
        yield file, module


def _bytes_at(elf: "ElfFile", address: int, size: int) -> bytes:
    for section in elf.sections:
        if section.is_alloc and section.file_size and 0 <= address - section.address < section.size:
            offset = address - section.address
            return bytes(elf.contents(section)[offset : offset + size])
    return b""


def _string_at(elf: "ElfFile", address: int) -> str:
    text, end, _ = _bytes_at(elf, address, _MAX_STRING).partition(b"\0")
    return text.decode("utf-8", "replace") if end else ""
