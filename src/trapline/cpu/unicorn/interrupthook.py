"""The INTR hook: where every exception and exit of the core arrives, and events leave.

It delivers what the guest raised and what Python asked for through the core's own IDT code, or
notes an exit and makes cpu_exec return. Native, because a fault while an event is delivered
leaves by longjmp, which must not cross a Python frame, and so that the guest's own exceptions
(#PF above all) never enter Python.
"""

from iced_x86 import Code, Register

from trapline.cpu.unicorn.assembler import Assembler
from trapline.cpu.unicorn.libunicorn import (
    EXCP_VMEXIT,
    MMU_FETCH,
    MMU_KNOSMAP,
    MMU_KSMAP,
    MMU_USER,
    SEGMENT_BASE,
    SEGMENT_FLAGS,
    SEGMENT_LIMIT,
    SEGMENT_SIZE,
    Cpu,
    Env,
    Fields,
    HFlags,
    InterruptRequest,
    Library,
    Segs,
    Svm,
)
from trapline.cpu.unicorn.slots import EXCEPTION_BYTES, IN_DELIVERY_FLAG, DeliveryKind, Slot

_RAX, _RCX, _RDX, _RBX = Register.RAX, Register.RCX, Register.RDX, Register.RBX
_RSI, _RDI = Register.RSI, Register.RDI
_EAX, _ECX, _EDX, _ESI = Register.EAX, Register.ECX, Register.EDX, Register.ESI
_ENV, _CPU = Register.R12, Register.R13

_RIP = Env.REGS + 16 * 8
_TR = Env.SEGS + SEGMENT_SIZE * Segs.TR
_CS_BASE = Env.SEGS + SEGMENT_SIZE * Segs.CS + SEGMENT_BASE
_PRESENT = 0x8000
_BUSY_TSS = 0x0B00
_AC = 1 << 18
_TS, _GP = 10, 13  # the vectors whose error code is a selector
_IDT = 2  # in an error code: it is about a gate


