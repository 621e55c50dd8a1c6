"""Back traces over hand-made stacks: calls, exceptions, stack switches, and garbage."""

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.kernel.live.orc import OrcEntry, OrcReg, OrcType
from trapline.kernel.live.unwind import (
    MAX_FRAMES,
    MAX_GUESSES,
    STACK_SIZE,
    SavedRegisters,
    unwind,
    with_guesses,
)

STACK = 0xFFFFC90000010000
IRQ_STACK = 0xFFFFC90000100000
TEXT = 0xFFFFFFFF81000000
END = TEXT + 0xF000
KERNEL_CS = 0x10
USER_CS = 0x33


class Memory:
    """Sparse guest memory in 8-byte words."""

    def __init__(self, *stacks):
        self.pages = {}
        for base in stacks or (STACK,):
            for page in range(0, STACK_SIZE, 4096):
                self.pages[base + page] = bytearray(4096)

    def put(self, address, *words):
        for index, word in enumerate(words):
            at = address + 8 * index
            struct.pack_into("<Q", self.pages[at & ~0xFFF], at & 0xFFF, word & (1 << 64) - 1)

    def read(self, gla, size):
        out = b""
        while size:
            page = self.pages.get(gla & ~0xFFF)
            if page is None:
                return None
            part = min(size, 4096 - (gla & 0xFFF))
            out += page[gla & 0xFFF : (gla & 0xFFF) + part]
            gla, size = gla + part, size - part
        return out


def registers(rip, rsp, rbp=0, cs=KERNEL_CS, **others):
    fields = dict.fromkeys(SavedRegisters._fields, 0)
    return SavedRegisters(**fields | {"rip": rip, "rsp": rsp, "rbp": rbp, "cs": cs} | others)


def call(sp_offset, sp_reg=OrcReg.SP, bp_reg=OrcReg.UNDEFINED, bp_offset=0):
    return OrcEntry(sp_offset, bp_offset, sp_reg, bp_reg, OrcType.CALL, signal=False)


def end():
    return OrcEntry(0, 0, 0, 0, OrcType.END_OF_STACK, signal=False)


def regs(kind=OrcType.REGS, sp_offset=0):
    return OrcEntry(sp_offset, 0, OrcReg.SP, OrcReg.UNDEFINED, kind, signal=True)


def finder(**by_name):
    """Functions of 0x100 bytes from TEXT on, in the order given; END ends the stack."""
    entries = {TEXT + 0x100 * i: e for i, e in enumerate(by_name.values())} | {END: end()}
    return lambda address: entries.get(address & ~0xFF)


def is_text(address):
    return TEXT <= address < TEXT + 0x10000


def test_calls_are_followed_to_the_end_of_the_stack():
    memory = Memory()
    memory.put(STACK + 0x100, 0xAAAA, TEXT + 0x120)
    memory.put(STACK + 0x110, 0xBBBB, 0xCCCC, END + 5)
    trace = unwind(
        registers(TEXT + 0x10, STACK + 0x100), memory.read, finder(leaf=call(16), outer=call(24))
    )
    assert [f.address for f in trace.frames] == [TEXT + 0x10, TEXT + 0x120, END + 5]
    assert [f.slot for f in trace.frames] == [None, STACK + 0x108, STACK + 0x120]
    assert [f.is_call for f in trace.frames] == [False, True, True]
    assert trace.complete


def test_a_return_address_is_looked_up_at_its_call():
    """A call that does not return may be a function's last instruction."""
    memory = Memory()
    memory.put(STACK + 0x100, TEXT + 0x200)  # one past `noreturn_caller`
    memory.put(STACK + 0x108, 0, END + 1)
    find = finder(leaf=call(8), noreturn_caller=call(16), unrelated=call(4096))
    trace = unwind(registers(TEXT, STACK + 0x100), memory.read, find)
    assert trace.complete
    assert trace.frames[-1].address == END + 1


