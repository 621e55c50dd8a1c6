"""Boots a guest to the places where cases start: ring 3, then the kernel serving a system call."""

import struct
from typing import TYPE_CHECKING, Final

from trapline.base.errors import BadMachineError
from trapline.guest.target import Target
from trapline.linux.names import SYSTEM_CALL
from trapline.machine.loader import initramfs
from trapline.verify.fixture import Stage

if TYPE_CHECKING:
    from trapline.machine.machine import Machine

_LOAD_AT: Final = 0x40_0000
_HEADERS: Final = 64 + 56
INIT_ENTRY: Final = _LOAD_AT + _HEADERS
# mov eax, 39 (getpid); syscall; jmp back to the syscall
_INIT_CODE: Final = bytes.fromhex("b827000000 0f05 ebf7")


def init_program() -> bytes:
    """Return the smallest init: an ELF file that makes system calls for ever."""
    size = _HEADERS + len(_INIT_CODE)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, INIT_ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_AT, _LOAD_AT, size, size, 4096)
    return header + segment + _INIT_CODE


def initrd() -> bytes:
    """Return an initramfs that holds nothing but init."""
    return initramfs.newc([initramfs.program("init", init_program())])


class Launch:
    """A guest on its way. Call `ring3` first, if at all: the guest goes on from there."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.machine: Machine = target.machine("")
        self.machine.host.start()

    def ring3(self) -> Stage:
        """Run to the first instruction of init."""
        self._run_to(INIT_ENTRY, "init's first instruction")
        return Stage(self.machine, self._target, user=True)

    def kernel(self, after: Stage | None = None) -> Stage:
        """Run to the first system call of init; `after` is what `ring3` returned."""
        if after is not None:
            after.leave()
        address = self._target.address(SYSTEM_CALL)
        if address is None:
            raise BadMachineError(f"the kernel has no {SYSTEM_CALL}(), where the tests begin.")
        self._run_to(address, f"{SYSTEM_CALL}()")
        return Stage(self.machine, self._target, user=False)

    def _run_to(self, address: int, what: str) -> None:
        machine = self.machine
        machine.watch({address: machine.vcpu.stop})
        machine.vcpu.run(machine.module.on_exit)
        if machine.host.outcome is not None:
            raise BadMachineError(f"the guest does not reach {what}: {machine.host.outcome.detail}")

    def close(self) -> None:
        """Free the guest's memory."""
        self.machine.host.finish()
        self.machine.close()
