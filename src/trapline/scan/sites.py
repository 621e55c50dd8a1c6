"""Finds the trap sites of one object.

There are three kinds. Instructions that trap wherever they are (IN, WRMSR, CPUID, HLT …) are
found by their opcodes. MMIO is an ordinary MOV: found where DWARF says that the instruction
belongs to an inlined `readl`, `writel` or their kin. Calls of out-of-line accessors, and calls
through pv_ops, are found by their targets.

Accesses without an accessor are found where the pointer can be followed from the mapping
(`trapline.scan.dereferences`); docs/limitations.md says which are not.
"""

from typing import TYPE_CHECKING, Final

from iced_x86 import Mnemonic

from trapline.isa import traps
from trapline.isa.operands import format_instruction, memory_operands
from trapline.linux import ve_handler
from trapline.linux.accessors import CALLED, INLINED, PARAVIRT, QUEUES
from trapline.scan import verdicts
from trapline.scan.dereferences import Dereferences
from trapline.scan.found import FoundSite, What
from trapline.scan.location import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iced_x86 import Instruction

    from trapline.isa.sweep import Sweep
    from trapline.kernel.binary import Binary
    from trapline.linux.accessors import Inlined
    from trapline.results.scan import Access, Form
    from trapline.scan.code import Code
    from trapline.scan.kernelfacts import ScanContext

_FRAME_BASE: Final = "rbp"
# Prologues of functions that keep their frame in RBP: push %rbp; mov %rsp,%rbp.
_FRAME_SETUP: Final = (b"\x55\x48\x89\xe5", b"\x55\x48\x8b\xec")
# Bytes. ENDBR64, the call of __fentry__, and the alignment of the stack may come before.
_PROLOGUE: Final = 64
# They have the address of what they write in a register operand; the memory operand is the source.
_WIDE_STORES: Final = frozenset({Mnemonic.MOVDIR64B, Mnemonic.ENQCMD, Mnemonic.ENQCMDS})
_WIDE: Final = 64  # bytes
_READ_MARK: Final = "fromio"
_WRITE_MARK: Final = "toio"


