"""The QEMU process: found, started, connected to, and gone when we are.

The machine type is `pc` without the legacy devices that the TD has of its own.
"""

import contextlib
import re
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

from trapline.base.errors import BadMachineError, ToolMissingError
from trapline.base.files import write_whole
from trapline.machine.qemu.doorbell import VECTORS, Doorbell
from trapline.machine.qemu.qtest import QemuDiedError, Qtest

EXECUTABLE: Final = "qemu-system-x86_64"
OLDEST: Final = (7, 0)
_START_SECONDS: Final = 20
_MACHINE: Final = (
    "pc,hpet=off,i8042=off,sata=off,usb=off,smbus=off,vmport=off,acpi=off,pit=off,pic=off"
)
_ROM_SIZE: Final = 0x10000
_RESET_VECTOR: Final = 0xFFF0
_IDLE: Final = b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt


def find() -> str:
    """Return the path of a QEMU that is recent enough, or raise ToolMissingError."""
    path = shutil.which(EXECUTABLE)
    if path is None:
        raise ToolMissingError(
            f"{EXECUTABLE}, which models the devices, is not installed; "
            "run: apt-get install qemu-system-x86"
        )
    try:
        text = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_START_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolMissingError(f"{path} --version fails; reinstall qemu-system-x86.") from error
    match = re.search(r"version (\d+)\.(\d+)", text)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise ToolMissingError(f"{path} is too old; QEMU {wanted} or later is needed.")
    return path


class QemuProcess:
    """A running QEMU. `qtest` drives it, `doorbell` brings its MSI messages."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", qtest: Qtest, doorbell: Doorbell
    ) -> None:
        self.qtest = qtest
        self.doorbell = doorbell
        self._process = process

    @classmethod
    def start(
        cls,
        device_arguments: Sequence[str],
        memory: int,
        size: int,
        on_irq: Callable[[int, bool], None],
        *,
        descriptors: Sequence[int] = (),
    ) -> Self:
        """Start QEMU on `size` bytes of guest memory behind the file descriptor `memory`.

        Raises BadMachineError with QEMU's own words when it refuses its arguments.
        """
        executable = find()
        with (
            tempfile.TemporaryDirectory(prefix="trapline-") as name,
            contextlib.ExitStack() as undo,
        ):
            folder = Path(name)
            doorbell = Doorbell()
            undo.callback(doorbell.close)
            rom = bytearray(b"\xf4" * _ROM_SIZE)
            rom[_RESET_VECTOR : _RESET_VECTOR + len(_IDLE)] = _IDLE
            write_whole(folder / "idle.rom", [bytes(rom)])
            with _listener(folder / "qtest") as qtest, _listener(folder / "doorbell") as bell:
                process = subprocess.Popen(
                    [
                        # The kernel ends QEMU when we end, however that happens.
                        *("setpriv", "--pdeathsig", "KILL", executable),
                        *_arguments(folder, memory, size),
                        *device_arguments,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[memory, *descriptors],
                )
                undo.callback(_last_words, process)
                try:
                    doorbell.greet(_accept(bell, process))
                except OSError as error:  # it has connected, and then refused a device
                    raise _refusal(process) from error
                client = Qtest(_accept(qtest, process), on_irq)
                undo.callback(client.close)
                try:
                    # It answers once the machine is complete; only then may its files go.
                    client.read_port(0xCF8, 4)
                except QemuDiedError as error:
                    raise _refusal(process) from error
            undo.pop_all()
        return cls(process, client, doorbell)

    def close(self) -> str:
        """End QEMU and return what it printed to stderr."""
        self.qtest.close()
        self.doorbell.close()
        return _last_words(self._process)


def _arguments(folder: Path, memory: int, size: int) -> list[str]:
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"),
        *("-m", f"{size >> 20}M"),
        "-object",
        f"memory-backend-file,id=ram,size={size},mem-path=/proc/self/fd/{memory},share=on",
        *("-machine", f"{_MACHINE},memory-backend=ram"),
        *("-bios", str(folder / "idle.rom")),
        *("-qtest", f"unix:{folder / 'qtest'}", "-qtest-log", "none"),
        *("-chardev", f"socket,path={folder / 'doorbell'},id=doorbell"),
        # The last slot, so that the devices asked for have the first ones.
        "-device",
        f"ivshmem-doorbell,chardev=doorbell,master=on,vectors={VECTORS},addr=1f.0",
    ]


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.settimeout(0.05)
    return listener


def _accept(listener: socket.socket, process: "subprocess.Popen[bytes]") -> socket.socket:
    for _ in range(int(_START_SECONDS / 0.05)):
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            # A kernel timeout, not Python's: with that, MSG_DONTWAIT would wait.
            connection.settimeout(None)
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _START_SECONDS, 0)
            )
            return connection
        if process.poll() is not None:
            raise _refusal(process)
    raise BadMachineError(f"QEMU did not start within {_START_SECONDS} seconds.")


def _last_words(process: "subprocess.Popen[bytes]") -> str:
    """End QEMU and return what it printed to stderr."""
    process.kill()
    if process.stderr is None or process.stderr.closed:
        return ""
    _, words = process.communicate()
    return words.decode(errors="replace").strip()


def _refusal(process: "subprocess.Popen[bytes]") -> BadMachineError:
    lines = _last_words(process).splitlines()
    # Hints may follow an error, on lines of their own.
    errors = [line for line in lines if line.startswith(f"{EXECUTABLE}: ")] or lines
    reason = errors[-1].removeprefix(f"{EXECUTABLE}: ") if errors else "it says nothing"
    return BadMachineError(f"QEMU does not start: {reason.rstrip('.')}.")
