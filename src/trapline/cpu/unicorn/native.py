"""The hooks that run inside the CPU core, assembled when an engine starts.

Each is native because it must not be Python: either it may leave by longjmp (event delivery,
forced exits), which must never cross a Python frame, or it runs for every translated block,
TLB fill or exception and would drown the guest in calls into Python.

The engine and its hooks share one control block (`slots`). Nothing native calls Python: an
exit makes cpu_exec return, and Python goes on from there.
"""

import ctypes
import mmap
from typing import TYPE_CHECKING, Any

from iced_x86 import Code, Instruction, MemoryOperand, Register
from unicorn import x86_const as x86
from unicorn.unicorn_const import (
    UC_HOOK_BLOCK,
    UC_HOOK_CODE,
    UC_HOOK_EDGE_GENERATED,
    UC_HOOK_INSN,
    UC_HOOK_INTR,
)

from trapline.base.errors import EngineMismatchError
from trapline.cpu.unicorn.assembler import Assembler, CodePage
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.interrupthook import InterruptHook, assemble_host_address
from trapline.cpu.unicorn.libunicorn import (
    EXCP_VMEXIT,
    KNOWN_VERSION,
    Cpu,
    Env,
    HFlags,
    Hook,
    Svm,
    window,
)
from trapline.cpu.unicorn.memory import UnicornMemory
from trapline.cpu.unicorn.slots import (
    COUNT_START,
    LOG_ENTRIES,
    NEVER,
    EntryTable,
    Slot,
)
from trapline.cpu.unicorn.tlb import FIRST_GROWTH, assemble_tlb_fill

if TYPE_CHECKING:
    from iced_x86._iced_x86_py import Register as RegisterValue

_RAX, _RCX, _RDX, _RBX = Register.RAX, Register.RCX, Register.RDX, Register.RBX
_RSI, _RDI = Register.RSI, Register.RDI
_EAX, _ECX, _EDX, _ESI = Register.EAX, Register.ECX, Register.EDX, Register.ESI
_R8 = Register.R8
_ENV, _CPU = Register.R12, Register.R13  # in the INTR hook

_RIP = Env.REGS + 16 * 8
# Ranges of a hook. Unicorn takes begin > end as everywhere; the other is not canonical.
_EVERYWHERE = (1, 0)
_NOWHERE = (1 << 62, 1 << 62)


