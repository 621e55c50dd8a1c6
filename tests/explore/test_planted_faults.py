"""Each hole is found with the right verdict, and the guest without it is clean."""

import pytest

from guests import SYSCALL, TRAP, Opened, explore
from trapline.base.errors import BadInputFileError
from trapline.explore.inject import ReferenceFailsError
from trapline.explore.runs import NotApplicableError
from trapline.results.explore import CLEAN, NOTHING

GAP_IN = ["swapgs", "mov %rsp,%gs:@", "mov %gs:@,%rsp"]
GAP_OUT = ["swapgs", "sysretq"]
NMI_ON_IST = '[start]\nnmi = "do_syscall_64"\nnth = 3\n'


def test_a_ve_in_the_syscall_gap_runs_on_the_users_stack():
    found = explore(SYSCALL, "ve:wrmsr")
    assert found["privilege"] == [*GAP_IN, *GAP_OUT]
    assert set(found) == {"privilege", "same"}


def test_a_ve_with_a_stack_of_its_own_survives_the_syscall_gap():
    assert set(explore(SYSCALL, "ve:wrmsr", "VE_ON_IST")) == {"same"}


def test_a_trap_of_the_kernels_own_in_the_syscall_gap_needs_no_event():
    """The hole is in the reference run: CPUID before the kernel is on its own stack."""
    with pytest.raises(ReferenceFailsError) as failure, Opened(SYSCALL, "GAP_TRAPS"):
        pass
    result = failure.value.result
    assert (result.verdict, result.event, result.nested) == ("privilege", NOTHING, None)
    assert result.detail.startswith("Vector 20 has no stack of its own")
    assert result.last[-1].endswith(": cpuid")
    assert result.splat.injected == ()
    assert set(explore(SYSCALL, "nmi", "GAP_TRAPS", "VE_ON_IST")) <= CLEAN


@pytest.mark.parametrize(
    ("flag", "verdict", "last"),
    [
        ("LOSES_STACK", "double-fault", "ud2"),
        ("LOSES_IDT", "double-fault", "ud2"),  # of which a triple fault would come
        ("PANICS", "panic", "cli"),
    ],
)
def test_a_guest_that_dies_in_the_window_by_itself(flag, verdict, last):
    """It never comes to the compare point, and no event is needed for that."""
    with (
        pytest.raises(ReferenceFailsError) as failure,
        Opened(SYSCALL, "DIES_IN_FOURTH_CALL", flag),
    ):
        pass
    result = failure.value.result
    assert (result.verdict, result.event, result.nested) == (verdict, NOTHING, None)
    assert f": {last}" in result.last[-1]
    assert result.splat.injected == ()


@pytest.mark.parametrize(
    ("flag", "why"), [("LOOPS", "never closes"), ("SWITCHES_OFF", "ends with the guest")]
)
def test_a_window_that_does_not_close_is_a_bad_scenario(flag, why):
    with pytest.raises(BadInputFileError, match=why), Opened(SYSCALL, "DIES_IN_FOURTH_CALL", flag):
        pass


def test_a_handler_with_the_users_gs_base():
    found = explore(SYSCALL, "nmi", "NO_PARANOIA")
    assert found["privilege"] == ["swapgs", "sysretq"]
    assert set(explore(SYSCALL, "nmi")) == {"handled"}


@pytest.mark.parametrize(
    ("hole", "handler"), [("GS_OF_PLANTED", "planted"), ("GS_OF_SYSVEC", "sysvec_planted")]
)
def test_handlers_are_known_by_their_stubs_and_by_their_names(hole, handler):
    with Opened(SYSCALL, "IRQ_IN_C", hole) as guest:
        found = {(r.verdict, r.detail.split()[0]) for r in guest.all("irq:0x40")}
    assert found == {("privilege", f"{handler}()")}
    assert set(explore(SYSCALL, "irq:0x40", "IRQ_IN_C")) <= CLEAN


def test_code_of_the_user_at_cpl_0():
    """No SMEP stops it, and the user's code may do no harm at all."""
    with Opened(SYSCALL, "NMI_CALLS_USER") as guest:
        results = guest.all("nmi")
    found = [r for r in results if r.verdict not in CLEAN]
    assert {r.verdict for r in found} == {"privilege"}
    assert {r.detail for r in found} == {"Code of the user, at 0x400000, is about to run at CPL 0."}
    assert {r.boundary for r in found} == {9, 10}


