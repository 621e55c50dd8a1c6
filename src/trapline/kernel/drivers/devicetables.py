"""The device tables of drivers that are built into vmlinux, read from the driver structures.

Kernels before v6.18 list the device aliases of loadable modules only, although a built-in driver
binds first. But each driver is a static `struct pci_driver`, `struct virtio_driver` and so on that
points to its table of ids. BTF tells the layouts, the symbol table where objects of the right
size are; what does not look like a driver (a printable name, a probe function in the text, a
table that ends in an empty entry) is left out. Aliases are written as scripts/mod/file2alias.c
writes them.
"""

import itertools
import posixpath
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from trapline.allowlist.entries import DeviceAlias
from trapline.kernel.drivers.kbuild import initcall_module
from trapline.kernel.elf.symtab import STT_FILE, STT_OBJECT
from trapline.kernel.types.btf import Btf

if TYPE_CHECKING:
    from trapline.kernel.elf.file import ElfFile
    from trapline.kernel.types.btf import Member

_ANY: Final = 0xFFFF_FFFF
_VFIO_OVERRIDE: Final = 1  # PCI_ID_F_VFIO_DRIVER_OVERRIDE
_MAX_IDS: Final = 65_536
_MAX_STRING: Final = 256


class BuiltinTable(NamedTuple):
    """One driver structure: the name it registers, its Kbuild module, its device aliases."""

    variable: str
    name: str
    module: str
    aliases: tuple[str, ...]


class _Kind(NamedTuple):
    """How to read one type of driver.

    `name` and `probe` are paths to a string (a pointer or an array) and a function pointer;
    `tables` are pairs of the path to a pointer, and the struct it points to an array of.
    """

    struct: str
    name: str
    probe: str
    tables: tuple[tuple[str, str], ...]


_KINDS: Final = (
    _Kind("pci_driver", "name", "probe", (("id_table", "pci_device_id"),)),
    _Kind("virtio_driver", "driver.name", "probe", (("id_table", "virtio_device_id"),)),
    _Kind(
        "platform_driver",
        "driver.name",
        "probe",
        (("id_table", "platform_device_id"), ("driver.acpi_match_table", "acpi_device_id")),
    ),
    _Kind("acpi_driver", "name", "ops.add", (("ids", "acpi_device_id"),)),
    _Kind("pnp_driver", "name", "probe", (("id_table", "pnp_device_id"),)),
    _Kind("hv_driver", "name", "probe", (("id_table", "hv_vmbus_device_id"),)),
    _Kind("xenbus_driver", "name", "probe", (("ids", "xenbus_device_id"),)),
    _Kind("serio_driver", "driver.name", "connect", (("id_table", "serio_device_id"),)),
)


def read(elf: "ElfFile", builtin: Collection[str] = ()) -> tuple[BuiltinTable, ...]:
    """Find the driver structures of vmlinux; empty without symbols or BTF.

    `builtin` are the names of the modules that are built in: a file without an initcall is
    taken for part of the one whose name its own starts with (8250_pnp.c -> 8250). Raises
    BadImageError where symbols or BTF are not sound.
    """
    data = elf.contents(".BTF")
    if not data or not len(elf.symbols):
        return ()
    btf = Btf.parse(data, name=f"{elf.name}: .BTF")
    return tuple(_Reader(elf, btf, frozenset(builtin)).drivers())


def aliases_by_module(tables: tuple[BuiltinTable, ...]) -> dict[str, tuple[str, ...]]:
    """Merge the aliases of each module's driver structures."""
    merged: dict[str, list[str]] = {}
    for table in tables:
        merged.setdefault(table.module, []).extend(table.aliases)
    return {module: tuple(dict.fromkeys(aliases)) for module, aliases in merged.items()}


