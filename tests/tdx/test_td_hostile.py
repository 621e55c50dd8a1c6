"""A guest is hostile: whatever it puts into registers, the module only ever answers."""

import random

import pytest

from trapline.cpu.engine import CrWrite, EptViolation, Exit, IoAccess, Reg

INTERESTING = (
    [0, 1, 2, 3, 4, 7, 0xFF, 0xFFF, 0x1000, 0x2000, 0x200000, 8 << 20, (8 << 20) - 0x1000]
    + [1 << n for n in range(12, 64, 3)]
    + [(1 << n) - 1 for n in (32, 39, 40, 52, 63, 64)]
)
FIELD_IDS = [0x1110000300000017, 0x9100000000000010, 0xA120000000000000, 0x1310000300000040]
MSRS = [0x10, 0x48, 0x1D9, 0x6E0, 0x808, 0x83F, 0xDA0, 0xC0000080, 0xC0000102, 0x40000000]
M64 = (1 << 64) - 1


def values(rng):
    pool = INTERESTING + FIELD_IDS + MSRS
    return rng.choice(pool) ^ rng.choice([0, 0, 0, 1, 1 << 39, 1 << 63, rng.getrandbits(64)])


@pytest.mark.parametrize("seed", range(8))
def test_random_guests(make_td, seed):
    rng = random.Random(seed)
    td = make_td(attributes=rng.choice([0, 1 << 28]), xfam=rng.choice([3, 3 | 3 << 11]))
    td.vmm.answer = {Reg.R10: 1 << 80, Reg.R11: -5}
    exits = [Exit.TDCALL] * 6 + [Exit.CPUID, Exit.RDMSR, Exit.WRMSR, Exit.IO, Exit.HLT]
    exits += [Exit.EPT_VIOLATION, Exit.CR_WRITE, Exit.NMI_WINDOW, Exit.UNDEFINED, Exit.RDPMC]
    for _ in range(4000):
        for number in range(16):
            td.regs[number] = values(rng) & M64
        if rng.random() < 0.9:
            td.regs[Reg.RAX] = rng.choice([*range(30), 1 << 16 | 7])
        exit_ = rng.choice(exits)
        td.vcpu.io = IoAccess(
            rng.getrandbits(16), rng.choice([1, 2, 4]), *[rng.random() < 0.5] * 4, 2
        )
        td.vcpu.cr_write = CrWrite(rng.choice([0, 3, 4, 8]), values(rng) & M64, 3)
        td.vcpu.ept = EptViolation(
            values(rng) & (1 << 52) - 1, values(rng) & M64, rng.random() < 0.5, False, False
        )
        if rng.random() < 0.02:
            page = rng.randrange(0, 8 << 20, 0x1000)
            rng.choice([td.module.sept.remove, td.module.sept.share])(page, 0x1000)
        if rng.random() < 0.02:
            td.module.pend_nmi()
        rip = td.regs[Reg.RIP]
        td.vcpu.events.clear()
        td.module.on_exit(exit_)
        assert len(td.vcpu.events) <= 1
        assert all(0 <= value <= M64 for value in td.regs)
        # It moved on, got an event, or a TD exit went to the VMM.
        assert (
            td.regs[Reg.RIP] != rip
            or td.vcpu.events
            or td.vmm.violations
            or exit_ is Exit.NMI_WINDOW
        )
        td.vmm.violations.clear()
        td.vmm.calls.clear()
        td.regs[Reg.RIP] = rip