class InterruptHook:
    """Assembles the hook: `void (uc, u32 index, control)`."""

    def __init__(self, library: Library, fields: Fields) -> None:
        self._library = library
        self._fields = fields

    def assemble(self) -> Assembler:
        """Assemble the INTR hook: `void (uc, u32 index, control)`.

        Native, because a fault while an event is delivered leaves by longjmp, and so that
        the guest's own exceptions (#PF above all) never enter Python.
        """
        a = Assembler()
        a.push(_RBX)
        a.push(_ENV)
        a.push(_CPU)
        a.move(_RBX, _RDX)
        a.set(_ENV, self._fields.env)
        a.set(_CPU, self._fields.cpu)
        a.move(_ESI, _ESI)  # clears the upper half
        a.mem_imm(Code.CMP_RM64_IMM8, _RBX, Slot.KIND * 8, 0)
        a.jump(Code.JNE_REL32_64, "deliver")
        a.reg_imm(Code.CMP_RM32_IMM32, _ESI, EXCP_VMEXIT)
        a.jump(Code.JAE_REL32_64, "exit")
        self._assemble_guest_exception(a)
        self._assemble_requested_event(a)
        self._assemble_delivery(a)
        self._assemble_exit(a)
        a.label("return")
        a.pop(_CPU)
        a.pop(_ENV)
        a.pop(_RBX)
        a.ret()
        return a

    def _assemble_guest_exception(self, a: Assembler) -> None:
        """Prepare an exception of the guest that nobody asked to see.

        Double faults are made after the core looked at the intercept bits, hence a second
        look here.
        """
        a.load(_RAX, _RBX, Slot.TRAPPED * 8)
        a.reg_reg(Code.BT_RM64_R64, _RAX, _RSI)
        a.jump(Code.JB_REL32_64, "trapped")
        # A fault did not complete its instruction; the trap #DB (1) did.
        a.reg_imm(Code.CMP_RM32_IMM32, _ESI, 1)
        a.jump(Code.JE_REL32_64, "completed")
        a.mem(Code.DEC_RM64, _RBX, Slot.COUNT * 8)
        a.label("completed")
        # An exception takes time, so that a guest that does nothing else is stopped as well.
        a.mem_imm(Code.ADD_RM64_IMM32, _RBX, Slot.BYTES * 8, EXCEPTION_BYTES)
        self._assemble_error_code(a)
        a.store_imm(_RBX, Slot.IN_KIND * 8, DeliveryKind.EXCEPTION, 8)
        a.store(_RBX, Slot.IN_VECTOR * 8, _RSI)
        a.load(_EAX, _ENV, Env.ERROR_CODE)
        a.store(_RBX, Slot.IN_ERROR * 8, _RAX)
        a.jump(Code.JMP_REL32_64, "exception")

    @staticmethod
    def _assemble_error_code(a: Assembler) -> None:
        """Correct the error code of a fault during the delivery of an event.

        SDM vol. 3A section 6.13: bit 0 (EXT) is set unless the event was a software
        interrupt, and an IDT entry's index is vector * 8; the core never sets EXT and has
        vector * 16 in long mode (qemu/target/i386/seg_helper.c, do_interrupt64).
        """
        a.reg_mem(Code.LEA_R32_M, _ECX, _RSI, -_TS)
        a.reg_imm(Code.CMP_RM32_IMM8, _ECX, _GP - _TS)
        a.jump(Code.JA_REL32_64, "code right")
        a.load(_EAX, _ENV, Env.ERROR_CODE)
        a.load(_RDX, _RBX, Slot.IN_KIND * 8)
        a.reg_reg(Code.TEST_RM64_R64, _RDX, _RDX)
        a.jump(Code.JE_REL32_64, "code right")
        a.reg_imm(Code.CMP_RM64_IMM8, _RDX, DeliveryKind.SOFTWARE)
        a.jump(Code.JE_REL32_64, "not external")
        a.reg_imm(Code.OR_RM32_IMM8, _EAX, 1)
        a.label("not external")
        a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _IDT)
        a.jump(Code.JE_REL32_64, "store code")
        a.mem_imm(Code.TEST_RM32_IMM32, _ENV, Env.HFLAGS, HFlags.LMA)
        a.jump(Code.JE_REL32_64, "store code")
        a.move(_ECX, _EAX)
        a.reg_imm(Code.AND_RM32_IMM8, _ECX, 7)
        a.reg_imm(Code.SHR_RM32_IMM8, _EAX, 1)
        a.reg_imm(Code.AND_RM32_IMM8, _EAX, -8)
        a.reg_reg(Code.OR_R32_RM32, _EAX, _ECX)
        a.label("store code")
        a.store(_ENV, Env.ERROR_CODE, _EAX)
        a.label("code right")

    @staticmethod
    def _assemble_requested_event(a: Assembler) -> None:
        """Take the event that Python left in the control block."""
        a.label("deliver")
        a.load(_RAX, _RBX, Slot.KIND * 8)
        a.load(_RSI, _RBX, Slot.VECTOR * 8)
        a.load(_RCX, _RBX, Slot.ERROR * 8)
        a.store_imm(_RBX, Slot.KIND * 8, DeliveryKind.NONE, 8)
        a.store(_RBX, Slot.IN_KIND * 8, _RAX)
        a.store(_RBX, Slot.IN_VECTOR * 8, _RSI)
        a.store(_RBX, Slot.IN_ERROR * 8, _RCX)
        a.store(_CPU, Cpu.EXCEPTION_INDEX, _ESI)
        a.store(_ENV, Env.ERROR_CODE, _ECX)
        a.load(_EDX, _RBX, Slot.OLD * 8)
        a.store(_ENV, Env.OLD_EXCEPTION, _EDX)
        a.store_imm(_ENV, Env.EXCEPTION_IS_INT, 0, 4)
        a.reg_imm(Code.CMP_RM64_IMM8, _RAX, DeliveryKind.INTERRUPT)
        a.jump(Code.JE_REL32_64, "interrupt")
        a.reg_imm(Code.CMP_RM64_IMM8, _RAX, DeliveryKind.SOFTWARE)
        a.jump(Code.JNE_REL32_64, "exception")
        a.load(_RDX, _RBX, Slot.NEXT_RIP * 8)
        a.store(_ENV, Env.EXCEPTION_NEXT_EIP, _RDX)
        a.store_imm(_ENV, Env.EXCEPTION_IS_INT, 1, 4)

    def _assemble_delivery(self, a: Assembler) -> None:
        """Push the frame and go through the IDT; may longjmp back into cpu_exec."""
        a.label("exception")
        self._assemble_tss_guard(a, "exception ready")
        a.move(_RDI, _CPU)
        a.call(self._library.address("x86_cpu_do_interrupt"))
        a.jump(Code.JMP_REL32_64, "delivered")
        a.label("interrupt")
        self._assemble_tss_guard(a, "interrupt ready")
        a.move(_RDI, _ENV)
        a.move(_EDX, _EAX)  # is_hw: not zero
        a.call(self._library.address("do_interrupt_x86_hardirq"))
        a.label("delivered")
        a.store_imm(_RBX, Slot.IN_KIND * 8, DeliveryKind.NONE, 8)
        # Must not stay set: cpu_exec would move RIP on the next event.
        a.store_imm(_ENV, Env.EXCEPTION_IS_INT, 0, 4)
        a.store_imm(_ENV, Env.OLD_EXCEPTION, -1, 4)
        # The limit has to be looked at here too: the handler's first block may never come.
        a.load(_RAX, _RBX, Slot.BYTES * 8)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _RBX, Slot.LIMIT * 8)
        a.jump(Code.JB_REL32_64, "return")
        a.mem_imm(Code.OR_RM32_IMM32, _CPU, Cpu.INTERRUPT_REQUEST, InterruptRequest.HARD)
        a.jump(Code.JMP_REL32_64, "return")

    def _assemble_exit(self, a: Assembler) -> None:
        """Note the exit and make cpu_exec return."""
        a.label("trapped")
        a.reg_imm(Code.ADD_RM32_IMM32, _ESI, EXCP_VMEXIT + Svm.EXCEPTION)
        a.store_imm(_ENV, Env.OLD_EXCEPTION, -1, 4)
        a.label("exit")
        a.mem_imm(Code.CMP_RM64_IMM8, _RBX, Slot.IN_KIND * 8, 0)
        a.jump(Code.JE_REL32_64, "plain")
        a.reg_imm(Code.OR_RM32_IMM32, _ESI, IN_DELIVERY_FLAG)
        a.label("plain")
        a.store(_RBX, Slot.EXIT * 8, _RSI)
        a.load(_EAX, _ENV, Env.ERROR_CODE)
        a.store(_RBX, Slot.INFO * 8, _RAX)
        # With a request still set, cpu_exec would take that exit too and lose this one.
        a.store_imm(_CPU, Cpu.INTERRUPT_REQUEST, 0, 4)
        a.store_imm(_CPU, Cpu.EXIT_REQUEST, 1, 1)
        a.store_imm(_ENV, Env.EXCEPTION_IS_INT, 0, 4)
        a.store_imm(_RBX, Slot.CODE * 8, 0, 8)
        # Exits between instructions, or while an event is delivered, have none to show.
        for code in (Svm.INTR, Svm.VINTR, Svm.COUNT, Svm.ENTRY):
            a.reg_imm(Code.CMP_RM32_IMM32, _ESI, EXCP_VMEXIT + code)
            a.jump(Code.JE_REL32_64, "return")
        a.reg_imm(Code.CMP_RM32_IMM32, _ESI, IN_DELIVERY_FLAG)
        a.jump(Code.JAE_REL32_64, "return")
        # The instruction was counted when it started, and has not executed.
        a.mem(Code.DEC_RM64, _RBX, Slot.COUNT * 8)
        # A breakpoint that let this instruction pass does so again when it is retried.
        a.load(_RAX, _RBX, Slot.SKIPPED * 8)
        a.store_imm(_RBX, Slot.SKIPPED * 8, -1, 8)
        a.reg_mem(Code.CMP_R64_RM64, _RAX, _ENV, _RIP)
        a.jump(Code.JNE_REL32_64, "not skipped")
        a.store(_RBX, Slot.SKIP * 8, _RAX)
        a.label("not skipped")
        # An EPT violation may be the fetch itself.
        a.reg_imm(Code.CMP_RM32_IMM32, _ESI, EXCP_VMEXIT + Svm.NPF)
        a.jump(Code.JE_REL32_64, "return")
        self._assemble_code_bytes(a)

    @staticmethod
    def _assemble_tss_guard(a: Assembler, label: str) -> None:
        """Make an absent TSS an empty one.

        A guest may load a null task register; the core aborts the process on the next stack
        switch. With a limit of 0 the switch is a #TS instead.
        """
        a.mem_imm(Code.TEST_RM32_IMM32, _ENV, _TR + SEGMENT_FLAGS, _PRESENT)
        a.jump(Code.JNE_REL32_64, label)
        a.mem_imm(Code.OR_RM32_IMM32, _ENV, _TR + SEGMENT_FLAGS, _PRESENT | _BUSY_TSS)
        a.store_imm(_ENV, _TR + SEGMENT_LIMIT, 0, 4)
        a.label(label)

    def _assemble_code_bytes(self, a: Assembler) -> None:
        """Copy the instruction's first 8 bytes to Slot.CODE through the core's own TLB.

        The page was just executed from, so this hits; a walk from Python costs microseconds.
        """
        a.load(_RSI, _ENV, _RIP)
        a.reg_mem(Code.ADD_R64_RM64, _RSI, _ENV, _CS_BASE)
        a.move(_EAX, _ESI)
        a.reg_imm(Code.AND_RM32_IMM32, _EAX, 0xFFF)
        a.reg_imm(Code.CMP_RM32_IMM32, _EAX, 0xFF8)
        a.jump(Code.JA_REL32_64, "return")
        assemble_host_address(a, self._library, "code")
        a.reg_reg(Code.TEST_RM64_R64, _RAX, _RAX)
        a.jump(Code.JE_REL32_64, "return")
        a.load(_RAX, _RAX, 0)
        a.store(_RBX, Slot.CODE * 8, _RAX)


