"""A CPU engine and a VMM that only remember: what the TDX module is tested against."""

from dataclasses import dataclass

from trapline.cpu.engine import (
    CrWrite,
    EptViolation,
    Exit,
    Fault,
    IoAccess,
    PageState,
    Reg,
    SegmentRegister,
)
from trapline.tdx.module import TdxModule
from trapline.tdx.sept import Sept
from trapline.tdx.vmm_interface import TdConfig

SHARED_BIT = 1 << 39
MEMORY = 8 << 20
CODE = 0x1000  # where the instructions under test are
EFER_LONG_MODE = 0x500  # LME, LMA
CODE_64 = SegmentRegister(0x10, 0, 0xFFFFFFFF, 0x00AF9B00)
CODE_32 = SegmentRegister(0x10, 0, 0xFFFFFFFF, 0x00CF9B00)


class FakeMemory:
    """RAM in a bytearray, and the last state pushed for each page."""

    def __init__(self, size):
        self.ram = memoryview(bytearray(size))
        self.shared_ram = self.ram
        self.shared_bit = SHARED_BIT
        self.private = {}
        self.shared = {}

    def set_private(self, gpa, size, state):
        assert not (gpa | size) & 0xFFF
        for page in range(gpa >> 12, (gpa + size) >> 12):
            self.private[page] = state

    def set_shared(self, gpa, size, state):
        assert not (gpa | size) & 0xFFF
        for page in range(gpa >> 12, (gpa + size) >> 12):
            self.shared[page] = state

    # Only the tests use these.

    def mapped_private(self):
        return {page for page, state in self.private.items() if state == PageState.MAPPED}

    def mapped_shared(self):
        return {page for page, state in self.shared.items() if state == PageState.MAPPED}


class FakeVcpu:
    """Registers in a list, GLA equal to GPA, events in a list."""

    def __init__(self, memory_size=8 << 20):
        self.memory = FakeMemory(memory_size)
        self.regs = [0] * 17
        self.regs[Reg.RIP] = CODE
        self.watched = {}
        self.intercepted = frozenset()
        self.length = 2
        self.vectoring = None
        self.cpuid_features = {
            (1, 0, "ecx"): 0xFFFFFFFF & ~(1 << 17),
            (1, 0, "edx"): 0xFFFFFFFF,
            (7, 0, "ebx"): 0xFFFFFFFF,
            (0x80000001, 0, "ecx"): 0xFFFFFFFF,
            (0x80000001, 0, "edx"): 0xFFFFFFFF,
        }
        self.cycles = 1000
        self.instructions = 0
        self.io = IoAccess(0, 1, False, False, False, False, 1)
        self.cr_write = CrWrite(0, 0, 3)
        self.fault = Fault(0, 0)
        self.ept = EptViolation(0, 0, False, False, False)
        self.rflags = 2
        self.cpl = 0
        self.crs = {0: 0x80010033, 2: 0, 3: 0, 4: 0x668, 8: 0}
        self.msrs = {0xC0000080: EFER_LONG_MODE}
        self.cs = CODE_64
        self.nmi_blocked = False
        self.interrupt_shadow = False
        self.nmi_window = False
        self.events = []  # ("fault", vector, error), ("nmi",)
        self.native = {}
        self.stopped = False

    def cr(self, number):
        return self.crs[number]

    def set_cr(self, number, value):
        self.crs[number] = value

    def segment(self, name):
        return self.cs if name == "cs" else SegmentRegister(0, 0, 0, 0)

    def msr(self, index):
        return self.msrs.get(index, 0)

    def set_msr(self, index, value):
        self.msrs[index] = value

    def native_msr(self, index, *, read, write):
        self.native[index] = (read, write)

    def read(self, gla, size):
        ram = self.memory.ram
        return bytes(ram[gla : gla + size]) if gla + size <= len(ram) else None

    def watch_cr(self, number, mask):
        self.watched[number] = mask

    def intercept_exceptions(self, vectors):
        self.intercepted = vectors

    def deliver(self, vector, error_code=None):
        self.events.append(("fault", vector, error_code))

    def deliver_nmi(self):
        self.events.append(("nmi",))
        self.nmi_blocked = True

    def request_nmi_window(self, wanted):
        self.nmi_window = wanted

    def advance(self, length):
        self.regs[Reg.RIP] += length
        self.interrupt_shadow = False

    def stop(self):
        self.stopped = True


class FakeVmm:
    """Answers with what the test put into `answer`, and remembers each exit."""

    def __init__(self):
        self.calls = []
        self.violations = []
        self.exits = []
        self.windows = 0
        self.boundaries = 0
        self.breakpoints = 0
        self.answer = {}
        self.takes_exception = False

    def tdvmcall(self, registers):
        self.calls.append(list(registers))
        for register, value in self.answer.items():
            registers[register] = value

    def ept_violation(self, td_exit):
        self.violations.append(td_exit)

    def td_exit(self, td_exit):
        self.exits.append(td_exit)

    def interrupt_window(self):
        self.windows += 1

    def boundary(self):
        self.boundaries += 1

    def breakpoint(self):
        self.breakpoints += 1

    def intercepted_exception(self):
        return self.takes_exception


class FakeApic:
    def __init__(self):
        self.values = {}
        self.refuses = set()

    def read(self, index):
        return self.values.get(index, 0)

    def write(self, index, value):
        if index in self.refuses:
            return False
        self.values[index] = value
        return True


class Recorder:
    """A TrapListener that keeps everything."""

    def __init__(self):
        self.ve = []
        self.tdcalls = []
        self.tdvmcalls = []

    def on_ve(self, rip, info, *, double_fault):
        self.ve.append((rip, info, double_fault))

    def on_tdcall(self, rip, leaf, status):
        self.tdcalls.append((rip, leaf, status))

    def on_tdvmcall(self, rip, registers):
        self.tdvmcalls.append((rip, list(registers)))


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


def build_td(rules=None, features=None, features_on=None, **config):
    """A TD whose RAM is all accepted; `features` are the engine's, `features_on` the VMM's."""
    vcpu, vmm, apic, traps = FakeVcpu(MEMORY), FakeVmm(), FakeApic(), Recorder()
    if features is not None:
        vcpu.cpuid_features = features
    config.setdefault("memory_size", MEMORY)
    if features_on is not None:
        config["features"] = features_on
    sept = Sept(vcpu.memory, config["memory_size"])
    module = TdxModule(
        vcpu, vmm, TdConfig(**config), rules, sept=sept, apic=apic, listeners=[traps]
    )
    module.sept.add(0, MEMORY)
    return Td(vcpu, vmm, apic, traps, module)
