"""The core's TLB fill, replaced by a native one for 4-level paging.

Three reasons, all of them native because they run for each TLB miss:

- An EPT violation tells only the GPA; noting address and access here keeps the GLA.
- The core walks two sets of tables with a function call for each of up to 24 entries. Guest
  RAM and the nested tables are host memory, so the walk here is a few dozen instructions.
- Unicorn 2.1.4 loses self-modifying code: a write through another linear address than the
  one that was executed is not seen (qemu/exec.c, cpu_physical_memory_test_and_clear_dirty is
  empty), and every write to a page that is mapped executable takes the slow path, executed
  or not (qemu/accel/tcg/cputlb.c, notdirty_write). Here a map of one bit per page says which
  pages were fetched from. Other pages enter the TLB as not executable, which makes writes to
  them fast. A fetched page stays executable, which keeps writes to it slow and seen; where
  the guest's mapping is not executable, it is not writable either until a write comes, and
  then the page's translations are dropped and it is data again.

Faults, other paging modes and unmapped pages are left to the core's own function.
"""

import ctypes
import mmap
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, Instruction, MemoryOperand, Register

from trapline.cpu.unicorn.assembler import Assembler
from trapline.cpu.unicorn.libunicorn import (
    MMU_FETCH,
    MMU_KSMAP,
    MMU_STORE,
    MMU_USER,
    PAGE_EXEC,
    PAGE_READ,
    PAGE_WRITE,
    PHYSICAL_BITS,
    Env,
    Fields,
    HFlags,
    Library,
)
from trapline.cpu.unicorn.slots import FailedWalk, Slot

if TYPE_CHECKING:
    from trapline.cpu.unicorn.nested import NestedTables
    from trapline.cpu.unicorn.ram import Ram
    from trapline.cpu.unicorn.writelog import WriteLog

_RAX, _RCX, _RDX, _RBX, _RBP = Register.RAX, Register.RCX, Register.RDX, Register.RBX, Register.RBP
_RSI, _RDI, _R8, _R9 = Register.RSI, Register.RDI, Register.R8, Register.R9
_R10, _R11, _R12, _R13, _R14 = (
    Register.R10,
    Register.R11,
    Register.R12,
    Register.R13,
    Register.R14,
)
_EAX, _ECX, _EBP, _R8D, _R9D = (
    Register.EAX,
    Register.ECX,
    Register.EBP,
    Register.R8D,
    Register.R9D,
)
_R10D, _R14D = Register.R10D, Register.R14D

# Page table entries: SDM vol. 3A section 4.5.4.
_PRESENT, _WRITABLE, _USER, _ACCESSED, _DIRTY, _LARGE = 1, 2, 4, 0x20, 0x40, 0x80
_NX_BIT: Final = 63
_FRAME: Final = (1 << PHYSICAL_BITS) - 0x1000
_RESERVED: Final = (1 << 52) - (1 << PHYSICAL_BITS)
_PAT_OF_LARGE: Final = 1 << 12
_CR0_WP: Final = 1 << 16
_CR4_SMEP: Final = 1 << 20
_CR4_UNSUPPORTED: Final = 1 << 12 | 1 << 22  # LA57, PKE
_EFER_NXE: Final = 1 << 11

_SAVED: Final = (_RBX, _RBP, _R12, _R13, _R14)
_ARGUMENTS: Final = (_RDI, _RSI, _RDX, _RCX, _R8, _R9)
FIRST_GROWTH: Final = 512


class CodeMap:
    """One bit for each page of RAM: code was fetched from it."""

    def __init__(self, ram_size: int) -> None:
        size = max(ram_size // 4096 // 8 + 8, mmap.PAGESIZE)
        self._map = mmap.mmap(-1, size)
        self._anchor = (ctypes.c_char * size).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor)

    def close(self) -> None:
        """Unmap; the core must be gone."""
        del self._anchor
        self._map.close()


