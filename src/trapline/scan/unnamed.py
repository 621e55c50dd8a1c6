"""Functions that access what their caller says, and that no list of names knows.

The lists of `trapline.linux.accessors` are of names, and kernels rename: rdmsrl_on_cpu() became
rdmsrq_on_cpu() in v6.16, and its calls were no sites any more. What such a function is can be
seen without its name: it is small, it is called from elsewhere, it traps, and the address, port or
register number of the trap is its caller's. Or it hands the address of such a function on, for
other processors to call. What is found and neither known nor reviewed makes a scan incomplete.

"Called from elsewhere" is taken from the symbol: global in vmlinux, exported by a module. What the
caller says is followed through registers and the stack (`trapline.isa.flow`).
"""

from typing import TYPE_CHECKING, Final

from iced_x86 import Code, OpKind, Register

from trapline.isa import flow
from trapline.kernel.elf.functions import source_name
from trapline.linux.accessors import CALLED, INLINED, MAPPERS, PARAVIRT
from trapline.linux.reviewed import REVIEWED, REVIEWED_RUST
from trapline.results.scan import Unrecognised

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from iced_x86 import Instruction

    from trapline.isa.flow import State
    from trapline.isa.sweep import Sweep
    from trapline.kernel.binary import Binary
    from trapline.kernel.elf.functions import Symbol
    from trapline.scan.code import Code as ObjectCode
    from trapline.scan.found import FoundSite, What

_SMALL: Final = 256  # bytes; the largest known, pcie_capability_clear_and_set_word(), has 200
_TINY: Final = 64  # bytes, of what has nothing to choose: WBINVD and little else
_KNOWN: Final = frozenset({*CALLED, *MAPPERS, *INLINED, *REVIEWED})
# Classes whose instruction names what it accesses in a register; the rest accesses one thing only.
_NUMBERED: "Final[dict[str, int]]" = {
    "msr": Register.RCX,
    "rdpmc": Register.RCX,
    "xsetbv": Register.RCX,
    "pio": Register.RDX,
    "cpuid": Register.RAX,
}
#: Where a caller may leave what is to be accessed in memory that it points to.
_BY_POINTER: Final = frozenset({"msr"})
#: Where there is nothing to choose. HLT is not among them: it does nothing for its caller.
_WHOLE: Final = frozenset({"wbinvd"})
_PV: Final = "pv_ops."
_FRAME: Final = frozenset({Register.RSP, Register.RBP})
_FIXED_PORTS: Final = frozenset(
    {
        *(Code.IN_AL_IMM8, Code.IN_AX_IMM8, Code.IN_EAX_IMM8),
        *(Code.OUT_IMM8_AL, Code.OUT_IMM8_AX, Code.OUT_IMM8_EAX),
    }
)


