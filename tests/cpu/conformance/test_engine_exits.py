"""Exits of the engine: which, where, with what operands; and instructions it does itself.

Outcomes are those of the SDM; instructions are in its volume 2.
"""

import pytest

from bare_guest import (
    ABSENT,
    CODE,
    DATA,
    EFER,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
    FEATURES,
    FEATURES_CR4,
    KERNEL_CS,
    KERNEL_SS,
    STACK,
    TSS,
    USER_CS,
    USER_SS,
    USER_STACK,
    BareGuest,
)
from trapline.cpu.engine import Exit, IoAccess, Reg

STAR, LSTAR, CSTAR, FMASK = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC0000100, 0xC0000101, 0xC0000102
SPEC_CTRL, TSC = 0x48, 0x10
PAT, TSC_AUX = 0x277, 0xC0000103


@pytest.mark.parametrize(
    ("instruction", "kind", "length"),
    [
        ("cpuid", Exit.CPUID, 2),
        (".byte 0x66; cpuid", Exit.CPUID, 3),
        ("rdmsr", Exit.RDMSR, 2),
        ("wrmsr", Exit.WRMSR, 2),
        (".byte 0x48; wrmsr", Exit.WRMSR, 3),
        ("wbinvd", Exit.WBINVD, 2),
        ("invd", Exit.INVD, 2),
        ("rdpmc", Exit.RDPMC, 2),
        ("monitor", Exit.MONITOR, 3),
        ("mwait", Exit.MWAIT, 3),
        ("vmcall", Exit.VMCALL, 3),
        ("tdcall", Exit.TDCALL, 4),
        (".byte 0x66, 0x48, 0x0f, 0x01, 0xcc", Exit.TDCALL, 5),
        ("in al, 0x10", Exit.IO, 2),
        ("outsb", Exit.IO, 1),
        ("vmclear [rax]", Exit.UNDEFINED, 4),
        ("encls", Exit.UNDEFINED, 3),
        ("vmmcall", Exit.UNDEFINED, 3),
    ],
)
def test_an_exit_is_before_its_instruction(instruction, kind, length):
    source = f"mov ecx, 0\n mov esi, DATA\n nop\nhere: {instruction}\nafter: hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        lengths = []

        def note():
            lengths.append(vcpu.length)
            vcpu.advance(vcpu.length)

        guest.on[kind] = note
        guest.run()
        assert guest.exits[0] == (kind, guest.labels["here"])
        assert lengths == [length]
        assert guest.at("after")


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("in al, 0x10", IoAccess(0x10, 1, True, False, False, True, 2)),
        ("in eax, 0x10", IoAccess(0x10, 4, True, False, False, True, 2)),
        ("in ax, dx", IoAccess(0x3F8, 2, True, False, False, False, 2)),
        ("in al, dx", IoAccess(0x3F8, 1, True, False, False, False, 1)),
        ("out dx, al", IoAccess(0x3F8, 1, False, False, False, False, 1)),
        ("out dx, eax", IoAccess(0x3F8, 4, False, False, False, False, 1)),
        ("out 0x80, ax", IoAccess(0x80, 2, False, False, False, True, 3)),
        ("outsb", IoAccess(0x3F8, 1, False, True, False, False, 1)),
        ("rep outsw", IoAccess(0x3F8, 2, False, True, True, False, 3)),
        ("rep insd", IoAccess(0x3F8, 4, True, True, True, False, 2)),
    ],
)
def test_port_accesses_are_described(instruction, expected):
    source = f"mov edx, 0x3f8\n mov ecx, 2\n mov esi, DATA\n mov edi, DATA\n {instruction}"
    with BareGuest(source) as guest:
        guest.on[Exit.IO] = guest.vcpu.stop
        guest.run()
        assert guest.vcpu.io == expected
        assert guest.vcpu.io == expected  # also when it comes from the cache


def test_a_repeated_port_access_of_nothing_does_not_exit():
    with BareGuest("xor ecx, ecx\n mov esi, DATA\n rep outsb\n hlt") as guest:
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


def test_a_port_access_across_a_page_boundary_is_described():
    source = "jmp there\n .org 0xfff, 0x90\nthere: in ax, dx"
    with BareGuest(source) as guest:
        guest.vcpu.regs[Reg.RDX] = 0x1234
        guest.on[Exit.IO] = guest.vcpu.stop
        guest.run()
        assert guest.vcpu.io == IoAccess(0x1234, 2, True, False, False, False, 2)


