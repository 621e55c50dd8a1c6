"""Memory of the engine: second-level tables, EPT violations, walks, self-modifying code."""

import struct

import pytest

from bare_guest import (
    ABSENT,
    CODE,
    DATA,
    HIGH,
    RAM,
    STACK,
    TABLES,
    BareGuest,
)
from trapline.base.errors import BadMachineError
from trapline.cpu.engine import EptViolation, Exit, PageState, Reg

PAGE = 0x1000


def violation_of(instruction, *, gla=DATA + 0x18, gpa=DATA, shared=True, setup=""):
    """The EPT violation of one access to a page that the guest maps to `gpa`; without shared bit.

    That it has the bit, or not, is looked at here.
    """
    with BareGuest(f"mov ebx, {gla}\n {setup}\nhere: {instruction}\n hlt") as guest:
        bit = guest.memory.shared_bit if shared else 0
        guest.map(gla & ~0xFFF, bit | gpa | 7)
        guest.vcpu.set_cr(4, guest.vcpu.cr(4) | 1 << 9)  # OSFXSR
        guest.on[Exit.EPT_VIOLATION] = guest.vcpu.stop
        guest.run()
        if guest.exits[-1][0] is Exit.HLT:
            return None
        if not guest.vcpu.ept.is_fetch:
            assert guest.at("here")
        assert guest.vcpu.vectoring is None
        violation = guest.vcpu.ept
        assert violation.gpa & guest.memory.shared_bit == bit
        return violation._replace(gpa=violation.gpa & ~bit)


@pytest.mark.parametrize(
    ("instruction", "offset", "is_write"),
    [
        ("mov eax, [rbx]", 0x18, False),
        ("mov [rbx], eax", 0x18, True),
        ("mov byte ptr [rbx + 7], 1", 0x1F, True),
        ("movzx eax, word ptr [rbx + 2]", 0x1A, False),
        ("add dword ptr [rbx], 1", 0x18, False),  # the read comes first
        ("lock xadd [rbx], eax", 0x18, False),
        ("push [rbx]", 0x18, False),
        ("movups xmm0, [rbx]", 0x18, False),
        ("fxsave [rbx + 8]", 0x20, True),
        ("mov rsi, rbx\n lodsd", 0x18, False),
        ("mov rdi, rbx\n stosq", 0x18, True),
    ],
)
def test_a_violation_tells_both_addresses_and_the_access(instruction, offset, is_write):
    setup, _, instruction = instruction.rpartition("\n")
    violation = violation_of(instruction, setup=setup)
    assert violation == EptViolation(
        gpa=DATA | offset,
        gla=DATA | offset,
        is_write=is_write,
        is_fetch=False,
        is_walk=False,
    )


def test_a_fetch_from_nowhere_is_a_fetch():
    violation = violation_of("jmp rbx")
    assert violation.is_fetch
    assert not violation.is_write
    assert (violation.gpa, violation.gla) == (DATA | 0x18, DATA | 0x18)


def test_a_private_address_outside_memory_is_a_violation():
    violation = violation_of("mov eax, [rbx]", gpa=0x80000000, shared=False)
    assert violation.gpa == 0x80000018


def test_an_access_across_pages_tells_the_page_that_is_missing():
    violation = violation_of("mov eax, [rbx - 2]", gla=DATA + PAGE, gpa=DATA + PAGE)
    assert violation.gla == DATA + PAGE
    assert violation.gpa == DATA + PAGE


@pytest.mark.parametrize("large", [0, 1])
def test_a_violation_through_a_large_page(large):
    with BareGuest("mov ebx, 0x600000 + 0x1234\n mov [rbx], eax\n hlt") as guest:
        at = TABLES + 0x3000 + 3 * 8
        guest.memory.ram[at : at + 8] = struct.pack("<Q", guest.memory.shared_bit | 0x600000 | 0x87)
        if large:
            guest.memory.set_private(0x600000, 2 << 20, PageState.ABSENT)
            guest.memory.ram[at : at + 8] = struct.pack("<Q", 0x600000 | 0x87)
        guest.on[Exit.EPT_VIOLATION] = guest.vcpu.stop
        guest.run()
        assert guest.vcpu.ept.gpa == (0 if large else guest.memory.shared_bit) | 0x601234
        assert guest.vcpu.ept.gla == 0x601234


