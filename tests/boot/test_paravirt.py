"""Instructions carried out by the host call that a converted kernel would make.

Each case runs twice: paravirtualised, and by the CPU itself on plain memory; registers agree.
"""

import pytest

from bare_guest import DATA, BareGuest
from trapline.boot.paravirt import ParavirtCalls
from trapline.cpu.engine import IoAccess, Reg
from trapline.machine.vmm.ghci import Status, TdVmCall
from trapline.tdx.vmm_interface import ExitReason, VeInfo

VALUE = 0x8877665544332211
START = 0x0123456789ABCDEF


class FakeHost:
    """Answers GHCI calls from a dictionary of bytes, ports and MSRs, and writes them down."""

    def __init__(self, memory=None, status=Status.SUCCESS):
        self.memory = bytearray(memory or b"")
        self.status = status
        self.calls = []

    def tdvmcall(self, registers):
        self.calls.append((registers[Reg.R11], *registers[Reg.R12 : Reg.R15 + 1]))
        registers[Reg.R10] = self.status
        leaf, size, write = registers[Reg.R11], registers[Reg.R12], registers[Reg.R13]
        if leaf == TdVmCall.REQUEST_MMIO:
            at = registers[Reg.R14] - DATA
            if write:
                self.memory[at : at + size] = registers[Reg.R15].to_bytes(size, "little")
            else:
                registers[Reg.R11] = int.from_bytes(self.memory[at : at + size], "little")
        elif leaf in (TdVmCall.IO, TdVmCall.RDMSR):
            registers[Reg.R11] = VALUE
        elif leaf == TdVmCall.CPUID:
            registers[Reg.R12 : Reg.R15 + 1] = (1, 2, 3, 4)


def run(instruction, *, host=None):
    """Run one instruction with RBX = DATA; by the CPU, or by the host if one is given."""
    source = f"mov rbx, {DATA}\nhlt\n{instruction}\nhlt"
    guest = BareGuest(source)
    vcpu = guest.vcpu
    with guest:
        vcpu.memory.ram[DATA : DATA + 8] = VALUE.to_bytes(8, "little")
        guest.run()
        vcpu.advance(1)
        for register in (Reg.RAX, Reg.RCX, Reg.RDX):
            vcpu.regs[register] = START
        if host is None:
            guest.run()
            done = True
        else:
            info = VeInfo(ExitReason.EPT_VIOLATION, 0, DATA, DATA)
            done = ParavirtCalls(vcpu, host).carry_out(info)
        registers = [int(value) for value in vcpu.regs]
        return done, registers, bytes(vcpu.memory.ram[DATA : DATA + 8])


LOADS = (
    "mov al, [rbx]",
    "mov ax, [rbx]",
    "mov ecx, [rbx]",
    "mov rcx, [rbx]",
    "mov r9, [rbx]",
    "movzx ecx, byte ptr [rbx]",
    "movzx cx, byte ptr [rbx]",
    "movzx rcx, word ptr [rbx]",
    "movsx ecx, byte ptr [rbx+7]",
    "movsx rcx, word ptr [rbx+6]",
    "movsxd rcx, dword ptr [rbx+4]",
)
STORES = (
    "mov [rbx], al",
    "mov [rbx], ah",
    "mov [rbx], cx",
    "mov [rbx], edx",
    "mov [rbx], rdx",
    "mov byte ptr [rbx], 0x5a",
    "mov word ptr [rbx], 0x5a5b",
    "mov dword ptr [rbx], 0x81828384",
    "mov qword ptr [rbx], -2",
)


@pytest.mark.parametrize("instruction", LOADS + STORES)
def test_it_leaves_what_the_processor_leaves(instruction):
    offset = int(instruction.partition("+")[2][:1] or 0)
    _, registers, memory = run(instruction)
    host = FakeHost(VALUE.to_bytes(8, "little")[offset:] if offset else VALUE.to_bytes(8, "little"))
    done, paravirt, _ = run(instruction, host=host)
    assert done
    assert len(host.calls) == 1
    assert paravirt == registers
    if not offset:
        assert bytes(host.memory) == memory