class SiteFinder:
    """Finds the sites of one binary; `sites` gives them in the order of sections and addresses."""

    def __init__(self, binary: "Binary", code: "Code", context: "ScanContext") -> None:
        self._binary = binary
        self._code = code
        self._context = context
        self._by_pointer = Dereferences(binary, code).by_address()

    def sites(self) -> "Iterator[FoundSite]":
        """Yield all sites, each address once."""
        for sweep in self._code.sweeps:
            found: dict[int, What] = {}
            kinds = (self._traps, self._mmio, self._calls, self._paravirt, self._dereferences)
            for what in kinds:
                for address, site in what(sweep):
                    found.setdefault(address, site)
            for address in sorted(found):
                yield self._found(sweep, address, found[address])

    def _traps(self, sweep: "Sweep") -> "Iterator[tuple[int, What]]":
        for address in sweep.trap_candidates():
            instruction = sweep.decode(address)
            trap = traps.classify(instruction)
            if trap is not None:
                yield (
                    address,
                    What(
                        *(trap.kind, "instruction", trap.access, trap.width, None),
                        format_instruction(instruction),
                        ve_handler.emulable(
                            instruction, self._context.handler, sweep.bytes_of(instruction)
                        ),
                    ),
                )

    def _mmio(self, sweep: "Sweep") -> "Iterator[tuple[int, What]]":
        for start, end, name in self._code.inlined:
            if not sweep.address <= start < sweep.address + len(sweep.data):
                continue
            for address in sweep.within(start, end):
                instruction = sweep.decode(address)
                match = self._device_operand(instruction, INLINED[name])
                if match is not None:
                    access, width = match
                    yield (
                        address,
                        What(
                            *("mmio", "instruction", access, width, name),
                            format_instruction(instruction),
                            ve_handler.emulable_mmio(
                                instruction, self._context.handler, sweep.bytes_of(instruction)
                            ),
                        ),
                    )

    def _calls(self, sweep: "Sweep") -> "Iterator[tuple[int, What]]":
        for address, instruction, name in self._code.calls(sweep, CALLED):
            called = CALLED[name]
            text = f"{format_instruction(instruction).partition(' ')[0]} {name}"
            yield (
                address,
                What(
                    *(called.trap, "call", called.access, called.width, name, text),
                    verdicts.of_call(called, self._context.handler, name),
                ),
            )

    def _paravirt(self, sweep: "Sweep") -> "Iterator[tuple[int, What]]":
        for address, instruction, member in self._code.paravirt_calls(sweep):
            called = PARAVIRT.get(member)
            if called is None:
                continue
            text = f"{format_instruction(instruction).partition(' ')[0]} *pv_ops.{member}"
            yield (
                address,
                What(
                    *(called.trap, "paravirt", called.access, called.width),
                    *(f"pv_ops.{member}", text),
                    verdicts.of_call(called, self._context.handler),
                ),
            )

    def _dereferences(self, sweep: "Sweep") -> "Iterator[tuple[int, What]]":
        for address, found in self._by_pointer.items():
            if not sweep.address <= address < sweep.address + len(sweep.data):
                continue
            instruction = sweep.decode(address)
            text = format_instruction(instruction)
            if found.copier is None:
                verdict = ve_handler.emulable_mmio(
                    instruction, self._context.handler, sweep.bytes_of(instruction)
                )
            else:
                verdict = verdicts.of_copy(self._context.handler)
                text = f"{text.partition(' ')[0]} {found.copier}"
            form: Form = "instruction" if found.copier is None else "call"
            what = (found.access, found.width, found.copier, text, verdict, found.mapper)
            yield address, What("mmio", form, *what)

    def _device_operand(
        self, instruction: "Instruction", accessor: "Inlined"
    ) -> "tuple[Access, int] | None":
        """Return direction and width of the access to the device, None if this is another one.

        The compiler mixes in spills, reloads and loads of the pointer. The access itself is an
        inline assembly statement: right direction, right width, and never on the stack.
        """
        if accessor.width is None:
            if not instruction.is_string_instruction:
                return None
            operand = memory_operands(instruction)[0]
            access = accessor.access or self._copy_direction(instruction.ip)
            return None if access is None else (access, operand.width)
        if instruction.mnemonic in _WIDE_STORES:
            fits = (accessor.access, accessor.width) == ("write", _WIDE)
            return ("write", _WIDE) if fits and self._is_for_device(instruction) else None
        for operand in memory_operands(instruction):
            if (
                operand.width == accessor.width
                and not operand.is_stack
                and accessor.access is not None
                and accessor.access in operand.access
                and not (operand.base == _FRAME_BASE and self._has_frame(instruction.ip))
            ):
                return accessor.access, operand.width
        return None

    def _copy_direction(self, address: int) -> "Access | None":
        """Tell by the functions around a copy in which direction it goes."""
        for frame in self._binary.chain(address):
            if _READ_MARK in frame.function:
                return "read"
            if _WRITE_MARK in frame.function:
                return "write"
        return None

    def _is_for_device(self, instruction: "Instruction") -> bool:
        """Tell by the functions around a MOVDIR64B whether it writes to a device."""
        return instruction.mnemonic != Mnemonic.MOVDIR64B or any(
            frame.function in QUEUES for frame in self._binary.chain(instruction.ip)
        )

    def _has_frame(self, address: int) -> bool:
        """Whether RBP is the frame pointer of the function at an address."""
        symbol = self._binary.symbol_at(address)
        code = None if symbol is None else self._binary.read(symbol.address, _PROLOGUE)
        return code is not None and any(setup in code for setup in _FRAME_SETUP)

    def _found(self, sweep: "Sweep", address: int, what: What) -> FoundSite:
        return FoundSite(
            at=address,
            module=self._binary.name,
            what=what,
            place=place_of(self._binary, address),
            bytes=sweep.bytes_of(sweep.decode(address)).hex(),
        )
