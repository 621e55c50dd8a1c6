"""What each packet of the remote protocol does to an engine.

`Interpreter.handle` takes one payload and gives the reply, or a `Resume` when the guest is to
run. It does no I/O and raises for no input: what does not parse is answered with an error, what
is not known with the empty reply, as the protocol asks.

Source: "Debugging with GDB", appendix E, sections Packets, General Query Packets, Stop Reply
Packets. Addresses are GLAs, read through the guest's own page tables.
"""

import re
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from trapline.machine.gdb.codec import MAX_PACKET
from trapline.machine.gdb.targetregisters import (
    REGISTERS,
    RIP_NUMBER,
    read_register,
    target_xml,
    write_register,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trapline.cpu.engine import Vcpu
    from trapline.machine.gdb.monitor import Monitor

Reply = bytes

OK: Final = b"OK"
UNKNOWN: Final = b""
E_ARGUMENT: Final = b"E16"  # EINVAL in hexadecimal
E_FAULT: Final = b"E0e"  # EFAULT: gdb says "Cannot access memory"
E_LIMIT: Final = b"E1c"  # ENOSPC
E_REGISTER: Final = b"E01"

MAX_BREAKPOINTS: Final = 512
_PAGE: Final = 4096
_TOP: Final = 1 << 64
_NUMBER: Final = re.compile(rb"[0-9a-fA-F]{1,16}\Z")
_MAX_MEMORY: Final = MAX_PACKET // 2 - 16
_FEATURES: Final = (
    b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;vContSupported+;swbreak+;hwbreak+"
    % MAX_PACKET
)


class Resume(Enum):
    """Packets that are not answered at once."""

    CONTINUE = auto()
    STEP = auto()
    DETACH = auto()
    KILL = auto()


class _BadPacketError(Exception):
    """The payload does not parse; the reply is in args[0]."""


class Interpreter:
    """The stub's state for one client: breakpoints, negotiated options, why the guest stopped."""

    def __init__(self, vcpu: "Vcpu", monitor: "Monitor") -> None:
        self._vcpu = vcpu
        self._monitor = monitor
        self._software: set[int] = set()
        self._hardware: set[int] = set()
        self.stop_reply: Reply = b"T05thread:01;"
        self.wants_acks = True
        self._xml = target_xml()
        self._handlers: dict[bytes, Callable[[bytes], Reply | Resume]] = {
            b"?": lambda _: self.stop_reply,
            b"g": self._read_registers,
            b"G": self._write_registers,
            b"p": self._read_register,
            b"P": self._write_register,
            b"m": self._read_memory,
            b"M": self._write_hex_memory,
            b"X": self._write_binary_memory,
            b"Z": self._insert_breakpoint,
            b"z": self._remove_breakpoint,
            b"c": lambda body: self._resume_at(body, Resume.CONTINUE),
            b"s": lambda body: self._resume_at(body, Resume.STEP),
            b"C": lambda _: Resume.CONTINUE,  # a TD takes no signals
            b"S": lambda _: Resume.STEP,
            b"D": lambda _: Resume.DETACH,
            b"k": lambda _: Resume.KILL,
            b"H": lambda _: OK,
            b"T": lambda _: OK,
            b"q": self._query,
            b"Q": self._set,
            b"v": self._long_packet,
        }

    @property
    def breakpoints(self) -> frozenset[int]:
        """Addresses with a breakpoint of either kind."""
        return frozenset(self._software | self._hardware)

    def breakpoint_reply(self, address: int) -> Reply:
        """Return the stop reply for a breakpoint hit.

        Saying which kind keeps gdb from taking one off RIP, as after an executed INT3.
        """
        if address in self._software:
            return b"T05thread:01;swbreak:;"
        return b"T05thread:01;hwbreak:;" if address in self._hardware else b"T05thread:01;"

    def clear_breakpoints(self) -> None:
        """Forget all breakpoints, as the client leaves."""
        self._software.clear()
        self._hardware.clear()
        self._vcpu.set_breakpoints(frozenset())

    def handle(self, packet: bytes) -> Reply | Resume:
        """Carry out one payload."""
        handler = self._handlers.get(packet[:1])
        if handler is None:
            return UNKNOWN
        try:
            return handler(packet[1:])
        except _BadPacketError as error:
            reply: bytes = error.args[0]
            return reply

    # Registers.

    def _read_registers(self, _: bytes) -> Reply:
        return b"".join(read_register(self._vcpu, register) for register in REGISTERS)

    def _write_registers(self, body: bytes) -> Reply:
        if len(body) != sum(register.digits for register in REGISTERS):
            raise _BadPacketError(E_ARGUMENT)
        position = 0
        for register in REGISTERS:
            digits = body[position : position + register.digits]
            position += register.digits
            # gdb sends back what it was given: only a change is a request.
            if register.put and digits.lower() != read_register(self._vcpu, register):
                write_register(self._vcpu, register, _hex_digits(digits))
        return OK

    def _read_register(self, body: bytes) -> Reply:
        number = _number(body)
        if number >= len(REGISTERS):
            raise _BadPacketError(E_REGISTER)
        return read_register(self._vcpu, REGISTERS[number])

    def _write_register(self, body: bytes) -> Reply:
        name, _, value = body.partition(b"=")
        number = _number(name)
        if number >= len(REGISTERS):
            raise _BadPacketError(E_REGISTER)
        return (
            OK
            if write_register(self._vcpu, REGISTERS[number], _hex_digits(value))
            else (E_REGISTER)
        )

    # Memory.

    def _read_memory(self, body: bytes) -> Reply:
        address, size = _range(body)
        data = bytearray()
        for start, length in _pages(address, min(size, _MAX_MEMORY)):
            part = self._vcpu.read(start, length)
            if part is None:
                break  # gdb takes a short reply for what it is
            data += part
        if size and not data:
            raise _BadPacketError(E_FAULT)
        return data.hex().encode()

    def _write_hex_memory(self, body: bytes) -> Reply:
        head, _, digits = body.partition(b":")
        return self._write(head, bytes.fromhex(_hex_digits(digits).decode("ascii")))

    def _write_binary_memory(self, body: bytes) -> Reply:
        head, _, data = body.partition(b":")
        return self._write(head, data)

    def _write(self, head: bytes, data: bytes) -> Reply:
        address, size = _range(head)
        if size != len(data):
            raise _BadPacketError(E_ARGUMENT)
        position = 0
        for start, length in _pages(address, size):
            if not self._vcpu.write(start, data[position : position + length]):
                raise _BadPacketError(E_FAULT)
            position += length
        return OK

    # Breakpoints.

    def _insert_breakpoint(self, body: bytes) -> Reply:
        addresses, address = self._breakpoint(body)
        if addresses is None:
            return UNKNOWN
        if len(self.breakpoints) >= MAX_BREAKPOINTS:
            return E_LIMIT
        addresses.add(address)
        self._vcpu.set_breakpoints(self.breakpoints)
        return OK

    def _remove_breakpoint(self, body: bytes) -> Reply:
        addresses, address = self._breakpoint(body)
        if addresses is None:
            return UNKNOWN
        addresses.discard(address)
        self._vcpu.set_breakpoints(self.breakpoints)
        return OK

    def _breakpoint(self, body: bytes) -> tuple[set[int] | None, int]:
        kind, _, rest = body.partition(b",")
        address = _number(rest.partition(b",")[0])
        # 2, 3 and 4 are watchpoints, which the engine interface does not have.
        return {b"0": self._software, b"1": self._hardware}.get(kind), address

    # Running.

    def _resume_at(self, body: bytes, how: Resume) -> Resume:
        if body:
            address = _number(body).to_bytes(8, "little").hex().encode()
            write_register(self._vcpu, REGISTERS[RIP_NUMBER], address)
        return how

    def _long_packet(self, body: bytes) -> Reply | Resume:
        if body == b"Cont?":
            return b"vCont;c;C;s;S"
        if body.startswith(b"Cont;"):
            # One vCPU: the first action is its action.
            action = body[5:6].lower()
            return {b"c": Resume.CONTINUE, b"s": Resume.STEP}.get(action, E_ARGUMENT)
        if body.startswith(b"Kill"):
            return Resume.KILL
        return UNKNOWN

    # Queries.

    def _query(self, body: bytes) -> Reply:
        if body.startswith(b"Supported"):
            return _FEATURES
        if body.startswith(b"Xfer:features:read:target.xml:"):
            return self._features(body.rpartition(b":")[2])
        if body.startswith(b"Rcmd,"):
            line = bytes.fromhex(_hex_digits(body[5:]).decode("ascii"))
            return self._monitor.run(line.decode("utf-8", "replace")).encode().hex().encode() or OK
        if body == b"Offsets":
            return self._offsets()
        return {
            b"Attached": b"1",  # so that leaving gdb detaches, and does not kill the TD
            b"C": b"QC01",
            b"fThreadInfo": b"m01",
            b"sThreadInfo": b"l",
        }.get(body, UNKNOWN)

    def _offsets(self) -> Reply:
        """Say where KASLR put the kernel: gdb moves the symbols that it was started with there."""
        start = self._monitor.text_segment
        return UNKNOWN if start is None else b"TextSeg=%x" % start

    def _features(self, position: bytes) -> Reply:
        offset, size = _range(position)
        part = self._xml[offset : offset + min(size, _MAX_MEMORY)]
        return (b"m" if offset + len(part) < len(self._xml) else b"l") + part

    def _set(self, body: bytes) -> Reply:
        if body == b"StartNoAckMode":
            self.wants_acks = False
            return OK
        return UNKNOWN


def _number(digits: bytes) -> int:
    if not _NUMBER.match(digits):
        raise _BadPacketError(E_ARGUMENT)
    return int(digits, 16)


def _hex_digits(digits: bytes) -> bytes:
    if len(digits) % 2 or not re.fullmatch(rb"[0-9a-fA-F]*", digits):
        raise _BadPacketError(E_ARGUMENT)
    return digits


def _range(body: bytes) -> tuple[int, int]:
    """Parse `address,size`; the range must not wrap around."""
    first, separator, second = body.partition(b",")
    if not separator:
        raise _BadPacketError(E_ARGUMENT)
    address, size = _number(first), _number(second)
    if address + size > _TOP:
        raise _BadPacketError(E_FAULT)
    return address, size


def _pages(address: int, size: int) -> list[tuple[int, int]]:
    """Cut a range at page boundaries, so that one absent page does not hide the others."""
    parts = []
    while size:
        length = min(size, _PAGE - address % _PAGE)
        parts.append((address, length))
        address, size = address + length, size - length
    return parts
