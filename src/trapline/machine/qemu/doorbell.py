"""MSI-X messages as eventfds: the server side of QEMU's ivshmem-doorbell device.

A device of QEMU sends an MSI by writing 32 bits to an address. Written to the doorbell
register of an ivshmem device (its BAR 0, offset 12) as `peer << 16 | vector`, that makes QEMU
signal an eventfd which we hold. Protocol: QEMU `docs/specs/ivshmem-spec.rst`, "Server".
"""

import os
import socket
import struct
from typing import Final

PROTOCOL_VERSION: Final = 0
QEMU_PEER: Final = 0
OUR_PEER: Final = 1
DOORBELL_OFFSET: Final = 12
VECTORS: Final = 64
_SHARED_MEMORY: Final = 4096  # the protocol wants one; nothing is kept there


class Doorbell:
    """`VECTORS` eventfds that MSI writes of one QEMU process end in."""

    def __init__(self) -> None:
        self._memory = os.memfd_create("trapline-ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, _SHARED_MEMORY)
        self.eventfds = tuple(
            os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(VECTORS)
        )
        self._connection: socket.socket | None = None

    def greet(self, connection: socket.socket) -> None:
        """Introduce QEMU (peer 0) to us (peer 1) and hand over the eventfds."""
        self._connection = connection
        self._say(PROTOCOL_VERSION)
        self._say(QEMU_PEER)
        self._say(-1, self._memory)
        for descriptor in self.eventfds:
            self._say(OUR_PEER, descriptor)

    @staticmethod
    def message(slot: int) -> int:
        """Give the 32-bit data that rings eventfd `slot`."""
        return OUR_PEER << 16 | slot

    def take(self, slot: int) -> bool:
        """Return whether eventfd `slot` was rung since the last look, and reset it."""
        try:
            os.eventfd_read(self.eventfds[slot])
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Give the descriptors back."""
        for descriptor in (*self.eventfds, self._memory):
            os.close(descriptor)
        if self._connection is not None:
            self._connection.close()

    def _say(self, value: int, descriptor: int | None = None) -> None:
        assert self._connection is not None
        data = struct.pack("<q", value)
        if descriptor is None:
            self._connection.sendall(data)
        else:
            socket.send_fds(self._connection, [data], [descriptor])