@pytest.mark.parametrize(
    "place",
    [
        lambda _: 0x80000000,
        lambda bit: bit * 2 - 0x1000,
        lambda bit: bit | TABLES,
        lambda bit: bit << 6,  # beyond the guest-physical space
    ],
)
def test_page_tables_in_nowhere_are_a_violation(place):
    with BareGuest("mov cr3, rax\n nop\n hlt") as guest:
        cr3 = place(guest.memory.shared_bit)
        guest.vcpu.regs[Reg.RAX] = cr3
        guest.on[Exit.EPT_VIOLATION] = guest.vcpu.stop
        guest.run()
        assert guest.exits[-1][0] is Exit.EPT_VIOLATION
        assert guest.vcpu.ept.is_walk
        assert guest.vcpu.ept.gpa & ~0xFFF == cr3


def test_a_page_table_in_nowhere_is_a_violation_of_its_gpa():
    with BareGuest("mov ebx, 0x400000\n mov eax, [rbx]\n hlt") as guest:
        at = TABLES + 0x3000 + 2 * 8
        guest.memory.ram[at : at + 8] = struct.pack("<Q", 0x90000000 | 7)
        guest.on[Exit.EPT_VIOLATION] = guest.vcpu.stop
        guest.run()
        violation = guest.vcpu.ept
        assert (violation.gpa, violation.gla) == (0x90000000, 0x400000)
        assert violation.is_walk
        assert not violation.is_write


def test_a_retried_access_sees_the_page_once_it_is_there():
    source = "mov ebx, DATA\n mov eax, [rbx]\n hlt"
    with BareGuest(source) as guest:
        memory = guest.memory
        memory.ram[DATA : DATA + 4] = b"\x78\x56\x34\x12"
        memory.set_private(DATA, PAGE, PageState.ABSENT)
        guest.on[Exit.EPT_VIOLATION] = lambda: memory.set_private(DATA, PAGE, PageState.MAPPED)
        guest.run()
        assert guest.reg("RAX") == 0x12345678
        assert [kind for kind, _ in guest.exits] == [Exit.EPT_VIOLATION, Exit.HLT]


def test_shared_and_private_show_the_same_bytes():
    alias = DATA + PAGE
    source = f"mov ebx, DATA\n mov ecx, {alias}\n mov dword ptr [rcx], 77\n mov eax, [rbx]\n hlt"
    with BareGuest(source) as guest:
        guest.map(alias, guest.memory.shared_bit | DATA | 7)
        guest.memory.set_shared(guest.memory.shared_bit | DATA, PAGE, PageState.MAPPED)
        guest.run()
        assert guest.reg("RAX") == 77
        assert guest.memory.ram[DATA] == 77
        assert guest.vcpu.read(alias, 4) == b"M\0\0\0"


def test_unmapping_a_page_takes_effect_though_it_was_used():
    source = "mov ebx, DATA\n mov eax, [rbx]\n cpuid\n mov ebx, DATA\nhere: mov eax, [rbx]\n hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        guest.on[Exit.CPUID] = lambda: (
            guest.memory.set_private(DATA, PAGE, PageState.ABSENT),
            vcpu.advance(2),
        )
        guest.on[Exit.EPT_VIOLATION] = vcpu.stop
        guest.run()
        assert guest.at("here")


# Walks from outside.