# Privilege.


@pytest.mark.parametrize(
    "instruction",
    ["hlt", "rdmsr", "wrmsr", "wbinvd", "invd", "mov cr0, rax", "clts", "tdcall", "in al, dx"],
)
def test_a_privileged_instruction_of_the_user_is_a_fault_not_an_exit(instruction):
    with BareGuest(f"to_user user\nuser: {instruction}\nvec_13: hlt") as guest:
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]
        frame = guest.frame(error_code=True)
        assert (frame["rip"], frame["code"]) == (guest.labels["user"], 0)


def test_cpuid_of_the_user_exits():
    with BareGuest("to_user user\nuser: cpuid\nvec_13: hlt") as guest:
        guest.on[Exit.CPUID] = guest.vcpu.stop
        guest.run()
        assert guest.at("user")
        assert guest.vcpu.cpl == 3


@pytest.mark.parametrize(
    ("iopl", "bitmap", "allowed"),
    [(3, None, True), (0, None, False), (0, b"\x00\xff", True), (0, b"\x01\xff", False)],
)
def test_user_port_io_needs_iopl_or_the_bitmap(iopl, bitmap, allowed):
    """Volume 1, section 19.5."""
    source = f"to_user user, {0x2 | iopl << 12}\nuser: in al, 0\nvec_13: hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        if bitmap is not None:
            guest.memory.ram[TSS + 0x68 : TSS + 0x6A] = bitmap
            vcpu.set_segment("tr", vcpu.segment("tr")._replace(limit=0x69))
        guest.on[Exit.IO] = vcpu.stop
        guest.run()
        assert (guest.exits[-1][0] is Exit.IO) is allowed


# SYSCALL and its relatives.

SYSCALL_SETUP = f"""
        mov ecx, {STAR}
        xor eax, eax
        mov edx, {KERNEL_CS | (USER_CS - 16) << 16}
        wrmsr
        mov ecx, {LSTAR}
        lea rax, [rip + entry]
        xor edx, edx
        wrmsr
        mov ecx, {FMASK}
        mov eax, 0x4700
        wrmsr
"""


def syscall_guest(source, *, efer=EFER_SCE):
    guest = BareGuest(source)
    vcpu = guest.vcpu
    for index in (STAR, LSTAR, FMASK, KERNEL_GS_BASE):
        vcpu.native_msr(index, read=True, write=True)
    vcpu.set_msr(EFER, vcpu.msr(EFER) | efer)
    return guest


def test_syscall_and_sysret():
    source = SYSCALL_SETUP + "to_user user, 0x247\nuser: syscall\nback: ud2\n"
    source += "entry: cpuid\n sysretq\nvec_6: hlt"
    with syscall_guest(source) as guest:
        vcpu = guest.vcpu
        seen = {}

        def entry():
            seen.update(rcx=guest.reg("RCX"), r11=guest.reg("R11"), rsp=guest.reg("RSP"))
            seen.update(cpl=vcpu.cpl, cs=vcpu.segment("cs").selector)
            seen.update(ss=vcpu.segment("ss").selector, rflags=vcpu.rflags)
            vcpu.advance(2)

        guest.on[Exit.CPUID] = entry
        guest.run()
        assert seen["rcx"] == guest.labels["back"]
        assert seen["r11"] == 0x247
        assert seen["rflags"] == 0x47  # masked: TF IF DF NT are gone
        assert seen["rsp"] == USER_STACK
        assert (seen["cpl"], seen["cs"], seen["ss"]) == (0, KERNEL_CS, KERNEL_SS)
        frame = guest.frame()
        assert frame["rip"] == guest.labels["back"]
        assert (frame["cs"], frame["ss"]) == (USER_CS | 3, USER_SS | 3)
        assert frame["rflags"] & 0x247 == 0x247


def test_sysret_to_a_non_canonical_address_is_a_fault_of_the_kernel():
    """SYSRET in volume 2B: #GP(0) before the privilege changes, the stack is the user's already."""
    source = SYSCALL_SETUP + "to_user user\nuser: syscall\n"
    source += "entry: mov rcx, 0x800000000000\nhere: sysretq\nvec_13: hlt"
    with syscall_guest(source) as guest:
        guest.run()
        assert guest.at("vec_13")
        frame = guest.frame(error_code=True)
        assert (frame["rip"], frame["code"]) == (guest.labels["here"], 0)
        assert (frame["cs"], frame["rsp"]) == (KERNEL_CS, USER_STACK)


