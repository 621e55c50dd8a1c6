"""The qtest protocol: port and memory accesses of a QEMU machine as lines of text.

Source: QEMU `system/qtest.c` (`softmmu/qtest.c` up to 8.1), "Commands". Each command is
answered by one line, `OK [VALUE]` or `FAIL …`; `IRQ raise N` and `IRQ lower N` may come before
it. Writes are posted: their answers are collected before the next read, or when
`MAX_POSTED` of them are outstanding, which makes a write three times cheaper than a read.
"""

import socket
from collections.abc import Callable
from typing import Final

from trapline.base.errors import BadMachineError

MAX_POSTED: Final = 64
_PORT: Final = {1: "b", 2: "w", 4: "l"}
_MEMORY: Final = {1: "b", 2: "w", 4: "l", 8: "q"}
_MAX_LINE: Final = 1 << 16
_LOOKS: Final = 64  # some 50 us


class QemuDiedError(BadMachineError):
    """QEMU went away in the middle of a run, or answers no more."""


class Qtest:
    """A client of one qtest socket. `on_irq(line, level)` is called for intercepted lines."""

    def __init__(self, connection: socket.socket, on_irq: Callable[[int, bool], None]) -> None:
        self._socket = connection
        self._on_irq = on_irq
        self._buffer = b""
        self._posted = 0

    def read_port(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        return self._value(f"in{_PORT[size]} {port:#x}\n")

    def write_port(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        self._post(f"out{_PORT[size]} {port:#x} {value:#x}\n")

    def read_memory(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of QEMU's physical address space."""
        return self._value(f"read{_MEMORY[size]} {address:#x}\n")

    def write_memory(self, address: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes of QEMU's physical address space."""
        self._post(f"write{_MEMORY[size]} {address:#x} {value:#x}\n")

    def intercept_irqs(self, device: str) -> None:
        """Have the input lines of an interrupt controller reported to us."""
        self._send(f"irq_intercept_in {device}\n")
        self._drain(0)
        self._answer()

    def poll(self) -> None:
        """Take in what QEMU has sent by itself."""
        self._drain(0)
        while True:
            try:
                chunk = self._socket.recv(_MAX_LINE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                raise self._died() from error
            if not chunk:
                raise self._died()
            self._buffer += chunk
        while b"\n" in self._buffer:
            self._take_irq(self._line())

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when an interrupt line changes."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _value(self, command: str) -> int:
        self._send(command)
        self._drain(0)
        answer = self._answer()
        try:
            return int(answer, 0)
        except ValueError as error:
            raise self._confused(answer) from error

    def _post(self, command: str) -> None:
        self._send(command)
        self._posted += 1
        if self._posted >= MAX_POSTED:
            self._drain(MAX_POSTED // 2)

    def _send(self, command: str) -> None:
        try:
            self._socket.sendall(command.encode())
        except OSError as error:
            raise self._died() from error

    def _drain(self, leave: int) -> None:
        while self._posted > leave:
            self._answer()
            self._posted -= 1

    def _answer(self) -> str:
        while True:
            line = self._line()
            if line.startswith("OK"):
                return line[3:]
            if not line.startswith("IRQ "):
                raise self._confused(line)
            self._take_irq(line)

    def _take_irq(self, line: str) -> None:
        words = line.split()
        if len(words) != 3 or words[0] != "IRQ" or not words[2].isdigit():
            raise self._confused(line)
        self._on_irq(int(words[2]), words[1] == "raise")

    def _line(self) -> str:
        while b"\n" not in self._buffer:
            try:
                chunk = self._receive()
            except BlockingIOError as error:  # the socket's time limit
                raise QemuDiedError("QEMU, which models the devices, no longer answers.") from error
            except OSError as error:
                raise self._died() from error
            if not chunk:
                raise self._died()
            self._buffer += chunk
            if len(self._buffer) > 16 * _MAX_LINE:
                raise self._confused("a line without an end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode("ascii", "replace")

    def _receive(self) -> bytes:
        """Wait for bytes; at first awake, as an answer takes less than falling asleep does."""
        for _ in range(_LOOKS):
            try:
                return self._socket.recv(_MAX_LINE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
        return self._socket.recv(_MAX_LINE)

    @staticmethod
    def _died() -> QemuDiedError:
        return QemuDiedError("QEMU, which models the devices, died during the run.")

    @staticmethod
    def _confused(line: str) -> QemuDiedError:
        return QemuDiedError(f"QEMU answered what no qtest server answers: {line[:80]!r}.")