def assemble_host_address(a: Assembler, library: Library, name: str) -> None:
    """Put the host address of the code at linear address RSI into RAX; 0: not in RAM.

    R12 is env; `name` makes the labels unique.
    """
    a.load(_EAX, _ENV, Env.HFLAGS)
    a.move(_EDX, _EAX)
    a.reg_imm(Code.AND_RM32_IMM8, _EDX, HFlags.CPL)
    a.reg_imm(Code.CMP_RM32_IMM8, _EDX, 3)
    a.reg_imm(Code.MOV_R32_IMM32, _ECX, MMU_USER)
    a.jump(Code.JE_REL32_64, f"look {name}")
    a.reg_imm(Code.MOV_R32_IMM32, _ECX, MMU_KNOSMAP)
    a.reg_imm(Code.TEST_RM32_IMM32, _EAX, HFlags.SMAP)
    a.jump(Code.JE_REL32_64, f"look {name}")
    a.mem_imm(Code.TEST_RM32_IMM32, _ENV, Env.EFLAGS, _AC)
    a.jump(Code.JNE_REL32_64, f"look {name}")
    a.reg_imm(Code.MOV_R32_IMM32, _ECX, MMU_KSMAP)
    a.label(f"look {name}")
    a.reg_imm(Code.MOV_R32_IMM32, _EDX, MMU_FETCH)
    a.move(_RDI, _ENV)
    a.call(library.address("tlb_vaddr_to_host"))