def test_sysret_of_32_bits():
    source = SYSCALL_SETUP + "to_user user\nuser: syscall\n ud2\n"
    source += f"entry: lea rcx, [rip + back]\n bts rcx, 40\n mov r11, {0x3202 | 1 << 16}\n"
    source += ".byte 0x0f, 0x07\nback: ud2\nvec_6: hlt"
    with syscall_guest(source) as guest:
        guest.run()
        frame = guest.frame()
        assert (frame["rip"], frame["cs"]) == (guest.labels["back"], USER_CS - 16 | 3)
        assert (frame["ss"], frame["rflags"] & 0x3202) == (USER_SS | 3, 0x3202)


@pytest.mark.parametrize(("efer", "vector"), [(EFER_SCE, 13), (0, 6)])
def test_sysret_of_the_user_is_a_fault(efer, vector):
    source = f"to_user user\nuser: sysretq\nvec_{vector}: hlt"
    with syscall_guest(source, efer=efer) as guest:
        guest.run()
        assert guest.at(f"vec_{vector}")
        assert guest.frame(error_code=vector == 13)["rip"] == guest.labels["user"]


def test_reading_efer_shows_sce():
    with syscall_guest(f"mov ecx, {EFER}\n rdmsr\n hlt") as guest:
        guest.vcpu.native_msr(EFER, read=True, write=False)
        guest.run()
        assert guest.reg("RAX") == EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE


def test_a_long_syscall_returns_behind_its_prefix():
    source = SYSCALL_SETUP + "to_user user\nuser: .byte 0x48; syscall\nback: ud2\n"
    with syscall_guest(source + "entry: hlt\nvec_6: hlt") as guest:
        guest.run()
        assert guest.reg("RCX") == guest.labels["back"]


def test_syscall_without_sce_is_undefined():
    source = SYSCALL_SETUP + "to_user user\nuser: syscall\nentry: hlt\nvec_6: hlt"
    with syscall_guest(source, efer=0) as guest:
        guest.run()
        assert guest.at("vec_6")
        assert guest.frame()["rip"] == guest.labels["user"]


def test_syscall_in_compatibility_mode_is_undefined():
    """SYSCALL in volume 2B: #UD unless CS.L is set. (AMD differs.)"""
    source = (
        SYSCALL_SETUP
        + f"""
        push USER_SS
        push USER_STACK
        push 2
        push {24 | 3}
        lea rax, [rip + user]
        push rax
        iretq
user:   syscall
entry:  hlt
vec_6:  hlt
    """
    )
    with syscall_guest(source) as guest:
        guest.run()
        assert guest.at("vec_6")


def test_sysenter_in_compatibility_mode():
    source = f"""
        push USER_SS
        push USER_STACK
        push 0x202
        push {24 | 3}
        lea rax, [rip + user]
        push rax
        iretq
user:   sysenter
entry:  hlt
    """
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.set_msr(0x174, KERNEL_CS)
        vcpu.set_msr(0x175, STACK - 0x100)
        vcpu.set_msr(0x176, guest.labels["entry"])
        guest.run()
        assert guest.at("entry")
        assert guest.reg("RSP") == STACK - 0x100
        assert (vcpu.cpl, vcpu.rflags & 0x200) == (0, 0)
        assert vcpu.segment("cs").selector == KERNEL_CS


def test_sysenter_without_a_selector_is_a_fault():
    with BareGuest("sysenter\nvec_13: hlt") as guest:
        guest.run()
        assert guest.at("vec_13")


def test_swapgs():
    source = "swapgs\n rdgsbase rax\n swapgs\n rdgsbase rbx\n hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.set_cr(4, vcpu.cr(4) | 1 << 16)
        vcpu.set_msr(GS_BASE, 0x1111)
        vcpu.set_msr(KERNEL_GS_BASE, 0x2222)
        guest.run()
        assert (guest.reg("RAX"), guest.reg("RBX")) == (0x2222, 0x1111)
        assert vcpu.msr(GS_BASE) == 0x1111


# MSRs.