def assemble_tlb_fill(
    library: Library,
    fields: Fields,
    control: int,
    ram: "Ram",
    nested: "NestedTables",
    code_map: CodeMap,
    log: "WriteLog",
) -> Assembler:
    """Assemble `bool (cpu, u64 address, int size, int access, int mmu_idx, bool probe, retaddr)`.

    It also flushes the TLB after 512 fills, 1,024 more, 2,048 more and so on: the core
    enlarges a full TLB only when it is flushed, and a guest that never does that (the
    decompressor) would stay at 256 entries.
    """
    a = Assembler()
    for register in _SAVED:  # five: the stack is aligned for calls
        a.push(register)
    a.set(_RBX, control)
    a.store(_RBX, Slot.GLA * 8, _RSI)
    a.move(_ECX, _ECX)  # clears the upper half
    a.store(_RBX, Slot.ACCESS * 8, _RCX)
    a.store_imm(_RBX, Slot.WALK * 8, FailedWalk.UNKNOWN, 8)
    a.load(_R10, _RBX, Slot.FILLS * 8)
    a.mem(Code.INC_RM64, _RBX, Slot.FILLS * 8)
    a.reg_mem(Code.CMP_R64_RM64, _R10, _RBX, Slot.GROW_AT * 8)
    a.jump(Code.JNE_REL32_64, "walk")
    a.mem_imm(Code.SHL_RM64_IMM8, _RBX, Slot.GROW_AT * 8, 1)
    _flush(a, library)
    a.label("walk")
    _assemble_mode_check(a, fields)
    for shift in (39, 30, 21, 12):
        _assemble_level(a, shift)
    _assemble_permissions(a, fields)
    _assemble_leaf(a)
    _assemble_code_rules(a, library, fields, code_map)

    _assemble_install(a, library)
    _assemble_fallback(a, library, log)
    _assemble_resolve(a, ram, nested)
    _assemble_note_table(a)
    log.assemble_note(a)
    return a


def _assemble_install(a: Assembler, library: Library) -> None:
    """Tell the core's TLB: RAX = address in RAM, EBP = what is allowed, R13 = page size."""
    a.label("install")
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, PAGE_WRITE)
    a.jump(Code.JE_REL32_64, "not written")
    a.move(_R10, _RAX)
    a.reg_imm(Code.SHR_RM64_IMM8, _R10, 12)
    a.jump(Code.CALL_REL32_64, "note")
    a.label("not written")
    a.reg_imm(Code.AND_RM64_IMM32, _RSI, -0x1000)
    a.move(_RDX, _RAX)
    a.reg_reg(Code.XOR_RM32_R32, _ECX, _ECX)  # attributes: not secure
    a.move(_R9D, _R8D)
    a.move(_R8D, _EBP)
    a.push(_R13)  # keeps the stack aligned
    a.push(_R13)  # page size
    a.call(library.address("tlb_set_page_with_attrs"))
    a.pop(_R13)
    a.pop(_R13)
    a.reg_imm(Code.MOV_R32_IMM32, _EAX, 1)
    for register in reversed(_SAVED):
        a.pop(register)
    a.ret()


def _assemble_fallback(a: Assembler, library: Library, log: "WriteLog") -> None:
    """Let the core fill; what it then writes is not listed."""
    a.label("no table")
    a.store_imm(_RBX, Slot.WALK * 8, FailedWalk.TABLE, 8)
    a.jump(Code.JMP_REL32_64, "slow")
    a.label("no page")
    a.store_imm(_RBX, Slot.WALK * 8, FailedWalk.PAGE, 8)
    a.label("slow")
    for register in reversed(_SAVED):
        a.pop(register)
    # The seventh argument is on the stack; the copy also aligns it for the call.
    a.emit(Instruction.create_mem(Code.PUSH_RM64, MemoryOperand(Register.RSP, displ=8)))
    a.call(library.address("x86_cpu_tlb_fill"))
    a.reg_imm(Code.ADD_RM64_IMM8, Register.RSP, 8)
    a.reg_reg(Code.TEST_RM8_R8, Register.AL, Register.AL)
    a.jump(Code.JE_REL32_64, "not filled")
    log.assemble_incomplete(a)
    a.label("not filled")
    a.ret()


def _assemble_note_table(a: Assembler) -> None:
    """Subroutine: note the page of the entry at R14 as written; uses R10, R11."""
    a.label("note table")
    a.move(_R10, _R14)
    a.reg_reg(Code.SUB_R64_RM64, _R10, _R12)
    a.reg_imm(Code.SHR_RM64_IMM8, _R10, 12)
    a.jump(Code.JMP_REL32_64, "note")


