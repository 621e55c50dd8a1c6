"""An engine on Unicorn: one memory, one VCPU, and their snapshots. See `trapline.cpu.engine`."""

from functools import cache, partial
from typing import Final

from trapline.base.errors import BadMachineError
from trapline.cpu.unicorn import selfcheck
from trapline.cpu.unicorn.control import SIZE as CONTROL_SIZE
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.core import Core
from trapline.cpu.unicorn.libunicorn import PHYSICAL_BITS, Library
from trapline.cpu.unicorn.memory import UnicornMemory
from trapline.cpu.unicorn.nested import NestedTables
from trapline.cpu.unicorn.ram import Ram
from trapline.cpu.unicorn.snapshot import Snapshots
from trapline.cpu.unicorn.vcpu import UnicornVcpu

_PAGE: Final = 4096
_MAX_RAM: Final = 64 << 30
_SHARED_BIT: Final = 1 << (PHYSICAL_BITS - 1)
_MONITOR: Final = 0xE0 << 32  # physical, reached by no nested leaf
_NESTED: Final = _MONITOR + 0x100000


class UnicornEngine:
    """`ram_size` bytes of RAM at GPA 0 (a multiple of 4 KiB, 64 GiB at most) and a CPU.

    The shared bit is bit 39: the core has 40 physical address bits. With `split_ram` the shared
    half is memory of its own; then there are no snapshots.
    """

    def __init__(
        self, library: Library, ram_size: int, *, seed: int = 0, split_ram: bool = False
    ) -> None:
        if not 0 < ram_size <= _MAX_RAM or ram_size % _PAGE:
            raise BadMachineError(
                f"guest memory of {ram_size} bytes is not a multiple of 4 KiB up to 64 GiB"
            )
        self._closed = False
        self._control = ControlPages(_MONITOR)
        ram = Ram(ram_size, split=split_ram)
        tables = NestedTables(_NESTED, ram_size, _SHARED_BIT, ram.shared_offset)
        self._core = Core(
            library,
            (
                (0, ram.span, ram.address),
                (_MONITOR, CONTROL_SIZE, self._control.address),
                (_NESTED, tables.size, tables.address),
            ),
        )
        self.memory = UnicornMemory(self._core, ram, tables, _SHARED_BIT)
        self._vcpu = UnicornVcpu(self._core, self.memory, self._control, seed)
        self.vcpus = (self._vcpu,)
        self._core.arm(_MONITOR, tables.root)
        snapshots = Snapshots(self._core, self.memory, self._vcpu)
        self.freeze, self.save = snapshots.freeze, snapshots.save
        self.restore = snapshots.restore

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._core.close()
        self._vcpu.close()
        self.memory.close()
        self._control.close()


@cache
def checked_library() -> Library:
    """Load the library and check that its private layout is the known one, once per process.

    Raises EngineMismatchError.
    """
    library = Library()
    selfcheck.check_fields(library)
    selfcheck.check_behaviour(partial(UnicornEngine, library))
    return library


def open_engine(ram_size: int, *, seed: int = 0, split_ram: bool = False) -> UnicornEngine:
    """Open an engine: the `trapline.cpu.engine.Factory` of this package."""
    return UnicornEngine(checked_library(), ram_size, seed=seed, split_ram=split_ram)