@pytest.mark.parametrize("index", [LSTAR, SPEC_CTRL, 0x1D9, 0xC0010015, 0x12345678])
def test_a_native_msr_keeps_what_is_written(index):
    source = f"mov ecx, {index}\n mov eax, 0x1234\n mov edx, 1\n wrmsr\n xor eax, eax\n rdmsr\n hlt"
    with BareGuest(source) as guest:
        guest.vcpu.native_msr(index, read=True, write=True)
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]
        assert (guest.reg("RAX"), guest.reg("RDX")) == (0x1234, 1)
        assert guest.vcpu.msr(index) == 0x100001234


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (LSTAR, 1 << 47),
        (FS_BASE, 1 << 63),
        (GS_BASE, ~(1 << 48) & (1 << 64) - 1),
        (KERNEL_GS_BASE, 1 << 47),
        (0x175, 1 << 47),  # SYSENTER_ESP
        (0x176, 1 << 47),  # SYSENTER_EIP
        (FMASK, 1 << 32),
        (TSC_AUX, 1 << 32),
        (PAT, 2),  # no memory type
    ],
)
def test_a_native_msr_refuses_reserved_values(index, value):
    """Volume 4, chapter 2."""
    source = f"mov ecx, {index}\n rdmsr\n mov rbx, {value}\n mov eax, ebx\n shr rbx, 32\n"
    source += "mov edx, ebx\nhere: wrmsr\n ud2\nvec_13: hlt"
    with BareGuest(source) as guest:
        guest.vcpu.native_msr(index, read=True, write=True)
        before = guest.vcpu.msr(index)
        guest.run()
        assert guest.at("vec_13")
        assert guest.frame(error_code=True)["rip"] == guest.labels["here"]
        assert guest.vcpu.msr(index) == before


@pytest.mark.parametrize("index", [LSTAR, SPEC_CTRL])
def test_reads_and_writes_of_an_msr_are_apart(index):
    source = f"mov ecx, {index}\n rdmsr\nhere: wrmsr\n hlt"
    with BareGuest(source) as guest:
        guest.vcpu.native_msr(index, read=True, write=False)
        guest.run()
        assert guest.exits[0] == (Exit.WRMSR, guest.labels["here"])
        guest.vcpu.native_msr(index, read=False, write=True)
        guest.vcpu.regs[Reg.RIP] = CODE
        guest.exits.clear()
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.RDMSR, Exit.HLT]


def test_a_native_time_stamp_counter_msr_reads_the_virtual_time():
    with BareGuest(f"mov ecx, {TSC}\n rdmsr\n hlt") as guest:
        guest.vcpu.native_msr(TSC, read=True, write=False)
        guest.vcpu.cycles = 5 << 32
        guest.run()
        assert guest.reg("RDX") == 5


# Control registers.


@pytest.mark.parametrize(
    ("setup", "instruction"),
    [
        ("mov rax, cr0\n btr eax, 5", "mov cr0, rax"),
        ("smsw eax", "lmsw ax"),
        ("mov rax, cr4\n bts eax, 13", "mov cr4, rax"),
    ],
)
def test_a_watched_bit_exits_with_the_value(setup, instruction):
    with BareGuest(f"{setup}\nhere: {instruction}\n hlt\nvec_13: hlt") as guest:
        vcpu = guest.vcpu
        vcpu.watch_cr(0, 1 << 5 | 1 << 3)
        vcpu.watch_cr(4, 1 << 13)
        guest.on[Exit.CR_WRITE] = vcpu.stop
        before = vcpu.cr(0)
        guest.run()
        if instruction == "lmsw ax":
            assert guest.exits[-1][0] is Exit.HLT  # nothing changes, so nothing exits
            return
        write = vcpu.cr_write
        assert guest.at("here")
        assert write.value == guest.reg("RAX")
        assert write.length == 3
        assert vcpu.cr(0) == before


