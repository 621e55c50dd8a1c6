"""Small guests on the whole machine: timers, interrupts, HLT, and pages that change hands."""

import pytest

import hostile
from trapline.cpu.default import open_engine
from trapline.machine.outcome import OutcomeKind

WRMSR, HLT, MAP_GPA = 32, 12, 0x10001
SVR, LVT_TIMER, DEADLINE, INITIAL_COUNT, DIVIDE = 0x80F, 0x832, 0x6E0, 0x838, 0x83E
VECTOR = 0x40
SHARED = 1 << 39
LARGE = 2 << 20


def wrmsr(index, value):
    return f"""
        mov r12d, {index}
        movabs r13, {value}
        tdvmcall {WRMSR}
    """


APIC = f"""
        gate {VECTOR}, tick
        load_idt
        {wrmsr(SVR, 0x1FF)}
"""
DEADLINE_TIMER = f"""
        {wrmsr(LVT_TIMER, 2 << 17 | VECTOR)}
        rdtsc
        shl rdx, 32
        lea r13, [rax + rdx + 2000000]
        mov r12d, {DEADLINE}
        tdvmcall {WRMSR}
"""
HALT = f"""
        xor r12d, r12d
        tdvmcall {HLT}
"""
ACCEPT = """
        mov ecx, 0x{0:x}
        mov eax, 6
        tdcall
"""


def test_a_machine_runs_on_the_engine_that_its_factory_opens():
    opened = []

    def factory(ram_size, **options):
        opened.append((ram_size, options, open_engine(ram_size, **options)))
        return opened[0][2]

    machine = hostile.machine_of("power_off", factory=factory, seed=7)
    ((ram_size, options, engine),) = opened
    assert (ram_size, options) == (machine.config.memory, {"seed": 7, "split_ram": False})
    assert machine.engine is engine
    assert machine.vcpu is engine.vcpus[0]
    assert machine.memory is engine.memory
    assert machine.run().kind == OutcomeKind.POWERED_OFF
    machine.close()


def test_hlt_sleeps_until_the_deadline_and_the_interrupt_is_taken():
    machine = hostile.machine_of(
        f"{APIC} {DEADLINE_TIMER} sti {HALT} mov ebx, 1\n2: jmp 2b\ntick: power_off"
    )
    outcome = machine.run()
    assert outcome.kind == OutcomeKind.POWERED_OFF
    assert 2_000_000 < outcome.cycles < 3_000_000
    machine.close()


def test_a_timer_interrupts_code_that_never_exits():
    outcome = hostile.run(f"{APIC} {DEADLINE_TIMER} sti\n2: jmp 2b\ntick: power_off")
    assert outcome.kind == OutcomeKind.POWERED_OFF


def test_a_periodic_timer_goes_on():
    ticks = 50
    outcome = hostile.run(
        f"""{APIC} {wrmsr(DIVIDE, 0xB)} {wrmsr(LVT_TIMER, 1 << 17 | VECTOR)}
        {wrmsr(INITIAL_COUNT, 1000)}
        xor ebx, ebx
        sti
2:      jmp 2b
tick:   inc ebx
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        cmp ebx, {ticks}
        jb 3f
        power_off
3:      iretq"""
    )
    assert outcome.kind == OutcomeKind.POWERED_OFF
    period = 1000 * 80
    assert ticks * period <= outcome.cycles < (ticks + 2) * period


def test_interrupts_wait_for_sti_and_then_for_their_shadow():
    outcome = hostile.run(
        f"""{APIC} mov ecx, 0x83f
        mov eax, {VECTOR}
        xor edx, edx
        wrmsr
        mov rbx, 1
        sti
        mov rbx, 2
        ud2
tick:   cmp rbx, 2
        jne 3f
        power_off
3:      ud2"""
    )
    assert outcome.kind == OutcomeKind.POWERED_OFF


def test_hlt_with_nothing_armed_is_a_hang():
    outcome = hostile.run(f"sti {HALT}\n2: jmp 2b".replace("sti", "sti\n"))
    assert outcome.kind == OutcomeKind.HANG
    assert "no timer armed" in outcome.detail


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("reboot: System halted", OutcomeKind.HALTED),
        ("[    1.5] reboot: Power off not available: System halted instead", OutcomeKind.HALTED),
        ("echo reboot: System halted", OutcomeKind.HANG),
        ("Attempted to boot a broken kernel. System halted", OutcomeKind.HANG),
    ],
)
def test_a_guest_that_says_that_it_halts_has_ended_as_it_should(line, kind):
    says = "".join(f"out_byte 0x3f8, {byte}\n" for byte in f"{line}\n".encode())
    outcome = hostile.run(f"{says} {HALT}\n2: jmp 2b")
    assert outcome.kind == kind
    assert outcome.is_clean == (kind == OutcomeKind.HALTED)


