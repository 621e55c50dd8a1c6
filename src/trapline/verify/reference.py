"""What the processor does for an instruction that always exits, on the devices of a world.

Operation sections of SDM volume 2: IN, OUT, INS, OUTS, CPUID, RDMSR, WRMSR, HLT. Writes to
32-bit registers clear the upper half; those to smaller ones keep it.
"""

from typing import Final

from trapline.cpu.engine import Exit, Reg, Vcpu
from trapline.verify.world import Access, World

_M32: Final = 0xFFFFFFFF
_DF: Final = 1 << 10
_IF: Final = 1 << 9
_MAX_REPEATS: Final = 64

SERVED: Final = frozenset((Exit.IO, Exit.CPUID, Exit.RDMSR, Exit.WRMSR, Exit.HLT))


def serve(vcpu: Vcpu, exit_: Exit, world: World) -> bool:
    """Execute the instruction behind an exit; False if it cannot be: #UD, #PF."""
    length = vcpu.length
    if not length:
        return False
    if exit_ is Exit.IO:
        if not _io(vcpu, world):
            return False
    elif exit_ is Exit.CPUID:
        regs = vcpu.regs
        world.note(Access("cpuid", False, regs[Reg.RAX] & _M32, 4, regs[Reg.RCX] & _M32))
        order = (Reg.RAX, Reg.RBX, Reg.RCX, Reg.RDX)
        for number, value in zip(order, world.cpuid, strict=True):
            regs[number] = value
    elif exit_ is Exit.RDMSR:
        world.note(Access("rdmsr", False, vcpu.regs[Reg.RCX] & _M32, 8, 0))
        vcpu.regs[Reg.RAX] = world.msr & _M32
        vcpu.regs[Reg.RDX] = world.msr >> 32
    elif exit_ is Exit.WRMSR:
        regs = vcpu.regs
        value = (regs[Reg.RDX] & _M32) << 32 | regs[Reg.RAX] & _M32
        world.note(Access("wrmsr", True, regs[Reg.RCX] & _M32, 8, value))
    else:
        world.note(Access("hlt", False, 0, 0, int(not vcpu.rflags & _IF)))
    vcpu.advance(length)
    return True


def _io(vcpu: Vcpu, world: World) -> bool:
    access, regs = vcpu.io, vcpu.regs
    mask = (1 << 8 * access.size) - 1
    if access.is_string:
        return _string_io(vcpu, world)
    if access.is_in:
        world.note(Access("port", False, access.port, access.size, 0))
        kept = 0 if access.size == 4 else regs[Reg.RAX] & ~mask
        regs[Reg.RAX] = kept | world.port & mask
    else:
        world.note(Access("port", True, access.port, access.size, regs[Reg.RAX] & mask))
    return True


def _string_io(vcpu: Vcpu, world: World) -> bool:
    access, regs = vcpu.io, vcpu.regs
    count = min(regs[Reg.RCX], _MAX_REPEATS) if access.has_rep else 1
    step = -access.size if vcpu.rflags & _DF else access.size
    pointer = Reg.RDI if access.is_in else Reg.RSI
    mask = (1 << 8 * access.size) - 1
    for _ in range(count):
        if access.is_in:
            world.note(Access("port", False, access.port, access.size, 0))
            data = (world.port & mask).to_bytes(access.size, "little")
            if not vcpu.write(regs[pointer], data):
                return False
        else:
            data_read = vcpu.read(regs[pointer], access.size)
            if data_read is None:
                return False
            value = int.from_bytes(data_read, "little")
            world.note(Access("port", True, access.port, access.size, value))
        regs[pointer] = regs[pointer] + step & (1 << 64) - 1
    if access.has_rep:
        regs[Reg.RCX] -= count
    return True
