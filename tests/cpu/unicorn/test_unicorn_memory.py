"""How the engine on Unicorn keeps memory: tables, files, the list of what was written."""

import random
import struct

import pytest

from bare_guest import CODE, DATA, HIGH, RAM, STACK, TABLES, BareGuest
from trapline.cpu import memoryfile
from trapline.cpu.engine import PageState, Reg
from trapline.cpu.unicorn import open_engine
from trapline.cpu.unicorn.nested import NestedTables

SHARED = 1 << 39
PAGE = 4096
LARGE = 2 << 20

# Write to each page of both halves, without changing it.
SWEEP = f"""
    mov rbx, {HIGH}
    mov rcx, {2 * RAM // PAGE}
next:
    lock or byte ptr [rbx], 0
    add rbx, {PAGE}
    loop next
    hlt
"""


class Model:
    """What the tables should say, page by page."""

    def __init__(self, pages):
        self.states = {False: [True] * pages, True: [False] * pages}

    def set(self, shared, first, count, mapped):
        self.states[shared][first : first + count] = [mapped] * count


@pytest.mark.parametrize("pages", [1, 511, 512, 513, 2048 + 77])
def test_tables_follow_any_sequence_of_changes(pages):
    dice = random.Random(pages)
    tables = NestedTables(0xE0 << 32, pages * PAGE, SHARED)
    model = Model(pages)
    saved = None
    for step in range(60):
        first = dice.randrange(pages)
        count = dice.choice([1, pages - first, dice.randrange(1, pages - first + 1)])
        shared, mapped = dice.random() < 0.5, dice.random() < 0.5
        change = tables.set_shared if shared else tables.set_private
        change(first * PAGE, count * PAGE, PageState(mapped))
        model.set(shared, first, count, mapped)
        if step == 30:
            saved = tables.save(), {half: list(s) for half, s in model.states.items()}
        for half, states in model.states.items():
            base = SHARED if half else 0
            for page in {0, pages - 1, first, min(first + count, pages - 1), dice.randrange(pages)}:
                assert tables.is_mapped(base + page * PAGE) is states[page]
    assert tables.load(saved[0])
    for half, states in saved[1].items():
        base = SHARED if half else 0
        assert [tables.is_mapped(base + page * PAGE) for page in range(pages)] == states
    assert not tables.is_mapped(pages * PAGE)
    tables.close()


def test_each_page_of_both_halves_is_listed_when_written():
    with BareGuest(SWEEP, split=True) as guest:
        guest.memory.set_shared(0, RAM, PageState.MAPPED)
        # The shared half follows the private one in the high mapping.
        high_directory = TABLES + 0x4000
        shared = [guest.memory.shared_bit | gpa | 0x83 for gpa in range(0, RAM, LARGE)]
        struct.pack_into("<8Q", guest.memory.ram, high_directory + RAM // LARGE * 8, *shared)
        guest.run()
        assert sorted(guest.memory.written_pages()) == list(range(0, 2 * RAM, PAGE))


def test_pages_that_are_only_read_are_not_listed():
    source = "mov ebx, DATA\n mov eax, [rbx + 0x5000]\n mov [rbx + 0x1000], eax\n push rax\n hlt"
    with BareGuest(source) as guest:
        guest.run()  # sets accessed and dirty bits
        guest.vcpu.regs[Reg.RIP], guest.vcpu.regs[Reg.RSP] = CODE, STACK
        snapshot = guest.engine.freeze()
        assert guest.memory.written_pages() == []
        guest.run()
        assert set(guest.memory.written_pages()) == {DATA + 0x1000, STACK - 0x1000}
        guest.engine.restore(snapshot)
        assert guest.memory.written_pages() == []


def test_without_a_list_the_kernel_says_which_pages_were_copied():
    """A page table that the native walk does not know: the core fills, and nothing is listed."""
    with BareGuest("mov dword ptr [DATA], 1\n hlt") as guest:
        assert guest.memory.written_pages() == []
        guest.memory.written._flags[1] = 1
        assert guest.memory.written_pages() == list(range(0, RAM, PAGE))
        snapshot = guest.engine.freeze()
        guest.memory.written._flags[1] = 1
        guest.run()
        guest.vcpu.write(DATA + 0x9000, b"host")
        assert {DATA, DATA + 0x9000} <= set(guest.memory.written_pages())
        assert len(guest.memory.written_pages()) < 20
        guest.engine.restore(snapshot)
        assert guest.memory.ram[DATA] == 0


@pytest.mark.parametrize("split", [False, True])
def test_the_digest_touches_no_page(split):
    size = 8 << 20
    engine = open_engine(size, split_ram=split)
    memory = engine.memory
    memory.ram[3 * PAGE : 3 * PAGE + 5] = b"bytes"
    memory.ram[-1] = 1
    before = list(memoryfile.populated(memory.host._fd, size))
    memory.digest()
    assert list(memoryfile.populated(memory.host._fd, size)) == before
    assert len(before) == 2
    engine.close()