@pytest.mark.parametrize(
    "instruction",
    ["add [rbx], eax", "xchg [rbx], eax", "movsb", "or dword ptr [rbx], 1", "movups xmm0, [rbx]"],
)
def test_what_a_conversion_would_rewrite_is_left_to_trap(instruction):
    host = FakeHost(bytes(8))
    done, registers, _ = run(instruction, host=host)
    assert not done
    assert host.calls == []
    assert registers[Reg.RAX] == START


def test_a_refused_call_leaves_the_instruction_to_trap():
    host = FakeHost(bytes(8), status=Status.INVALID_OPERAND)
    done, registers, _ = run("mov eax, [rbx]", host=host)
    assert not done
    assert registers[Reg.RAX] == START


class FakeVcpu:
    """An engine at an instruction of 2 bytes that is no memory access."""

    vectoring = None

    def __init__(self, io=None):
        self.regs = memoryview(bytearray(17 * 8)).cast("Q")
        self.regs[Reg.RAX] = START
        self.regs[Reg.RCX] = 0x1B
        self.regs[Reg.RDX] = START
        self.io = io
        self.advanced = 0

    def advance(self, length):
        self.advanced += length


def access(*, is_in, size, is_string=False):
    return IoAccess(0x3F8, size, is_in, is_string, False, False, 2)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, START & ~0xFF | 0x11), (2, START & ~0xFFFF | 0x2211), (4, 0x44332211)],
)
def test_in_fills_the_part_of_rax_it_names(size, expected):
    vcpu = FakeVcpu(access(is_in=True, size=size))
    host = FakeHost()
    assert ParavirtCalls(vcpu, host).carry_out(VeInfo(ExitReason.IO_INSTRUCTION, length=2))
    assert vcpu.regs[Reg.RAX] == expected
    assert vcpu.advanced == 2
    assert host.calls == [(TdVmCall.IO, size, 0, 0x3F8, 0)]


def test_out_sends_the_part_of_rax_it_names():
    vcpu = FakeVcpu(access(is_in=False, size=2))
    host = FakeHost()
    assert ParavirtCalls(vcpu, host).carry_out(VeInfo(ExitReason.IO_INSTRUCTION, length=2))
    assert host.calls == [(TdVmCall.IO, 2, 1, 0x3F8, START & 0xFFFF)]


def test_string_io_is_left_to_trap():
    vcpu = FakeVcpu(access(is_in=False, size=1, is_string=True))
    host = FakeHost()
    assert not ParavirtCalls(vcpu, host).carry_out(VeInfo(ExitReason.IO_INSTRUCTION, length=2))
    assert host.calls == []


def test_msr_and_cpuid_calls():
    vcpu, host = FakeVcpu(), FakeHost()
    calls = ParavirtCalls(vcpu, host)
    assert calls.carry_out(VeInfo(ExitReason.RDMSR, length=2))
    assert (vcpu.regs[Reg.RAX], vcpu.regs[Reg.RDX]) == (VALUE & 0xFFFFFFFF, VALUE >> 32)
    assert calls.carry_out(VeInfo(ExitReason.WRMSR, length=2))
    assert host.calls[-1] == (TdVmCall.WRMSR, 0x1B, VALUE, 0, 0)
    assert calls.carry_out(VeInfo(ExitReason.CPUID, length=2))
    assert [vcpu.regs[r] for r in (Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX)] == [1, 2, 3, 4]
    assert vcpu.advanced == 6


def test_nothing_is_done_in_the_middle_of_event_delivery():
    vcpu, host = FakeVcpu(), FakeHost()
    vcpu.vectoring = 14
    assert not ParavirtCalls(vcpu, host).carry_out(VeInfo(ExitReason.CPUID, length=2))
    assert host.calls == []


def test_other_reasons_are_left_alone():
    assert not ParavirtCalls(FakeVcpu(), FakeHost()).carry_out(VeInfo(ExitReason.HLT, length=1))


def test_the_guest_of_this_test_stops_where_it_should():
    """The comparison above is only as good as this: RIP is behind the instruction."""
    _, registers, _ = run("mov al, [rbx]")
    done, paravirt, _ = run("mov al, [rbx]", host=FakeHost(bytes(8)))
    assert done
    assert registers[Reg.RIP] == paravirt[Reg.RIP]
