"""The ORC table of a real kernel, against what every compiled function looks like on entry."""

import numpy as np
import pytest

from trapline.kernel.binary import Binary
from trapline.kernel.elf.symtab import STT_FUNC
from trapline.kernel.live.orc import OrcTable, OrcType

# Functions that switch stacks, paging or mode and are marked UNWIND_HINT_UNDEFINED or
# STACK_FRAME_NON_STANDARD: do_suspend_lowlevel, machine_real_restart, __efi64_thunk,
# __crash_kexec, clear_bhb_loop; each with its __pfx_ padding.
MOST_UNDEFINED = 40


@pytest.mark.kernel
def test_on_entry_the_return_address_is_on_top_of_the_stack(debian_kernel):
    with Binary.open_vmlinux(debian_kernel.vmlinux) as vmlinux:
        table = OrcTable.of_vmlinux(vmlinux.elf, debian_kernel.release)
        assert np.all(table.addresses[1:] >= table.addresses[:-1])
        symbols = vmlinux.elf.symbols
        functions = np.flatnonzero((symbols.kinds == STT_FUNC) & (symbols.records["size"] > 0))
        # .cold parts are jumped to with the frame of the function they were split from.
        entries = {
            name: table.find(int(symbols.records["value"][index]))
            for index in functions.tolist()
            if not (name := symbols.name(index)).endswith(".cold")
        }
        assert len(entries) > 30_000
        odd = {name: entry for name, entry in entries.items() if not entry.is_plain_call}
        assert all(entry.type == OrcType.UNDEFINED for entry in odd.values()), odd
        assert "do_suspend_lowlevel" in odd
        assert len(odd) <= MOST_UNDEFINED


@pytest.mark.kernel
def test_entry_code_stands_on_saved_registers(debian_kernel):
    with Binary.open_vmlinux(debian_kernel.vmlinux) as vmlinux:
        table = OrcTable.of_vmlinux(vmlinux.elf, debian_kernel.release)
        start = vmlinux.address_of("asm_exc_virtualization_exception")
        kinds = {table.find(start + offset).type for offset in range(64)}
        assert {OrcType.REGS, OrcType.REGS_PARTIAL} <= kinds