class NativeHooks:
    """The assembled hooks of one CPU, registered with Unicorn; owns the control block."""

    def __init__(self, core: Core, memory: UnicornMemory) -> None:
        self._library = library = core.library
        self._fields = fields = core.fields
        self._block = mmap.mmap(-1, EntryTable.CONTROL_SIZE)
        self._anchor = (ctypes.c_char * len(self._block)).from_buffer(self._block)
        self.control_address = ctypes.addressof(self._anchor)
        self.slots = memoryview(self._block).cast("Q")
        self.slots[Slot.LIMIT] = NEVER
        self.slots[Slot.COUNT_LIMIT] = NEVER
        self.slots[Slot.COUNT] = COUNT_START
        self.slots[Slot.SKIP] = NEVER
        self.slots[Slot.SKIPPED] = NEVER
        self.slots[Slot.RESUME] = NEVER
        self.slots[Slot.ENTRY_SKIP] = NEVER
        self.slots[Slot.GROW_AT] = FIRST_GROWTH
        self._log = mmap.mmap(-1, 32 + 32 * LOG_ENTRIES)
        self._log_anchor = (ctypes.c_char * len(self._log)).from_buffer(self._log)
        self._log_address = ctypes.addressof(self._log_anchor)
        # Count, then from the fifth word on host address, size, linear address and nothing of
        # each block translated.
        self.translated = memoryview(self._log).cast("Q")
        self._page = CodePage()
        place = self._page.place
        self.enter = ctypes.CFUNCTYPE(ctypes.c_uint32)(place(self._assemble_enter()))
        self._counter_hook = place(self._assemble_counter())
        self._breakpoint_hook = place(self._assemble_breakpoint())
        self._counter: int | None = None
        self._breakpoints: list[int] = []
        self._add(
            UC_HOOK_INTR, place(InterruptHook(library, fields).assemble()), self.control_address
        )
        self._add(UC_HOOK_BLOCK, place(self._assemble_block()), self.control_address)
        for instruction, hook in (
            (x86.UC_X86_INS_IN, self._assemble_io(is_in=True)),
            (x86.UC_X86_INS_OUT, self._assemble_io(is_in=False)),
            (x86.UC_X86_INS_SYSCALL, self._assemble_leave(Svm.SYSCALL)),
            (x86.UC_X86_INS_SYSENTER, self._assemble_leave(Svm.SYSENTER)),
        ):
            self._add(UC_HOOK_INSN, place(hook), fields.env, instruction=instruction)
        self._add(UC_HOOK_EDGE_GENERATED, place(self._assemble_translated()), self._log_address)
        fill = assemble_tlb_fill(
            library,
            fields,
            self.control_address,
            memory.host,
            memory.tables,
            memory.code_map,
            memory.written,
        )
        # The class structure belongs to this CPU alone: uc_open allocates one for each.
        fields.tlb_fill[0] = place(fill)

    def hook_instructions(self, *, count: bool, breakpoints: frozenset[int]) -> None:
        """Choose what calls the CODE hooks; the caller flushes translations.

        Unicorn frees deleted hooks only at the end of uc_emu_start, which is never called
        here. Hooks are therefore kept, and parked where no instruction can be.
        """
        # The counter comes first: a breakpoint's exit takes back what it counted.
        if self._counter is None:
            self._counter = self._add_code_hook(self._counter_hook)
        _place_hook(self._counter, *(_EVERYWHERE if count else _NOWHERE))
        while len(self._breakpoints) < len(breakpoints):
            self._breakpoints.append(self._add_code_hook(self._breakpoint_hook))
        parked = [_NOWHERE] * (len(self._breakpoints) - len(breakpoints))
        ranges = [(address, address) for address in sorted(breakpoints)] + parked
        for hook, (begin, end) in zip(self._breakpoints, ranges, strict=True):
            _place_hook(hook, begin, end)

    def watch_entries(self, addresses: frozenset[int], *, wanted: bool) -> None:
        """Fill the table that the BLOCK hook looks into; translations stay as they are."""
        entries = memoryview(self._block)
        entries[EntryTable.FILTER : EntryTable.COUNT] = bytes(EntryTable.FILTER_SIZE)
        for address in addresses:
            entries[EntryTable.FILTER + (address >> 4) % EntryTable.FILTER_SIZE] = 1
        self.slots[EntryTable.COUNT // 8] = len(addresses)
        for index, address in enumerate(sorted(addresses), EntryTable.LIST // 8):
            self.slots[index] = address
        self.slots[Slot.WATCHING] = wanted

    def close(self) -> None:
        """Free the memory; the CPU must be gone."""
        self._page.close()
        self.slots.release()
        self.translated.release()
        del self._anchor
        del self._log_anchor
        self._block.close()
        self._log.close()

    def _add(self, kind: int, callback: int, data: int, *, instruction: int | None = None) -> int:
        """Register a hook; its handle is the address of Unicorn's struct hook."""
        handle = ctypes.c_size_t()
        arguments: list[Any] = [
            ctypes.c_void_p(self._fields.uc),
            ctypes.byref(handle),
            ctypes.c_int(kind),
            ctypes.c_void_p(callback),
            ctypes.c_void_p(data),
            ctypes.c_uint64(_EVERYWHERE[0]),
            ctypes.c_uint64(_EVERYWHERE[1]),
        ]
        if instruction is not None:
            arguments.append(ctypes.c_int(instruction))
        self._library.check(self._library.uc_hook_add(*arguments), "uc_hook_add")
        return handle.value

    def _add_code_hook(self, callback: int) -> int:
        hook = self._add(UC_HOOK_CODE, callback, self.control_address)
        if tuple(window(hook + Hook.BEGIN, 16, "Q")) != _EVERYWHERE:
            raise EngineMismatchError(
                "unicorn's hooks have another layout than the one known: "
                f"install unicorn=={KNOWN_VERSION} from PyPI"
            )
        return hook

    def _address(self, name: str) -> int:
        return self._library.address(name)

    def _assemble_enter(self) -> Assembler:
        """Assemble `u32 enter(void)`: run until the next exit.

        Native, so that one call without arguments does it all. cpu_exec is called directly:
        uc_emu_start would reset the exception index and flush translations.
        """
        a = Assembler()
        a.push(_RBX)
        a.set(_RBX, self.control_address)
        a.set(Register.RSI, self._fields.cpu)
        a.store_imm(_RBX, Slot.EXIT * 8, 0, 8)
        a.load(_EAX, _RBX, Slot.WANTED * 8)
        a.store(_RSI, Cpu.INTERRUPT_REQUEST, _EAX)
        a.store_imm(_RSI, Cpu.EXIT_REQUEST, 0, 1)
        a.store_imm(_RSI, Cpu.EXCEPTION_INDEX, -1, 4)
        a.mem_imm(Code.CMP_RM64_IMM8, _RBX, Slot.KIND * 8, 0)
        a.jump(Code.JE_REL32_64, "no event")
        # Any index makes cpu_exec call the INTR hook first; the hook finds the event.
        a.store_imm(_RSI, Cpu.EXCEPTION_INDEX, EXCP_VMEXIT + Svm.DELIVER, 4)
        a.store_imm(_RBX, Slot.RESUME * 8, -1, 8)
        a.store_imm(_RBX, Slot.ENTRY_SKIP * 8, -1, 8)
        a.jump(Code.JMP_REL32_64, "no skip")
        a.label("no event")
        a.load(_RAX, _RBX, Slot.RESUME * 8)
        a.set(_RDX, self._fields.env)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RDX, _RIP)
        a.jump(Code.JE_REL32_64, "resume")
        a.store_imm(_RBX, Slot.RESUME * 8, -1, 8)
        a.label("resume")
        a.load(_RAX, _RBX, Slot.ENTRY_SKIP * 8)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RDX, _RIP)
        a.jump(Code.JE_REL32_64, "told")
        a.store_imm(_RBX, Slot.ENTRY_SKIP * 8, -1, 8)
        a.label("told")
        # A breakpoint passes only when the guest resumes where it was hit.
        a.load(_RAX, _RBX, Slot.SKIP * 8)
        a.set(_RDX, self._fields.env)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RDX, _RIP)
        a.jump(Code.JE_REL32_64, "run")
        a.label("no skip")
        a.store_imm(_RBX, Slot.SKIP * 8, -1, 8)
        a.label("run")
        a.set(_RDI, self._fields.uc)
        a.call(self._address("cpu_exec"))
        a.pop(_RBX)
        a.ret()
        return a

    def _assemble_translated(self) -> Assembler:
        """Assemble the hook for a new translation: `void (uc, block, previous, log)`.

        Notes the host address of the block's first byte, its size and its linear address, so
        that a restore can drop what was translated from code that the restore takes back.
        Native, because it runs inside the core for each new block.
        """
        a = Assembler()
        a.push(_RBX)
        a.push(_ENV)
        a.push(_CPU)
        a.move(_RBX, _RCX)
        a.set(_ENV, self._fields.env)
        a.move(_CPU, _RSI)  # the block: u64 address, u16 instructions, u16 size
        a.reg_mem(Code.MOV_R64_RM64, _RAX, _RBX, 0)
        a.reg_imm(Code.CMP_RM64_IMM32, _RAX, LOG_ENTRIES)
        a.jump(Code.JAE_REL32_64, "full")
        a.load(_RSI, _CPU, 0)
        assemble_host_address(a, self._library, "block")
        a.load(_RCX, _RBX, 0)
        a.mem(Code.INC_RM64, _RBX, 0)
        a.reg_imm(Code.SHL_RM64_IMM8, _RCX, 5)
        a.reg_reg(Code.ADD_R64_RM64, _RBX, _RCX)
        a.store(_RBX, 32, _RAX)
        a.reg_mem(Code.MOVZX_R32_RM16, _EAX, _CPU, 10)
        a.store(_RBX, 40, _RAX)
        a.load(_RAX, _CPU, 0)
        a.store(_RBX, 48, _RAX)
        a.label("full")
        a.pop(_CPU)
        a.pop(_ENV)
        a.pop(_RBX)
        a.ret()
        return a

    def _assemble_block(self) -> Assembler:
        """Assemble the BLOCK hook: `void (uc, u64 address, u32 size, control)`.

        Native, because it runs for each block. It is what makes a loop without events give
        way: it counts code bytes, and once the limit is reached it exits before the block.
        """
        a = Assembler()
        a.reg_mem(Code.CMP_R64_RM64, _RSI, _RCX, Slot.RESUME * 8)
        a.jump(Code.JE_REL32_64, "paid")
        a.load(_RAX, _RCX, Slot.BYTES * 8)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RCX, Slot.LIMIT * 8)
        a.jump(Code.JAE_REL32_64, "limit")
        a.label("in time")
        a.mem_imm(Code.CMP_RM64_IMM8, _RCX, Slot.WATCHING * 8, 0)
        a.jump(Code.JNE_REL32_64, "watch")
        a.label("pass")
        a.store_imm(_RCX, Slot.STEP * 8, 0, 8)
        a.move(_EDX, _EDX)  # clears the upper half
        a.mem_reg(Code.ADD_RM64_R64, _RCX, Slot.BYTES * 8, _RDX)
        a.ret()
        a.label("paid")
        # The rest of a block that a breakpoint or a budget has cut: it was counted whole, so
        # that virtual time does not depend on where the guest is stopped.
        a.store_imm(_RCX, Slot.RESUME * 8, -1, 8)
        a.store_imm(_RCX, Slot.STEP * 8, 0, 8)
        a.ret()
        a.label("limit")
        a.mem_imm(Code.CMP_RM64_IMM8, _RCX, Slot.STEP * 8, 0)
        a.jump(Code.JNE_REL32_64, "in time")
        a.set(_RDI, self._fields.env)
        self._exit_now(a, Svm.INTR)
        self._assemble_watch(a)
        return a

    def _assemble_watch(self, a: Assembler) -> None:
        """Assemble, for the BLOCK hook: exit before an entry and before user code at CPL 0.

        A function's first instruction begins a block, since control comes to it by a branch. So
        no CODE hook is needed, of which each makes the counting of instructions slower.
        """
        a.label("watch")
        a.reg_reg(Code.TEST_RM64_R64, _RSI, _RSI)
        a.jump(Code.JNS_REL32_64, "user half")
        a.move(_EAX, _ESI)
        a.reg_imm(Code.SHR_RM32_IMM8, _EAX, 4)
        a.reg_imm(Code.AND_EAX_IMM32, _EAX, EntryTable.FILTER_SIZE - 1)
        a.reg_reg(Code.ADD_R64_RM64, _RAX, _RCX)
        a.mem_imm(Code.CMP_RM8_IMM8, _RAX, EntryTable.FILTER, 0)
        a.jump(Code.JE_REL32_64, "pass")
        a.load(_RAX, _RCX, EntryTable.COUNT)
        a.label("next")
        a.reg_imm(Code.SUB_RM64_IMM8, _RAX, 1)
        a.jump(Code.JS_REL32_64, "pass")
        a.emit(_compare_with_entry(_RSI, _RCX, _RAX))
        a.jump(Code.JNE_REL32_64, "next")
        a.label("tell")
        a.reg_mem(Code.CMP_R64_RM64, _RSI, _RCX, Slot.ENTRY_SKIP * 8)
        a.jump(Code.JE_REL32_64, "was told")
        a.set(_RDI, self._fields.env)
        self._exit_now(a, Svm.ENTRY)
        a.label("was told")
        a.store_imm(_RCX, Slot.ENTRY_SKIP * 8, -1, 8)
        a.jump(Code.JMP_REL32_64, "pass")
        a.label("user half")
        a.set(_RAX, self._fields.env)
        a.mem_imm(Code.TEST_RM32_IMM32, _RAX, Env.HFLAGS, HFlags.CPL)
        a.jump(Code.JE_REL32_64, "tell")
        a.jump(Code.JMP_REL32_64, "pass")

    def _assemble_counter(self) -> Assembler:
        """Assemble the CODE hook that counts: same arguments as the BLOCK hook.

        Native, because it runs for each instruction.
        """
        a = Assembler()
        a.load(_RAX, _RCX, Slot.COUNT * 8)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RCX, Slot.COUNT_LIMIT * 8)
        a.jump(Code.JGE_REL32_64, "limit")
        a.mem(Code.INC_RM64, _RCX, Slot.COUNT * 8)
        a.ret()
        a.label("limit")
        a.set(_RDI, self._fields.env)
        self._exit_now(a, Svm.COUNT)
        return a

    def _exit_now(self, a: Assembler, code: int) -> None:
        """Leave the guest with an exit; RDI is env, RSP as at the hook's first instruction."""
        a.reg_imm(Code.MOV_R32_IMM32, _ESI, code)
        a.reg_reg(Code.XOR_RM32_R32, _EDX, _EDX)
        a.reg_reg(Code.XOR_RM32_R32, _ECX, _ECX)
        a.reg_imm(Code.SUB_RM64_IMM8, Register.RSP, 8)
        a.call(self._address("cpu_vmexit"))

    def _assemble_breakpoint(self) -> Assembler:
        """Assemble the CODE hook of one address: exits unless Slot.SKIP lets it pass once."""
        a = Assembler()
        a.reg_mem(Code.CMP_R64_RM64, _RSI, _RCX, Slot.SKIP * 8)
        a.jump(Code.JNE_REL32_64, "hit")
        a.store(_RCX, Slot.SKIPPED * 8, _RSI)
        a.store_imm(_RCX, Slot.SKIP * 8, -1, 8)
        a.ret()
        a.label("hit")
        a.set(_RDI, self._fields.env)
        self._exit_now(a, Svm.BREAKPOINT)
        return a

    def _assemble_io(self, *, is_in: bool) -> Assembler:
        """Assemble the IN or OUT hook: `(uc, u32 port, u32 size, [u32 value,] env)`.

        Native, because the core's I/O intercept is compiled out and this restores it: the
        exit longjmps. The information word is SVM's: port << 16, size << 4, bit 0 for IN.
        """
        a = Assembler()
        a.move(_RDI, _RCX if is_in else _R8)
        a.reg_imm(Code.SHL_RM32_IMM8, _EDX, 4)
        a.reg_imm(Code.SHL_RM32_IMM8, _ESI, 16)
        a.reg_reg(Code.OR_RM32_R32, _EDX, _ESI)
        if is_in:
            a.reg_imm(Code.OR_RM32_IMM8, _EDX, 1)
        a.reg_imm(Code.MOV_R32_IMM32, _ESI, Svm.IOIO)
        a.reg_reg(Code.XOR_RM32_R32, _ECX, _ECX)
        a.reg_imm(Code.SUB_RM64_IMM8, Register.RSP, 8)
        a.call(self._address("cpu_vmexit"))
        return a

    def _assemble_leave(self, code: int) -> Assembler:
        """Assemble the hook of an instruction the core only pretends to know: `(uc, env)`."""
        a = Assembler()
        a.move(_RDI, _RSI)
        self._exit_now(a, code)
        return a


def _compare_with_entry(
    register: "RegisterValue", block: "RegisterValue", index: "RegisterValue"
) -> Instruction:
    """Cmp register, [control block + index * 8 + EntryTable.LIST]."""
    operand = MemoryOperand(block, index, 8, EntryTable.LIST, 8)
    return Instruction.create_reg_mem(Code.CMP_R64_RM64, register, operand)


def _place_hook(hook: int, begin: int, end: int) -> None:
    where = window(hook + Hook.BEGIN, 16, "Q")
    where[0], where[1] = begin, end
