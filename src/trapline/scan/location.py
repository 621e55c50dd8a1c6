"""Where a finding is: its function, source line, inline chain, object and section."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trapline.kernel.binary import REPLACEMENTS
from trapline.results.scan import Frame

if TYPE_CHECKING:
    from trapline.kernel.binary import Binary


@dataclass(frozen=True, slots=True)
class Place:
    """The place of one address, in the words of the result document.

    `origin` is the address that code in .altinstr_replacement is copied to; all but `section`
    and `address` are then the origin's. `source` is the address in the image that is said of.
    """

    object: str | None
    function: str
    file: str | None
    line: int | None
    inlined: tuple[Frame, ...]
    address: str
    section: str
    origin: str | None
    source: int = 0


def place_of(binary: "Binary", address: int) -> Place:
    """Find the place of an address."""
    section = binary.section_at(address)
    source, origin = address, None
    if section == REPLACEMENTS:
        alternative = binary.alternatives.replacing_at(address)
        if alternative is not None:
            source = alternative.origin
            origin = hex(binary.offset_of(source))
    chain = binary.chain(source)
    if chain:
        outer = chain[-1]
        function, file, line = outer.function, outer.file, outer.line
    else:
        # Without symbols the section is all there is to say.
        function, file, line = f"{section}+{source - _start(binary, source):#x}", None, None
    return Place(
        object=binary.object_at(source),
        function=function,
        file=file,
        line=line,
        inlined=chain[:-1],
        address=hex(binary.offset_of(address)),
        section=section,
        origin=origin,
        source=source,
    )


def _start(binary: "Binary", address: int) -> int:
    section = binary.text_at(address)
    return 0 if section is None else section.address
