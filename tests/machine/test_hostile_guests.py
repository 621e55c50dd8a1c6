"""No guest may crash the process, hang it, or reach host memory, whatever it does.

Each test runs an assembled guest on the real engine, module and VMM. Those with a known end are
held to it; the random ones need only end, one way or the other, within their limits.
"""

import random
import struct
from threading import Thread

import pytest
from gdb_client import Client

from hostile import CODE, FREE, MEMORY, STACK, TABLE, machine_of, run
from trapline.machine.gdb.debugview import TdTarget
from trapline.machine.gdb.server import GdbServer
from trapline.machine.observe.symbols import GuestSymbols
from trapline.machine.outcome import OutcomeKind

# Ends that a guest may bring about; TIMEOUT has tests of its own.
ENDS = set(OutcomeKind) - {OutcomeKind.INTERRUPTED}

RAX, RCX, RDX, RBX, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 = range(14)
ROW = 16  # quadwords: the registers above, then two that are not used

# Takes registers from a table, row by row, and executes TDCALL with each.
TABLE_GUEST = f"""
        gate 20, ignore
        gate 13, skip
        load_idt
        mov qword ptr [{STACK}], TABLE
next:   mov rbp, [{STACK}]
        mov rax, [rbp]
        mov rcx, [rbp + 8]
        mov rdx, [rbp + 16]
        mov rbx, [rbp + 24]
        mov rsi, [rbp + 32]
        mov rdi, [rbp + 40]
        mov r8, [rbp + 48]
        mov r9, [rbp + 56]
        mov r10, [rbp + 64]
        mov r11, [rbp + 72]
        mov r12, [rbp + 80]
        mov r13, [rbp + 88]
        mov r14, [rbp + 96]
        mov r15, [rbp + 104]
        tdcall
go_on:  add qword ptr [{STACK}], {8 * ROW}
        mov rbp, [{STACK}]
        cmp qword ptr [rbp + 112], 0
        jne next
        power_off
skip:   lea rax, [rip + go_on]          # a #GP from the module: give up this row
        mov [rsp + 8], rax
        add rsp, 8
        iretq
ignore: push rax
        push rcx
        mov eax, 3                      # TDG.VP.VEINFO.GET, so that the next #VE is no #DF
        tdcall
        pop rcx
        pop rax
        iretq
"""


def rows(*registers):
    """Encode rows for TABLE_GUEST; each is a dict from register number to value."""
    out = b""
    for row in registers:
        words = [row.get(index, 0) & 2**64 - 1 for index in range(14)]
        out += struct.pack("<16Q", *words, 1, 0)
    return out + bytes(8 * ROW)


def interesting(rng):
    """Pick a value that has broken something somewhere."""
    return rng.choice(
        [
            0,
            1,
            0xFFF,
            0x1000,
            FREE,
            FREE | 1,
            MEMORY - 0x1000,
            MEMORY,
            1 << 39,
            1 << 39 | FREE,
            1 << 40,
            1 << 51,
            1 << 52,
            1 << 63,
            2**64 - 1,
            2**64 - 0x1000,
            2**32 - 1,
            CODE,
            rng.getrandbits(16),
            rng.getrandbits(40),
            rng.getrandbits(64),
        ]
    )


def random_vmcall(rng):
    leaf = rng.choice(
        [10, 12, 30, 31, 32, 48, 54, 65, *range(0x10000, 0x10008), rng.getrandbits(32)]
    )
    row = {RAX: 0, RCX: 0xFC00, R11: leaf}
    row |= {register: interesting(rng) for register in (R12, R13, R14, R15)}
    if rng.random() < 0.2:
        row |= {RCX: interesting(rng), R10: interesting(rng)}
    # A HLT or a fatal error report ends the run; keep few.
    if leaf in {12, 0x10003} and rng.random() < 0.98:
        row[R11] = 0x10001
    return row


def random_tdcall(rng):
    row = {register: interesting(rng) for register in range(14)}
    row[RAX] = rng.choice([*range(30), rng.getrandbits(16), rng.getrandbits(64)])
    if row[RAX] & 0xFFFF == 0:
        row[R11] = rng.choice([10, 30, 31, 48, 0x10001, 0x10002])
    if row[RAX] & 0xFFFF == 6 and rng.random() < 0.97:
        row[RCX] = FREE + 0x1000 * rng.randrange(1024)  # other pages end in an EPT violation
    return row


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("make", [random_vmcall, random_tdcall])
def test_random_calls(make, seed):
    rng = random.Random(f"{make.__name__} {seed}")
    table = rows(*(make(rng) for _ in range(400)))
    outcome = run(TABLE_GUEST, table, console_limit=1 << 16)
    assert outcome.kind in ENDS - {OutcomeKind.TIMEOUT}
    assert outcome.detail


@pytest.mark.parametrize("seed", range(24))
def test_random_code(seed):
    """Bytes that mean nothing, with handlers that get over faults for a while."""
    rng = random.Random(seed)
    junk = "\n".join(f".byte {rng.getrandbits(8)}" for _ in range(2048))
    outcome = run(f"{HANDLERS}\n{junk}\n power_off", seconds=3, console_limit=1 << 16)
    assert outcome.kind in ENDS


