"""What an event changes by its own nature is learnt from it, and told apart from damage."""

import pytest

from guests import SYSCALL, TRAP, Opened, explore
from trapline.results.explore import CLEAN

OPEN = "OPEN"  # interrupts on for 24 instructions before and behind what counts


@pytest.mark.parametrize("flags", [(), (OPEN,)])
@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        ("NMI_TAKES_TIME", "time"),
        ("NMI_MEASURES", "time"),
        ("NMI_KEEPS_RIP", "rip"),
        ("NMI_KEEPS_FLAGS", "flags"),
    ],
)
def test_what_a_handler_remembers_is_no_damage(flag, kind, flags):
    with Opened(SYSCALL, flag, *flags) as guest:
        results = guest.all("nmi")
        words = {
            (word.name, word.kind)
            for result in results
            for word in guest.injector.footprints.document(result.footprint).words
        }
    assert {result.verdict for result in results} <= {"handled", "held"}
    assert ("stamp", kind) in words
    assert words <= {("stamp", kind), ("nmi_count", "value")}


def test_a_pointer_into_the_interrupted_stack_is_no_damage():
    """Where the stack is the kernel's; what user mode has in RSP is a number like others."""
    with Opened(SYSCALL, "NMI_KEEPS_RSP", OPEN) as guest:
        first, last = guest.at("sti"), guest.at("cli")
        found = {guest.run("nmi", boundary).verdict for boundary in range(first, last + 1)}
    assert found <= CLEAN


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("NMI_WRITES_USER", "memory of user mode is changed: "),
        ("NMI_WRITES_TABLE", "a page table is changed: "),
        ("NMI_WRITES_IDT", "a descriptor table is changed: "),
        ("NMI_CUTS_IDT", "IDTR.limit is 0xfef, 0xfff expected"),
        ("NMI_USES_FPU", "the x87 and SSE registers are not as they were"),
        ("NMI_WRITES_DR", "DR0 is 0x"),
    ],
)
def test_what_no_event_may_change_is_found_though_all_runs_do_it(flag, says):
    with Opened(SYSCALL, flag) as guest:
        results = guest.all("nmi")
    assert {result.verdict for result in results} == {"corrupt"}
    assert all(result.detail.startswith(says) for result in results)
    assert set(explore(SYSCALL, "nmi")) <= CLEAN


def test_an_interrupt_that_is_never_ended():
    with Opened(TRAP, "TRAP", "IRQ_WITHOUT_EOI") as guest:
        results = guest.all("irq:0x40")
    assert {result.verdict for result in results} == {"corrupt"}
    assert all(result.detail.startswith("interrupts in service is 0x") for result in results)
    assert set(explore(TRAP, "irq:0x40", "TRAP")) <= CLEAN


def test_a_counter_that_is_torn_where_interrupts_are_on():
    """The few places at which it is are ordinary ones, and agree with each other."""
    found = explore(SYSCALL, "nmi", OPEN, "TORN_COUNTER", "NMI_COUNTS")
    assert found["corrupt"] == ["add $0x1,%rcx", "mov %rcx,@(%rip)"]
    with Opened(SYSCALL, OPEN, "TORN_COUNTER", "NMI_COUNTS") as guest:
        lost = guest.run("nmi", guest.at("add $0x1,%rcx"))
    assert lost.differs == ("lost: counter is 0x4 still, 0x5 expected",)
    assert set(explore(SYSCALL, "nmi", OPEN, "NMI_COUNTS")) <= CLEAN


def test_two_processes_come_to_the_same_though_in_another_order():
    flags = (OPEN, "TORN_COUNTER", "NMI_COUNTS", "NMI_TAKES_TIME")
    with Opened(SYSCALL, *flags) as guest:
        forwards = guest.all("nmi")
    with Opened(SYSCALL, *flags) as guest:
        count = len(guest.window.steps)
        backwards = [guest.run("nmi", boundary) for boundary in reversed(range(count))]
    assert forwards == backwards[::-1]