class Unnamed:
    """Looks at the functions of one object that have sites."""

    def __init__(self, binary: "Binary", code: "ObjectCode", sites: "Sequence[FoundSite]") -> None:
        self._binary = binary
        self._code = code
        self._sites: dict[int, list[tuple[int, What]]] = {}
        self._symbols: dict[int, Symbol] = {}
        for site in sites:
            symbol = binary.symbol_at(site.at)
            if symbol is not None and 0 < symbol.size <= _SMALL:
                self._symbols[symbol.address] = symbol
                self._sites.setdefault(symbol.address, []).append((site.at, site.what))

    def functions(self) -> "Iterator[Unrecognised]":
        """Yield what is neither known nor reviewed, by address."""
        found: dict[int, What] = {}
        for address in self._public(self._symbols):
            for site in self._chosen_by_caller(address):
                if site.trap not in _WHOLE or self._symbols[address].size <= _TINY:
                    found.setdefault(address, site)
        for address, site in self._that_hand_on():
            found.setdefault(address, site)
        for address in sorted(found):
            frame = self._binary.chain(address)[-1]
            yield Unrecognised(
                function=frame.function,
                trap=found[address].trap,
                module=self._binary.name,
                file=frame.file,
                line=frame.line,
            )

    def _public(self, addresses: "Iterable[int]") -> "Iterator[int]":
        """Give those that others call, and that are not known by name."""
        for address in sorted(addresses):
            names = self._binary.functions.names_at(address)
            is_known = not _KNOWN.isdisjoint(map(source_name, names))
            is_known = is_known or any(map(REVIEWED_RUST.fullmatch, names))
            if not is_known and self._binary.is_public(address):
                yield address

    def _that_hand_on(self) -> "Iterator[tuple[int, What]]":
        """Give small functions that hand on one whose caller says what is accessed."""
        for sweep in self._code.sweeps:
            for place in sweep.pointer_loads(self._symbols):
                taker = self._binary.symbol_at(place)
                if taker is None or not 0 < taker.size <= _SMALL:
                    continue
                instruction = sweep.decode(place)
                taken = _constant(instruction)
                if taken not in self._sites or taker.address == taken:
                    continue
                if _is_kept(instruction):
                    continue
                site = next(iter(self._chosen_by_caller(taken)), None)
                if site is not None:
                    for address in self._public([taker.address]):
                        self._symbols.setdefault(address, taker)
                        yield address, site

    def _chosen_by_caller(self, function: int) -> "Iterator[What]":
        """Yield the sites of a function that access what its caller says."""
        sites = dict(self._sites[function])
        sweep = self._sweep_of(function)
        if sweep is None:
            return
        size = self._symbols[function].size
        code = [sweep.decode(at) for at in sweep.within(function, function + size)]
        walk = flow.Walk(code, returns={}, members=True, silent=self._code.silent)
        for instruction, state in walk.states():
            site = sites.get(instruction.ip)
            if site is not None and _is_chosen(instruction, site, state):
                yield site

    def _sweep_of(self, address: int) -> "Sweep | None":
        for sweep in self._code.sweeps:
            if sweep.address <= address < sweep.address + len(sweep.data):
                return sweep
        return None


def _is_chosen(instruction: "Instruction", site: "What", state: "State") -> bool:
    if site.mapped_by is not None:  # what it accesses is known, and not its caller's
        return False
    if site.form == "instruction":
        return _is_chosen_operand(instruction, site, state)
    if site.form == "paravirt":
        called = PARAVIRT[(site.accessor or "").removeprefix(_PV)]
    else:
        called = CALLED[site.accessor or ""]
    if site.trap == "cpuid":
        # By pointers to four registers; the first has the leaf.
        return _is_callers(flow.pointed_to(state, 0), site)
    if called.operand is None:
        return site.trap in _WHOLE
    return _is_callers(flow.argument(state, called.operand), site)


def _is_chosen_operand(instruction: "Instruction", site: "What", state: "State") -> bool:
    if site.trap == "mmio":
        if instruction.is_string_instruction:
            return True
        return _is_callers(flow.address_of(instruction, state), site)
    if instruction.code in _FIXED_PORTS:
        return False
    register = _NUMBERED.get(site.trap)
    if register is None:
        return site.trap in _WHOLE
    return _is_callers(state.get(register), site)


def _is_callers(value: "flow.Value | None", site: "What") -> bool:
    if value is None:
        return False
    if value.kind == "argument member":
        return site.trap in _BY_POINTER
    return value.kind == "argument"


def _is_kept(instruction: "Instruction") -> bool:
    """Whether an address is stored where it stays: for others to call, not to be called now."""
    return instruction.op0_kind == OpKind.MEMORY and instruction.memory_base not in _FRAME


def _constant(instruction: "Instruction") -> int:
    """Return the address that an instruction takes: LEA from RIP, or MOV of an immediate."""
    if instruction.op1_kind != OpKind.MEMORY:
        return instruction.immediate(1)
    return instruction.ip_rel_memory_address if instruction.is_ip_rel_memory_operand else 0