# Every fault goes on one byte further; without this, random code ends at its first byte.
HANDLERS = """
        .altmacro
        .irp vector, 0,1,3,4,5,6,7,9,16,18,19,20
        gate \\vector, over
        .endr
        .irp vector, 8,10,11,12,13,14,17,21
        gate \\vector, over_code
        .endr
        load_idt
        jmp junk
over_code: add rsp, 8
over:   mov rsp, STACK
        inc qword ptr [rip + position]
        mov eax, 3
        tdcall
        mov rax, [rip + position]
        lea rbx, [rip + junk]
        add rax, rbx
        jmp rax
position: .quad 0
junk:
"""


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("power_off", OutcomeKind.POWERED_OFF, ""),
        # Nothing can wake it: no timer is armed.
        ("tdvmcall 12", OutcomeKind.HANG, "HLT"),
        # No IDT at all: #UD, #GP in its delivery, #DF, and no way to deliver that either.
        ("ud2", OutcomeKind.TRIPLE_FAULT, ""),
        ("cpuid_loop: mov eax, 0x40000000\ncpuid\njmp cpuid_loop", OutcomeKind.TRIPLE_FAULT, ""),
        # The IDT is where there is no memory; the host cannot give any.
        (
            "mov eax, 0x80000000\nmov [rip + idt_pointer + 2], rax\nload_idt\nud2",
            OutcomeKind.EPT_VIOLATION,
            "0x80000000",
        ),
        # The IDT is where no page table leads.
        (
            "mov qword ptr [rip + idt_pointer + 2], -0x1000\nload_idt\nud2",
            OutcomeKind.TRIPLE_FAULT,
            "",
        ),
        # CR3 in nowhere: the next fetch has no page table in RAM.
        ("mov rax, 0x70000000\nmov cr3, rax\nnop", OutcomeKind.EPT_VIOLATION, "0x70000"),
        # Reading GPAs that are private and not there.
        (f"mov rax, [{MEMORY}]", OutcomeKind.EPT_VIOLATION, f"{MEMORY:#x}"),
        ("mov rax, [0xfee00000]", OutcomeKind.EPT_VIOLATION, "0xfee00000"),
        # Running where nothing is.
        (f"mov eax, {MEMORY}\njmp rax", OutcomeKind.EPT_VIOLATION, f"{MEMORY:#x}"),
        # Giving one's own code to the host.
        (
            f"mov r12, {CODE | 1 << 39}\nmov r13d, 0x1000\ntdvmcall 0x10001\nnop",
            OutcomeKind.EPT_VIOLATION,
            f"{CODE:#x}",
        ),
        # A report with a message from outside of memory.
        (
            f"mov r12, {1 << 63}\nmov r13, {1 << 45}\ntdvmcall 0x10003",
            OutcomeKind.FATAL_ERROR,
            "",
        ),
        ("out_byte 0x602, 6\nhlt", OutcomeKind.RESET, ""),
    ],
)
def test_known_ends(source, kind, words):
    outcome = run(source)
    assert outcome.kind == kind, outcome
    assert words in outcome.detail


def test_a_ve_inside_the_ve_handler_before_veinfo_get_is_a_double_fault():
    outcome = run(
        """
        gate 20, handler
        gate 8, doubled
        load_idt
        mov eax, 0x40000000
        cpuid
handler: mov eax, 0x40000000
        cpuid
        ud2
doubled: power_off
        """
    )
    assert outcome.kind == OutcomeKind.DOUBLE_FAULT
    assert "VE_INFO was still in use" in outcome.detail
    assert "(rule second-ve-module)" in outcome.detail


def test_a_double_fault_for_want_of_a_stack_says_so():
    outcome = run(
        """
        gate 14, over
        gate 8, over
        load_idt
        mov rsp, 0x700000000000
        mov rax, [rsp]
over:   ud2
        """
    )
    assert outcome.kind == OutcomeKind.TRIPLE_FAULT
    assert "found no stack, as RSP was 0x700000000000 (rule ve-class)" in outcome.detail


def test_a_page_fault_handler_that_faults_eats_its_stack_and_ends():
    """Each frame is pushed below the last, through everything, until nothing is mapped."""
    outcome = run("gate 14, again\nload_idt\nagain: mov rax, [-1]\njmp again")
    assert outcome.kind in {
        OutcomeKind.TRIPLE_FAULT,
        OutcomeKind.DOUBLE_FAULT,
        OutcomeKind.EPT_VIOLATION,
    }


