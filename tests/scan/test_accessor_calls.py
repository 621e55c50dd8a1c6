"""Calls of accessors, counted a second way: by patterns of names, and with no decoder.

The scan finds calls by a list of names and by decoding. Here names are matched by patterns, so
that a renamed accessor is missed by the list only; calls in modules are their relocations; calls in
vmlinux are all places whose bytes would be a CALL or JMP to an accessor, wherever they are.
"""

import re

import numpy as np
import pytest

from trapline.kernel.binary import Binary
from trapline.kernel.elf.file import ElfFile

_NAMES = re.compile(
    r"(?:native_|mce_|mtrr_|hv_[gs]et_)?(?:rd|wr)?msr(?:l|q)?(?:_safe)?(?:_regs)?(?:_on_cpus?)?"
    r"|native_(?:read|write)_msr\w*|msr_(?:set|clear)_bit"
    r"|wb(?:no)?invd_on\w+|hv_[gs]et(?:_non_nested)?_msr"
    r"|(?:__)?io(?:read|write)(?:8|16|32|64)\w*|(?:memcpy_(?:to|from)|memset_)io"
    r"|__io(?:read|write)\d+_copy"
    r"|(?:pci|pci_bus|pci_user)_(?:read|write|clear_and_set)_config_(?:byte|d?word)"
    r"|pcie_capability_(?:read|write|clear_and_set)_d?word(?:_(?:un)?locked)?"
    r"|raw_pci_(?:read|write)|acpi_(?:os|hw)_(?:read|write)_port"
    r"|(?:read|write)_pci_config\w*"
)
# Match, and are none: hypercalls of Xen with a name like an MSR's, and trace points.
_NONE = re.compile(r"msr|.*_trace\w*|do_trace\w*")
_BRANCHES = (0xE8, 0xE9)
_PLT32, _PC32 = 4, 2
_RELA = np.dtype([("offset", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])


def is_accessor(name):
    return bool(_NAMES.fullmatch(name)) and not _NONE.fullmatch(name)


def calls_by_relocation(path):
    """Return (section, offset of the instruction) of calls of accessors in a module."""
    with ElfFile.open(path) as elf:
        names = elf.symbols.names
        found = set()
        for section in elf.sections:
            if section.type != 4:
                continue
            target = elf.sections[section.info]
            if not (target.is_alloc and target.is_executable):
                continue
            code = bytes(elf.contents(target))
            for entry in np.frombuffer(bytes(elf.contents(section)), _RELA):
                name = names[int(entry["symbol"])]
                place = int(entry["offset"])
                is_branch = int(entry["kind"]) in {_PLT32, _PC32} and place > 0
                is_branch = is_branch and code[place - 1] in _BRANCHES
                if is_branch and is_accessor(name) and not _is_alternative(target):
                    found.add((target.name, place - 1))
    return found


def _is_alternative(section):
    return section.name == ".altinstr_replacement"


def calls_by_bytes(vmlinux):
    """Return the addresses in a vmlinux where a branch to an accessor could be."""
    with Binary.open_vmlinux(vmlinux) as binary:
        table = binary.elf.symbols
        targets = {
            int(value): name
            for name, value, kind in zip(
                table.names, table.records["value"].tolist(), table.kinds.tolist(), strict=True
            )
            if kind == 2 and is_accessor(name)
        }
        sizes = {address: binary.symbol_at(address).size for address in targets}
        wanted = np.array(sorted(targets), np.uint64)
        found = set()
        for section in binary.text:
            data = np.frombuffer(bytes(section.data) + bytes(8), np.uint8)
            at = np.flatnonzero((data[:-8] == 0xE8) | (data[:-8] == 0xE9))
            distance = sum(data[at + 1 + n].astype(np.uint32) << np.uint32(8 * n) for n in range(4))
            reached = np.uint64(section.address) + (at + 5).astype(np.uint64)
            reached += distance.view(np.int32).astype(np.int64).view(np.uint64)
            for place in at[np.isin(reached, wanted)].tolist():
                address = section.address + place
                if not any(start <= address < start + sizes[start] for start in targets):
                    found.add(address)
        return found


@pytest.mark.kernel
def test_no_call_of_an_accessor_is_missed(debian_kernel, debian_scan):
    calls = {(s.module, s.section, int(s.address, 16)) for s in debian_scan.sites}
    in_vmlinux = {address for module, _, address in calls if module == "vmlinux"}
    counted = calls_by_bytes(debian_kernel.vmlinux)
    assert len(counted) > 1000
    assert sorted(map(hex, counted - in_vmlinux)) == []
    total = 0
    for module in debian_kernel.modules:
        relocated = calls_by_relocation(module.debug or module.path)
        total += len(relocated)
        known = {(section, offset) for name, section, offset in calls if name == module.name}
        assert relocated - known == set(), module.name
    assert total > 1000
