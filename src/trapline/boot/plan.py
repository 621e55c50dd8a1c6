"""What to boot: from kernel files and options to a kernel image, an initramfs, a command line."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from trapline.base.errors import BadImageError, BadMachineError, FetchError, KernelNotFoundError
from trapline.base.files import read
from trapline.base.mapping import mapped
from trapline.boot.policy import Guard
from trapline.boot.program import ARGUMENT, Program
from trapline.boot.session import COMMAND_LINE as INTERACTIVE_COMMAND_LINE
from trapline.boot.session import DISK_MODULES, Session
from trapline.kernel.binary import Binary
from trapline.kernel.drivers.modinfo import module_info, read_builtin
from trapline.kernel.elf import compression
from trapline.kernel.elf.file import MAX_MODULE, ElfFile
from trapline.kernel.find import deb
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.machine.devices.console import DEFAULT_LIMIT
from trapline.machine.loader import initramfs, kernelimage
from trapline.machine.loader.acpi import BOARD_DEVICES, Board
from trapline.machine.loader.gpamap import DEFAULT_MEMORY
from trapline.machine.loader.kernelimage import KernelImage
from trapline.machine.machine import DEFAULT_VIRTUAL_SECONDS
from trapline.machine.qemu import catalogue
from trapline.machine.qemu.catalogue import DeviceRequest
from trapline.results.boot import COMPLAINT_KINDS, ComplaintKind

# What Debian's cloud images put on the command line.
DISTRIBUTION_COMMAND_LINE: Final = (
    "console=tty0 console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0"
)
BUSYBOX_PACKAGE: Final = "busybox-static"
_BUSYBOX_PATHS: Final = ("bin/busybox", "usr/bin/busybox")
# Linux has x2APIC mode without interrupt remapping, which a TD is in from the start, on known
# hypervisors only (try_to_enable_x2apic(), arch/x86/kernel/apic/apic.c). A kernel that takes its
# host for bare metal leaves the mode, which a TD cannot.
_KNOWN_HOSTS: Final = ("CONFIG_KVM_GUEST", "CONFIG_HYPERV")
_MAX_MODULE: Final = 256 << 20
_MAX_MODULES: Final = 256


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What the user may choose; sizes in bytes, times in seconds.

    `command_line` replaces the distribution's, `append` goes behind either. `insmod` names
    modules that the self-test initramfs loads, with all they depend on; `init` replaces its /init,
    and `program` is run by it in place of the tests; or it is for a `session` of a person who
    types on the descriptor `keyboard`. `devices` are QEMU's. `guard` says which
    accesses the guest may make, `fail_on` which complaints of its kernel are not put up with.
    """

    initrd: Path | None = None
    command_line: str | None = None
    append: tuple[str, ...] = ()
    insmod: tuple[str, ...] = ()
    init: str | None = None
    program: Program | None = None
    session: Session | None = None
    keyboard: int | None = None
    memory: int = DEFAULT_MEMORY
    unaccepted: int = 0
    board: Board = field(default_factory=Board)
    devices: tuple[DeviceRequest, ...] = ()
    module_version: str = "1.5.01"
    timeout: float | None = None
    virtual_seconds: int = DEFAULT_VIRTUAL_SECONDS
    console_limit: int = DEFAULT_LIMIT
    seed: int = 1
    guard: Guard = field(default_factory=Guard)
    fail_on: frozenset[ComplaintKind] = COMPLAINT_KINDS


@dataclass(frozen=True, slots=True)
class BootPlan:
    """What will be booted. `modules` are the files that may turn up in the guest."""

    files: KernelFiles
    image: KernelImage
    initrd: bytes
    initrd_name: str
    command_line: str
    modules: tuple[ModuleFile, ...]
    options: BootOptions


def without_boot_image(files: KernelFiles, spec: str) -> KernelFiles:
    """Leave the boot image out where `spec`, the user's KERNEL, is the vmlinux itself."""
    named = files.vmlinux is not None and Path(spec).is_file() and files.vmlinux.samefile(spec)
    return replace(files, vmlinuz=None) if named else files


def make_plan(
    files: KernelFiles, options: BootOptions, announce: Callable[[str], None] | None = None
) -> BootPlan:
    """Choose and read everything; `announce` is told what will be downloaded, or cannot work.

    The boot image is preferred to the vmlinux, as it is what ships. Raises a TraplineError for
    whatever cannot be booted.
    """
    path = files.vmlinuz or files.vmlinux
    if path is None:
        raise KernelNotFoundError(
            "there is neither a vmlinuz nor a vmlinux to boot; give one of them, or "
            "deb:linux-image-…"
        )
    image = kernelimage.open_image(path)
    if announce is not None and _lacks_hosts(files):
        announce(
            "this kernel was built without CONFIG_KVM_GUEST, so it takes its host for bare metal "
            "and gives up the x2APIC, which a TD cannot: expect it to end at its local APIC"
        )
    if options.initrd is not None:
        if options.insmod or options.program is not None:
            option = "--insmod" if options.insmod else "--run"
            raise BadMachineError(f"{option} is for the initramfs that is made here, not --initrd.")
        initrd, name = initramfs.read_initrd(options.initrd), str(options.initrd)
        modules: tuple[ModuleFile, ...] = files.modules
    else:
        modules = with_dependencies(files, _loaded(files, options))
        program, session = options.program, options.session
        init = options.init or initramfs.SELF_TEST
        name = "self-test" if options.init is None else "workload"
        if program is not None:
            init, name = initramfs.workload(program.commands), program.name
        elif session is not None:
            init, name = initramfs.workload(session.commands), "session"
        initrd = _own_initrd(modules, init, program, announce)
    return BootPlan(files, image, initrd, name, command_line(options), modules, options)


