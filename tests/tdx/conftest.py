"""A TD on the fake engine: `make_td(**config)` builds one, `td` is one with defaults."""

from dataclasses import dataclass

import pytest
from fake_td import FakeApic, FakeVcpu, FakeVmm, Recorder

from trapline.cpu.engine import Exit, Reg
from trapline.rules.tables import load
from trapline.tdx.module import TdxModule
from trapline.tdx.sept import Sept
from trapline.tdx.vmm_interface import TdConfig

MEMORY = 8 << 20


@dataclass
class Td:
    vcpu: FakeVcpu
    vmm: FakeVmm
    apic: FakeApic
    traps: Recorder
    module: TdxModule

    @property
    def memory(self):
        return self.vcpu.memory

    @property
    def regs(self):
        return self.vcpu.regs

    def take(self, exit_, **registers):
        """Set registers, take an exit, and return the events it caused."""
        for name, value in registers.items():
            self.regs[Reg[name.upper()]] = value
        self.vcpu.events.clear()
        self.module.on_exit(exit_)
        return list(self.vcpu.events)

    def call(self, leaf, **registers):
        """TDCALL: return RAX."""
        self.vcpu.length = 4
        self.take(Exit.TDCALL, rax=leaf, **registers)
        return self.regs[Reg.RAX]

    def msr(self, index, value=None):
        """RDMSR, or WRMSR with a value: the value read, or the events."""
        rip = self.regs[Reg.RIP]
        if value is None:
            events = self.take(Exit.RDMSR, rcx=index)
            done = self.regs[Reg.RDX] << 32 | self.regs[Reg.RAX]
        else:
            events = self.take(Exit.WRMSR, rcx=index, rax=value & 0xFFFFFFFF, rdx=value >> 32)
            done = []
        if self.regs[Reg.RIP] == rip:
            assert len(events) == 1
            return events[0]
        assert not events
        return done


@pytest.fixture
def rules():
    return load("1.5.01")


@pytest.fixture
def make_td():
    def make(rules=None, features=None, **config):
        vcpu, vmm, apic, traps = FakeVcpu(MEMORY), FakeVmm(), FakeApic(), Recorder()
        if features is not None:
            vcpu.cpuid_features = features
        config.setdefault("memory_size", MEMORY)
        sept = Sept(vcpu.memory, config["memory_size"])
        module = TdxModule(
            vcpu, vmm, TdConfig(**config), rules, sept=sept, apic=apic, listeners=[traps]
        )
        module.sept.add(0, MEMORY)
        return Td(vcpu, vmm, apic, traps, module)

    return make


@pytest.fixture
def td(make_td):
    return make_td()