def test_hlt_returns_although_its_timer_is_masked():
    """A guest must not hang the host with a timer that fires and interrupts nobody."""
    outcome = hostile.run(
        f"""{APIC} {wrmsr(DIVIDE, 0xB)} {wrmsr(LVT_TIMER, 1 << 17 | 1 << 16 | VECTOR)}
        {wrmsr(INITIAL_COUNT, 1)} {HALT} power_off
tick:   ud2"""
    )
    assert outcome.kind == OutcomeKind.POWERED_OFF


def map_gpa(gpa, size):
    return f"""
        movabs r12, {gpa}
        mov r13d, {size}
        tdvmcall {MAP_GPA}
    """


def test_a_page_that_went_to_the_host_and_back_must_be_accepted():
    page = hostile.FREE
    taken = map_gpa(page, 4096)
    given = map_gpa(page | SHARED, 4096)
    fill = f"mov dword ptr [{page}], 0x1234\n"
    look = f"cmp dword ptr [{page}], 0\n je 2f\n ud2\n 2: power_off"
    outcome = hostile.run(f"{fill} {given} {taken} {ACCEPT.format(page)} {look}")
    assert outcome.kind == OutcomeKind.POWERED_OFF
    outcome = hostile.run(f"{fill} {given} {taken} {look}")
    assert outcome.kind == OutcomeKind.EPT_VIOLATION
    assert f"{page:#x}" in outcome.detail


def test_rbp_cannot_be_shown_to_the_host():
    """KVM sets CONFIG_FLAGS.NO_RBP_MOD; the module then refuses the mask."""
    call = "xor eax, eax\n xor r10d, r10d\n mov r11d, 10\n mov r12d, 0x40000000\n"
    invalid_rcx = 0xC000010000000001
    outcome = hostile.run(f"""
        {call}
        mov ecx, 0xfc20
        tdcall
        movabs rbx, {invalid_rcx:#x}
        cmp rax, rbx
        jne 2f
        {call}
        mov ecx, 0xfc00
        tdcall
        test rax, rax
        jnz 2f
        power_off
        2: ud2
    """)
    assert outcome.kind == OutcomeKind.POWERED_OFF


def test_unaccepted_memory_is_not_there_until_it_is_accepted():
    start = hostile.MEMORY - LARGE
    touch = f"mov eax, [{start + 0x5000}]\n power_off"
    outcome = hostile.run(touch, unaccepted=LARGE)
    assert outcome.kind == OutcomeKind.EPT_VIOLATION
    # The host adds 4 KiB whatever is asked for: accepting 2 MiB is a size mismatch.
    outcome = hostile.run(f"{ACCEPT.format(start | 1)} {touch}", unaccepted=LARGE)
    assert outcome.kind == OutcomeKind.EPT_VIOLATION
    outcome = hostile.run(f"{ACCEPT.format(start + 0x5000)} {touch}", unaccepted=LARGE)
    assert outcome.kind == OutcomeKind.POWERED_OFF


@pytest.mark.parametrize("level", [0, 1])
def test_memory_beyond_the_end_cannot_be_accepted(level):
    outcome = hostile.run(f"{ACCEPT.format(hostile.MEMORY | level)} power_off")
    assert outcome.kind == OutcomeKind.EPT_VIOLATION


def test_breakpoints_call_what_they_were_given_once():
    machine = hostile.machine_of("mov ecx, 3\n2: nop\n loop 2b\n power_off")
    where = machine.memory.ram[hostile.CODE : hostile.CODE + 64].tobytes().index(b"\x90\xe2")
    seen = []
    machine.watch({hostile.CODE + where: lambda: seen.append(machine.vcpu.regs[1])})
    assert machine.run().kind == OutcomeKind.POWERED_OFF
    assert seen == [3]
    machine.close()


def test_closing_a_machine_twice_is_harmless():
    machine = hostile.machine_of("power_off")
    machine.run()
    machine.close()
    machine.close()


def test_nmis_are_counted():
    self_nmi = wrmsr(0x830, 1 << 18 | 4 << 8)
    machine = hostile.machine_of(
        f"""gate 2, nmi
        load_idt
        {wrmsr(SVR, 0x1FF)} {self_nmi}
2:      jmp 2b
nmi:    power_off"""
    )
    assert machine.run().kind == OutcomeKind.POWERED_OFF
    assert machine.nmis == 1
    machine.close()
