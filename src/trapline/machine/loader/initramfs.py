"""An initramfs made here, and a check of one made elsewhere.

The archive format is the kernel's own (Documentation/driver-api/early-userspace/
buffer-format.rst): cpio "newc", uncompressed or in any compression the kernel unpacks.
"""

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from trapline.base import files
from trapline.base.errors import BadImageError, BadMachineError
from trapline.kernel.elf import compression

MAGIC: Final = b"070701"
MAGIC_CHECKSUM: Final = b"070702"
TRAILER: Final = "TRAILER!!!"
HEADER_SIZE: Final = 110
MAX_NAME: Final = 4096

MAX_INITRD: Final = 1 << 30

BUSYBOX: Final = "bin/busybox"
MODULES: Final = "modules"

# Says what it does, so that the console shows how far the guest came. `sleep` needs the timer
# interrupt; a static glibc program executes CPUID in ring 3 when it starts; /proc/interrupts
# and free need a working /proc. `poweroff -f` is reboot(2) without an init to ask.
_PROLOGUE: Final = """\
#!/bin/busybox sh
export PATH=/bin
say() { echo "init: $*"; }
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs devtmpfs /dev
"""
_LOAD: Final = """\
if [ -d /modules ]; then
  for module in $(busybox cat /modules/order); do
    busybox insmod "/modules/$module" && say "loaded $module"
  done
fi
"""
_EPILOGUE: Final = """\
# Without an interrupt the serial driver sends 16 bytes a tick: let it finish.
busybox sleep 0.3
busybox poweroff -f
"""
# On a board without IO-APIC, drivers that are built in may have taken IRQ 4 for their MSIs, and no
# write to the serial port succeeds. The kernel log comes out there all the same.
_SAY: Final = """\
if ! echo "init: began" 2> /dev/null; then
  exec < /dev/null > /dev/null 2>&1
  say() { echo "<1>init: $*" > /dev/kmsg; }
  say "began"
fi
"""
# tcsetattr(TCSADRAIN) returns when all output was sent.
_DRAIN: Final = "busybox stty -F /dev/console sane\n"
_HELLO: Final = """\
say "$(busybox uname -srm), $(busybox grep -c ^processor /proc/cpuinfo) CPU"
busybox grep -qw tdx_guest /proc/cpuinfo && say "the CPU flags name tdx_guest"
"""
_CHECKS: Final = """\
if [ -e /sys/module/tdx_guest ]; then
  # Through the driver: TDG.MR.REPORT, then GetQuote, which no host here can serve.
  busybox mount -t configfs configfs /sys/kernel/config
  report=/sys/kernel/config/tsm/report/td
  busybox mkdir $report
  busybox head -c 64 /dev/zero > $report/inblob
  say "the host gave a quote of $(busybox wc -c < $report/outblob) bytes"
fi
busybox sleep 1 && say "slept one second"
busybox sh -c 'exit 42'; [ $? = 42 ] && say "fork, exec and wait work"
say "self-test passed, powering off"
"""
SELF_TEST: Final = _PROLOGUE + _HELLO + _LOAD + _CHECKS + _EPILOGUE


class ArchiveEntry(NamedTuple):
    """One file, folder or device node; `mode` holds type and permissions."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def folder(name: str) -> ArchiveEntry:
    """Describe a folder."""
    return ArchiveEntry(name, stat.S_IFDIR | 0o755)


def program(name: str, data: bytes) -> ArchiveEntry:
    """Describe an executable file."""
    return ArchiveEntry(name, stat.S_IFREG | 0o755, data)


def newc(entries: Iterable[ArchiveEntry]) -> bytes:
    """Write a cpio archive; times, owners and inode numbers are fixed."""
    archive = bytearray()
    for number, entry in enumerate([*entries, ArchiveEntry(TRAILER, 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (
            number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0,
        )  # fmt: skip
        archive += MAGIC + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def workload(commands: str) -> str:
    """Return an /init that loads the modules, runs shell commands and powers off.

    The commands have busybox's applets as `busybox NAME`, `say` to print a line, and /proc,
    /sys and /dev.
    """
    return _PROLOGUE + _SAY + _LOAD + commands + _DRAIN + _EPILOGUE


def self_test(
    busybox: bytes,
    modules: Sequence[tuple[str, bytes]] = (),
    init: str = SELF_TEST,
    further: Sequence[ArchiveEntry] = (),
) -> bytes:
    """Build the initramfs whose /init tests the guest and powers it off.

    `modules` are file names and unpacked contents of loadable modules, in the order in which they
    are to be loaded. `further` are files, each in a folder of its own.
    """
    entries = [folder(name) for name in ("bin", "proc", "sys", "dev")]
    entries.append(ArchiveEntry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(program(BUSYBOX, busybox))
    entries.append(program("init", init.encode()))
    for entry in further:
        entries += [folder(entry.name.partition("/")[0]), entry]
    if modules:
        order = "".join(f"{name}\n" for name, _ in modules)
        entries.append(folder(MODULES))
        entries.append(ArchiveEntry(f"{MODULES}/order", stat.S_IFREG | 0o644, order.encode()))
        entries += [
            ArchiveEntry(f"{MODULES}/{name}", stat.S_IFREG | 0o644, data) for name, data in modules
        ]
    return newc(entries)


def read_initrd(path: Path) -> bytes:
    """Read an initrd that the user gave.

    Raises BadMachineError where it cannot be read or is not an archive that the kernel unpacks.
    """
    data = files.read(path, limit=MAX_INITRD, what="an initrd", error=BadMachineError)
    check(data, str(path))
    return data


def check(data: bytes, name: str) -> None:
    """Refuse what the kernel could not unpack; raises BadMachineError."""
    archive = memoryview(data)
    if compression.detect(archive) is not None:
        try:
            first = compression.peek(archive, len(MAGIC))
        except BadImageError as error:
            raise BadMachineError(f"{name}: the initrd is broken: {error}") from None
        if first not in (MAGIC, MAGIC_CHECKSUM):
            raise BadMachineError(f"{name}: the initrd does not unpack to a cpio archive.")
        return
    if data[:6] not in (MAGIC, MAGIC_CHECKSUM):
        raise BadMachineError(
            f"{name}: is not an initrd; give a cpio archive (newc), compressed or not."
        )
    _walk(data, name)


def _walk(data: bytes, name: str) -> None:
    """Follow the headers of the first archive to its trailer."""
    offset = 0
    while True:
        header = data[offset : offset + HEADER_SIZE]
        try:
            size = int(header[54:62], 16)
            name_size = int(header[94:102], 16)
        except ValueError:
            header = b""
            size = name_size = 0
        start = offset + HEADER_SIZE
        end = _align(_align(start + name_size) + size)
        if (
            header[:6] not in (MAGIC, MAGIC_CHECKSUM)
            or not 0 < name_size <= MAX_NAME
            or size < 0
            or start + name_size > len(data)
        ):
            raise BadMachineError(f"{name}: the initrd is broken at byte {offset}.")
        if data[start : start + name_size - 1] == TRAILER.encode():
            return
        offset = end


def _align(offset: int) -> int:
    return offset + 3 & -4
