"""The rules as assembled guests see them, on the real engine."""

import struct

import pytest

from hostile import machine_of
from trapline.machine.devices.uart import COM1
from trapline.machine.outcome import OutcomeKind
from trapline.rules.rows import CpuAccess, CpuidKind, CpuidOutcome, MsrAction, MsrKind, MsrSpecial
from trapline.rules.tables import load

RULES = load("1.5.01")
SHARED_MMIO = 0xFEC00000

# Print one character and keep every register; `letter` is an immediate or a register.
PRINT = f"""
        .macro put letter
        push rax
        push rcx
        push r10
        push r11
        push r12
        push r13
        push r14
        push r15
        mov r15, \\letter
        mov r12d, 1
        mov r13d, 1
        mov r14d, {COM1}
        tdvmcall 30
        pop r15
        pop r14
        pop r13
        pop r12
        pop r11
        pop r10
        pop rcx
        pop rax
        .endm
        .macro veinfo_get
        push rax
        push rcx
        push rdx
        push r8
        push r9
        push r10
        mov eax, 3
        tdcall
        pop r10
        pop r9
        pop r8
        pop rdx
        pop rcx
        pop rax
        .endm
"""


def say(source, table=b"", **options):
    """Run a guest; returns its outcome and what it printed."""
    printed = bytearray()
    machine = machine_of(PRINT + source, table, echo=printed.extend, **options)
    try:
        outcome = machine.run()
    finally:
        machine.close()
    return outcome, printed.decode().replace("\n", "")


# Every instruction at `probe` once for each entry of a table; n: nothing, v: #VE, g: #GP.
PROBE = """
        gate 20, on_ve
        gate 13, on_gp
        load_idt
        mov rbx, TABLE
next:   mov eax, [rbx]
        mov ecx, [rbx + 4]
        mov r14, [rbx + 8]
        test r14, r14
        jz done
        push rbx
        xor edx, edx
        mov rbp, rsp
        %s
        mov rsp, rbp
        put 'n'
back:   pop rbx
        add rbx, 16
        jmp next
done:   power_off
on_ve:  veinfo_get
        mov rsp, rbp
        put 'v'
        jmp back
on_gp:  mov rsp, rbp
        put 'g'
        jmp back
"""


def probe(instruction, entries):
    table = b"".join(struct.pack("<IIQ", eax, ecx, 1) for eax, ecx in entries)
    outcome, letters = say(PROBE % instruction, table + bytes(16))
    assert outcome.kind is OutcomeKind.POWERED_OFF
    assert len(letters) == len(entries)
    return letters


def msr_letter(action, access, way):
    """What a TD with only the TSC deadline timer sees."""
    if action in {MsrAction.NATIVE, MsrAction.EMULATED}:
        return "n" if access in {CpuAccess.BOTH, way} else "g"
    return {
        MsrAction.VE: "v",
        MsrAction.GP: "g",
        MsrAction.NATIVE_UNLESS_GP: "g",
        MsrAction.NATIVE_UNLESS_EMULATED: "n",
        MsrAction.GP_UNLESS_VE: "v",
    }[action]


def msr_rows():
    return [
        row
        for row in RULES.msrs
        if row.followed
        and row.kind == MsrKind.RANGE
        # Off in this TD, where the table's word is "#VE if on".
        and not (row.read == MsrAction.GP_UNLESS_VE and row.read_feature != "tsc_deadline")
    ]


def test_rdmsr_of_every_row():
    rows = msr_rows()
    letters = probe("rdmsr", [(0, row.first) for row in rows])
    wrong = [
        (row.id, letter)
        for row, letter in zip(rows, letters, strict=True)
        if letter != msr_letter(row.read, row.cpu_access, CpuAccess.READ)
    ]
    assert wrong == []


def test_wrmsr_of_zero_to_every_row():
    # EFER, bases and system call targets are needed, APIC registers have their own rules.
    rows = [
        row
        for row in msr_rows()
        if row.special == MsrSpecial.NONE
        and row.first not in range(0xC0000080, 0xC0000104)
        and row.first != 0x277  # PAT of zeros is fine, but slow: all memory uncached
    ]
    letters = probe("wrmsr", [(0, row.first) for row in rows])
    wrong = [
        (row.id, letter)
        for row, letter in zip(rows, letters, strict=True)
        if letter != msr_letter(row.write, row.cpu_access, CpuAccess.WRITE)
    ]
    assert wrong == []


def test_cpuid_of_every_row():
    rows = [r for r in RULES.cpuid if r.followed and r.kind == CpuidKind.LEAF]
    letters = probe("cpuid", [(row.first, row.subleaf or 0) for row in rows])
    wrong = [
        (row.id, letter)
        for row, letter in zip(rows, letters, strict=True)
        if letter != ("v" if row.outcome == CpuidOutcome.VE else "n")
    ]
    assert wrong == []


