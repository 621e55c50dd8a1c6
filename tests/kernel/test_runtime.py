"""Run-time addresses: slides, modules that come and go, the decompressor, and finding KASLR."""

import struct

import pytest

from trapline.kernel.binary import TextSection
from trapline.kernel.elf.functions import Symbol
from trapline.kernel.live.orc import OrcReg, OrcTable, OrcType
from trapline.kernel.live.runtime import (
    KERNEL_MAP,
    PHYSICAL_ALIGN,
    RuntimeSymbols,
    Span,
    detect_slide,
)
from trapline.results.scan import Frame

TEXT = 0xFFFFFFFF81000000
SLIDE = 0x1A000000
MODULE = 0xFFFFFFFFC0400000
MODULE_LINK = 0x1000


class Image:
    """Functions of 0x100 bytes each, with one inlined function in all of them."""

    def __init__(self, name, base, names):
        self.name = name
        self.base = base
        self.names = names
        self.text = (TextSection(".text", base, memoryview(bytes(0x100 * len(names)))),)

    def symbol_at(self, address):
        index = (address - self.base) // 0x100
        if not 0 <= index < len(self.names):
            return None
        return Symbol(self.names[index], self.base + 0x100 * index, 0x100)

    def chain(self, address):
        symbol = self.symbol_at(address)
        if symbol is None:
            return ()
        return (
            Frame(function="inlined", file="include/a.h", line=3),
            Frame(function=symbol.name, file="kernel/a.c", line=(address - symbol.address) or None),
        )


@pytest.fixture
def symbols():
    found = RuntimeSymbols()
    image = Image("vmlinux", TEXT, ["start", "middle", "end"])
    found.place_vmlinux(image, SLIDE, physical=0x2000000)
    found.place(Image("virtio_net", MODULE_LINK, ["probe"]), [Span(MODULE, 0x100, MODULE_LINK)])
    found.place_decompressor(0x100000, 0x10000)
    return found


@pytest.mark.parametrize(
    ("address", "label"),
    [
        (TEXT + SLIDE, "start+0x0/0x100"),
        (TEXT + SLIDE + 0x112, "middle+0x12/0x100"),
        (TEXT - KERNEL_MAP + 0x2000000 + 0x2FF, "end+0xff/0x100"),
        (TEXT + SLIDE + 0x300, "0xffffffff9b000300"),
        (TEXT, "0xffffffff81000000"),
        (MODULE + 5, "probe+0x5/0x100 [virtio_net]"),
        (0x100010, "decompressor+0x10"),
        (0x110000, "0x110000"),
        (0, "0x0"),
    ],
)
def test_labels_read_as_printk_gives_them(symbols, address, label):
    assert symbols.locate(address).label == label


def test_a_return_address_belongs_to_the_call_before_it(symbols):
    location = symbols.locate(TEXT + SLIDE + 0x100, is_call=True)
    assert location.label == "start+0x100/0x100"
    assert location.frames[-1].line == 0xFF
    assert symbols.locate(TEXT + SLIDE + 0x100).label == "middle+0x0/0x100"


def test_what_cannot_be_a_return_address_is_taken_for_a_pointer(symbols):
    symbols.place(Image("m", 0x1000, ["init"]), [Span(MODULE + 0x1000 - 0x10, 0x110, 0xFF0)])
    assert symbols.locate(MODULE + 0x1000, is_call=True).label == "init+0x0/0x100 [m]"


def test_inline_chains_and_link_addresses_come_along(symbols):
    location = symbols.locate(TEXT + SLIDE + 0x20)
    assert [frame.function for frame in location.frames] == ["inlined", "start"]
    assert location.source == "include/a.h:3"
    assert location.link_address == TEXT + 0x20
    assert symbols.link_address(MODULE + 5) == ("virtio_net", MODULE_LINK + 5)
    assert symbols.link_address(5) is None


def test_user_addresses_are_never_looked_up(symbols):
    assert symbols.locate(TEXT + SLIDE, is_user=True).label == f"user+{TEXT + SLIDE:#x}"


def test_a_module_loaded_over_an_unloaded_one_replaces_it(symbols):
    assert symbols.locate(MODULE).image == "virtio_net"
    symbols.place(Image("e1000", 0, ["reset"]), [Span(MODULE - 0x80, 0x100, 0)])
    assert symbols.locate(MODULE).label == "reset+0x80/0x100 [e1000]"
    assert not symbols.is_text(MODULE + 0x90)


def test_empty_spans_are_ignored(symbols):
    symbols.place(Image("empty", 0, []), [Span(MODULE, 0, 0)])
    assert symbols.locate(MODULE).image == "virtio_net"


def test_orc_is_looked_up_at_the_link_time_address():
    flags = OrcReg.SP | OrcType.CALL << 8
    orc = OrcTable.parse(struct.pack("<i", 0), TEXT, struct.pack("<hhH", 8, 0, flags), 3)
    found = RuntimeSymbols()
    found.place_vmlinux(Image("vmlinux", TEXT, ["f"]), SLIDE, orc)
    assert found.find_orc(TEXT + SLIDE + 4).is_plain_call
    assert found.find_orc(TEXT + 4) is None


def test_the_slide_is_found_by_the_banner():
    banner = b"Linux version 6.12.0"
    landmark = 0xFFFFFFFF82000040

    def read(gla, size):
        return banner[:size] if gla == landmark + 37 * PHYSICAL_ALIGN else None

    assert detect_slide(read, landmark, banner) == 37 * PHYSICAL_ALIGN
    assert detect_slide(lambda *_: None, landmark, banner) is None
    assert detect_slide(lambda _, size: b"\0" * size, landmark, banner) is None
    assert detect_slide(lambda *_: banner, (1 << 64) - 4, banner) is None
