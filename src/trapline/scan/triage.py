"""Tells modules that have no site from those that need a closer look.

Six of seven modules have none. To find that out takes their code and a look at two tables of
strings; neither relocations nor DWARF are read. The test errs on one side only: a module that it
lets go has nothing that the closer look would find.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from trapline.isa.sweep import Sweep
from trapline.isa.traps import classify
from trapline.kernel.binary import code_sections, has_dwarf
from trapline.linux.accessors import CALLED, INLINED, MAPPERS, MAPPING_TABLES
from trapline.scan.kernelfacts import PV_OPS

if TYPE_CHECKING:
    from collections.abc import Collection

    from trapline.kernel.elf.file import ElfFile

# Inline functions have out-of-line copies, which tell in modules without DWARF.
_NAMED: Final = frozenset({*CALLED, *MAPPERS, *MAPPING_TABLES, PV_OPS, *INLINED})
_TAIL: Final = 8  # bytes of a name that are compared at once


def may_have_sites(code: "ElfFile", debug: "ElfFile") -> bool:
    """Whether a module needs a closer look; `debug` is the file with its DWARF."""
    return (
        len(code.symbols.find(_NAMED)[0]) > 0
        or (has_dwarf(debug) and mentions(bytes(debug.contents(".debug_str")), INLINED))
        or any(_has_trap(bytes(code.contents(section))) for section in code_sections(code))
    )


def mentions(strings: bytes, names: "Collection[str]") -> bool:
    """Whether a table of NUL-terminated strings holds one of the names.

    Compilers put the names of functions there; one that is mentioned need not be used.
    """
    data = np.frombuffer(bytes(_TAIL) + strings, np.uint8)
    ends = np.flatnonzero(data[_TAIL:] == 0)
    tails = np.zeros(len(ends), np.uint64)
    for byte in range(_TAIL):
        tails |= data[ends + byte].astype(np.uint64) << np.uint64(8 * byte)
    by_length: dict[int, list[bytes]] = {}
    for name in names:
        encoded = name.encode()
        by_length.setdefault(min(len(encoded), _TAIL), []).append(encoded)
    for length, encoded_names in by_length.items():
        wanted = [int.from_bytes(name[-_TAIL:], "little") for name in encoded_names]
        # A string may be the end of a longer one, so what comes before does not matter.
        ends_so = np.isin(tails >> np.uint64(8 * (_TAIL - length)), np.array(wanted, np.uint64))
        if ends_so.any() and any(strings.find(name + b"\0") >= 0 for name in encoded_names):
            return True
    return False


def _has_trap(code: bytes) -> bool:
    sweep = Sweep(code, 0)
    return any(classify(sweep.decode(address)) is not None for address in sweep.trap_candidates())