def _assemble_mode_check(a: Assembler, fields: Fields) -> None:
    """Leave modes other than plain 4-level paging to the core; RAX = first table's GPA."""
    a.set(_R10, fields.env)
    a.mem_imm(Code.TEST_RM32_IMM32, _R10, Env.HFLAGS, HFlags.LMA)
    a.jump(Code.JE_REL32_64, "slow")
    a.mem_imm(Code.TEST_RM32_IMM32, _R10, Env.CR + 4 * 8, _CR4_UNSUPPORTED)
    a.jump(Code.JNE_REL32_64, "slow")
    a.mem_imm(Code.TEST_RM32_IMM32, _R10, Env.EFER, _EFER_NXE)
    a.jump(Code.JE_REL32_64, "slow")
    a.mem_imm(Code.TEST_RM32_IMM32, _R10, Env.CR, _CR0_WP)
    a.jump(Code.JE_REL32_64, "slow")
    a.load(_RAX, _R10, Env.CR + 3 * 8)
    a.set(_R11, _FRAME)
    a.reg_reg(Code.AND_R64_RM64, _RAX, _R11)
    # Canonical: bits 63:47 all alike.
    a.move(_R10, _RSI)
    a.reg_imm(Code.SAR_RM64_IMM8, _R10, 47)
    a.reg_imm(Code.ADD_RM64_IMM8, _R10, 1)
    a.reg_imm(Code.CMP_RM64_IMM8, _R10, 1)
    a.jump(Code.JA_REL32_64, "slow")
    a.reg_imm(Code.MOV_RM64_IMM32, _RBP, -1)  # permissions, combined by AND; NX inverted


def _assemble_level(a: Assembler, shift: int) -> None:
    """Read one entry: RAX = table's GPA before, entry after; R14 = the entry's host address."""
    a.jump(Code.CALL_REL32_64, "resolve")
    a.jump(Code.JE_REL32_64, "no table")
    a.move(_R10, _RSI)
    a.reg_imm(Code.SHR_RM64_IMM8, _R10, shift - 3)
    a.reg_imm(Code.AND_RM32_IMM32, _R10D, 0xFF8)
    a.reg_reg(Code.ADD_R64_RM64, _RAX, _R10)
    a.reg_reg(Code.ADD_R64_RM64, _RAX, _R12)
    a.move(_R14, _RAX)
    a.load(_RAX, _R14, 0)
    a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _PRESENT)
    a.jump(Code.JE_REL32_64, "slow")
    a.set(_R11, _RESERVED | (_LARGE if shift == 39 else 0))
    a.reg_reg(Code.TEST_RM64_R64, _RAX, _R11)
    a.jump(Code.JNE_REL32_64, "slow")
    a.set(_R11, 1 << _NX_BIT)
    a.reg_reg(Code.XOR_R64_RM64, _R11, _RAX)
    a.reg_reg(Code.AND_R64_RM64, _RBP, _R11)
    if shift in {30, 21}:
        a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _LARGE)
        a.jump(Code.JE_REL32_64, f"table {shift}")
        a.set(_R11, (1 << shift) - 0x1000 - _PAT_OF_LARGE)
        a.reg_reg(Code.TEST_RM64_R64, _RAX, _R11)
        a.jump(Code.JNE_REL32_64, "slow")
        a.reg_imm(Code.MOV_R32_IMM32, Register.R13D, 1 << shift)
        a.jump(Code.JMP_REL32_64, "permissions")
        a.label(f"table {shift}")
    if shift == 12:
        a.reg_imm(Code.MOV_R32_IMM32, Register.R13D, 1 << shift)
        return
    a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _ACCESSED)
    a.jump(Code.JNE_REL32_64, f"accessed {shift}")
    a.mem_imm(Code.OR_RM8_IMM8, _R14, 0, _ACCESSED)
    a.jump(Code.CALL_REL32_64, "note table")
    a.label(f"accessed {shift}")
    a.set(_R11, _FRAME)
    a.reg_reg(Code.AND_R64_RM64, _RAX, _R11)


