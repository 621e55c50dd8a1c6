"""What is said of an allow list: its ids, and what each lets in."""

from typing import TYPE_CHECKING

from trapline.allowlist import virtio
from trapline.report.blocks import Gap, Paragraph, Table
from trapline.report.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.allowlist.entries import AllowEntry, AllowList
    from trapline.report.blocks import Block


def page(allow: "AllowList", verbosity: int = 0) -> "Iterator[Block]":
    """Yield the list's blocks."""
    del verbosity
    yield Paragraph(f"{allow.title}: {counted(len(allow.entries), 'id')} ({allow.source})")
    if allow.entries:
        yield Gap()
        rows = tuple((e.id, e.name, _meaning(e), e.note or "") for e in allow.entries)
        yield Table(("id", "true name", "lets in", "note"), rows)
    else:
        yield Paragraph("The list is empty: it lets in no device, on any bus.")
    if any(_is_transitional(entry) for entry in allow.entries):
        yield Gap()
        yield Paragraph(
            "Linux takes the virtio type of a transitional device (1af4:1000 to 1af4:103f) from "
            "its PCI subsystem id, which the host chooses: each of them lets in every virtio "
            "driver unless the list has virtio entries too."
        )


def _meaning(entry: "AllowEntry") -> str:
    pattern = entry.pattern
    device = pattern.get("d")
    if pattern.bus == "virtio":
        return "any virtio device" if device is None else _type(device)
    if pattern.get("v") == virtio.PCI_VENDOR and device is not None:
        kind = virtio.device_type(device)
        return "no virtio device" if kind is None else _type(kind)
    if pattern.get("v") is None:
        return "any device of the class"
    return "any device of the vendor" if device is None else "this device"


def _type(kind: int) -> str:
    return f"virtio:{kind} ({virtio.DEVICE_TYPES.get(kind, 'reserved')})"


def _is_transitional(entry: "AllowEntry") -> bool:
    device = entry.pattern.get("d")
    return (
        entry.pattern.get("v") == virtio.PCI_VENDOR
        and device is not None
        and virtio.takes_subsystem_id(device)
    )
