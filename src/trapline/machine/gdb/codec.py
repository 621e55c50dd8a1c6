"""Framing of the GDB remote serial protocol: `$payload#checksum`, acknowledgements, interrupts.

Source: "Debugging with GDB", appendix E, sections Overview and Interrupts. The peer may send
anything: no packet grows beyond `MAX_PACKET`, and garbage between packets is dropped.
"""

from enum import Enum, auto
from typing import Final

MAX_PACKET: Final = 0x4000  # bytes of payload, announced as PacketSize
_START: Final = ord("$")
_END: Final = ord("#")
_ESCAPE: Final = ord("}")
_INTERRUPT: Final = 0x03
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")
_TO_ESCAPE: Final = frozenset(b"$#}*")


class Signal(Enum):
    """What may arrive besides a packet."""

    ACK = auto()  # "+"
    NACK = auto()  # "-": send the last packet again
    INTERRUPT = auto()  # 0x03, Ctrl-C in gdb
    CORRUPT = auto()  # a packet whose checksum is wrong, or that is too long


class _State(Enum):
    IDLE = auto()
    PAYLOAD = auto()
    CHECKSUM = auto()
    SKIP = auto()  # the rest of a packet that is too long


class Decoder:
    """Turns a stream of bytes, cut anywhere, into packets and signals."""

    def __init__(self) -> None:
        self._state = _State.IDLE
        self._raw = bytearray()
        self._checksum = b""

    def feed(self, data: bytes) -> list[bytes | Signal]:
        """Take received bytes; return what they completed, payloads unescaped."""
        events = []
        for byte in data:
            event = self._step(byte)
            if event is not None:
                events.append(event)
        return events

    def _step(self, byte: int) -> bytes | Signal | None:
        match self._state:
            case _State.IDLE:
                return self._idle(byte)
            case _State.PAYLOAD if byte == _END:
                self._state, self._checksum = _State.CHECKSUM, b""
            case _State.PAYLOAD if byte == _START:
                self._raw.clear()  # the peer gave up on the packet before
            case _State.PAYLOAD if len(self._raw) < MAX_PACKET:
                self._raw.append(byte)
            case _State.PAYLOAD:
                self._state = _State.SKIP
            case _State.SKIP if byte == _END:
                self._state = _State.IDLE
                return Signal.CORRUPT
            case _State.SKIP:
                pass
            case _State.CHECKSUM:
                return self._check(byte)
        return None

    def _idle(self, byte: int) -> Signal | None:
        if byte == _START:
            self._state = _State.PAYLOAD
            self._raw.clear()
        return {ord("+"): Signal.ACK, ord("-"): Signal.NACK, _INTERRUPT: Signal.INTERRUPT}.get(byte)

    def _check(self, byte: int) -> bytes | Signal | None:
        self._checksum += bytes([byte])
        if len(self._checksum) < 2:
            return None
        self._state = _State.IDLE
        if not _HEX.issuperset(self._checksum):
            return Signal.CORRUPT
        if int(self._checksum, 16) != sum(self._raw) & 0xFF:
            return Signal.CORRUPT
        return _unescape(bytes(self._raw))


def encode(payload: bytes) -> bytes:
    """Frame one payload, escaping what needs it."""
    if not _TO_ESCAPE.isdisjoint(payload):
        escaped = bytearray()
        for byte in payload:
            escaped += bytes([_ESCAPE, byte ^ 0x20]) if byte in _TO_ESCAPE else bytes([byte])
        payload = bytes(escaped)
    return b"$%b#%02x" % (payload, sum(payload) & 0xFF)


def _unescape(raw: bytes) -> bytes:
    if _ESCAPE not in raw:
        return raw
    result = bytearray()
    is_escaped = False
    for byte in raw:
        if byte == _ESCAPE and not is_escaped:
            is_escaped = True
        else:
            result.append(byte ^ 0x20 if is_escaped else byte)
            is_escaped = False
    return bytes(result)
