"""Messages formatted from a va_list in guest memory."""

import struct

import pytest

from trapline.kernel.live.printk import Printk, read_string

BASE = 0xFFFFC90000000000
LIST, SAVED, STACK, STRINGS = BASE, BASE + 0x100, BASE + 0x200, BASE + 0x300


def memory_of(values, strings=b""):
    """Lay out a va_list of which the first four words were in registers."""
    ram = bytearray(0x1000)
    struct.pack_into("<IIQQ", ram, 0, 16, 48, STACK, SAVED)  # two registers went to the format
    words = [value & 2**64 - 1 for value in values]
    for index, word in enumerate(words):
        at = 0x110 + 8 * index if index < 4 else 0x200 + 8 * (index - 4)
        struct.pack_into("<Q", ram, at, word)
    ram[0x300 : 0x300 + len(strings)] = strings

    def read(address, size):
        start = address - BASE
        return bytes(ram[start : start + size]) if start >= 0 and start + size <= 0x1000 else None

    return read


def text(message, *values, strings=b""):
    return Printk(memory_of(values, strings), lambda at: f"f+{at:#x}").text(message, LIST)


@pytest.mark.parametrize(
    ("message", "values", "said"),
    [
        (b"WARNING: CPU: %d PID: %d at %s:%d %pS\n", (0, 1, STRINGS, 77, 0x10),
         "WARNING: CPU: 0 PID: 1 at mm/slub.c:77 f+0x10"),
        (b"Oops: %s: %04lx [#%d]", (STRINGS, 2, 1), "Oops: mm/slub.c: 0002 [#1]"),
        (b"%d %u %x %#lx %c %%", (-1, -1, -1, -1, 65),
         "-1 4294967295 ffffffff 0xffffffffffffffff A %"),
        (b"%-4d|%*d|%.2s", (7, 3, 5, STRINGS), "7   |  5|mm"),
        (b"%px %p", (0x12, 0x34), "0000000000000012 0000000000000034"),
        (b"%s", (0,), "(null)"),
        (b"five %d %d %d %d %d six %d", (1, 2, 3, 4, 5, 6), "five 1 2 3 4 5 six 6"),
    ],
)  # fmt: skip
def test_it_reads_as_the_kernel_prints_it(message, values, said):
    assert text(message, *values, strings=b"mm/slub.c\0") == said


def test_a_va_list_that_is_not_there_is_no_error():
    assert Printk(lambda *_: None, str).text(b"a %d b %s", 0) == "a ? b ?"


def test_a_string_ends_at_its_limit_and_at_the_end_of_memory():
    read = memory_of((), b"x" * 0x300)
    assert read_string(read, STRINGS, 8) == b"x" * 8
    assert read_string(read, BASE + 0xFFC, 64) == b"\0" * 0
    assert read_string(read, 0, 8) is None
    assert read_string(read, 2**64 - 4, 64) is None