def test_frame_pointer_functions_restore_rbp():
    memory = Memory()
    memory.put(STACK + 0x200, STACK + 0x300, TEXT + 0x110)  # saved rbp, return address
    memory.put(STACK + 0x300, 0, END + 1)
    with_bp = call(16, OrcReg.BP, OrcReg.PREV_SP, -16)
    trace = unwind(
        registers(TEXT, STACK + 0x100, rbp=STACK + 0x200),
        memory.read,
        finder(leaf=with_bp, outer=with_bp),
    )
    assert trace.complete
    assert [f.address for f in trace.frames] == [TEXT, TEXT + 0x110, END + 1]


def test_code_without_an_entry_is_assumed_to_keep_a_frame_pointer():
    memory = Memory()
    memory.put(STACK + 0x200, 0, END + 1)
    trace = unwind(registers(0xFFFFFFFFC0001234, STACK, rbp=STACK + 0x200), memory.read, finder())
    assert trace.complete
    assert trace.frames[1].address == END + 1


def test_a_jump_to_null_shows_its_caller():
    memory = Memory()
    memory.put(STACK, END + 7)
    trace = unwind(registers(0, STACK), memory.read, finder())
    assert [f.address for f in trace.frames] == [0, END + 7]
    assert trace.complete


def test_a_return_address_of_0_is_the_end_of_the_stack():
    memory = Memory()
    trace = unwind(registers(TEXT, STACK), memory.read, finder(start=call(8)))
    assert [f.address for f in trace.frames] == [TEXT]
    assert trace.complete


def test_an_exception_frame_brings_all_registers():
    """The handler was called from entry code, which stands on pt_regs."""
    memory = Memory()
    memory.put(STACK + 0x100, TEXT + 0x110)
    interrupted = registers(TEXT + 0x220, STACK + 0x800, r10=STACK + 0x900, rax=0x1234)
    memory.put(STACK + 0x108, *interrupted)
    memory.put(STACK + 0x8F8, END + 1)  # below r10, where GCC's realigned frame finds it
    find = finder(handler=call(8), entry=regs(), realigned=call(0, OrcReg.R10))
    trace = unwind(registers(TEXT, STACK + 0x100), memory.read, find)
    assert [f.address for f in trace.frames] == [TEXT, TEXT + 0x110, TEXT + 0x220, END + 1]
    assert trace.frames[2].registers == interrupted
    assert not trace.frames[2].is_call
    assert trace.complete


def test_entry_code_has_only_what_the_cpu_pushed():
    memory = Memory()
    memory.put(STACK + 0x100, TEXT + 0x110, KERNEL_CS, 0x202, STACK + 0x400, 0x18)
    memory.put(STACK + 0x400, END + 1)
    find = finder(entry=regs(OrcType.REGS_PARTIAL), interrupted=call(8))
    trace = unwind(registers(TEXT, STACK + 0x100), memory.read, find)
    assert [f.address for f in trace.frames] == [TEXT, TEXT + 0x110, END + 1]
    assert trace.frames[1].registers is None
    assert trace.complete


def test_a_trace_ends_where_ring_3_was_interrupted():
    memory = Memory()
    memory.put(STACK, *registers(0x401000, 0x7FFC0000, cs=USER_CS))
    trace = unwind(registers(TEXT, STACK), memory.read, finder(entry=regs()))
    assert trace.complete
    assert trace.frames[-1].is_user
    assert trace.frames[-1].address == 0x401000


def test_a_stopped_ring_3_has_no_kernel_frames():
    trace = unwind(registers(0x401000, 0x7FFC0000, cs=USER_CS), lambda *_: None, finder())
    assert trace.complete
    assert len(trace.frames) == 1