class _Reader:
    """Reads structures out of the sections of one vmlinux."""

    def __init__(self, elf: "ElfFile", btf: Btf, builtin: frozenset[str]) -> None:
        self._elf = elf
        self._btf = btf
        self._builtin = builtin
        self._sections = [s for s in elf.sections if s.is_alloc and s.file_size]
        self._layouts: dict[str, dict[str, Member]] = {}

    def drivers(self) -> Iterator[BuiltinTable]:
        """Yield the drivers, by kind and then in the order of the symbol table."""
        symbols = self._elf.symbols
        files = np.cumsum(symbols.kinds == STT_FILE)
        modules = self._modules_of_files(files.tolist())
        sizes = symbols.records["size"]
        for kind in _KINDS:
            size = self._btf.size(kind.struct)
            if not size:
                continue
            for index in np.flatnonzero((symbols.kinds == STT_OBJECT) & (sizes == size)).tolist():
                address = int(symbols.records["value"][index])
                found = self._driver(kind, address, size)
                if found is not None:
                    name, aliases = found
                    module = modules.get(int(files[index])) or name.replace("-", "_")
                    yield BuiltinTable(symbols.name(index), name, module, aliases)

    def _modules_of_files(self, files: list[int]) -> dict[int, str]:
        """Map the running number of each STT_FILE to a module; local symbols follow their file.

        An initcall names the module; without one, the file's own name may.
        """
        named: dict[int, str] = {}
        called: dict[int, str] = {}
        kinds = self._elf.symbols.kinds.tolist()
        for index, symbol in enumerate(self._elf.symbols.names):
            if kinds[index] == STT_FILE:
                stem = posixpath.splitext(posixpath.basename(symbol))[0].replace("-", "_")
                if module := self._builtin_prefix(stem):
                    named[files[index]] = module
            elif module := initcall_module(symbol):
                called[files[index]] = module
        return {**named, **called}

    def _builtin_prefix(self, stem: str) -> str | None:
        words = stem.split("_")
        candidates = ("_".join(words[:length]) for length in range(len(words), 0, -1))
        return next((name for name in candidates if name in self._builtin), None)

    def _driver(self, kind: _Kind, address: int, size: int) -> tuple[str, tuple[str, ...]] | None:
        data = self._bytes(address, size)
        if len(data) != size:
            return None
        name = self._name(data, kind)
        probe = self._pointer(data, kind.struct, kind.probe)
        if not name or not self._in_text(probe):
            return None
        aliases: list[str] = []
        for path, struct in kind.tables:
            table = self._pointer(data, kind.struct, path)
            if table:
                found = self._table(table, struct)
                if found is None:
                    return None
                aliases += found
        if kind.struct == "platform_driver" and not self._pointer(data, kind.struct, "id_table"):
            # drivers/base/platform.c: platform_match() then compares the driver's own name.
            aliases.append(f"platform:{name}")
        return name, tuple(dict.fromkeys(aliases))

    def _name(self, data: bytes, kind: _Kind) -> str:
        member = self._layout(kind.struct).get(kind.name)
        if member is not None and member.type_name.startswith("char ["):
            text = (
                data[member.offset :].partition(b"\0")[0][:_MAX_STRING].decode("ascii", "replace")
            )
            return text if text.isprintable() else ""
        return self._string(self._pointer(data, kind.struct, kind.name))

    def _table(self, address: int, struct: str) -> list[str] | None:
        """Return the aliases of an id table, None where it is none."""
        size = self._btf.size(struct)
        layout = self._layout(struct)
        if not size or not layout:
            return None
        aliases: list[str] = []
        for _ in range(_MAX_IDS):
            entry = self._bytes(address, size)
            if len(entry) != size:
                return None
            if not any(entry):
                return aliases
            aliases += _ALIASES[struct](_Entry(entry, layout, size))
            address += size
        return None

    def _layout(self, struct: str) -> "dict[str, Member]":
        if struct not in self._layouts:
            self._layouts[struct] = self._btf.struct(struct) or {}
        return self._layouts[struct]

    def _pointer(self, data: bytes, struct: str, path: str) -> int:
        """Read the pointer at a path such as "driver.name"; 0 where there is no such member."""
        offset = 0
        for part in path.split("."):
            member = self._layout(struct).get(part)
            if member is None:
                return 0
            offset += member.offset
            struct = member.type_name.removeprefix("struct ")
        return int.from_bytes(data[offset : offset + 8], "little")

    def _bytes(self, address: int, size: int) -> bytes:
        for section in self._sections:
            offset = address - section.address
            if 0 <= offset < section.size:
                return bytes(self._elf.contents(section)[offset : offset + size])
        return b""

    def _string(self, address: int) -> str:
        text, end, _ = self._bytes(address, _MAX_STRING).partition(b"\0")
        name = text.decode("ascii", "replace")
        return name if end and name.isprintable() else ""

    def _in_text(self, address: int) -> bool:
        return any(
            s.is_executable and s.address <= address < s.address + s.size for s in self._sections
        )


