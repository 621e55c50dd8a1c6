"""One CPU of the library: what it sees of host memory, its state, and what it caches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from unicorn.unicorn_const import UC_PROT_ALL

from trapline.cpu.unicorn.libunicorn import (
    NESTED_MODE_LONG,
    Cpu,
    Env,
    Fields,
    HFlags,
    HFlags2,
    Library,
    Svm,
    Uc,
)

_TRANSLATION_BUFFER: Final = 192 << 20

_INTERCEPTS: Final = sum(
    1 << (code - Svm.INTR)
    for code in (
        Svm.INTR,
        Svm.VINTR,
        Svm.RDTSC,
        Svm.RDPMC,
        Svm.CPUID,
        Svm.SWINT,
        Svm.INVD,
        Svm.PAUSE,
        Svm.HLT,
        Svm.IOIO,
        Svm.MSR,
        Svm.SHUTDOWN,
        Svm.ICEBP,
        Svm.WBINVD,
        Svm.MONITOR,
        Svm.MWAIT,
    )
)


class Core:
    """An open CPU of `library`; `maps` are (physical address, size, host address).

    `stale_tlb`: flush the TLB before the guest goes on. `drop_code(start, end)` forgets what was
    translated from these physical addresses.
    """

    def __init__(self, library: Library, maps: Iterable[tuple[int, int, int]]) -> None:
        self.library = library
        self._uc = library.open_cpu(_TRANSLATION_BUFFER)
        for address, size, host in maps:
            status = library.uc_mem_map_ptr(self._uc, address, size, UC_PROT_ALL, host)
            library.check(status, "uc_mem_map_ptr")
        self.fields = Fields(self._uc)
        self.stale_tlb = False
        self._tlb_flush = library.tlb_flush
        self.drop_code: Callable[[int, int], None] = partial(
            library.tb_invalidate_phys_range, self.fields.uc
        )

    def arm(self, vmcb: int, nested_root: int) -> None:
        """Switch on guest mode, intercepts and nested paging; both are physical addresses."""
        fields = self.fields
        words, quads = fields.env32, fields.env64
        quads[Env.VM_VMCB // 8] = vmcb
        quads[Env.INTERCEPT // 8] = _INTERCEPTS
        quads[Env.NESTED_CR3 // 8] = nested_root
        words[Env.NESTED_PG_MODE // 4] = NESTED_MODE_LONG
        words[Env.HFLAGS // 4] |= HFlags.GUEST
        # HIF and VINTR: a HARD request becomes an exit at any boundary, IF or not.
        words[Env.HFLAGS2 // 4] |= HFlags2.GIF | HFlags2.HIF | HFlags2.VINTR | HFlags2.NPT
        # cpu_exec is called directly: it is always the outermost run.
        fields.nested_level[0] = 1
        fields.cpu8[Cpu.STOPPED] = 0
        # The core would call a helper after each load and store to see whether an unmapped
        # access stopped the run. With nested paging no access is unmapped.
        fields.uc8[Uc.NO_EXIT_REQUEST] = 1

    def flush_tlb(self) -> None:
        """Forget all translations of addresses."""
        self.stale_tlb = False
        self._tlb_flush(self.fields.cpu)

    def drop_all_code(self) -> None:
        """Forget all translations of code."""
        self.library.tb_flush(self.fields.cpu)

    def close(self) -> None:
        """Free the CPU; what is mapped into it may be freed then."""
        self.fields.nested_level[0] = 0
        self.library.uc_close(self._uc)
