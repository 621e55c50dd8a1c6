"""One gdb on a TCP socket, and `Vcpu.run` under its control.

The guest stops before its first instruction until gdb attaches. While it runs, the socket is
looked at on the engine's exits, so Ctrl-C takes effect at the next one; a guest without events
still exits when its time budget is used up. Without gdb, nothing of this is in the way.
"""

import re
import select
import socket
import time
from typing import TYPE_CHECKING, Final, Self

from trapline.base.errors import UsageError
from trapline.cpu.engine import Exit, Reg
from trapline.machine.gdb.codec import Decoder, Signal, encode
from trapline.machine.gdb.commands import Interpreter, Resume
from trapline.machine.gdb.monitor import DebugTarget, Monitor
from trapline.tdx.vmm_interface import TrapListener, VeInfo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trapline.cpu.engine import ExitHandler, Vcpu

_RECEIVE: Final = 4096
_POLL_EVERY: Final = 32  # exits; a system call each time would be most of an exit's cost
_MAX_QUEUE: Final = 1024  # packets sent while the guest runs; gdb waits instead
_SIGINT: Final = b"T02thread:01;"
_SIGTRAP: Final = b"T05thread:01;"
_SIGABRT: Final = b"T06thread:01;"
_SEND_TIMEOUT: Final = 10.0  # seconds, for a client that does not read


def parse_address(text: str) -> tuple[str, int]:
    """Read `:1234`, `1234`, `127.0.0.1:1234` or `[::1]:1234`; the host is localhost by default.

    Raises UsageError for anything else.
    """
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]*):)?(\d{1,5})", text)
    if match is None or int(match[2]) > 65535:
        raise UsageError(f"{text!r} is no address for gdb; give :PORT or HOST:PORT.")
    return (match[1] or "127.0.0.1").strip("[]"), int(match[2])


class _ClientGoneError(Exception):
    """The connection ended without a detach."""