@pytest.mark.parametrize(
    ("setup", "instruction"),
    [
        ("mov rax, cr0\n bts rax, 29", "mov cr0, rax"),  # NW without CD
        ("mov rax, cr0\n btr rax, 0", "mov cr0, rax"),  # PG without PE
        ("mov rax, cr4\n bts rax, 63", "mov cr4, rax"),
    ],
)
def test_a_watched_bit_exits_before_its_value_is_checked(setup, instruction):
    """Section 26.1.1 of volume 3C: of all faults, only those by privilege come first."""
    with BareGuest(f"{setup}\nhere: {instruction}\nvec_13: hlt") as guest:
        vcpu = guest.vcpu
        vcpu.watch_cr(0, 1 << 29 | 1 << 0)
        vcpu.watch_cr(4, 1 << 63)
        guest.on[Exit.CR_WRITE] = vcpu.stop
        guest.run()
        assert guest.exits[-1] == (Exit.CR_WRITE, guest.labels["here"])
        assert vcpu.cr_write.value == guest.reg("RAX")


def test_clts_is_a_write_to_cr0():
    with BareGuest("mov rax, cr0\n bts eax, 3\n mov cr0, rax\nhere: clts\n hlt") as guest:
        vcpu = guest.vcpu
        guest.run()
        assert not vcpu.cr(0) & 8
        vcpu.watch_cr(0, 8)
        guest.vcpu.regs[Reg.RIP] = CODE
        writes = []

        def note():
            writes.append((guest.reg("RIP"), vcpu.cr_write.value & 8))
            vcpu.set_cr(0, vcpu.cr_write.value)
            vcpu.advance(vcpu.cr_write.length)

        guest.on[Exit.CR_WRITE] = note
        guest.run()
        assert writes == [(guest.labels["here"] - 3, 8), (guest.labels["here"], 0)]


@pytest.mark.parametrize(
    ("register", "bits", "on"),
    [
        ("cr0", 1 << 31, False),  # leaves paging in 64-bit mode
        ("cr0", 1 << 0, False),
        ("cr0", 1 << 29, True),  # NW without CD
        ("cr0", 1 << 40, True),
        ("cr4", 1 << 5, False),  # leaves PAE in long mode
        ("cr4", 1 << 63, True),
        ("cr4", 1 << 12, True),  # LA57
        ("cr4", 1 << 17, True),  # PCIDE: not a feature of this CPU
    ],
)
def test_an_invalid_control_register_value_is_a_fault(register, bits, on):
    """Section 2.5 of volume 3A."""
    change = "or rax, rbx" if on else "not rbx\n and rax, rbx"
    source = (
        f"mov rax, {register}\n mov rbx, {bits}\n {change}\nhere: mov {register}, rax\nvec_13: hlt"
    )
    with BareGuest(source) as guest:
        guest.run()
        assert guest.at("vec_13")
        assert guest.frame(error_code=True)["rip"] == guest.labels["here"]


def test_a_valid_control_register_write_is_done():
    with BareGuest("mov rax, cr4\n or eax, 0x680\n mov cr4, rax\n mov rbx, cr4\n hlt") as guest:
        guest.run()
        assert guest.reg("RBX") == 0x6A0
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


@pytest.mark.parametrize(
    ("selector", "value", "taken"),
    [
        (0, 3, True),
        (0, 1, True),
        (0, 7, False),
        (0, 2, False),
        (0, 1 << 32 | 3, False),
        (1, 3, False),
    ],
)
def test_xsetbv_takes_what_the_engine_can_execute(selector, value, taken):
    """x87 and SSE; XSETBV in volume 2."""
    source = f"""
        mov rax, cr4
        bts eax, 18
        mov cr4, rax
        mov ecx, {selector}
        mov eax, {value & 0xFFFFFFFF}
        mov edx, {value >> 32}
here:   xsetbv
        xor ecx, ecx
        xgetbv
        hlt
vec_13: hlt
    """
    with BareGuest(source) as guest:
        guest.run()
        assert guest.at("vec_13") is not taken
        if taken:
            assert guest.reg("RAX") == value
        else:
            assert guest.frame(error_code=True)["rip"] == guest.labels["here"]


@pytest.mark.parametrize("instruction", ["clflush [rsi]", "clflushopt [rsi]", "clwb [rsi]"])
def test_flushes_of_a_line_execute(instruction):
    with BareGuest(f"mov esi, DATA\n {instruction}\n hlt") as guest:
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


# Time and chance.


def test_the_time_stamp_counter_advances_and_repeats():
    source = "rdtsc\n mov ebx, eax\n rdtsc\n mov esi, eax\n rdtscp\n hlt"
    values = []
    for _ in range(2):
        with BareGuest(source, seed=7) as guest:
            guest.vcpu.cycles = 1 << 33
            guest.vcpu.set_msr(0xC0000103, 77)
            guest.run()
            values.append([guest.reg(name) for name in ("RBX", "RSI", "RAX", "RDX", "RCX")])
    assert values[0] == values[1]
    first, second, third, high, aux = values[0]
    assert first < second < third
    assert (high, aux) == (2, 77)


