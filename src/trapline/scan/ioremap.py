"""Finds where one object maps device memory: ioremap() and kin, called or inlined."""

from typing import TYPE_CHECKING, NamedTuple

from trapline.linux.accessors import MAPPERS, PARAVIRT_MAPPERS
from trapline.results.scan import Mapping
from trapline.scan.identity import Key, key
from trapline.scan.places import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.kernel.binary import Binary
    from trapline.scan.code import Code


class FoundMapping(NamedTuple):
    """A mapping with what its id is made of; id, driver and subsystem are filled in later."""

    mapping: Mapping
    key: Key


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
            yield _document(binary, address, found[address])


def _document(binary: "Binary", address: int, mapper: str) -> FoundMapping:
    place = place_of(binary, address)
    mapping = Mapping(
        id="",
        mapper=mapper,
        module=binary.name,
        object=place.object,
        function=place.function,
        file=place.file,
        line=place.line,
        inlined=place.inlined,
        address=place.address,
        section=place.section,
        driver=None,
        subsystem="",
    )
    where = place.object or binary.name
    return FoundMapping(mapping, key("mapping", where, place.function, place.inlined, mapper, ""))
