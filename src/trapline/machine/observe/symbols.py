"""Symbols of the guest that an engine holds, kept up to date while it runs.

Where the kernel is, is either told (`place_kernel`, when it was loaded as vmlinux) or found in
guest memory once it runs at its own addresses; where its modules are, is read from the guest
when an address turns up that nothing else explains.
"""

from typing import TYPE_CHECKING, Final

from trapline.base.errors import TraplineError
from trapline.kernel.binary import VMLINUX, Binary
from trapline.kernel.live.devices import DeviceReader, PciDevice
from trapline.kernel.live.modules import LoadedModule, ModuleReader, module_spans
from trapline.kernel.live.orc import OrcTable
from trapline.kernel.live.runtime import (
    KERNEL_MAP,
    Location,
    RuntimeSymbols,
    Span,
    detect_slide,
)
from trapline.kernel.live.tasks import LiveTask, TaskReader
from trapline.kernel.types.btf import Btf
from trapline.linux import names

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from trapline.cpu.engine import Vcpu
    from trapline.kernel.find.kernelfiles import ModuleFile

_KERNEL_HALF: Final = 1 << 63
PT_LOAD: Final = 1
_BANNER_SIZE: Final = 64
# Looking at guest memory takes milliseconds, and a guest can trap at any number of addresses.
_MAX_REFRESHES: Final = 1000


class _Stranger:
    """A module in the guest without a file: known by name only."""

    text = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def symbol_at(self, address: int) -> None:
        del address

    def chain(self, address: int) -> tuple[()]:
        del address
        return ()