def test_translate_follows_all_page_sizes():
    with BareGuest("hlt") as guest:
        vcpu = guest.vcpu
        assert vcpu.translate(0x123456) == 0x123456  # 4 KiB
        assert vcpu.translate(0x812345) == 0x812345  # 2 MiB
        assert vcpu.translate(HIGH + 0x654321) == 0x654321
        assert vcpu.translate(ABSENT) is None
        assert vcpu.translate(1 << 47) is None  # not canonical
        guest.map(DATA, guest.memory.shared_bit | 0x5000 | 7)
        assert vcpu.translate(DATA + 1) == guest.memory.shared_bit | 0x5001
        at = TABLES + 0x1000 + 8
        guest.memory.ram[at : at + 8] = struct.pack("<Q", 0x40000000 | 0x83)
        assert vcpu.translate(ABSENT + 0x1234567) == 0x41234567  # 1 GiB


def test_read_and_write_by_linear_address():
    with BareGuest("hlt") as guest:
        vcpu = guest.vcpu
        assert vcpu.write(DATA + 0xFFE, b"abcd")
        assert vcpu.read(DATA + 0xFFE, 4) == b"abcd"
        assert bytes(guest.memory.ram[DATA + 0xFFE : DATA + 0x1002]) == b"abcd"
        guest.map(DATA + PAGE, 0)
        assert vcpu.read(DATA + 0xFFE, 4) is None
        assert not vcpu.write(DATA + 0xFFE, b"wxyz")
        assert vcpu.read(DATA + 0xFFE, 2) == b"ab"  # nothing of it was written
        guest.map(DATA, 0x80000000 | 7)
        assert vcpu.read(DATA, 1) is None


# Code that changes.


def test_code_written_by_the_guest_takes_effect():
    source = """
        call there
        mov byte ptr [rip + there + 1], 2
        call there
        hlt
there:  mov eax, 1
        ret
    """
    with BareGuest(source) as guest:
        guest.run()
        assert guest.reg("RAX") == 2


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_code_written_through_another_address_takes_effect(rounds):
    """The other address is not executable, so the core alone would miss the write."""
    source = f"""
        mov rbx, {HIGH}
        lea rcx, [rip + there]
        add rbx, rcx
        mov edx, {rounds}
        mov r8, {HIGH + DATA}
        mov [r8], rax
1:      call there
        inc byte ptr [rbx + 1]
        dec edx
        jnz 1b
        call there
        hlt
        .org 0x2000
there:  mov eax, 1
        ret
    """
    with BareGuest(source) as guest:
        guest.run()
        assert guest.reg("RAX") == 1 + rounds


def test_code_written_before_it_is_first_executed_is_what_executes():
    source = f"""
        mov rbx, {HIGH + DATA}
        mov ecx, 3
1:      mov dword ptr [rbx], 0xc3c0ff
        mov eax, DATA
        xchg eax, esi
        call rsi
        add byte ptr [rbx + 1], 1
        loop 1b
        hlt
    """
    with BareGuest(source) as guest:
        guest.vcpu.regs[Reg.RAX] = 0
        guest.run()
        assert guest.exits[-1][0] is Exit.HLT


def test_code_written_from_outside_takes_effect():
    source = "call there\n cpuid\n call there\n hlt\n .org 0x1000\nthere: mov eax, 1\n ret"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        at = guest.labels["there"] + 1
        guest.on[Exit.CPUID] = lambda: (vcpu.write(at, b"\x05"), vcpu.advance(2))
        guest.run()
        assert guest.reg("RAX") == 5


def test_a_change_of_a_page_tables_entry_needs_invlpg_only():
    """INVLPG inside a 2 MiB page drops all of it."""
    source = """
        mov ebx, 0x600000
        mov eax, [rbx + 0x1000]
        mov ecx, TABLE
        mov rdx, TARGET
        mov [rcx], rdx
        invlpg [rbx + 0x5000]
        mov eax, [rbx + 0x1000]
        hlt
    """
    target = 0x800000 | 0x87
    source = f".set TABLE, {TABLES + 0x3000 + 24}\n .set TARGET, {target}\n" + source
    with BareGuest(source) as guest:
        guest.memory.ram[0x801000:0x801004] = b"\x09\0\0\0"
        guest.run()
        assert guest.reg("RAX") == 9


