"""What a run may not do on its way is found, though its end looks right; the sound twin passes."""

import pytest

from guests import SYSCALL, TRAP, Opened, explore
from trapline.explore.way import unwritable
from trapline.results.explore import CLEAN

NMI = 'title = "t"\n[start]\nnmi = "do_syscall_64"\nnth = 3\n[[inject]]\nevent = "nmi"\n'


def bad(results):
    return [one for one in results if one.verdict not in CLEAN]


def test_interrupts_on_in_the_handling_of_a_trap_that_had_them_off():
    with Opened(TRAP, "TRAP", "MASKED") as guest:
        results = guest.all("irq:0x40")
        behind = guest.at("cli")
    found = bad(results)
    # It is delivered behind STI if it comes before the handler's own CLI is through.
    assert [one.boundary for one in found] == list(range(behind + 1))
    assert {one.verdict for one in found} == {"misstep"}
    detail = (
        "Vector 0x40 is delivered inside the handling of the #VE at do_syscall_64+0x1c/0x21, "
        "which had interrupts off."
    )
    assert {one.detail for one in found} == {detail}


def test_before_veinfo_get_too():
    with Opened(TRAP, "TRAP", "MASKED", "EARLY_STI") as guest:
        results = guest.all("irq:0x40")
        behind = guest.at("cli")
    assert {one.verdict for one in results[: behind + 1]} == {"misstep"}
    assert {one.verdict for one in results[behind + 1 :]} <= CLEAN


@pytest.mark.parametrize("flags", [("MASKED", "CONDITIONAL_STI"), ("CONDITIONAL_STI",), ()])
def test_interrupts_on_only_where_they_were(flags):
    assert set(explore(TRAP, "irq:0x40", "TRAP", *flags)) <= CLEAN


def test_an_nmi_inside_an_nmi_whose_frame_it_overwrites():
    with Opened(NMI, "NMI_TRAPS") as guest:
        results = guest.all("nmi")
    found = bad(results)
    # The IRET of the #VE lets it in.
    assert {one.verdict for one in found} == {"misstep"}
    assert found[0].boundary == 0
    assert found[0].detail == (
        "An NMI at exc_nmi+0xf/0x11 came inside the NMI at do_syscall_64+0x0/0x17, and its frame "
        "took the place of the first one's: the IRET goes back to exc_nmi+0xf/0x11."
    )
    held = [one for one in results if one not in found]
    assert {one.verdict for one in held} <= {"held"}


def test_a_kernel_that_is_built_for_an_nmi_inside_an_nmi():
    found = explore(NMI, "nmi", "NMI_TRAPS", "NMI_COPIES")
    assert set(found) <= CLEAN
    assert set(explore(NMI, "nmi", "NMI_COPIES")) <= CLEAN


def test_ve_info_that_is_not_collected():
    with Opened(SYSCALL, "VE_ON_IST", "VE_UNREAD") as guest:
        results = guest.all("ve:wrmsr")
    found = bad(results)
    assert {one.verdict for one in found} == {"misstep"}
    assert {one.boundary for one in found} == {9, 10}
    assert found[0].detail == (
        "The handling of the #VE at do_syscall_64+0x7/0x17 ends with VE_INFO not collected: the "
        "next #VE is a #DF."
    )
    assert set(explore(SYSCALL, "ve:wrmsr", "VE_ON_IST")) <= CLEAN


def test_a_write_to_text_that_leaves_it_as_it_was():
    with Opened(SYSCALL, "PROTECTED", "NMI_WRITES_TEXT") as guest:
        results = guest.all("nmi")
    found = bad(results)
    assert {one.verdict for one in found} == {"misstep"}
    assert {one.boundary for one in found} == {9, 10}
    assert found[0].detail.startswith("Kernel text is written, in the page of ")
    assert set(explore(SYSCALL, "nmi", "PROTECTED")) <= CLEAN


def test_protected_pages_are_those_that_nobody_may_write():
    text, data = 0xFFFFFFFF80200000, 0xFFFFFFFF80400000
    where = range(text + 1, data + 0x2000)
    with Opened(SYSCALL, "PROTECTED") as guest:
        assert list(unwritable(guest.machine.vcpu, where)) == list(range(0x200000, 0x400000, 4096))
    with Opened(SYSCALL) as guest:
        assert list(unwritable(guest.machine.vcpu, where)) == []


def test_interrupts_on_in_the_handling_of_an_nmi():
    with Opened(SYSCALL, "NMI_OPENS") as guest:
        runs = [guest.run("nmi", 9, "irq:0x40", at) for at in range(30)]
    found = bad(runs)
    assert {one.verdict for one in found} == {"misstep"}
    assert "inside the handling of the NMI at do_syscall_64+0x7/" in found[0].detail
    with Opened(SYSCALL) as guest:
        runs = [guest.run("nmi", 9, "irq:0x40", at) for at in range(20)]
    assert bad(runs) == []


def test_flags_that_are_not_given_back_to_the_kernel():
    """SYSRET gives the user his own, so that the end looks right."""
    with Opened(SYSCALL, "NMI_SETS_DF") as guest:
        results = guest.all("nmi")
    found = bad(results)
    # Only each sixteenth run is looked at that closely.
    assert [one.boundary for one in found] == [0, 16]
    assert {one.verdict for one in found} == {"misstep"}
    assert found[0].detail == (
        "The NMI at entry_SYSCALL_64+0x0/0x34 goes back with RFLAGS 0x404, 0x4 expected."
    )
    assert set(explore(SYSCALL, "nmi")) <= CLEAN


def test_flags_that_an_interrupt_does_not_give_back():
    with Opened(TRAP, "TRAP", "IRQ_SETS_DF") as guest:
        results = guest.all("irq:0x40")
    missteps = [one for one in bad(results) if one.verdict == "misstep"]
    assert missteps
    assert all("The vector 0x40 at " in one.detail for one in missteps)
    assert {one.boundary % 16 for one in missteps} == {0}
    assert set(explore(TRAP, "irq:0x40", "TRAP")) <= CLEAN


def test_a_register_that_nobody_needs_and_that_is_not_given_back():
    with Opened(TRAP, "TRAP", "IRQ_LOSES_R11") as guest:
        results = guest.all("irq:0x40")
    missteps = [one for one in bad(results) if one.verdict == "misstep"]
    assert missteps
    assert all(" goes back with R11 0x0, 0x" in one.detail for one in missteps)
