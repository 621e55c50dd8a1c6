"""A person at the guest's serial port: what is typed, and time that passes as theirs does.

Beside QEMU's devices, or without any: an idle guest waits for a key in real time.
"""

import os
import select
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from trapline.machine.devices.console import Console
    from trapline.machine.devices.uart import Uart16550
    from trapline.machine.qemu.board import QemuBoard

LEAVE: Final = b"\x1d"  # Ctrl-], as in telnet
# A running guest's output is shown, and keys are looked for, so often.
_LOOK_SECONDS: Final = 0.005
# One wait, so that limits are looked at.
_WAIT_SECONDS: Final = 0.05
_READ: Final = 4096


class Keyboard:
    """The machine's `host.OutsideDevices`; `devices` are QEMU's, if there are any.

    Bytes from `descriptor` go to `port` as it has room, so that a paste is not lost. `leave` is
    called at Ctrl-]. The end of input is no reason to leave: the guest goes on without.
    """

    def __init__(
        self,
        descriptor: int,
        port: "Uart16550",
        console: "Console",
        frequency: int,
        *,
        devices: "QemuBoard | None",
        leave: Callable[[], None],
    ) -> None:
        self._descriptor: int | None = descriptor
        self._port = port
        self._console = console
        self._frequency = frequency
        self._devices = devices
        self._leave = leave
        self._typed = bytearray()
        self._look_at = 0.0
        if devices is not None:
            devices.backend.wake_for(descriptor)

    def poll(self) -> None:
        """Take in what has happened."""
        if self._devices is not None:
            self._devices.poll()
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._console.show()
            self._take(0.0)

    def wait(self, cycles: int | None) -> int:
        """Let the guest idle for at most `cycles`, None: without end; returns what passed."""
        self._console.show()
        if self._devices is not None:
            passed = self._devices.wait(cycles)
            self._take(0.0)
            return passed
        start = time.monotonic()
        left = _WAIT_SECONDS if cycles is None else cycles / self._frequency
        seconds = min(left, _WAIT_SECONDS)
        happened = self._take(seconds)
        if cycles is not None and seconds == left and not happened:
            return cycles
        passed = int((time.monotonic() - start) * self._frequency)
        return passed if cycles is None else min(cycles, passed)

    def _take(self, seconds: float) -> bool:
        """Read what was typed, waiting for it for so long; returns whether the guest got any."""
        if self._descriptor is None or len(self._typed) >= _READ:
            if not self._typed:
                time.sleep(seconds)
        elif select.select([self._descriptor], [], [], 0.0 if self._typed else seconds)[0]:
            self._read(self._descriptor)
        room = self._port.room
        for byte in self._typed[:room]:
            self._port.receive(byte)
        is_any = bool(self._typed and room)
        del self._typed[:room]
        return is_any

    def _read(self, descriptor: int) -> None:
        data = os.read(descriptor, _READ)
        if not data:
            self._descriptor = None
            if self._devices is not None:
                self._devices.backend.wake_no_more(descriptor)
        before, leave, _ = data.partition(LEAVE)
        self._typed += before
        if leave:
            self._leave()