class GuestSymbols:
    """Symbolises addresses of one guest.

    `vmlinux` is None where there is no symbol source; then labels are bare addresses. `modules`
    are the files that may be loaded. `release` is as `uname -r` prints it.
    """

    def __init__(
        self,
        vcpu: "Vcpu",
        vmlinux: Binary | None,
        *,
        release: str | None = None,
        modules: "Iterable[ModuleFile]" = (),
    ) -> None:
        self._vcpu = vcpu
        self._vmlinux = vmlinux
        self._files = {module.name: module for module in modules}
        self._orc = None if vmlinux is None else OrcTable.of_vmlinux(vmlinux.elf, release)
        self._reader: ModuleReader | None = None
        self._devices: DeviceReader | None = None
        self._btf: Btf | None = None
        self._loaded: dict[str, LoadedModule] = {}
        self._binaries: dict[str, Binary] = {}
        self._refreshes = 0
        self._unexplained: set[int] = set()
        self.runtime = RuntimeSymbols()

    def close(self) -> None:
        """Close the module files that were opened; `vmlinux` is the caller's."""
        for binary in self._binaries.values():
            binary.close()
        self._binaries.clear()

    @property
    def slide(self) -> int | None:
        """Run-time minus link-time address of the kernel in bytes, None while not known."""
        return self.runtime.slide

    @property
    def first_segment(self) -> int | None:
        """Link-time address of the first segment of vmlinux that is loaded."""
        segments = () if self._vmlinux is None else self._vmlinux.elf.segments
        return next((s.virtual_address for s in segments if s.type == PT_LOAD), None)

    def module_text(self) -> "Iterator[tuple[ModuleFile, int]]":
        """Yield each loaded module that has a file, with the run-time address of its .text."""
        for name, module in self._loaded.items():
            binary = self._open(name)
            if binary is None:
                continue
            text = next((part.address for part in binary.text if part.name == ".text"), None)
            for span in module_spans(binary, module):
                if span.link == text:
                    yield self._files[name], span.start

    def preload(self) -> None:
        """Read the kernel's symbols and DWARF now, which takes seconds, not at the first use."""
        if self._vmlinux is not None and self._vmlinux.text:
            self._vmlinux.chain(self._vmlinux.text[0].address)

    def place_kernel(self, slide: int, physical: int) -> None:
        """Say that the kernel runs at `slide`, with link-time KERNEL_MAP at GPA `physical`."""
        if self._vmlinux is not None:
            self.runtime.place_vmlinux(self._vmlinux, slide, self._orc, physical)

    def place_decompressor(self, start: int, size: int) -> None:
        """Say where the boot image's protected-mode code is; bytes at a GPA."""
        self.runtime.place_decompressor(start, size)

    def locate(self, address: int, *, is_call: bool = False, is_user: bool = False) -> Location:
        """Describe a run-time address, as `RuntimeSymbols.locate`; may read guest memory."""
        location = self.runtime.locate(address, is_call=is_call, is_user=is_user)
        if (
            location.image
            or address < _KERNEL_HALF
            or address in self._unexplained
            or self._refreshes >= _MAX_REFRESHES
        ):
            return location
        self._refreshes += 1
        self.refresh()
        location = self.runtime.locate(address, is_call=is_call)
        if not location.image:
            self._unexplained.add(address)
        return location

    def image(self, name: str) -> Binary | None:
        """Return the vmlinux or an opened module that a `Location` names."""
        return self._vmlinux if name == VMLINUX else self._binaries.get(name)

    def pci_devices(self) -> tuple[PciDevice, ...]:
        """Return the PCI functions that the kernel knows now, with their drivers."""
        self.refresh()
        slide = self.runtime.slide
        if self._vmlinux is None or slide is None:
            return ()
        if self._devices is None:
            head, types = self._vmlinux.address_of(names.PCI_BUSES), self._types()
            if head is None or types is None:
                return ()
            self._devices = DeviceReader(self._vcpu.read, types, head + slide)
        return self._devices.read()

    def tasks(self) -> tuple[LiveTask, ...]:
        """Return the tasks that the kernel has now, PID 1 first."""
        self.refresh()
        slide = self.runtime.slide
        if self._vmlinux is None or slide is None:
            return ()
        first, types = self._vmlinux.address_of(names.INIT_TASK), self._types()
        if first is None or types is None:
            return ()
        return TaskReader(self._vcpu.read, types, first + slide).read()

    def _types(self) -> Btf | None:
        if self._btf is None and self._vmlinux is not None:
            data = self._vmlinux.elf.contents(".BTF")
            try:
                self._btf = Btf.parse(data) if data else None
            except TraplineError:
                return None
        return self._btf

    def settle(self) -> None:
        """Look at guest memory for the last time; the engine may be closed afterwards."""
        self.refresh()
        self._refreshes = _MAX_REFRESHES

    def refresh(self) -> None:
        """Find the kernel if it was not found yet, and the modules that are loaded now."""
        if self._vmlinux is None:
            return
        if self.runtime.slide is None:
            self._find_kernel(self._vmlinux)
        if self.runtime.slide is not None:
            self._find_modules(self._vmlinux, self.runtime.slide)

    def _find_kernel(self, vmlinux: Binary) -> None:
        landmark = vmlinux.address_of(names.BANNER)
        content = None if landmark is None else vmlinux.read(landmark, _BANNER_SIZE)
        if landmark is None or content is None:
            return
        slide = detect_slide(self._vcpu.read, landmark, content)
        gpa = None if slide is None else self._vcpu.translate(landmark + slide)
        if slide is None or gpa is None:
            return
        gpa &= ~self._vcpu.memory.shared_bit
        self.place_kernel(slide, gpa - (landmark - KERNEL_MAP))

    def _find_modules(self, vmlinux: Binary, slide: int) -> None:
        if self._reader is None:
            head = vmlinux.address_of(names.MODULES)
            types = self._types()
            if head is None or types is None:
                return  # its modules stay nameless; the kernel itself needs no types
            self._reader = ModuleReader(self._vcpu.read, types, head + slide)
        for module in self._reader.read():
            if self._loaded.get(module.name) != module:
                self._loaded[module.name] = module
                self._place_module(self._reader, module)

    def _place_module(self, reader: ModuleReader, module: LoadedModule) -> None:
        orc = None if self._orc is None else reader.orc(module, self._orc.version)
        binary = self._open(module.name)
        if binary is not None:
            self.runtime.place(binary, module_spans(binary, module), orc)
            return
        areas = [area for area in (module.text, module.init) if area is not None]
        spans = [Span(area.start, area.size, area.start) for area in areas]
        self.runtime.place(_Stranger(module.name), spans, orc)

    def _open(self, name: str) -> Binary | None:
        if name not in self._binaries and name in self._files:
            file = self._files[name]
            try:
                self._binaries[name] = Binary.open_module(name, file.path, file.debug)
            except TraplineError:
                # A damaged module file must not end a boot; its addresses stay nameless.
                del self._files[name]
        return self._binaries.get(name)