def test_a_lost_nmi():
    found = explore(SYSCALL, "nmi", "NMI_LOST")
    assert found["corrupt"] == ["addq $0x1,@(%rip)", "movb $0x0,@(%rip)"]
    assert len(found["handled"]) > len(found["corrupt"])


def test_a_lost_nmi_is_told_by_the_count_that_is_missing():
    with Opened(SYSCALL, "NMI_LOST") as guest:
        worst = next(r for r in guest.all("nmi") if r.verdict == "corrupt")
    assert worst.detail == "lost: nmi_count is 0x0 still, 0x1 expected."
    assert worst.differs == ("lost: nmi_count is 0x0 still, 0x1 expected",)


def test_a_torn_counter():
    found = explore(SYSCALL, "nmi", "TORN_COUNTER", "NMI_COUNTS")
    # Between the load and the store the NMI's own count is overwritten.
    assert found["corrupt"] == ["add $0x1,%rcx", "mov %rcx,@(%rip)"]
    assert set(explore(SYSCALL, "nmi", "NMI_COUNTS")) == {"handled"}


def test_a_bystander_is_written():
    with Opened(SYSCALL, "NMI_SCRIBBLES") as guest:
        results = guest.all("nmi")
    found = [r for r in results if r.verdict not in CLEAN]
    assert {r.verdict for r in found} == {"corrupt"}
    assert {r.differs for r in found} == {("gained: bystander is 0x7, 0x0 expected",)}
    assert {r.boundary for r in found} == {9, 10}


def test_an_nmi_that_takes_a_page_fault_of_its_own():
    """It may come between a page fault and its handler, which reads CR2."""
    with Opened(SYSCALL, "NMI_FAULTS") as guest:
        results = guest.all("nmi")
    assert {r.verdict for r in results} == {"corrupt"}
    assert all(r.detail.startswith("CR2 is 0x") for r in results)
    # Interrupts are off there.
    assert set(explore(TRAP, "irq:0x40", "TRAP", "IRQ_FAULTS")) <= CLEAN


def test_nmis_that_stay_blocked():
    found = explore(SYSCALL, "nmi", "NO_IRET")
    assert "corrupt" in found


@pytest.mark.parametrize(("flag", "verdict"), [("NMI_SPINS", "hang"), ("NMI_PANICS", "panic")])
def test_an_nmi_handler_that_does_not_come_back(flag, verdict):
    found = explore(SYSCALL, "nmi", flag)
    assert found[verdict] == ["addq $0x1,@(%rip)", "movb $0x0,@(%rip)"]
    assert set(found) == {verdict, "handled"}


def test_a_ve_before_the_one_before_was_collected():
    with Opened(TRAP, "TRAP", "EARLY_STI", "IRQ_TRAPS") as guest:
        results = guest.all("irq:0x40")
        last = guest.at("cli")
    # The interrupt comes as soon as the handler allows it, and traps before VEINFO.GET.
    assert {r.verdict for r in results[: last + 1]} == {"double-fault"}
    assert {r.verdict for r in results[last + 1 :]} == {"held"}


def test_the_same_interrupt_after_veinfo_get():
    found = explore(TRAP, "irq:0x40", "TRAP", "IRQ_TRAPS")
    assert found["handled"] == ["nop", "cli"]
    assert set(found) == {"handled", "held"}


def test_an_nmi_waits_for_veinfo_get():
    with Opened(TRAP, "TRAP") as guest:
        results = guest.all("nmi")
        steps = guest.window.steps
        collected = next(i for i, step in enumerate(steps) if not step.conditions.ve_valid)
    held = [r for r in results if r.boundary < collected]
    assert {(r.verdict, r.rule) for r in held} == {("held", "nmi-held")}
    place = guest.window.boundaries[collected]
    assert held[0].detail.startswith(f"It was delivered at {place.function}+{place.offset:#x}/")
    # Only the instruction behind STI makes it wait again.
    waits = [(r.boundary - collected, r.rule) for r in results[collected:] if r.verdict == "held"]
    assert waits == [(1, "sdm-interrupt-shadow-nmi")]


