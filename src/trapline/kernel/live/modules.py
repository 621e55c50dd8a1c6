"""Which modules a running kernel has loaded, and where, read from its memory.

The kernel keeps `struct module` in the list `modules`; member offsets come from its BTF. The
memory belongs to a guest that may be hostile or broken: names, counts and pointers are checked,
and the walk is bounded.

Layouts: module.mem[] since ac3b43283923 (v6.4), before that core_layout and init_layout. The
order of sections within a module's text is that of __layout_sections() (kernel/module/main.c).
"""

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from trapline.kernel.elf.file import SHT_PROGBITS
from trapline.kernel.live.orc import OrcTable
from trapline.kernel.live.runtime import Span

if TYPE_CHECKING:
    from trapline.kernel.binary import Binary
    from trapline.kernel.types.btf import Btf

MAX_MODULES: Final = 4096
_MAX_ORC: Final = 1 << 19  # entries; Debian's largest module has some 60,000
_MAX_TEXT: Final = 256 << 20
_NAME: Final = re.compile(rb"[A-Za-z0-9_.-]{1,55}\0")
_NAME_SIZE: Final = 56  # MODULE_NAME_LEN of a 64-bit kernel
_POINTER: Final = struct.Struct("<Q")
_UINT: Final = struct.Struct("<I")

ReadMemory = Callable[[int, int], bytes | None]


class Area(NamedTuple):
    """A piece of guest memory; `size` in bytes."""

    start: int
    size: int


class LoadedModule(NamedTuple):
    """A module in the guest, its struct module at `address`.

    `init` is its init text, None once that has been freed.
    """

    name: str
    address: int
    text: Area
    init: Area | None


class ModuleReader:
    """Reads the list of modules; `head` is the run-time address of the symbol `modules`.

    `usable` is False where the BTF does not describe modules; then `read` returns nothing.
    """

    def __init__(self, read: ReadMemory, btf: "Btf", head: int) -> None:
        self._read = read
        self._head = head
        self._module = btf.struct("module") or {}
        self._arch = btf.struct("mod_arch_specific") or {}
        self._memory = btf.struct("module_memory") or {}
        self._memory_size = btf.size("module_memory") or 0
        self._layout = btf.struct("module_layout") or {}
        types = btf.enum("mod_mem_type") or {}
        self._text_index = types.get("MOD_TEXT", 0)
        self._init_index = types.get("MOD_INIT_TEXT", 0)
        has_areas = ("mem" in self._module and {"base", "size"} <= set(self._memory)) or (
            "core_layout" in self._module and {"base", "text_size"} <= set(self._layout)
        )
        self.usable = {"list", "name"} <= set(self._module) and has_areas

    def read(self) -> tuple[LoadedModule, ...]:
        """Return what is in the list now, as far as it makes sense."""
        if not self.usable:
            return ()
        found: list[LoadedModule] = []
        link = self._pointer(self._head)
        seen = {self._head}
        while link and link not in seen and len(found) < MAX_MODULES:
            seen.add(link)
            module = self._one(link - self._module["list"].offset)
            if module is None:
                break
            found.append(module)
            link = self._pointer(link)
        return tuple(found)

    def orc(self, module: LoadedModule, version: int) -> OrcTable | None:
        """Return the table that the kernel itself uses for a module: run-time addresses.

        `version` is the format of the kernel's own.
        """
        names = ("num_orcs", "orc_unwind_ip", "orc_unwind")
        if "arch" not in self._module or not set(names) <= set(self._arch):
            return None
        count, ip, unwind = (
            module.address + self._module["arch"].offset + self._arch[name].offset for name in names
        )
        entries = self._uint(count) or 0
        ip_at, unwind_at = self._pointer(ip), self._pointer(unwind)
        if not 0 < entries <= _MAX_ORC or not ip_at or not unwind_at:
            return None
        ips = self._bytes(ip_at, 4 * entries)
        rows = self._bytes(unwind_at, 6 * entries)
        if ips is None or rows is None:
            return None
        return OrcTable.parse(ips, ip_at, rows, version)

    def _one(self, address: int) -> LoadedModule | None:
        raw = self._bytes(address + self._module["name"].offset, _NAME_SIZE)
        name = None if raw is None else _NAME.match(raw)
        if name is None:
            return None
        text = self._area(address, self._text_index, "core_layout")
        if text is None:
            return None
        return LoadedModule(
            name[0][:-1].decode("ascii"),
            address,
            text,
            self._area(address, self._init_index, "init_layout"),
        )

    def _area(self, address: int, index: int, layout: str) -> Area | None:
        if "mem" in self._module:
            at = address + self._module["mem"].offset + index * self._memory_size
            members, size_name = self._memory, "size"
        else:
            at = address + self._module[layout].offset
            members, size_name = self._layout, "text_size"
        base = self._pointer(at + members["base"].offset)
        size = self._uint(at + members[size_name].offset)
        return Area(base, size) if base and size and size <= _MAX_TEXT else None

    def _pointer(self, address: int) -> int | None:
        data = self._bytes(address, _POINTER.size)
        return None if data is None else int(_POINTER.unpack(data)[0])

    def _uint(self, address: int) -> int | None:
        data = self._bytes(address, _UINT.size)
        return None if data is None else int(_UINT.unpack(data)[0])

    def _bytes(self, address: int, size: int) -> bytes | None:
        if address < 0 or address + size > 1 << 64:
            return None
        data = self._read(address, size)
        return data if data is not None and len(data) == size else None


def module_spans(binary: "Binary", module: LoadedModule) -> list[Span]:
    """Say where each code section of a module file ended up in the guest.

    Sections that do not fit into the module's memory, as when the guest runs another build of
    it, are left out.
    """
    sections = [
        section
        for section in binary.elf.sections
        if section.is_alloc and section.is_executable and section.type == SHT_PROGBITS
    ]
    linked = {part.name: part.address for part in binary.text}
    spans = []
    for is_init, area in ((False, module.text), (True, module.init)):
        if area is None:
            continue
        offset = 0
        for section in sections:
            if section.name.startswith(".init") != is_init:
                continue
            alignment = max(section.alignment, 1)
            offset = (offset + alignment - 1) // alignment * alignment
            if section.name in linked and offset + section.size <= area.size:
                spans.append(Span(area.start + offset, section.size, linked[section.name]))
            offset += section.size
    return spans