def test_another_seed_changes_chance_until_a_restore():
    source = "rdrand rbx\n rdtsc\n mov esi, eax\n rdtsc\n sub eax, esi\n hlt"
    with BareGuest(source, seed=1) as guest:
        snapshot = guest.engine.freeze()
        seen = []
        for seed in (None, 5, 6, None):
            guest.engine.restore(snapshot)
            if seed is not None:
                guest.vcpu.reseed(seed)
            guest.run()
            seen.append((guest.reg("RBX"), guest.reg("RAX")))
    assert seen[0] == seen[3]
    assert len({random for random, _ in seen}) == len({took for _, took in seen}) == 3


@pytest.mark.parametrize("instruction", ["rdrand", "rdseed"])
def test_random_numbers_come_from_the_seed(instruction):
    source = f"{instruction} rax\n setc bl\n {instruction} ecx\n {instruction} r9w\n hlt"
    results = []
    for seed in (1, 1, 2):
        with BareGuest(source, seed=seed) as guest:
            guest.vcpu.regs[Reg.RCX] = guest.vcpu.regs[Reg.R9] = (1 << 64) - 1
            guest.run()
            assert guest.reg("RBX") & 1
            assert guest.reg("RCX") >> 32 == 0
            assert guest.reg("R9") >> 16 == (1 << 48) - 1
            results.append([guest.reg(name) for name in ("RAX", "RCX", "R9")])
    assert results[0] == results[1] != results[2]


def test_no_budget_no_boundary():
    with BareGuest("mov ecx, 100000\n1: loop 1b\n hlt") as guest:
        guest.vcpu.set_time_budget(None)
        guest.vcpu.run(guest.handle)
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


def test_the_length_is_known_at_the_end_of_mapped_memory():
    """Only the instruction itself is mapped; the next page is not."""
    with BareGuest("hlt") as guest:
        vcpu = guest.vcpu
        guest.memory.ram[0x3FFFFE:0x400000] = b"\x0f\xa2"
        vcpu.set_segment("cs", vcpu.segment("cs"))
        vcpu.regs[Reg.RIP] = 0x3FFFFE
        guest.on[Exit.CPUID] = vcpu.stop
        guest.run()
        assert vcpu.length == 2


def test_efer_reads_back():
    with BareGuest("hlt") as guest:
        assert guest.vcpu.msr(EFER) == EFER_LME | EFER_LMA | EFER_NXE


def test_data_and_absent_are_what_the_tests_take_them_for():
    with BareGuest("hlt") as guest:
        assert guest.vcpu.translate(DATA) == DATA
        assert guest.vcpu.translate(ABSENT) is None


def test_pause_does_not_exit():
    with BareGuest("pause\n pause\n hlt") as guest:
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


def test_the_time_budget_ends_a_loop_without_events():
    with BareGuest("1: jmp 1b") as guest:
        vcpu = guest.vcpu
        guest.on[Exit.BOUNDARY] = vcpu.stop
        for cycles in (1, 1000, 0, 12345):
            before = vcpu.cycles
            vcpu.set_time_budget(cycles)
            vcpu.run(guest.handle)
            assert vcpu.cycles - before >= cycles
        assert guest.reg("RIP") == CODE


def test_the_features_that_are_announced_work():
    """An instruction of each announced group executes."""
    with BareGuest("hlt") as guest:
        vcpu = guest.vcpu
        vcpu.set_cr(4, vcpu.cr(4) | FEATURES_CR4)
        features = vcpu.cpuid_features
    announced = [
        instruction
        for (leaf, subleaf, register, bit), instruction in FEATURES.items()
        if features[leaf, subleaf, register] >> bit & 1
    ]
    source = "stac\n xor ecx, ecx\n mov esi, DATA\n mov edi, DATA\n"
    source += "\n".join(announced) + "\n hlt\nvec_6: hlt"
    with BareGuest(source) as guest:
        guest.vcpu.set_cr(4, guest.vcpu.cr(4) | FEATURES_CR4)
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]
        assert not guest.at("vec_6")