OSXSAVE = "mov rax, cr4; bts rax, 18; mov cr4, rax; "


@pytest.mark.parametrize(
    ("instruction", "letter"),
    [
        ("hlt", "v"),
        ("wbinvd", "v"),
        ("invd", "v"),
        ("vmcall", "v"),
        ("in al, dx", "v"),
        ("rdpmc", "g"),
        ("mov rax, cr0; btr rax, 5; mov cr0, rax", "g"),  # NE
        ("mov rax, cr0; bts rax, 30; mov cr0, rax", "v"),  # CD
        ("mov rax, cr0; bts rax, 29; mov cr0, rax", "v"),  # NW without CD
        ("mov rax, cr0; btr rax, 0; btr rax, 31; mov cr0, rax", "v"),  # PE and PG
        ("mov rax, cr0; btr rax, 0; mov cr0, rax", "g"),  # PG without PE
        ("mov rax, cr4; btr rax, 6; mov cr4, rax", "v"),  # MCE
        ("mov rax, cr4; bts rax, 13; mov cr4, rax", "v"),  # VMXE
        ("mov rax, cr4; bts rax, 22; mov cr4, rax", "g"),  # PKE
        ("mov rax, cr4; bts rax, 2; mov cr4, rax", "n"),  # TSD
        ("mov rax, cr0; mov cr0, rax", "n"),
        ("rdtsc", "n"),
        ("pause", "n"),
        (OSXSAVE + "xor ecx, ecx; mov eax, 3; xsetbv", "n"),
        (OSXSAVE + "xor ecx, ecx; mov eax, 7; xsetbv", "g"),  # AVX is not in XFAM
        (OSXSAVE + "xor ecx, ecx; mov eax, 2; xsetbv", "g"),
        (OSXSAVE + "mov ecx, 1; mov eax, 3; xsetbv", "g"),
        ("mov ecx, 0xc0000082; mov edx, 0x8000; wrmsr", "g"),  # LSTAR, not canonical
        ("mov ecx, 0x600; mov edx, 0x8000; wrmsr", "g"),  # DS_AREA
    ],
)
def test_instructions(instruction, letter):
    assert probe(instruction, [(0, 0)]) == letter


def test_rf_is_set_in_the_frame_of_a_ve():
    outcome, letters = say("""
        gate 20, on_ve
        load_idt
        hlt
on_ve:  bt qword ptr [rsp + 16], 16
        jc set
        put 'c'
        power_off
set:    put 's'
        power_off
""")
    assert outcome.kind is OutcomeKind.POWERED_OFF
    assert letters == "s"


def test_an_nmi_waits_until_ve_info_is_collected():
    outcome, letters = say("""
        gate 20, on_ve
        gate 2, on_nmi
        load_idt
        hlt
on_ve:  mov r12d, 0x830                 # ICR: an NMI to this processor itself
        mov r13d, 0x44400
        tdvmcall 32
        put 'a'
        put 'b'
        veinfo_get
        put 'c'
        power_off
on_nmi: put 'N'
        iretq
""")
    assert outcome.kind is OutcomeKind.POWERED_OFF
    assert letters == "abNc"


def test_an_nmi_without_ve_info_is_delivered_at_once():
    outcome, letters = say("""
        gate 2, on_nmi
        load_idt
        mov r12d, 0x830
        mov r13d, 0x44400
        tdvmcall 32
        put 'a'
        power_off
on_nmi: put 'N'
        mov r12d, 0x830                 # a second one waits for IRET
        mov r13d, 0x44400
        cmp ebx, 1
        je out
        mov ebx, 1
        tdvmcall 32
        put 'n'
out:    iretq
""")
    assert outcome.kind is OutcomeKind.POWERED_OFF
    assert letters == "NnNa"


def test_a_second_ve_by_the_module_and_one_by_mmio_end_differently():
    start = """
        gate 20, on_ve
        gate 8, on_df
        load_idt
        hlt
on_df:  put 'D'
        power_off
on_ve:  """
    outcome, letters = say(start + "mov ecx, 0x8b; rdmsr; put 'x'; power_off")
    assert letters == "D"
    # The page tables of the loader map the MMIO address as shared for the handler.
    outcome, letters = say(
        start
        + f"""
        mov rax, cr3
        mov rax, [rax]
        and rax, -4096
        mov rbx, [rax + 24]             # the fourth GiB, as 2 MiB pages
        and rbx, -4096
        mov rdx, {1 << 39 | SHARED_MMIO & -0x200000 | 0x83}
        mov [rbx + 8 * {SHARED_MMIO >> 21 & 511}], rdx
        mov rax, cr3
        mov cr3, rax
        mov rdx, {SHARED_MMIO}
        mov eax, [rdx]
        put 'x'
        power_off"""
    )
    assert letters == ""
    assert outcome.kind in {OutcomeKind.HANG, OutcomeKind.EPT_VIOLATION}
