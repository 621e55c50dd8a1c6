"""Accesses to device memory without an accessor: the pointer of ioremap() and kin is followed.

`*(volatile u32 *)regs`, `regs->control |= 1` and `memcpy(buffer, regs, 64)` look like any other
code. But within the function that maps, the pointer can be followed through registers and the stack
(`trapline.isa.flow`); and where it is put in a variable of the kernel, or in a structure that is
one, in which nothing else is ever put but NULL, it can be followed to all functions of the same
object that load it from there. What is accessed through it is a site, whose evidence is the
mapping.

Not followed are pointers in structures that are allocated, which is where most drivers keep theirs,
and pointers that are handed to other functions, but for the few that copy, fill and compare memory.
What memremap() and early_memremap() return is ordinary memory, mostly.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Mnemonic, OpKind, Register

from trapline.isa import flow
from trapline.isa.flow import Value
from trapline.isa.operands import memory_operands
from trapline.linux.accessors import COPIERS, DEVICE_MAPPERS, MAPPING_TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iced_x86 import Instruction

    from trapline.isa.flow import State
    from trapline.isa.sweep import Sweep
    from trapline.kernel.binary import Binary
    from trapline.results.scan import Access
    from trapline.scan.code import Code

_MAPPED: Final = "result"
_STRINGS: "Final[dict[str, int]]" = {"rdi": Register.RDI, "rsi": Register.RSI}


class Dereference(NamedTuple):
    """One access: `copier` is the function that is called for it, None for an instruction."""

    address: int
    access: "Access"
    width: int
    mapper: str
    copier: str | None


class _Body(NamedTuple):
    sweep: "Sweep"
    start: int
    end: int


class Dereferences:
    """Finds the accesses of one object; `by_address` has one for each instruction."""

    def __init__(self, binary: "Binary", code: "Code") -> None:
        self._binary = binary
        self._code = code
        self._names: list[str] = []
        self._found: dict[int, Dereference] = {}
        self._stored: dict[int, Value] = {}
        self._spoilt: set[int] = set()
        self._follow()

    def by_address(self) -> dict[int, Dereference]:
        """Return what was found, by the address of the instruction."""
        return self._found

    def _follow(self) -> None:
        calls: dict[int, Value] = {}
        bodies: dict[int, _Body] = {}
        for sweep in self._code.sweeps:
            for address, _, name in self._code.calls(sweep, DEVICE_MAPPERS):
                kind: flow.Kind = "table" if name in MAPPING_TABLES else _MAPPED
                calls[address] = Value(kind, self._number(name))
                self._add_body(sweep, address, bodies)
        for body in bodies.values():
            self._walk(body, calls, {})
        self._follow_variables(calls)

    def _follow_variables(self, calls: dict[int, Value]) -> None:
        """Walk the functions that use the variables that pointers were seen put in."""
        variables = dict(self._stored)
        if not variables:
            return
        users: dict[int, _Body] = {}
        for sweep in self._code.sweeps:
            for address in sweep.variable_uses(variables):
                self._add_body(sweep, address, users)
        before = dict(self._found)
        # What else is put in them is only known once all have been walked.
        for body in users.values():
            self._walk(body, calls, variables)
        if self._spoilt:
            for address in self._spoilt:
                variables.pop(address, None)
            self._found = before
            for body in users.values():
                self._walk(body, calls, variables)

    def _number(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)

    def _add_body(self, sweep: "Sweep", address: int, bodies: dict[int, _Body]) -> None:
        symbol = self._binary.symbol_at(address)
        if symbol is not None and symbol.size:
            bodies[symbol.address] = _Body(sweep, symbol.address, symbol.address + symbol.size)

    def _walk(self, body: _Body, calls: dict[int, Value], variables: dict[int, Value]) -> None:
        code = [body.sweep.decode(at) for at in body.sweep.within(body.start, body.end)]
        walk = flow.Walk(code, returns=calls, content=variables.get, silent=self._code.silent)
        for instruction, state in walk.states():
            if instruction.op_count == 0:
                continue
            self._look_at_store(instruction, state)
            for found in self._accesses(instruction, state):
                self._found.setdefault(found.address, found)

    def _look_at_store(self, instruction: "Instruction", state: "State") -> None:
        """Note which variables a mapping is put in, and which anything else."""
        if instruction.op0_kind != OpKind.MEMORY or instruction.mnemonic != Mnemonic.MOV:
            return
        variable = flow.variable_of(instruction)
        if variable is None:
            return
        value = flow.moved(instruction, state)
        if value is not None and value.kind == _MAPPED:
            self._stored.setdefault(variable, value)
        elif value is None or value.what:
            self._spoilt.add(variable)

    def _accesses(self, instruction: "Instruction", state: "State") -> "Iterator[Dereference]":
        if instruction.is_call_near or instruction.is_jmp_near:
            yield from self._copies(instruction, state)
            return
        if not _may_access(instruction, state):
            return
        for operand in memory_operands(instruction):
            register = _STRINGS.get(operand.base or "")
            if instruction.is_string_instruction and register is not None:
                value = state.get(register)
            else:
                value = flow.address_of(instruction, state)
            if value is not None and value.kind == _MAPPED:
                mapper = self._names[value.what]
                yield Dereference(instruction.ip, operand.access, operand.width, mapper, None)

    def _copies(self, instruction: "Instruction", state: "State") -> "Iterator[Dereference]":
        name = self._code.copiers.get(instruction.near_branch_target)
        for number, access in COPIERS.get(name or "", ()):
            value = flow.argument(state, number)
            if value is not None and value.kind == _MAPPED:
                yield Dereference(instruction.ip, access, 0, self._names[value.what], name)


def _may_access(instruction: "Instruction", state: "State") -> bool:
    """Tell, cheaply, whether a mapped pointer is in a register of an operand in memory."""
    if instruction.is_string_instruction:
        return True
    value = flow.address_of(instruction, state)
    return value is not None and value.kind == _MAPPED