class _Entry:
    """One entry of an id table."""

    def __init__(self, data: bytes, layout: "dict[str, Member]", size: int) -> None:
        self._data = data
        starts = sorted({member.offset for member in layout.values()} | {size})
        self._ends = dict(itertools.pairwise(starts))
        self._layout = layout

    def number(self, field: str, width: int = 4) -> int:
        """Read an unsigned number; 0 for a member that this kernel does not have."""
        member = self._layout.get(field)
        if member is None:
            return 0
        return int.from_bytes(self._data[member.offset : member.offset + width], "little")

    def raw(self, field: str) -> bytes:
        """Read all bytes up to the next member."""
        member = self._layout.get(field)
        return b"" if member is None else self._data[member.offset : self._ends[member.offset]]

    def text(self, field: str) -> str:
        """Read a NUL-terminated string."""
        return self.raw(field).partition(b"\0")[0].decode("ascii", "replace")


def _pci(entry: _Entry) -> list[str]:
    kind, mask = entry.number("class"), entry.number("class_mask")
    fields: list[tuple[str, int | None]] = [
        (prefix, None if value == _ANY else value)
        for prefix, field in (("v", "vendor"), ("d", "device"), ("sv", "subvendor"))
        for value in (entry.number(field),)
    ]
    subdevice = entry.number("subdevice")
    fields.append(("sd", None if subdevice == _ANY else subdevice))
    for prefix, shift in (("bc", 16), ("sc", 8), ("i", 0)):
        whole = mask >> shift & 0xFF == 0xFF
        fields.append((prefix, kind >> shift & 0xFF if whole else None))
    alias = DeviceAlias("pci", tuple(fields)).pattern()
    if entry.number("override_only") & _VFIO_OVERRIDE:
        alias = alias.replace("pci:", "vfio_pci:", 1)
    return [alias]


def _virtio(entry: _Entry) -> list[str]:
    fields = tuple(
        (prefix, None if value == _ANY else value)
        for prefix, field in (("d", "device"), ("v", "vendor"))
        for value in (entry.number(field),)
    )
    return [DeviceAlias("virtio", fields).pattern()]


def _platform(entry: _Entry) -> list[str]:
    return [f"platform:{entry.text('name')}"]


def _acpi(entry: _Entry) -> list[str]:
    # Entries without an id match by device class; file2alias.c writes the class's digits.
    if name := entry.text("id"):
        return [f"acpi*:{name}:*"]
    kind, mask = entry.number("cls"), entry.number("cls_msk")
    digits = (
        f"{kind >> shift & 0xFF:02x}" if mask >> shift & 0xFF else "??" for shift in (16, 8, 0)
    )
    return [f"acpi*:{''.join(digits)}:*"]


def _pnp(entry: _Entry) -> list[str]:
    # file2alias.c: do_pnp_device_entry writes both, as ACPI may enumerate the device.
    name = entry.text("id")
    return [f"pnp:d{name}*", f"acpi*:{name.upper()}:*"]


def _vmbus(entry: _Entry) -> list[str]:
    return [f"vmbus:{entry.raw('guid').hex()}"]


def _xen(entry: _Entry) -> list[str]:
    return [f"xen:{entry.text('devicetype')}"]


def _serio(entry: _Entry) -> list[str]:
    fields = (("ty", "type"), ("pr", "proto"), ("id", "id"), ("ex", "extra"))
    text = "".join(
        prefix + ("*" if value == 0xFF else f"{value:02X}")
        for prefix, field in fields
        for value in (entry.number(field, 1),)
    )
    return [f"serio:{text}*" if not text.endswith("*") else f"serio:{text}"]


_ALIASES: "Final[dict[str, Callable[[_Entry], list[str]]]]" = {
    "pci_device_id": _pci,
    "virtio_device_id": _virtio,
    "platform_device_id": _platform,
    "acpi_device_id": _acpi,
    "pnp_device_id": _pnp,
    "hv_vmbus_device_id": _vmbus,
    "xenbus_device_id": _xen,
    "serio_device_id": _serio,
}
