"""Finds where one object maps device memory: ioremap() and kin, called or inlined."""

from typing import TYPE_CHECKING

from trapline.linux.accessors import MAPPERS, PARAVIRT_MAPPERS
from trapline.scan.found import FoundMapping
from trapline.scan.location import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.kernel.binary import Binary
    from trapline.scan.code import Code


def find_mappings(binary: "Binary", code: "Code") -> "Iterator[FoundMapping]":
    """Yield all mapping sites of a binary, in the order of sections and addresses."""
    for sweep in code.sweeps:
        found = {address: name for address, _, name in code.calls(sweep, MAPPERS)}
        for address, _, member in code.paravirt_calls(sweep):
            if member in PARAVIRT_MAPPERS:
                found[address] = PARAVIRT_MAPPERS[member]
        for address, name in code.inlined_mappers:
            if sweep.address <= address < sweep.address + len(sweep.data):
                found.setdefault(address, name)
        for address in sorted(found):
            place = place_of(binary, address)
            yield FoundMapping(module=binary.name, mapper=found[address], place=place)
