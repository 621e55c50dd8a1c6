"""What the VCPU on Unicorn does beyond what any engine must: features, time, blocks."""

import pytest

from bare_guest import CODE, FEATURES, FEATURES_CR4, BareGuest
from trapline.cpu.engine import Exit

ENTERED = """
        mov ecx, 2
again:  call entered
        dec ecx
        jnz again
        hlt
        .balign 16
entered: nop
        ret
"""


def entries(guest):
    return [rip for kind, rip in guest.exits if kind is Exit.ENTRY]


@pytest.mark.parametrize("counted", [False, True])
def test_each_block_in_the_user_half_at_cpl_0_is_told_of_once(counted):
    with BareGuest(ENTERED) as guest:
        guest.vcpu.exact_counts(counted)
        guest.run()
        instructions, cycles = guest.vcpu.instructions, guest.vcpu.cycles
        assert entries(guest) == []
    with BareGuest(ENTERED) as guest:
        guest.vcpu.exact_counts(counted)
        guest.vcpu.watch_entries(frozenset())
        guest.on[Exit.ENTRY] = lambda: None
        guest.run()
        # Each block once, and neither count nor time shows that it was.
        assert entries(guest)[:3] == [CODE, guest.labels["entered"], guest.labels["again"] + 5]
        assert guest.vcpu.instructions == instructions
        assert guest.vcpu.cycles == cycles


def test_all_that_is_known_to_work_is_announced():
    with BareGuest("hlt") as guest:
        guest.vcpu.set_cr(4, guest.vcpu.cr(4) | FEATURES_CR4)
        features = guest.vcpu.cpuid_features
        for leaf, subleaf, register, bit in FEATURES:
            assert features[leaf, subleaf, register] >> bit & 1


def test_bmi_is_announced_once_it_works():
    with BareGuest("hlt") as guest:
        vcpu = guest.vcpu
        bmi = 1 << 3 | 1 << 8
        assert not vcpu.cpuid_features[7, 0, "ebx"] & bmi
        vcpu.set_cr(4, vcpu.cr(4) | 1 << 9)
        assert vcpu.cpuid_features[7, 0, "ebx"] & bmi == bmi


def test_the_time_budget_is_exact_to_a_block():
    with BareGuest("1: jmp 1b") as guest:
        vcpu = guest.vcpu
        guest.on[Exit.BOUNDARY] = vcpu.stop
        for cycles in (1, 1000, 0, 12345):
            before = vcpu.cycles
            vcpu.set_time_budget(cycles)
            vcpu.run(guest.handle)
            assert cycles <= vcpu.cycles - before <= cycles + 2
        assert guest.reg("RIP") == CODE


def test_pause_takes_time():
    with BareGuest("pause\n pause\n hlt") as guest:
        guest.run()
        assert guest.vcpu.cycles >= 280
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]