class GdbServer(TrapListener):
    """Debugs one machine for one client.

    `run` replaces `Vcpu.run` in the machine; it listens to the module's traps; `finish` says how
    it all ended. `say` gets lines for the user's terminal, among them the command that starts gdb
    with the symbols of `vmlinux`. `halted` is how many seconds of
    wall time the guest stood still, which no timeout should count.
    """

    def __init__(
        self,
        address: str,
        vcpu: "Vcpu",
        target: DebugTarget,
        say: "Callable[[str], None]",
        *,
        vmlinux: "Path | None" = None,
    ) -> None:
        self._vmlinux = vmlinux
        self._vcpu = vcpu
        self._monitor = Monitor(target)
        self._interpreter = Interpreter(vcpu, self._monitor)
        self.say = say
        self._decoder = Decoder()
        self._events: list[bytes | Signal] = []
        self._last_sent = b""
        self._client: socket.socket | None = None
        self._listener: socket.socket | None = _listen(*parse_address(address))
        self._stop: bytes | None = None  # the stop reply that is due
        self._stops_at_boundary = False
        self._passed: int | None = None  # RIP of the TDCALL that gdb was already shown
        self._exits = 0
        self.was_killed = False
        self._is_over = False
        self.halted = 0.0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that the server listens on; ("", 0) once a client came."""
        if self._listener is None:
            return "", 0
        host, port = self._listener.getsockname()[:2]
        return host, port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all sockets; the guest can run on without."""
        for each in (self._client, self._listener):
            if each is not None:
                each.close()
        self._client = self._listener = None

    def run(self, handler: "ExitHandler", has_ended: "Callable[[], bool]") -> None:
        """Run the guest as `Vcpu.run` does, stopping for gdb, until `has_ended()`.

        `has_ended` is asked when the engine has stopped, since the handler stops it too.
        After a kill packet `was_killed` is set.
        """
        self._wait_for_client()
        how = self._serve() if self._client is not None else Resume.DETACH
        while how in {Resume.CONTINUE, Resume.STEP}:
            self._stop = None
            self._go(how, handler, has_ended)
            if has_ended():
                return
            self._send_stop()
            how = self._serve()
        if how is Resume.KILL:
            self.was_killed = True
            return
        self._vcpu.run(handler)

    # vmm_interface.TrapListener

    def on_ve(self, rip: int, info: VeInfo, *, double_fault: bool) -> None:
        """Stop at the handler of a #VE if the client asked to."""
        del rip, info
        if not double_fault and self._client is not None and "ve" in self._monitor.stop_on:
            self._stops_at_boundary = True
            self._vcpu.request_boundary()

    def on_tdcall(self, rip: int, leaf: int, status: int) -> None:
        """Do nothing: the client is stopped before it."""

    def on_tdvmcall(self, rip: int, registers: list[int]) -> None:
        """Do nothing: the client is stopped before it."""

    def finish(self, *, clean: bool, text: str) -> None:
        """Tell the client that the guest is gone; after a failure, let it look around first."""
        self._is_over = True
        if self.was_killed:
            self.close()
        if self._client is None:
            return
        try:
            if not clean:
                self._packet(b"O" + f"trapline: {text}\n".encode().hex().encode())
                self._stop = self._interpreter.stop_reply = _SIGABRT
                self._packet(_SIGABRT)
                if self._serve() in {Resume.CONTINUE, Resume.STEP}:
                    self._packet(b"X06")
            else:
                self._packet(b"W00")
        except _ClientGoneError:
            pass
        self.close()

    # Running.

    def _go(self, how: Resume, handler: "ExitHandler", has_ended: "Callable[[], bool]") -> None:
        rip = int(self._vcpu.regs[Reg.RIP])
        self._passed = rip

        def watch(reason: Exit) -> None:
            self._watch(reason, handler)

        if how is Resume.STEP or rip in self._interpreter.breakpoints:
            # A breakpoint here has been reported already.
            self._vcpu.set_breakpoints(self._interpreter.breakpoints - {rip})
            self._vcpu.step(watch)
            self._vcpu.set_breakpoints(self._interpreter.breakpoints)
        if how is Resume.STEP:
            self._stop = self._stop or _SIGTRAP
        elif self._stop is None and not has_ended():
            self._vcpu.run(watch)

    def _watch(self, reason: Exit, handler: "ExitHandler") -> None:
        rip = int(self._vcpu.regs[Reg.RIP])
        if reason is Exit.BREAKPOINT:
            if rip in self._interpreter.breakpoints:
                self._halt(self._interpreter.breakpoint_reply(rip))
                return
        elif reason is Exit.TDCALL and self._stops_before_tdcall(rip):
            self._halt(_SIGTRAP)
            return
        self._passed = None
        handler(reason)
        if reason is Exit.BOUNDARY and self._stops_at_boundary:
            self._stops_at_boundary = False
            self._halt(_SIGTRAP)
        self._exits += 1
        # A guest without events has no other exits than the ends of its time budgets.
        is_due = reason is Exit.BOUNDARY or self._exits % _POLL_EVERY == 0
        if is_due and self._was_interrupted():
            self._halt(_SIGINT)

    def _stops_before_tdcall(self, rip: int) -> bool:
        return "tdcall" in self._monitor.stop_on and rip != self._passed

    def _halt(self, reply: bytes) -> None:
        self._stop = reply
        self._vcpu.stop()

    def _was_interrupted(self) -> bool:
        """Take in what has arrived, without waiting, and look for Ctrl-C."""
        if self._client is None:
            return False
        try:
            if select.select([self._client], [], [], 0)[0]:
                self._receive()
        except _ClientGoneError:
            self._drop_client()
            return False
        # Ctrl-C may have come in one piece with the packet that resumed the guest.
        if Signal.INTERRUPT not in self._events:
            return False
        self._events.remove(Signal.INTERRUPT)
        return True

    # Talking.

    def _wait_for_client(self) -> None:
        if self._listener is None:
            return
        host, port = self.address
        self.say(f"waiting for gdb: {self._hint(host, port)}")
        since = time.monotonic()
        self._client, peer = self._listener.accept()
        self.halted += time.monotonic() - since
        self._listener.close()
        self._listener = None
        self._client.settimeout(_SEND_TIMEOUT)
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.say(f"gdb attached from {peer[0]}")

    def _hint(self, host: str, port: int) -> str:
        command = f"target remote {host}:{port}"
        return command if self._vmlinux is None else f"gdb {self._vmlinux} -ex '{command}'"

    def _send_stop(self) -> None:
        reply = self._interpreter.stop_reply = self._stop or _SIGTRAP
        try:
            self._packet(reply)
        except _ClientGoneError:
            self._drop_client()

    def _serve(self) -> Resume:
        """Answer packets until one makes the guest run; a client that left is a detach."""
        since = time.monotonic()
        try:
            while True:
                while self._events:
                    how = self._answer(self._events.pop(0))
                    if how is not None:
                        return how
                self._receive()
        except _ClientGoneError:
            self._drop_client()
            return Resume.DETACH
        finally:
            self.halted += time.monotonic() - since

    def _answer(self, event: bytes | Signal) -> Resume | None:
        if isinstance(event, Signal):
            if event is Signal.NACK and self._last_sent:
                self._send(self._last_sent)
            elif event is Signal.CORRUPT:
                self._send(b"-")
            return None
        if self._interpreter.wants_acks:
            self._send(b"+")
        reply = self._interpreter.handle(event)
        if not isinstance(reply, Resume):
            self._packet(reply)
            return None
        if reply is Resume.DETACH:
            self._packet(b"OK")
            self._drop_client()
        elif reply is Resume.KILL and event.startswith(b"v"):
            self._packet(b"OK")
        return reply

    def _drop_client(self) -> None:
        if self._client is None:
            return
        self.say("gdb detached" if self._is_over else "gdb detached; the guest runs on")
        self._client.close()
        self._client = None
        self._interpreter.clear_breakpoints()
        self._monitor.stop_on = frozenset()

    def _packet(self, payload: bytes) -> None:
        self._last_sent = encode(payload)
        self._send(self._last_sent)

    def _send(self, data: bytes) -> None:
        if self._client is None:
            raise _ClientGoneError
        try:
            self._client.sendall(data)
        except OSError:
            raise _ClientGoneError from None

    def _receive(self) -> None:
        """Wait for bytes, without limit: gdb is driven by a person."""
        if self._client is None:
            raise _ClientGoneError
        select.select([self._client], [], [])
        try:
            data = self._client.recv(_RECEIVE)
        except OSError:
            raise _ClientGoneError from None
        self._events += [e for e in self._decoder.feed(data) if e is not Signal.ACK]
        if not data or len(self._events) > _MAX_QUEUE:
            raise _ClientGoneError


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"cannot listen for gdb on {host}:{port}: {error.strerror}.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise UsageError(f"cannot listen for gdb on {host}:{port}: {error.strerror}.") from None
    return listener
