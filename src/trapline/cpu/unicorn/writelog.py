"""Which pages of RAM were written since the last restore, kept by the native TLB fill.

A page can be written only through a TLB entry, and a restore flushes the TLB: the pages that
entered it as writable, and the page tables whose accessed and dirty bits were set, are all
that the guest wrote. Restoring copies those pages back, natively; dropping the process's own
copies instead would cost a host page fault for each page in the next run.
"""

import ctypes
import mmap
from typing import TYPE_CHECKING, Final

import numpy as np
from iced_x86 import Code, Instruction, Register

from trapline.cpu.unicorn.assembler import Assembler, CodePage

if TYPE_CHECKING:
    import numpy.typing as npt

_PAGE: Final = 4096
_WORDS: Final = 512
_COUNT, _INCOMPLETE, _FIRST = 0, 1, 2  # words of the log


class WriteLog:
    """A bit for each page, so that each is listed once, and the list."""

    def __init__(self, ram_size: int) -> None:
        pages = -(-ram_size // _PAGE)
        self._bits = mmap.mmap(-1, max(pages // 8 + 8, _PAGE))
        self._log = mmap.mmap(-1, (pages + _FIRST) * 8)
        self._bits_anchor = (ctypes.c_char * len(self._bits)).from_buffer(self._bits)
        self._log_anchor = (ctypes.c_char * len(self._log)).from_buffer(self._log)
        self.bits_address = ctypes.addressof(self._bits_anchor)
        self.address = ctypes.addressof(self._log_anchor)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._log, np.uint64)
        self._flags = memoryview(self._log).cast("Q")  # of single words: faster than the array
        self._code = CodePage()
        self._restore: ctypes._FuncPointer | None = None

    def add(self, gpa: int, size: int) -> None:
        """Note that the host wrote to RAM."""
        bits, words = self._bits, self._flags
        for page in range(gpa // _PAGE, -(-(gpa + size) // _PAGE)):
            if not bits[page // 8] >> page % 8 & 1:
                bits[page // 8] |= 1 << page % 8
                count = words[_COUNT]
                words[_FIRST + count] = page
                words[_COUNT] = count + 1

    @property
    def is_complete(self) -> bool:
        """All pages written are listed."""
        return not self._flags[_INCOMPLETE]

    def pages(self) -> list[int] | None:
        """GPAs of the pages written; None if some cannot be told."""
        if not self.is_complete:
            return None
        listed = self._words[_FIRST : _FIRST + int(self._words[_COUNT])]
        gpas: list[int] = (listed * np.uint64(_PAGE)).tolist()
        return gpas

    def clear(self) -> None:
        """Start over; the TLB must be flushed before the guest goes on."""
        listed = self._words[_FIRST : _FIRST + int(self._words[_COUNT])]
        bits = np.frombuffer(self._bits, np.uint8)
        bits[listed >> np.uint64(3)] = 0
        self._words[_COUNT] = self._words[_INCOMPLETE] = 0

    def copy_back(self, ram: int, frozen: int) -> None:
        """Copy the listed pages from `frozen` to `ram`, both host addresses, and start over."""
        if self._restore is None:
            address = self._code.place(self._assemble_copy(ram, frozen))
            self._restore = ctypes.CFUNCTYPE(None)(address)
        self._restore()

    def assemble_note(self, a: Assembler) -> None:
        """Assemble the subroutine `note`: R10 = number of a page that may be written.

        Uses R11 and R13.
        """
        a.label("note")
        a.set(Register.R11, self.bits_address)
        a.mem_reg(Code.BTS_RM64_R64, Register.R11, 0, Register.R10)
        a.jump(Code.JB_REL32_64, "noted")
        a.set(Register.R11, self.address)
        a.push(Register.R13)
        a.load(Register.R13, Register.R11, _COUNT * 8)
        a.mem(Code.INC_RM64, Register.R11, _COUNT * 8)
        a.store_index(Register.R11, Register.R13, _FIRST * 8, Register.R10)
        a.pop(Register.R13)
        a.label("noted")
        a.ret()

    def assemble_incomplete(self, a: Assembler) -> None:
        """Assemble the note that a page was written without being listed; uses R11."""
        a.set(Register.R11, self.address)
        a.store_imm(Register.R11, _INCOMPLETE * 8, 1, 8)

    def _assemble_copy(self, ram: int, frozen: int) -> Assembler:
        """Assemble `void copy(void)`. Native: Python would take longer than the copying."""
        a = Assembler()
        a.set(Register.R8, self.address)
        a.set(Register.R9, self.bits_address)
        a.load(Register.RDX, Register.R8, _COUNT * 8)
        a.store_imm(Register.R8, _COUNT * 8, 0, 8)
        a.store_imm(Register.R8, _INCOMPLETE * 8, 0, 8)
        a.label("next")
        a.reg_imm(Code.SUB_RM64_IMM8, Register.RDX, 1)
        a.jump(Code.JB_REL32_64, "done")
        a.reg_mem(Code.LEA_R64_M, Register.RAX, Register.R8, _FIRST * 8)
        a.load_index(Register.RAX, Register.RAX, Register.RDX)
        a.mem_reg(Code.BTR_RM64_R64, Register.R9, 0, Register.RAX)
        a.reg_imm(Code.SHL_RM64_IMM8, Register.RAX, 12)
        a.set(Register.RSI, frozen)
        a.reg_reg(Code.ADD_R64_RM64, Register.RSI, Register.RAX)
        a.set(Register.RDI, ram)
        a.reg_reg(Code.ADD_R64_RM64, Register.RDI, Register.RAX)
        a.reg_imm(Code.MOV_R32_IMM32, Register.ECX, _WORDS)
        a.emit(Instruction.create_rep_movsq(64))
        a.jump(Code.JMP_REL32_64, "next")
        a.label("done")
        a.ret()
        return a

    def close(self) -> None:
        """Unmap; the core must be gone."""
        self._flags.release()
        del self._words
        del self._bits_anchor
        del self._log_anchor
        self._bits.close()
        self._log.close()
        self._code.close()
