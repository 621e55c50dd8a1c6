"""In which context a #VE came, by what the processor and preempt_count say."""

from types import SimpleNamespace

import pytest

from trapline.cpu.engine import Reg
from trapline.machine.observe.trapcontext import TrapContexts

GS = 0xFFFF_8880_0000_0000
PREEMPT_COUNT = 0x35008
KERNEL_STACK = 0xFFFF_C900_0000_4000
IF = 1 << 9
REASON = 30


def noted(*, count=0, gs=GS, rsp=KERNEL_STACK, rflags=IF, cpl=0, nmi=False, **said):
    ram = bytearray(0x1000)
    ram[0x100:0x104] = count.to_bytes(4, "little")
    regs = [0] * 17
    regs[Reg.RSP] = rsp
    vcpu = SimpleNamespace(
        memory=SimpleNamespace(ram=memoryview(ram)),
        regs=regs,
        rflags=rflags,
        cpl=cpl,
        nmi_blocked=nmi,
        msr={0xC000_0101: gs}.get,
        translate={GS + PREEMPT_COUNT: 0x100}.get,
    )
    contexts = TrapContexts(vcpu)
    contexts.preempt_count = PREEMPT_COUNT
    contexts.is_early = said.pop("early", False)
    contexts.is_panic = said.pop("panic", False)
    contexts.note(REASON, nested=said.pop("nested", False), second=said.pop("second", False))
    assert not said
    return dict(contexts.counts()[REASON])


@pytest.mark.parametrize(
    ("state", "context"),
    [
        ({"cpl": 3, "gs": 0x7000, "rsp": 0x7000}, "user mode"),
        ({"early": True}, "early"),
        ({"rflags": 0}, "interrupts off"),
        ({"count": 1 << 8}, "soft interrupt"),
        ({"count": 1 << 16}, "hard interrupt"),
        ({"nmi": True}, "NMI"),
        ({"nested": True}, "#VE handler"),
        ({"panic": True}, "panic"),
        ({"nested": True, "second": True}, "VE_INFO in use"),
        ({"gs": 0x7000_0000}, "user GS"),
        ({"rsp": 0x7FFC_0000_0000}, "user stack"),
    ],
)
def test_each_context_is_told(state, context):
    assert noted(**state) == {context: 1}


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"count": 1},  # preemption off
        {"count": 2 << 8},  # soft interrupts held back, which is not serving one
    ],
)
def test_ordinary_kernel_code_is_in_none(state):
    assert noted(**state) == {}


def test_one_may_be_in_several():
    assert noted(nmi=True, rflags=0, count=1 << 20 | 1 << 16, early=True) == {
        "interrupts off": 1,
        "hard interrupt": 1,
        "NMI": 1,
        "early": 1,
    }


def test_before_the_kernel_has_a_gs_base_none_is_the_users():
    assert noted(gs=0, rsp=0x1000, early=True) == {"early": 1}