def _assemble_permissions(a: Assembler, fields: Fields) -> None:
    """EBP = what the guest's tables allow (PAGE_*); refused accesses go to the core."""
    a.label("permissions")
    a.reg_imm(Code.MOV_R32_IMM32, Register.R11D, PAGE_READ)
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, _WRITABLE)
    a.jump(Code.JE_REL32_64, "read only")
    a.reg_imm(Code.OR_RM32_IMM8, Register.R11D, PAGE_WRITE)
    a.label("read only")
    a.reg_imm(Code.BT_RM64_IMM8, _RBP, _NX_BIT)
    a.jump(Code.JAE_REL32_64, "no fetch")
    a.reg_imm(Code.OR_RM32_IMM8, Register.R11D, PAGE_EXEC)
    a.label("no fetch")
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, _USER)
    a.jump(Code.JE_REL32_64, "supervisor page")
    # A user page: SMAP forbids data, SMEP forbids fetches, to the supervisor.
    a.reg_imm(Code.CMP_RM32_IMM8, _R8D, MMU_USER)
    a.jump(Code.JE_REL32_64, "checked")
    a.reg_imm(Code.CMP_RM32_IMM8, _R8D, MMU_KSMAP)
    a.jump(Code.JE_REL32_64, "slow")
    a.set(_R10, fields.env)
    a.mem_imm(Code.TEST_RM32_IMM32, _R10, Env.CR + 4 * 8, _CR4_SMEP)
    a.jump(Code.JE_REL32_64, "checked")
    a.reg_imm(Code.AND_RM32_IMM8, Register.R11D, ~PAGE_EXEC)
    a.jump(Code.JMP_REL32_64, "checked")
    a.label("supervisor page")
    a.reg_imm(Code.CMP_RM32_IMM8, _R8D, MMU_USER)
    a.jump(Code.JE_REL32_64, "slow")
    a.label("checked")
    a.move(_EBP, Register.R11D)
    a.reg_imm(Code.CMP_RM32_IMM8, _ECX, MMU_STORE)
    a.jump(Code.JB_REL32_64, "allowed")
    a.jump(Code.JA_REL32_64, "fetch")
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, PAGE_WRITE)
    a.jump(Code.JE_REL32_64, "slow")
    a.jump(Code.JMP_REL32_64, "allowed")
    a.label("fetch")
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, PAGE_EXEC)
    a.jump(Code.JE_REL32_64, "slow")
    a.label("allowed")


def _assemble_leaf(a: Assembler) -> None:
    """Set accessed and dirty; RAX = address in RAM of the page. A clean page is read-only."""
    a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _ACCESSED)
    a.jump(Code.JNE_REL32_64, "accessed")
    a.mem_imm(Code.OR_RM8_IMM8, _R14, 0, _ACCESSED)
    a.jump(Code.CALL_REL32_64, "note table")
    a.label("accessed")
    a.reg_imm(Code.TEST_RM32_IMM32, _EAX, _DIRTY)
    a.jump(Code.JNE_REL32_64, "dirty")
    a.reg_imm(Code.CMP_RM32_IMM8, _ECX, MMU_STORE)
    a.jump(Code.JE_REL32_64, "now dirty")
    a.reg_imm(Code.AND_RM32_IMM8, _EBP, ~PAGE_WRITE)
    a.jump(Code.JMP_REL32_64, "dirty")
    a.label("now dirty")
    a.mem_imm(Code.OR_RM8_IMM8, _R14, 0, _DIRTY)
    a.jump(Code.CALL_REL32_64, "note table")
    a.label("dirty")
    a.set(_R11, _FRAME)
    a.reg_reg(Code.AND_R64_RM64, _RAX, _R11)
    a.move(_R10, _R13)
    a.reg(Code.NEG_RM64, _R10)  # ~(size - 1)
    a.reg_reg(Code.AND_R64_RM64, _RAX, _R10)
    a.reg(Code.NOT_RM64, _R10)
    a.reg_imm(Code.AND_RM64_IMM32, _R10, -0x1000)
    a.reg_reg(Code.AND_R64_RM64, _R10, _RSI)
    a.reg_reg(Code.OR_R64_RM64, _RAX, _R10)
    a.jump(Code.CALL_REL32_64, "resolve")
    a.jump(Code.JE_REL32_64, "no page")


