"""What the code of an object does with pointers to functions: where it calls, where it puts them.

Each function with something to see is walked once; what is learnt of the types of global pointers
on the way is used in a second walk of those that could not tell what they call.
"""

from typing import TYPE_CHECKING, Final

import numpy as np
from iced_x86 import Mnemonic, OpKind, Register

from trapline.isa.flow import full, variable_of
from trapline.kernel.calls.body import Body
from trapline.kernel.calls.origins import ARGUMENTS, UNKNOWN, Facts, Origins, Value, Values
from trapline.kernel.calls.uses import Argument, Cell, Uses, stored_at
from trapline.kernel.types.layout import Place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iced_x86 import Instruction
    from numpy.typing import NDArray

    from trapline.kernel.calls.codemap import CodeMap
    from trapline.kernel.calls.optables import Tables
    from trapline.kernel.calls.pointers import Pointers
    from trapline.kernel.types.layout import Layouts, Leaf

#: Values of one pointer that are believed; of more, those whose prototype fits the arguments.
FEW: Final = 4
_WORD: Final = 8
_KEPT: Final = 2000  # functions that are kept decoded
_CALLS: Final = frozenset({Mnemonic.CALL, Mnemonic.JMP})


class Survey:
    """`sites` is what each indirect branch goes through, `arguments` what it is called with.

    `assigned` says which functions code puts where; those in `assigned[None]` go where nobody can
    tell. `flows` says of a cell to which others what is in it is copied.
    """

    def __init__(
        self,
        code: "CodeMap",
        layouts: "Layouts | None",
        prototypes: dict[int, int],
        pointers: "Pointers",
        tables: "Tables | None",
        per_cpu: int,
    ) -> None:
        self._code = code
        self._pointers = pointers
        self._tables = tables
        self._bodies: dict[int, Body] = {}
        self._held: dict[int, Value] = {}
        self._asked: set[int] = set()  # variables whose type would have helped
        self._layouts = layouts
        self._prototypes = prototypes
        self.sites: dict[int, Values] = {}
        self.arguments: dict[int, tuple[Values, ...]] = {}
        self.assigned: dict[Cell, set[int]] = {}
        self.flows: dict[Cell, set[Cell]] = {}
        #: What is stored to variables, by their address.
        self.stores: dict[int, set[Value]] = {}
        self.facts = Facts(
            layouts, prototypes, code.untraced, per_cpu, self._pointer_in, self._leaves_at
        )
        self._walk_all()
        self._learn_variables()
        self._follow_arguments()

    def origins(self, function: int) -> Origins:
        """Return the walker of one function."""
        body = self._bodies.get(function)
        if body is None:
            body = self._bodies[function] = Body(self._code, function)
            if len(self._bodies) > _KEPT:
                del self._bodies[next(iter(self._bodies))]
        return Origins(body, self.facts)

    def _walk_all(self) -> None:
        code, branches = self._code, self._code.branches
        is_start = np.isin(branches.loaded, code.starts)
        loads = zip(
            branches.loads[is_start].tolist(), branches.loaded[is_start].tolist(), strict=True
        )
        through = np.isin(branches.targets, np.fromiter(code.thunks, np.uint64))
        sites = np.concatenate((branches.sites[through], branches.pointers))
        thunks = {code.owner(address) for address in code.thunks}
        work: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        for owner, site in zip(_owners(code, sites), sites.tolist(), strict=True):
            if owner not in thunks:
                work.setdefault(owner, ([], []))[0].append(site)
        for owner, load in zip(_owners(code, branches.loads[is_start]), loads, strict=True):
            work.setdefault(owner, ([], []))[1].append(load)
        for owner, (its_sites, its_loads) in sorted(work.items()):
            if owner >= 0:
                self._walk(owner, its_sites, its_loads)

    def _walk(self, owner: int, sites: "Iterable[int]", loads: "list[tuple[int, int]]") -> None:
        origins = self.origins(owner)
        for site in sites:
            self._see(origins, site)
        uses = Uses(origins.body, origins, self._layouts)
        for address, function in loads:
            for cell in uses.of_load(address):
                self.assigned.setdefault(cell, set()).add(function)

    def _see(self, origins: Origins, site: int) -> None:
        instruction = origins.body.instructions.get(site)
        if instruction is None:
            # In a replacement, which is no part of a body.
            instruction = self._code.decode(site)
            if instruction.op0_kind != OpKind.MEMORY or instruction.memory_base not in {
                Register.NONE,
                Register.RIP,
            }:
                self.sites[site] = frozenset({UNKNOWN})
                return
        if instruction.op0_kind == OpKind.NEAR_BRANCH64:
            register = self._code.thunks[instruction.near_branch_target]
            values = origins.of_register(site, register)
        else:
            values = origins.of_operand(instruction)
        self.sites[site] = values
        is_vague = any(value.source in {"field", "unknown", "pointer"} for value in values)
        if is_vague or len(values) > FEW:
            self.arguments[site] = tuple(
                origins.of_register(site, register) for register in ARGUMENTS[:3]
            )

    def _learn_variables(self) -> None:
        """Find out what is stored to the variables that calls go through, and look again."""
        wanted = {
            value.what
            for values in self.sites.values()
            for value in values
            if value.source == "variable"
        }
        again = [
            site
            for site, values in self.sites.items()
            if any(value.source in {"field", "unknown"} for value in values)
        ]
        for sweep in self._code.sweeps:
            for address in sweep.variable_uses(wanted | self._asked):
                instruction = sweep.decode(address)
                if instruction.op0_kind == OpKind.MEMORY:
                    self._learn_store(instruction)
        for address, values in self.stores.items():
            pointers = {value for value in values if value.source == "pointer"}
            if len(pointers) == 1:
                self._held.setdefault(address, pointers.pop())
        for site in again if self._held else ():
            self._see_again(site)

    def _see_again(self, site: int) -> None:
        owner = self._code.owner(site)
        self._see(self.origins(owner), site)

    def _learn_store(self, instruction: "Instruction") -> None:
        address = variable_of(instruction)
        if address is None or instruction.op1_kind != OpKind.REGISTER:
            return
        origins = self.origins(self._code.owner(instruction.ip))
        values = origins.of_register(instruction.ip, full(instruction.op1_register))
        found = set()
        for value in values:
            if value.source == "constant" and value.what:
                found |= self._typed(value.what)
            elif value.source != "constant":
                found.add(value)
        self.stores.setdefault(address, set()).update(found)

    def _typed(self, address: int) -> set[Value]:
        """Return what a pointer to an address is: a function, or a variable of some type."""
        if self._code.is_function(address):
            return {Value("constant", address)}
        variable = self._pointers.variable(address)
        if variable is None or self._tables is None:
            return set()
        start, _ = variable
        return {
            Value("pointer", kind, address - start) for kind in self._tables.types.get(start, ())
        }

    def _pointer_in(self, address: int) -> Value | None:
        """Return what kind of pointer is in a variable: by what it is initialised or set to."""
        known = self._held.get(address)
        if known is not None:
            return known
        self._asked.add(address)
        leaves = self._typed_leaves(address)
        if len(leaves) == 1 and self._layouts is not None:
            target = self._layouts.pointed(leaves[0].kind)
            if target and self._layouts.prototype_of(leaves[0].kind) is None:
                return Value("pointer", target)
        word = self._pointers.word(address)
        if word:
            found = self._typed(word)
            if len(found) == 1 and next(iter(found)).source == "pointer":
                return found.pop()
        return None

    def _typed_leaves(self, address: int) -> "tuple[Leaf, ...]":
        variable = self._pointers.variable(address)
        if variable is None or self._tables is None:
            return ()
        return self._tables.leaves(variable[0], address)

    def _leaves_at(self, address: int) -> "tuple[Leaf, ...]":
        """Return what may be at an address: of a variable of unknown type, by its size."""
        typed = self._typed_leaves(address)
        variable = self._pointers.variable(address)
        if typed or variable is None or self._layouts is None:
            return typed
        start, end = variable
        if end - start <= _WORD:
            return ()  # a pointer by itself
        return tuple(
            leaf
            for struct in self._layouts.by_size.get(end - start, ())
            for leaf in self._layouts.leaves(Place(struct, address - start))
            if self._layouts.prototype_of(leaf.kind) is not None
        )

    def _follow_arguments(self) -> None:
        """Follow functions that are handed to others into what those do with them."""
        pending = [cell for cell in self.assigned if isinstance(cell, Argument)]
        seen = set(pending)
        while pending:
            cell = pending.pop()
            goes = self.flows[cell] = set(self._flow(cell))
            for other in goes:
                if isinstance(other, Argument) and other not in seen:
                    seen.add(other)
                    pending.append(other)

    def _flow(self, cell: Argument) -> "Iterator[Cell]":
        wanted = self._argument_of(cell)
        if wanted is None:
            yield None
            return
        origins = self.origins(self._code.owner(cell.function))
        for instruction in origins.body.instructions.values():
            if instruction.mnemonic == Mnemonic.MOV:
                is_store = (
                    instruction.op0_kind == OpKind.MEMORY
                    and instruction.op1_kind == OpKind.REGISTER
                    and full(instruction.op1_register) == instruction.op1_register
                    and instruction.memory_base != Register.RSP
                )
                if is_store and wanted in origins.of_operand(instruction, 1):
                    yield from stored_at(instruction, origins, self._layouts)
            elif (
                instruction.mnemonic in _CALLS
                and instruction.op0_kind == OpKind.NEAR_BRANCH64
                and instruction.near_branch_target not in origins.body.instructions
            ):
                yield from self._handed_on(origins, instruction, wanted)

    def _handed_on(
        self, origins: Origins, instruction: "Instruction", wanted: Value
    ) -> "Iterator[Cell]":
        target = instruction.near_branch_target
        if target in self.facts.silent or target in self._code.returns:
            return
        for number, register in enumerate(ARGUMENTS):
            if wanted in origins.of_register(instruction.ip, register):
                yield None if target in self._code.thunks else Argument(target, number)

    def _argument_of(self, cell: Argument) -> Value | None:
        """Return how the walker calls an argument, None where it is no pointer to a function."""
        layouts, prototype = self._layouts, self._prototypes.get(cell.function)
        if layouts is None or prototype is None:
            return None
        _, parameters = layouts.signature(prototype)
        if cell.number >= len(parameters):
            return None
        pointed = layouts.prototype_of(parameters[cell.number])
        if pointed is None:
            return None
        return Value("argument", cell.function, cell.number, layouts.class_of(pointed))


def _owners(code: "CodeMap", addresses: "NDArray[np.uint64]") -> list[int]:
    found: list[int] = code.owners(addresses).tolist()
    return found