def test_irq_stack_leads_back_to_the_task_stack():
    memory = Memory(STACK, IRQ_STACK)
    top = IRQ_STACK + STACK_SIZE - 8
    memory.put(top, STACK + 0x100)  # call_on_stack() keeps the old RSP in the top word
    memory.put(top - 8, TEXT + 0x110)
    memory.put(STACK + 0x0F8, 0, END + 1)
    switched = OrcEntry(8, 0, OrcReg.SP_INDIRECT, 0, OrcType.CALL, signal=False)
    trace = unwind(
        registers(TEXT, top - 8), memory.read, finder(handler=call(8), call_on_stack=switched)
    )
    assert [f.address for f in trace.frames] == [TEXT, TEXT + 0x110, END + 1]
    assert trace.complete


def test_a_stack_that_leads_to_itself_ends():
    memory = Memory()
    memory.put(STACK, STACK)
    looping = OrcEntry(8, 0, OrcReg.SP_INDIRECT, 0, OrcType.CALL, signal=False)
    trace = unwind(registers(TEXT, STACK), memory.read, lambda _: looping)
    assert not trace.complete
    assert len(trace.frames) <= 2


def test_an_unmapped_stack_gives_the_registers_frame_only():
    trace = unwind(registers(TEXT, 0), lambda *_: None, finder(leaf=call(8)))
    assert not trace.complete
    assert [f.address for f in trace.frames] == [TEXT]


def test_guesses_lie_between_known_frames():
    memory = Memory()
    memory.put(STACK + 0x100, TEXT + 0x777, 5, TEXT + 0x120)
    memory.put(STACK + 0x118, TEXT + 0x888, END + 5)
    trace = unwind(
        registers(TEXT + 0x10, STACK + 0x100), memory.read, finder(leaf=call(24), outer=call(16))
    )
    frames = with_guesses(trace, memory.read, is_text)
    assert [(f.address, f.is_guess) for f in frames] == [
        (TEXT + 0x10, False),
        (TEXT + 0x777, True),
        (TEXT + 0x120, False),
        (TEXT + 0x888, True),
        (END + 5, False),
    ]


def test_where_the_walk_is_lost_the_rest_of_the_stack_is_guessed():
    memory = Memory()
    memory.put(STACK + STACK_SIZE - 16, TEXT + 0x42)
    lost = OrcEntry(0, 0, 0, 0, OrcType.UNDEFINED, signal=False)
    trace = unwind(registers(TEXT, STACK + 0x100), memory.read, lambda _: lost)
    frames = with_guesses(trace, memory.read, is_text)
    assert [f.address for f in frames] == [TEXT, TEXT + 0x42]
    assert frames[1].is_guess


def test_guesses_are_bounded():
    memory = Memory()
    memory.put(STACK, *[TEXT + 1] * (STACK_SIZE // 8))
    lost = OrcEntry(0, 0, 0, 0, OrcType.UNDEFINED, signal=False)
    trace = unwind(registers(TEXT, STACK), memory.read, lambda _: lost)
    assert len(with_guesses(trace, memory.read, is_text)) == 1 + MAX_GUESSES


words = st.one_of(
    st.integers(0, 2**64 - 1),
    st.integers(STACK, STACK + STACK_SIZE),
    st.integers(TEXT, TEXT + 0xFFFF),
)
entries = st.builds(
    OrcEntry,
    st.integers(-(2**15), 2**15 - 1),
    st.integers(-(2**15), 2**15 - 1),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 7),
    st.booleans(),
)


@settings(deadline=None)
@given(
    st.lists(words, min_size=21, max_size=21),
    st.lists(words, max_size=400),
    st.lists(entries, min_size=1, max_size=8),
    st.booleans(),
)
def test_no_stack_and_no_table_breaks_the_walk(values, content, table, on_stack):
    memory = Memory()
    memory.put(STACK + 0x800, *content)
    start = SavedRegisters(*values)
    if on_stack:
        start = start._replace(rsp=STACK + 0x800 + (start.rsp & 0x3F8), cs=KERNEL_CS)
    trace = unwind(start, memory.read, lambda address: table[address % len(table)])
    assert 1 <= len(trace.frames) <= MAX_FRAMES
    frames = with_guesses(trace, memory.read, is_text)
    assert len(frames) <= MAX_FRAMES + MAX_GUESSES
