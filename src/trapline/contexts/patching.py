"""Kernel code as it runs: alternatives in all forms, static keys both ways, thunks.

A form is chosen by a CPU feature. Some are settled in any TD; of those that decide where code
goes on or what stack, GS base or page table it uses, a path remembers which way it went, so that
it leaves by the form by which it came in.
"""

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Decoder, FlowControl, Mnemonic, OpKind, Register

from trapline.linux import names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from iced_x86 import Instruction

    from trapline.kernel.binary import Binary
    from trapline.kernel.elf.alternatives import Alternative

#: X86_FEATURE_ALWAYS, X86_FEATURE_XENPV (a TD is no Xen PV guest) and X86_FEATURE_TDX_GUEST:
#: arch/x86/include/asm/cpufeatures.h, the same numbers from v5.19 to v7.3.
SETTLED: Final = {3 * 32 + 21: True, 8 * 32 + 16: False, 8 * 32 + 22: True}
_DECIDING: Final = frozenset(
    (Mnemonic.SWAPGS, Mnemonic.WRGSBASE, Mnemonic.RDGSBASE, Mnemonic.TDCALL)
)
_BRANCHES: Final = frozenset((FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH))
_LONGEST: Final = 15
_REGS: Final = (
    *("RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP"),
    *(f"R{number}" for number in range(8, 16)),
)


class Form(NamedTuple):
    """One form of an origin: where it begins, and which feature it takes.

    `direct` is set where the replacement is a call whose target stands in the origin's operand,
    `is_empty` where all is NOPs and `address` is what comes behind them.
    """

    address: int
    features: "Mapping[int, bool]"
    direct: bool = False
    is_empty: bool = False