def test_a_second_ve_ends_as_its_kind_does():
    with Opened(TRAP, "TRAP") as guest:
        by_module = guest.run("ve:wrmsr", 1)
        with pytest.raises(NotApplicableError, match=r"push %rax does not access memory"):
            guest.run("ve:mmio", 0)
    assert (by_module.verdict, by_module.rule) == ("double-fault", "second-ve-module")
    with Opened(TRAP, "TRAP", "VE_TOUCHES") as guest:
        by_cpu = guest.run("ve:mmio", guest.at("incq @(%rip)"))
    assert (by_cpu.verdict, by_cpu.rule) == ("td-exit", "second-ve-mmio")
    assert not by_module.allowed
    assert not by_cpu.allowed


def test_a_machine_check_is_beyond_the_rules():
    with Opened(SYSCALL) as guest:
        result = guest.run("mce", 5)
    assert not result.allowed


def test_a_nested_event_is_counted_from_the_first():
    with Opened(SYSCALL, "VE_ON_IST") as guest:
        plain = guest.run("nmi", 4)
        runs = [guest.run("nmi", 4, "ve:wrmsr", at) for at in range(plain.instructions)]
    # With both at one boundary the #VE comes first, and the NMI waits for VEINFO.GET.
    assert [r.verdict for r in runs] == ["held"] + ["handled"] * (plain.instructions - 1)
    assert {r.nested_at for r in runs} == set(range(plain.instructions))
    assert runs[0].instructions > plain.instructions


def test_a_finding_carries_what_is_needed_to_see_it():
    with Opened(SYSCALL, "NMI_PANICS") as guest:
        result = guest.run("nmi", 9)
    assert result.splat.injected[0].startswith(
        "nmi before instruction 9 of test, do_syscall_64+0x7"
    )
    assert result.splat.registers.rip == "panic+0x0/0x4"
    assert result.last[-1] == "panic+0x0/0x4: cli"
    assert "exc_nmi" in result.last[-2]
    assert result.reproduce == "trapline explore guest --event nmi --at 9"


def test_an_oops_shows_what_led_to_it_and_not_what_came_later():
    with Opened(SYSCALL, "NMI_OOPSES") as guest:
        results = [guest.run("nmi", 9), guest.run("nmi", 9, "nmi", 2)]
    for result in results:
        assert result.verdict == "oops"
        assert [text.partition(": ")[2] for text in result.last[-3:]] == [
            "nop", "call @", "mov $0x12c,%ecx",
        ]  # fmt: skip
        assert result.splat.registers.rip.startswith("oops_begin+0x0")


def test_a_window_opened_by_an_nmi_of_traplines_own():
    text = f'title = "t"\n{NMI_ON_IST}[[inject]]\nevent = "nmi"\n'
    with Opened(text) as guest:
        assert guest.window.boundaries[0].function == "asm_exc_nmi"
        results = guest.all("nmi")
        # NMIs are blocked until the IRET; the second comes right behind it.
        assert {(r.verdict, r.rule) for r in results} == {("held", "sdm-nmi-blocking")}


def test_a_window_opened_by_an_interrupt_from_user_mode():
    text = 'title = "t"\n[start]\ninterrupt = "0x40"\nnth = 2\n[[inject]]\nevent = "nmi"\n'
    with Opened(text) as guest:
        # Before the interrupt, and then in it.
        assert guest.window.steps[0].cpl == 3
        assert guest.window.boundaries[1].function == "asm_common_interrupt"
        assert {r.verdict for r in guest.all("nmi")} == {"handled"}


def test_the_reference_repeats_bit_by_bit():
    with Opened(SYSCALL, "NMI_SCRIBBLES") as guest:
        end = guest.window.end
        guest.injector.reference()
        pages, words, _ = guest.window.ends.take([])
        for boundary in range(len(guest.window.steps)):
            guest.run("nmi", boundary)
            assert guest.injector.reference() == end
            again = guest.window.ends.take([])
            assert again.pages == pages
            assert (again.words == words).all()


def test_a_boot_goes_on_behind_its_windows_as_if_there_had_been_none():
    with Opened(SYSCALL) as guest:
        guest.all("nmi")
        guest.injector.close()
        guest.window.leave()
        assert guest.triggers.next() is None
        guest.machine.vcpu.run(guest.machine.module.on_exit)
        explored = guest.machine.host.outcome, guest.machine.ram_digest()
        straight = guest.target.machine("")
        outcome = straight.run()
        assert explored == (outcome, straight.ram_digest())
        straight.close()