def _assemble_code_rules(a: Assembler, library: Library, fields: Fields, code_map: CodeMap) -> None:
    """Keep code and data apart: see the module's text. EBP = what the TLB is told."""
    a.move(_R10, _RAX)
    a.reg_imm(Code.SHR_RM64_IMM8, _R10, 12)
    a.set(_R11, code_map.address)
    a.mem_reg(Code.BT_RM64_R64, _R11, 0, _R10)
    a.jump(Code.JB_REL32_64, "code page")
    a.reg_imm(Code.CMP_RM32_IMM8, _ECX, MMU_FETCH)
    a.jump(Code.JE_REL32_64, "first fetch")
    a.reg_imm(Code.AND_RM32_IMM8, _EBP, ~PAGE_EXEC)
    a.jump(Code.JMP_REL32_64, "install")

    a.label("first fetch")
    a.mem_reg(Code.BTS_RM64_R64, _R11, 0, _R10)
    # Entries of this page that are writable, by whatever address, must go.
    a.push(_RAX)
    a.push(_RAX)
    _flush(a, library)
    a.pop(_RAX)
    a.pop(_RAX)
    a.jump(Code.JMP_REL32_64, "install")

    a.label("code page")
    a.reg_imm(Code.TEST_RM32_IMM32, _EBP, PAGE_EXEC)
    a.jump(Code.JNE_REL32_64, "install")
    a.reg_imm(Code.CMP_RM32_IMM8, _ECX, MMU_STORE)
    a.jump(Code.JE_REL32_64, "data again")
    a.reg_imm(Code.AND_RM32_IMM8, _EBP, ~PAGE_WRITE)
    a.jump(Code.JMP_REL32_64, "install")

    a.label("data again")
    a.mem_reg(Code.BTR_RM64_R64, _R11, 0, _R10)
    a.push(_RAX)
    for register in (_RDI, _RSI, _R8):
        a.push(register)
    a.set(_RDI, fields.uc)
    a.move(_RSI, _RAX)
    a.reg_mem(Code.LEA_R64_M, _RDX, _RAX, 0x1000)
    a.call(library.address("tb_invalidate_phys_range"))
    for register in (_R8, _RSI, _RDI):
        a.pop(register)
    a.push(_RAX)
    _flush(a, library)
    a.pop(_RAX)
    a.pop(_RAX)


def _flush(a: Assembler, library: Library) -> None:
    """Flush the TLB; keeps the argument registers. The stack is aligned before and after."""
    for register in _ARGUMENTS:
        a.push(register)
    a.call(library.address("tlb_flush"))
    for register in reversed(_ARGUMENTS):
        a.pop(register)


def _assemble_resolve(a: Assembler, ram: "Ram", nested: "NestedTables") -> None:
    """Subroutine: GPA in RAX to address in RAM; ZF set if it is not mapped.

    R12 = host address of RAM; uses R10, R11, R14.
    """
    a.label("resolve")
    a.set(_R12, ram.address)
    a.set(_R11, nested.private_directory)
    a.reg_imm(Code.BT_RM64_IMM8, _RAX, PHYSICAL_BITS - 1)
    a.jump(Code.JAE_REL32_64, "private")
    a.reg_imm(Code.BTR_RM64_IMM8, _RAX, PHYSICAL_BITS - 1)
    a.set(_R10, ram.size)
    a.reg_reg(Code.CMP_R64_RM64, _RAX, _R10)
    a.jump(Code.JAE_REL32_64, "unmapped")
    # From here on as if the directory began at the offset of the shared half's memory.
    a.set(_R10, ram.shared_offset)
    a.reg_reg(Code.ADD_R64_RM64, _RAX, _R10)
    a.set(_R11, nested.shared_directory - (ram.shared_offset >> 21) * 8)
    a.jump(Code.JMP_REL32_64, "inside")
    a.label("private")
    a.set(_R10, ram.size)
    a.reg_reg(Code.CMP_R64_RM64, _RAX, _R10)
    a.jump(Code.JAE_REL32_64, "unmapped")
    a.label("inside")
    a.move(_R10, _RAX)
    a.reg_imm(Code.SHR_RM64_IMM8, _R10, 21)
    a.load_index(_R10, _R11, _R10)
    a.reg_imm(Code.TEST_RM32_IMM32, _R10D, _PRESENT)
    a.jump(Code.JE_REL32_64, "unmapped")
    a.reg_imm(Code.TEST_RM32_IMM32, _R10D, _LARGE)
    a.jump(Code.JNE_REL32_64, "mapped")
    a.reg_imm(Code.AND_RM64_IMM32, _R10, -0x1000)
    a.set(_R11, (nested.address - nested.root) & 0xFFFFFFFFFFFFFFFF)
    a.reg_reg(Code.ADD_R64_RM64, _R10, _R11)
    a.move(_R14, _RAX)
    a.reg_imm(Code.SHR_RM64_IMM8, _R14, 12)
    a.reg_imm(Code.AND_RM32_IMM32, _R14D, 0x1FF)
    a.load_index(_R10, _R10, _R14)
    a.label("mapped")
    a.reg_imm(Code.TEST_RM32_IMM32, _R10D, _PRESENT)
    a.ret()
    a.label("unmapped")
    a.reg_reg(Code.XOR_RM32_R32, _R10D, _R10D)
    a.ret()
