"""Puts a TD together in guest memory: map, tables, kernel, initramfs, processor state."""

from dataclasses import dataclass

from trapline.base.errors import BadMachineError
from trapline.cpu.engine import Vcpu
from trapline.machine.loader import acpi, cpustate, e820, efi, gpamap, kernelimage
from trapline.machine.loader.bootparams import BootParams, EfiInfo
from trapline.machine.loader.kernelimage import KernelImage


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to start and with what; `unaccepted` is in bytes, taken from the end of RAM."""

    image: KernelImage
    command_line: str
    initrd: bytes
    board: acpi.Board
    unaccepted: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where things went; GPAs. [unaccepted, unaccepted_end) is empty where all is accepted."""

    entry: int
    initrd: int
    unaccepted: int
    unaccepted_end: int


def check_memory(memory: int) -> None:
    """Refuse memory sizes that no TD here can have; raises BadMachineError."""
    if memory % (2 * gpamap.MIB):
        raise BadMachineError("the memory size must be a multiple of 2 MiB.")
    if not gpamap.MIN_MEMORY <= memory <= gpamap.MAX_MEMORY:
        raise BadMachineError(
            f"{memory // gpamap.MIB} MiB of memory cannot be had; give between "
            f"{gpamap.MIN_MEMORY // gpamap.MIB} and {gpamap.MAX_MEMORY // gpamap.MIB} MiB."
        )


def plan_memory(plan: LoadPlan, memory: int) -> Placement:
    """Decide where the initrd and the unaccepted range go; raises BadMachineError."""
    check_memory(memory)
    if plan.unaccepted < 0:
        raise BadMachineError("less than no memory cannot be left unaccepted.")
    image = plan.image
    accepted = memory - -(-plan.unaccepted // efi.UNIT) * efi.UNIT
    top = min(accepted, image.initrd_max + 1)
    initrd = (top - len(plan.initrd)) & -gpamap.PAGE
    if initrd < image.end:
        need = -(-(image.end + len(plan.initrd)) // gpamap.MIB)
        raise BadMachineError(
            f"{image.name} and its initrd need {need} MiB of accepted memory; give more with "
            "--memory" + (" or leave less of it unaccepted." if plan.unaccepted else ".")
        )
    return Placement(image.entry, initrd, accepted, memory)


def load(vcpu: Vcpu, plan: LoadPlan) -> Placement:
    """Fill guest memory and set the processor up; raises BadMachineError or BadImageError."""
    ram = vcpu.memory.ram
    place = plan_memory(plan, len(ram))
    kernelimage.load(plan.image, ram)
    ram[place.initrd : place.initrd + len(plan.initrd)] = plan.initrd
    tables = acpi.tables(plan.board)
    _put(ram, gpamap.ACPI_TABLES, tables.data)
    _put(ram, gpamap.COMMAND_LINE, _command_line(plan))
    info = _put_efi(ram, place, tables.rsdp)
    params = BootParams(
        e820.memory_map(len(ram)),
        tables.rsdp,
        plan.image.setup_header,
        plan.image.start,
        place.initrd if plan.initrd else 0,
        len(plan.initrd),
        info,
    )
    _put(ram, gpamap.BOOT_PARAMS, params.pack())
    cpustate.enter_long_mode(vcpu, place.entry)
    return place


def _put(ram: memoryview, address: int, data: bytes) -> None:
    ram[address : address + len(data)] = data


def _put_efi(ram: memoryview, place: Placement, rsdp: int) -> EfiInfo | None:
    if place.unaccepted == place.unaccepted_end:
        return None
    tables = efi.tables(len(ram), place.unaccepted, place.unaccepted_end, rsdp)
    _put(ram, gpamap.EFI_TABLES, tables.data)
    return tables.info


def _command_line(plan: LoadPlan) -> bytes:
    text = plan.command_line.encode("utf-8", "surrogateescape")
    room = min(plan.image.cmdline_max, gpamap.COMMAND_LINE_ROOM - 1)
    if len(text) > room or b"\0" in text:
        raise BadMachineError(
            f"the command line has {len(text)} bytes; this kernel takes {room} without NUL."
        )
    return text + b"\0"