def _loaded(files: KernelFiles, options: BootOptions) -> tuple[str, ...]:
    """Name the modules to load: those asked for, and the disk's that are no part of vmlinux."""
    if options.session is None or not options.session.has_disk:
        return options.insmod
    there = {module.name for module in files.modules}
    return (*options.insmod, *(name for name in DISK_MODULES if name in there))


def _lacks_hosts(files: KernelFiles) -> bool:
    return bool(files.config) and not any(option in files.config for option in _KNOWN_HOSTS)


def command_line(options: BootOptions) -> str:
    """Return what the kernel gets: an empty line where the user asks for one."""
    first = options.command_line
    # A console costs most of a boot's time, and shows nothing that a program prints.
    ours = () if options.program is None else (ARGUMENT, *(("quiet",) if first is None else ()))
    usual = DISTRIBUTION_COMMAND_LINE if options.keyboard is None else INTERACTIVE_COMMAND_LINE
    words = (usual if first is None else first, *ours, *options.append)
    return " ".join(word for word in words if word)


def parse_devices(texts: Iterable[str]) -> tuple[Board, tuple[DeviceRequest, ...]]:
    """Turn `--device` arguments into a board and QEMU's devices; raises UsageError."""
    words = tuple(texts)
    requests = tuple(catalogue.parse(text) for text in words if text not in BOARD_DEVICES)
    hpet = "hpet" in words
    board = Board(
        # Linux ignores an HPET that has no interrupts.
        ioapic="ioapic" in words or hpet or catalogue.needs_io_apic(requests),
        hpet=hpet,
        pci=bool(requests),
        mmio_uart="mmio-uart" in words,
    )
    return board, requests


def open_symbols(plan: BootPlan) -> Binary:
    """Open the vmlinux that belongs to the image, or what the image itself knows of symbols.

    Raises BadImageError where the vmlinux is of another build.
    """
    path = plan.files.vmlinux
    if path is None:
        assert plan.files.vmlinuz is not None, "make_plan has found one of them"
        return Binary.open_vmlinuz(plan.files.vmlinuz)
    binary = Binary.open_vmlinux(path)
    build_id = plan.image.build_id
    if build_id is not None and binary.elf.build_id not in (None, build_id):
        binary.close()
        raise BadImageError(f"{path}: is of another build than {plan.image.name}; remove one.")
    return binary


def with_dependencies(files: KernelFiles, names: Iterable[str]) -> tuple[ModuleFile, ...]:
    """Return the modules and all they depend on, in the order in which they must be loaded.

    What is built into the kernel need not be.
    """
    known = {module.name: module for module in files.modules}
    built_in = {module.name for module in read_builtin(files)}
    order: dict[str, ModuleFile] = {}
    pending = [(name.replace("-", "_"), False) for name in reversed(tuple(names))]
    seen: set[str] = set()
    while pending:
        name, is_ready = pending.pop()
        if is_ready:
            order[name] = known[name]
            continue
        if name in seen or (name in built_in and name not in known):
            continue
        seen.add(name)
        if name not in known or len(seen) > _MAX_MODULES:
            raise KernelNotFoundError(f"there is no module {name} for this kernel to load.")
        pending.append((name, True))
        with ElfFile.open(known[name].path, limit=MAX_MODULE) as elf:
            pending += [(needed, False) for needed in module_info(elf, name).depends]
    return tuple(order.values())


def _own_initrd(
    modules: tuple[ModuleFile, ...],
    init: str,
    program: Program | None,
    announce: Callable[[str], None] | None,
) -> bytes:
    tree = deb.fetch_package(BUSYBOX_PACKAGE, announce=announce)
    found = next((tree / path for path in _BUSYBOX_PATHS if (tree / path).is_file()), None)
    if found is None:
        raise FetchError(f"the package {BUSYBOX_PACKAGE} holds no busybox; give --initrd.")
    busybox = read(found, limit=_MAX_MODULE, what="a busybox", error=FetchError)
    contents = [(f"{module.name}.ko", _unpacked(module.path)) for module in modules]
    further = () if program is None else (initramfs.program(program.path, program.data),)
    return initramfs.self_test(busybox, contents, init, further)


def _unpacked(path: Path) -> bytes:
    with mapped(path) as data:
        if compression.detect(data) is None:
            return bytes(data)
        return compression.decompress(data, limit=_MAX_MODULE, name=str(path))