@pytest.mark.parametrize(
    "source",
    [
        "spin: jmp spin",
        "spin: pause\njmp spin",
        "spin: rdtsc\njmp spin",
        "spin: tdvmcall 10\njmp spin",
        "spin: tdvmcall 0x10000\njmp spin",
        "spin: mov eax, 1\ntdcall\njmp spin",
        "gate 6, over\nload_idt\nover: mov rsp, STACK\nud2",
        # A stack that never runs out, faults that never end.
        "gate 14, over\nload_idt\nover: mov rsp, STACK\nmov rax, [-1]",
        # Rewriting its own code for ever.
        "spin: xor byte ptr [rip + spin + 20], 1\njmp spin\n.fill 32, 1, 0x90",
        # Turning one page back and forth.
        f"""
spin:   mov r12, {1 << 39 | FREE}
        mov r13d, 0x1000
        tdvmcall 0x10001
        mov r12, {FREE}
        mov r13d, 0x1000
        tdvmcall 0x10001
        jmp spin
        """,
    ],
)
def test_endless_loops_end_at_the_timeout(source):
    outcome = run(source, seconds=1.0, virtual_seconds=100_000)
    assert outcome.kind == OutcomeKind.TIMEOUT, outcome


def test_a_debuggers_pause_moves_the_timeout():
    """The alarm rings while gdb has the guest; it must be set again for what is left."""
    machine = machine_of("gate 6, over\nload_idt\nover: mov rsp, STACK\nud2", seconds=0.5)
    try:
        assert machine.run(paused=lambda: 0.5).kind == OutcomeKind.TIMEOUT
    finally:
        machine.close()


def test_gdb_interrupts_a_guest_that_never_exits():
    machine = machine_of("spin: jmp spin", virtual_seconds=100_000)
    symbols = GuestSymbols(machine.vcpu, None)
    target = TdTarget(machine.vcpu, symbols, lambda _: [], None)
    with GdbServer(":0", machine.vcpu, target, lambda _: None) as server:
        client = Client(server.address)
        client.send(b"c")
        client.socket.sendall(b"\x03")
        replies = []

        def talk():
            replies.append(client.receive())
            client.send(b"k")

        thread = Thread(target=talk)
        thread.start()
        outcome = machine.run(lambda handler: server.run(handler, machine.ended))
        thread.join()
        assert server.was_killed
        client.socket.close()
    machine.close()
    assert outcome.kind == OutcomeKind.INTERRUPTED
    assert replies == [b"T02thread:01;"]


def test_virtual_time_runs_out_too():
    """A guest that sleeps takes no wall time, so its own clock must end it."""
    source = "spin: mov r12d, 0\ntdvmcall 12\njmp spin"
    assert run(source).kind == OutcomeKind.HANG


def test_a_console_flood_is_cut_off():
    machine = machine_of("spin: out_byte 0x3f8, 0x41\njmp spin", console_limit=10_000)
    try:
        outcome = machine.run()
        assert outcome.kind == OutcomeKind.CONSOLE_FLOOD
    finally:
        machine.close()


def test_the_host_answers_errors_for_ranges_that_wrap():
    """MapGPA and GetQuote of absurd ranges, then a clean end: nothing was changed."""
    bad = [
        {RCX: 0xFC00, R11: 0x10001, R12: gpa, R13: size}
        for gpa in (0, FREE, 1 << 39, 2**64 - 0x1000, 1 << 52)
        for size in (2**64 - 0x1000, 1 << 63, 1 << 52, 123)
    ]
    bad += [{RCX: 0xFC00, R11: 0x10002, R12: gpa, R13: 2**64 - 0x1000} for gpa in (0, 1 << 39)]
    machine = machine_of(TABLE_GUEST, rows(*bad))
    try:
        assert machine.run().kind == OutcomeKind.POWERED_OFF
        assert bytes(machine.memory.ram[FREE : FREE + 4096]) == bytes(4096)
        assert machine.recorder.tdvmcalls[0x10001] == 20
    finally:
        machine.close()


def test_the_same_hostile_guest_does_the_same_twice():
    rng = random.Random("twice")
    table = rows(*(random_tdcall(rng) for _ in range(200)))
    digests = []
    for _ in range(2):
        machine = machine_of(TABLE_GUEST, table)
        try:
            outcome = machine.run()
            digests.append((outcome.kind, machine.recorder.digest, machine.ram_digest()))
        finally:
            machine.close()
    assert digests[0] == digests[1]
    assert TABLE < FREE


def test_a_guest_that_doubles_every_fault_is_lost_and_ends():
    """A handler of double faults that takes one itself would go on for ever."""
    outcome = run(
        """
        gate 8, doubled
        gate 20, broken
        load_idt
        xor ecx, ecx
        mov eax, 0x40000000
        cpuid
broken: cpuid                           # VE_INFO is valid still: #DF instead of #VE
doubled: mov rsp, STACK
        cpuid
        """,
        virtual_seconds=300,
    )
    assert outcome.kind == OutcomeKind.DOUBLE_FAULT
    assert "one after the other" in outcome.detail


def test_a_guest_that_is_silent_after_a_double_fault_ends():
    outcome = run(
        """
        gate 8, doubled
        gate 20, broken
        load_idt
        mov eax, 0x40000000
        cpuid
broken: cpuid
doubled: jmp doubled
        """,
        virtual_seconds=300,
    )
    assert outcome.kind == OutcomeKind.DOUBLE_FAULT
    assert outcome.cycles < 3 * 10**10  # not the 300 s of its virtual time
