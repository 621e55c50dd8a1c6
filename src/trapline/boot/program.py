"""A program that a guest is booted for: what it prints, and what it exits with.

The kernel has the first serial port to itself. The program's output comes through the second, its
errors through the third, and what it exits with through the fourth; each is drained before the
guest powers off, so that no last line is lost.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from trapline.base.errors import BadImageError, BadMachineError
from trapline.base.files import read
from trapline.kernel.elf.file import ElfFile
from trapline.results.boot import RunProgram

MAX_PROGRAM: Final = 256 << 20
ARGUMENT: Final = "8250.nr_uarts=4"  # a kernel may be built to look for fewer
PORTS: Final = 3  # beside the first: output, errors, exit code
_FOLDER: Final = "run"
_ELF: Final = b"\x7fELF"
_SAFE: Final = re.compile(r"[^A-Za-z0-9._+-]")
_STATUS_LIMIT: Final = 16
_MAX_STATUS: Final = 255

# Raw: what is printed comes out as it is. Closing a tty waits for its output, but 30 s at most:
# tcsetattr(TCSADRAIN), which stty makes, waits for all of it.
_INIT: Final = """\
busybox --install -s /bin
busybox ln -s bin /sbin
busybox mkdir -p /tmp /usr
busybox ln -s ../bin /usr/bin
for port in 1 2 3; do busybox stty -F /dev/ttyS$port raw -echo; done
export TERM=dumb HOME=/
"/{path}" </dev/null >/dev/ttyS1 2>/dev/ttyS2
echo $? >/dev/ttyS3
for port in 1 2 3; do busybox stty -F /dev/ttyS$port raw; done
busybox poweroff -f
"""


class Program(NamedTuple):
    """A script or a static binary; `path` is where it is in the guest."""

    name: str
    path: str
    data: bytes

    @property
    def commands(self) -> str:
        """What /init does about it once it has loaded the modules."""
        return _INIT.format(path=self.path)


def read_program(path: Path) -> Program:
    """Read what is to run; raises BadMachineError for what the guest could not."""
    data = read(path, limit=MAX_PROGRAM, what="a program", error=BadMachineError)
    if data.startswith(_ELF):
        _check_static(path)
    elif not data.startswith(b"#!"):
        raise BadMachineError(
            f"{path}: is neither a script nor a program; a script begins with #!/bin/sh."
        )
    return Program(path.name, f"{_FOLDER}/{_SAFE.sub('_', path.name)}", data)


def _check_static(path: Path) -> None:
    try:
        with ElfFile.open(path, limit=MAX_PROGRAM) as elf:
            is_dynamic = elf.section(".interp") is not None
    except BadImageError as error:
        raise BadMachineError(str(error)) from None
    if is_dynamic:
        raise BadMachineError(
            f"{path}: needs a dynamic linker, which the guest does not have; link it with -static, "
            "or give an --initrd that has one."
        )


class ProgramOutput:
    """What comes out of the program's serial ports.

    `out` and `err` get its output as it comes, in pieces.
    """

    def __init__(
        self, name: str, out: Callable[[bytes], None], err: Callable[[bytes], None]
    ) -> None:
        self._name = name
        self._out = out
        self._err = err
        self._written = [0, 0]
        self._pieces = (bytearray(), bytearray())
        self._status = bytearray()
        self.ports = (self._put_out, self._put_err, self._put_status)

    def flush(self) -> None:
        """Pass on what has come."""
        for piece, sink in zip(self._pieces, (self._out, self._err), strict=True):
            if piece:
                sink(bytes(piece))
                piece.clear()

    @property
    def result(self) -> RunProgram:
        """Say what became of it."""
        text = bytes(self._status).strip()
        status = int(text) if text.isdigit() and self._status.endswith(b"\n") else None
        if status is not None and status > _MAX_STATUS:
            status = None
        return RunProgram(
            name=self._name, exit_code=status, out=self._written[0], err=self._written[1]
        )

    def _put_out(self, byte: int) -> None:
        self._put(0, byte)

    def _put_err(self, byte: int) -> None:
        self._put(1, byte)

    def _put(self, which: int, byte: int) -> None:
        self._written[which] += 1
        piece = self._pieces[which]
        piece.append(byte)
        if byte == 0x0A or len(piece) >= 4096:
            self.flush()

    def _put_status(self, byte: int) -> None:
        if len(self._status) < _STATUS_LIMIT:
            self._status.append(byte)