class PatchedCode:
    """The code of a vmlinux."""

    def __init__(self, binary: "Binary") -> None:
        self.binary = binary
        self._decoded: dict[int, Instruction | None] = {}
        self._places: dict[int, int] = {}

    def decode(self, address: int) -> "Instruction | None":
        """Decode one instruction; None where there is no code."""
        if address not in self._decoded:
            self._decoded[address] = self._decode(address)
        return self._decoded[address]

    def _decode(self, address: int) -> "Instruction | None":
        section = self.binary.text_at(address)
        if section is None:
            return None
        offset = address - section.address
        data = section.data[offset : offset + _LONGEST]
        instruction = Decoder(64, bytes(data), ip=address).decode()
        return None if instruction.is_invalid else instruction

    @cached_property
    def _origins(self) -> "Mapping[int, list[Alternative]]":
        found = defaultdict(list)
        for each in self.binary.alternatives.in_order():
            found[each.origin].append(each)
        return dict(found)

    @cached_property
    def resume(self) -> "Mapping[int, int]":
        """The end of each replacement, and where its origin goes on."""
        return {
            each.replacement + each.size: each.origin + each.length
            for each in self.binary.alternatives.in_order()
            if each.size
        }

    def forms(self, address: int, decided: "Mapping[int, bool]") -> "list[Form]":
        """List the forms of what stands at an address; only itself if it is no alternative.

        `decided` are features that the path has decided on.
        """
        if address not in self._origins:
            return []
        return list(self._choices(self._origins[address], dict(decided), address))

    def _choices(
        self, entries: "list[Alternative]", decided: dict[int, bool], origin: int
    ) -> "Iterator[Form]":
        """Give the forms in which the last entry wins that applies, as apply_alternatives() has it.

        An entry without bytes is one of NOPs.
        """
        if not entries:
            yield Form(origin, decided)
            return
        *rest, last = entries
        known = SETTLED.get(last.feature, decided.get(last.feature))
        for present in (True, False) if known is None else (known,):
            chosen = decided
            if known is None and self._deciding(last.feature):
                chosen = decided | {last.feature: present}
            if present is last.inverted:
                yield from self._choices(rest, chosen, origin)
            elif last.size:
                yield Form(last.replacement, chosen, last.direct)
            else:
                yield Form(origin + last.length, chosen, is_empty=True)

    def _deciding(self, feature: int) -> bool:
        return feature in self._features_that_decide

    @cached_property
    def _features_that_decide(self) -> frozenset[int]:
        """Features by which entry code goes elsewhere, or changes what a trap depends on."""
        return frozenset(
            each.feature
            for origin, entries in self._origins.items()
            if self.in_entry(origin)
            for each in entries
            if self._decides(each.replacement, each.size) or self._decides(origin, each.length)
        )

    def _decides(self, start: int, size: int) -> bool:
        address = start
        while address < start + size:
            instruction = self.decode(address)
            if instruction is None:
                return True
            if (
                instruction.flow_control in _BRANCHES
                or instruction.mnemonic in _DECIDING
                or Register.CR3 in {instruction.op0_register, instruction.op1_register}
                or (
                    instruction.op0_kind == OpKind.REGISTER
                    and instruction.op0_register == Register.RSP
                )
            ):
                return True
            address += instruction.len
        return False

    @cached_property
    def entry_text(self) -> range:
        """Where entry code is; empty where no symbols say so."""
        first, last = (self.binary.address_of(name) for name in names.ENTRY_TEXT[0])
        return range(0) if first is None or last is None else range(first, last)

    def in_entry(self, address: int) -> bool:
        """Whether an address is in the entry code, which is assembly, or stands in for some."""
        return self.place(address) in self.entry_text

    def place(self, address: int) -> int:
        """Return where code runs that stands at an address: a replacement over its origin."""
        if address not in self._places:
            found = self.binary.alternatives.replacing_at(address)
            distance = 0 if found is None else found.origin - found.replacement
            self._places[address] = address + distance
        return self._places[address]

    def is_same_function(self, one: int, other: int) -> bool:
        """Whether two addresses belong to one function; what pads it does not."""
        if self.in_entry(one):
            return True
        symbol = self.binary.symbol_at(self.place(one))
        if symbol is None:
            return False
        return 0 <= self.place(other) - symbol.address < symbol.size

    @cached_property
    def static_keys(self) -> "Mapping[int, int]":
        """Branches of static keys, and where they go when they are taken."""
        return self.binary.static_branches

    @cached_property
    def return_thunk(self) -> int | None:
        """Where code jumps to in place of RET."""
        return self.binary.address_of(names.RETURN_THUNK)

    @cached_property
    def indirect_thunks(self) -> "Mapping[int, int]":
        """Where code calls or jumps to in place of a branch to a register; that register."""
        wanted = {prefix + name.lower(): name for prefix in names.INDIRECT_THUNKS for name in _REGS}
        found = self.binary.addresses_of(wanted)
        return {address: getattr(Register, wanted[name]) for address, name in found.items()}

    def is_static_call(self, address: int) -> bool:
        """Whether this is a trampoline of a static call, which is patched to go elsewhere."""
        return any(
            name.startswith(names.STATIC_CALL) for name in self.binary.functions.names_at(address)
        )

    @cached_property
    def reports(self) -> "Mapping[int, str]":
        """Functions that print, warn or give up."""
        return self.binary.addresses_of(names.REPORTS)

    @cached_property
    def page_table_features(self) -> frozenset[int]:
        """Features without which entry code jumps over what changes the page table."""
        return frozenset(
            each.feature
            for origin, entries in self._origins.items()
            if self.in_entry(origin)
            for each in entries
            if self._skips_page_table(origin)
        )

    def _skips_page_table(self, origin: int) -> bool:
        jump = self.decode(origin)
        if jump is None or jump.flow_control != FlowControl.UNCONDITIONAL_BRANCH:
            return False
        address = jump.next_ip
        while address < jump.near_branch_target:
            instruction = self.decode(address)
            if instruction is None or instruction.flow_control == FlowControl.RETURN:
                return False
            if instruction.op0_register == Register.CR3:
                return True
            address = instruction.next_ip
        return False
