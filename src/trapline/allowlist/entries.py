"""The allow list: which devices a confidential guest lets its drivers bind to.

An entry names devices in one of these ways, in hexadecimal and lower case but for the virtio id:

    1af4:1041      a PCI vendor and device id
    1af4:*         every device of a PCI vendor
    class:0c03     a PCI class: base class, subclass and, optionally, programming interface
    virtio:4       a virtio device id (decimal), for filters that act on the virtio bus
    virtio:*       every virtio device

Matching is done on modalias strings, as the kernel writes them to
/sys/bus/*/devices/*/modalias and scripts/mod/file2alias.c writes them into modules:
"pci:v00001AF4d00001041sv00001AF4sd00001100bc02sc00i00", "virtio:d00000001v00001AF4".
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from trapline.results.scan import AllowedId

# (prefix, digits) of each field, in the order of file2alias.c: do_pci_entry, do_virtio_entry.
_FIELDS: Final = {
    "pci": (("v", 8), ("d", 8), ("sv", 8), ("sd", 8), ("bc", 2), ("sc", 2), ("i", 2)),
    "virtio": (("d", 8), ("v", 8)),
}
_PCI_ID: Final = re.compile(r"([0-9a-f]{4}):([0-9a-f]{4}|\*)")
_PCI_CLASS: Final = re.compile(r"class:([0-9a-f]{2})([0-9a-f]{2})?([0-9a-f]{2})?")
_VIRTIO_ID: Final = re.compile(r"virtio:(\d{1,5}|\*)")
_MAX_ALIAS: Final = 4096


@dataclass(frozen=True, slots=True)
class DeviceAlias:
    """A modalias, or the pattern of one: bus, and a value (or None for any) per field.

    A real device's modalias has a value in every field.
    """

    bus: str
    fields: tuple[tuple[str, int | None], ...]

    @classmethod
    def parse(cls, text: str) -> "DeviceAlias | None":
        """Read a "pci:" or "virtio:" modalias or alias pattern; None for anything else.

        A field is either all hexadecimal digits or "*"; a trailing "*" stands for all fields
        that follow. The patterns of file2alias.c have no other form on these buses.
        """
        bus, colon, rest = text.partition(":")
        if not colon or bus not in _FIELDS or len(text) > _MAX_ALIAS:
            return None
        values: list[tuple[str, int | None]] = []
        open_end = False
        for prefix, digits in _FIELDS[bus]:
            value: str | None = None
            if not open_end:
                match = re.match(rf"{prefix}(?:([0-9A-Fa-f]{{{digits}}})|\*)", rest)
                if match is None:
                    return None
                value, rest = match.group(1), rest[match.end() :]
                open_end = rest == "*" or (rest == "" and value is None)
            values.append((prefix, None if value is None else int(value, 16)))
        return cls(bus, tuple(values)) if open_end or not rest else None

    def get(self, field: str) -> int | None:
        """Return the value of a field by its prefix ("v", "d", "bc", …), None for any."""
        return dict(self.fields).get(field)

    def overlaps(self, other: "DeviceAlias") -> bool:
        """Whether some device matches both patterns."""
        return self.bus == other.bus and all(
            mine is None or theirs is None or mine == theirs
            for (_, mine), (_, theirs) in zip(self.fields, other.fields, strict=True)
        )

    def covers(self, other: "DeviceAlias") -> bool:
        """Whether every device that matches `other` matches this."""
        return self.bus == other.bus and all(
            mine is None or mine == theirs
            for (_, mine), (_, theirs) in zip(self.fields, other.fields, strict=True)
        )

    def pattern(self) -> str:
        """Write the pattern as depmod would, for fnmatch()."""
        text = f"{self.bus}:"
        for (prefix, value), (_, digits) in zip(self.fields, _FIELDS[self.bus], strict=True):
            text += prefix + ("*" if value is None else f"{value:0{digits}X}")
        return text if text.endswith("*") else text + "*"


def parse_id(text: str) -> DeviceAlias:
    """Turn the id of an entry into a pattern; raises ValueError that says what is wrong."""
    if match := _PCI_ID.fullmatch(text):
        vendor, device = match.groups()
        return _pci(v=int(vendor, 16), d=None if device == "*" else int(device, 16))
    if match := _PCI_CLASS.fullmatch(text):
        base, sub, interface = (None if part is None else int(part, 16) for part in match.groups())
        return _pci(bc=base, sc=sub, i=interface)
    if match := _VIRTIO_ID.fullmatch(text):
        number = match.group(1)
        return DeviceAlias("virtio", (("d", None if number == "*" else int(number)), ("v", None)))
    raise ValueError(
        "is none of vendor:device (four hexadecimal digits each, lower case), vendor:*, "
        "class:CC, class:CCSS, class:CCSSPP, virtio:ID (decimal) and virtio:*"
    )


def _pci(**values: int | None) -> DeviceAlias:
    return DeviceAlias("pci", tuple((prefix, values.get(prefix)) for prefix, _ in _FIELDS["pci"]))


@dataclass(frozen=True)
class AllowEntry:
    """One validated line of an allow list. `note` says what the name alone would not."""

    id: str
    name: str
    note: str | None
    pattern: DeviceAlias


@dataclass(frozen=True)
class AllowList:
    """A validated allow list. `source` is what messages call it: a path, or "built-in"."""

    title: str
    source: str
    entries: tuple[AllowEntry, ...]

    @cached_property
    def filters_virtio_bus(self) -> bool:
        """Whether the list has virtio entries, so that a filter on that bus must obey it."""
        return any(entry.pattern.bus == "virtio" for entry in self.entries)

    def matching(self, modalias: str) -> AllowEntry | None:
        """Return the first entry that lets in the device of this modalias, or None."""
        device = DeviceAlias.parse(modalias)
        if device is None:
            return None
        return next((e for e in self.entries if e.pattern.covers(device)), None)

    def admitting(self, alias: str) -> tuple[AllowEntry, ...]:
        """Return the entries that let in some device that a driver's alias pattern matches."""
        pattern = DeviceAlias.parse(alias)
        if pattern is None:
            return ()
        return tuple(e for e in self.entries if e.pattern.overlaps(pattern))

    def documents(self) -> tuple[AllowedId, ...]:
        """Return the entries as result documents carry them."""
        return tuple(AllowedId(id=e.id, name=e.name, note=e.note) for e in self.entries)