def test_accessed_and_dirty_bits_are_set():
    source = "mov ebx, DATA\n mov eax, [rbx]\n cpuid\n mov ebx, DATA\n mov [rbx], eax\n hlt"
    with BareGuest(source) as guest:
        at = TABLES + 0x5000 + (DATA >> 12) * 8
        ram = guest.memory.ram
        states = []
        guest.on[Exit.CPUID] = lambda: (states.append(ram[at]), guest.vcpu.advance(2))
        assert ram[at] & 0x60 == 0
        guest.run()
        assert states[0] & 0x60 == 0x20
        assert ram[at] & 0x60 == 0x60


@pytest.mark.parametrize(
    ("entry", "access", "code"),
    [
        (DATA | 5, "mov [rbx], eax", 3),  # read-only, CR0.WP
        (1 << 63 | DATA | 7, "jmp rbx", 0x11),  # NX
        (DATA | 7 | 1 << 50, "mov eax, [rbx]", 9),  # reserved: beyond the physical address
    ],
)
def test_permissions_are_kept(entry, access, code):
    """Volume 3A, section 4.6 and 4.7."""
    with BareGuest(f"mov ebx, DATA\n {access}\n hlt\nvec_14: hlt") as guest:
        guest.map(DATA, entry)
        guest.run()
        assert guest.at("vec_14")
        assert guest.frame(error_code=True)["code"] == code


@pytest.mark.parametrize(
    ("cr4", "source", "code"),
    [
        (1 << 21, "mov eax, [rbx]", 1),  # SMAP
        (1 << 21, "stac\n mov eax, [rbx]", None),
        (1 << 20, "jmp rbx", 0x11),  # SMEP
    ],
)
def test_user_pages_are_guarded_from_the_supervisor(cr4, source, code):
    """Volume 3A, section 4.6.1. The guest's code is put where no user can reach it."""
    source = f"mov ebx, DATA\n {source}\n hlt\nvec_14: hlt"
    with BareGuest(source) as guest:
        for page in range(0, 0x300000, PAGE):
            guest.map(page, page | 3)
        guest.vcpu.set_cr(4, guest.vcpu.cr(4) | cr4)
        guest.run()
        if code is None:
            assert not guest.at("vec_14")
        else:
            assert guest.frame(error_code=True)["code"] == code


def test_user_mode_cannot_touch_supervisor_pages():
    with BareGuest(f"to_user user\nuser: mov rbx, {HIGH}\n mov eax, [rbx]\nvec_14: hlt") as guest:
        guest.run()
        assert guest.frame(error_code=True)["code"] == 5


# What an engine is opened with, and its end.


@pytest.mark.parametrize(("gpa", "size"), [(0, RAM + PAGE), (RAM, PAGE), (5, PAGE), (0, 100)])
def test_only_whole_pages_of_memory_have_a_state(gpa, size):
    with BareGuest("hlt") as guest, pytest.raises(ValueError, match="whole pages"):
        guest.memory.set_private(gpa, size, PageState.ABSENT)


@pytest.mark.parametrize("size", [0, -PAGE, 5, PAGE + 1, 1 << 50])
def test_no_engine_without_a_sane_memory_size(factory, size):
    with pytest.raises(BadMachineError, match="guest memory of"):
        factory(size)


def test_a_guest_of_gigabytes_starts(factory):
    engine = factory(8 << 30)
    engine.memory.ram[(8 << 30) - 1] = 1
    engine.memory.set_private(7 << 30, PAGE, PageState.ABSENT)
    engine.close()


def test_close_can_be_repeated_and_ends_use():
    guest = BareGuest("hlt")
    guest.engine.close()
    guest.engine.close()
    with pytest.raises(ValueError, match="closed"):
        guest.vcpu.run(guest.handle)


def test_engines_do_not_share_anything():
    with BareGuest("mov eax, 1\n hlt") as one, BareGuest("mov eax, 2\n hlt") as two:
        one.run()
        two.run()
        assert (one.reg("RAX"), two.reg("RAX")) == (1, 2)
        assert one.memory.ram[CODE + 1] == 1
        assert one.reg("RSP") == two.reg("RSP") == STACK
