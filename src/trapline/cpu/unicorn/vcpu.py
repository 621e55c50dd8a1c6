"""One virtual CPU on Unicorn: construction, running, time. See `trapline.cpu.engine`."""

from threading import get_ident
from typing import ClassVar, Final

from unicorn.unicorn_const import UC_PROT_ALL

from trapline.base.errors import BadMachineError, EngineMismatchError
from trapline.cpu.engine import MAX_ENTRIES, Exit, ExitHandler, PageState
from trapline.cpu.unicorn import selfcheck
from trapline.cpu.unicorn.control import SIZE as CONTROL_SIZE
from trapline.cpu.unicorn.control import ControlPages
from trapline.cpu.unicorn.exits import PLAIN
from trapline.cpu.unicorn.layout import (
    EXCP_VMEXIT,
    NESTED_MODE_LONG,
    PHYSICAL_BITS,
    Cpu,
    Env,
    Fields,
    HFlags,
    HFlags2,
    Library,
    Request,
    Svm,
    Uc,
)
from trapline.cpu.unicorn.native import NativeHooks
from trapline.cpu.unicorn.nested import NestedTables
from trapline.cpu.unicorn.ram import Ram
from trapline.cpu.unicorn.slots import COUNT_START, IN_DELIVERY_FLAG, NEVER, Delivery, Slot
from trapline.cpu.unicorn.snapshot import Snapshots
from trapline.cpu.unicorn.tlb import CodeMap
from trapline.cpu.unicorn.writelog import WriteLog

_PAGE: Final = 4096
_MAX_RAM: Final = 64 << 30
_MONITOR: Final = 0xE0 << 32  # physical, reached by no nested leaf
_NESTED: Final = _MONITOR + 0x100000
_TRANSLATION_BUFFER: Final = 192 << 20
_EXIT, _BYTES = Slot.EXIT, Slot.BYTES
_BYTES_PER_CYCLE: Final = 4  # about one instruction

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


class UnicornEngine(Snapshots):
    """A CPU with `ram_size` bytes of RAM at GPA 0 (a multiple of 4 KiB, 64 GiB at most).

    The shared bit is bit 39: the core has 40 physical address bits. `seed` determines what
    RDRAND, RDSEED and the noise of RDTSC give. All RAM is private and mapped, no page is
    shared. The state is that of reset, in real mode.

    With `split_ram` the shared half is memory of its own, `shared_fd`, which devices may be
    given; then there are no snapshots.
    """

    _verified: ClassVar[bool] = False

    def __init__(self, ram_size: int, *, seed: int = 0, split_ram: bool = False) -> None:
        if not 0 < ram_size <= _MAX_RAM or ram_size % _PAGE:
            raise BadMachineError(
                f"guest memory of {ram_size} bytes is not a multiple of 4 KiB up to 64 GiB"
            )
        self.shared_bit = 1 << (PHYSICAL_BITS - 1)
        self._library = Library()
        self._verify()
        self._closed = False
        self._uc = self._library.open_cpu(_TRANSLATION_BUFFER)
        self._ram = Ram(ram_size, split=split_ram)
        self._control = ControlPages(_MONITOR)
        self._nested = NestedTables(_NESTED, ram_size, self.shared_bit, self._ram.shared_offset)
        for address, size, host in (
            (0, self._ram.span, self._ram.address),
            (_MONITOR, CONTROL_SIZE, self._control.address),
            (_NESTED, self._nested.size, self._nested.address),
        ):
            status = self._library.uc_mem_map_ptr(self._uc, address, size, UC_PROT_ALL, host)
            self._library.check(status, "uc_mem_map_ptr")
        self._fields = Fields(self._uc)
        self._code_map = CodeMap(self._ram.span)
        self._write_log = WriteLog(self._ram.span)
        self._hooks = NativeHooks(
            self._library, self._fields, self._ram, self._nested, self._code_map, self._write_log
        )
        self.ram = self._ram.view
        self.shared_ram = self._ram.shared
        self.memory = self
        self.vcpus = (self,)
        self._base_cycles = 0
        self._budget = NEVER
        self._stepping = False
        self._stopping = False
        self._stale_tlb = False
        self._stuck_at = -1
        self._exact = False
        self._breakpoints: frozenset[int] = frozenset()
        self._init_state()
        self._init_events()
        self._init_exits(seed)
        self._decoders |= {
            EXCP_VMEXIT + Svm.INTR: self._exit_boundary,
            EXCP_VMEXIT + Svm.COUNT: self._exit_count,
            EXCP_VMEXIT + Svm.IRET: self._exit_iret,
            EXCP_VMEXIT + Svm.BREAKPOINT: self._exit_breakpoint,
            EXCP_VMEXIT + Svm.ENTRY: self._exit_entry,
        }
        self._arm()

    def _verify(self) -> None:
        """Check the library's private layout, when the first engine of a process starts."""
        if UnicornEngine._verified:
            return
        selfcheck.check_fields(self._library)
        UnicornEngine._verified = True
        try:
            selfcheck.check_behaviour(UnicornEngine)
        except BaseException:
            UnicornEngine._verified = False
            raise

    def _arm(self) -> None:
        """Switch on guest mode, intercepts and nested paging."""
        fields = self._fields
        words, quads = fields.env32, fields.env64
        quads[Env.VM_VMCB // 8] = _MONITOR
        quads[Env.INTERCEPT // 8] = _INTERCEPTS
        quads[Env.NESTED_CR3 // 8] = self._nested.root
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

    # Time and counts.

    @property
    def cycles(self) -> int:
        """Virtual TSC: executed code bytes / 4, 100 for an exception, and what was added."""
        return self._base_cycles + self._slots[_BYTES] // _BYTES_PER_CYCLE

    @cycles.setter
    def cycles(self, value: int) -> None:
        self._base_cycles = value - self._slots[_BYTES] // _BYTES_PER_CYCLE

    @property
    def instructions(self) -> int:
        """Instructions retired; without exact_counts() estimated from code bytes."""
        if self._exact:
            return self._slots[Slot.COUNT] - COUNT_START
        return self._slots[Slot.BYTES] // _BYTES_PER_CYCLE

    def exact_counts(self, wanted: bool) -> None:
        """Count each instruction from now on (about three times slower), from 0."""
        if wanted != self._exact:
            self._exact = wanted
            self._slots[Slot.COUNT] = COUNT_START
            self._rehook()

    def set_breakpoints(self, addresses: frozenset[int]) -> None:
        """Exit with BREAKPOINT before these linear addresses execute."""
        if addresses != self._breakpoints:
            self._breakpoints = addresses
            self._rehook()

    def watch_entries(self, addresses: frozenset[int] | None) -> None:
        """Exit with ENTRY before these functions begin, and before user code at CPL 0."""
        entries = frozenset[int]() if addresses is None else addresses
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"{len(entries)} entries are more than {MAX_ENTRIES}")
        self._hooks.watch_entries(entries, wanted=addresses is not None)

    def _rehook(self) -> None:
        self._hooks.hook_instructions(count=self._exact, breakpoints=self._breakpoints)
        self._library.tb_flush(self._fields.cpu)

    def set_time_budget(self, cycles: int | None) -> None:
        """Exit with BOUNDARY once `cycles` more were executed; None: never."""
        self._budget = NEVER
        if cycles is not None:
            self._budget = self._slots[Slot.BYTES] + max(cycles, 0) * _BYTES_PER_CYCLE
        self._set_limit(self._budget)

    def set_instruction_budget(self, count: int | None) -> None:
        """Exit with BOUNDARY after exactly `count` more instructions; needs exact_counts()."""
        limit = NEVER if count is None else self._slots[Slot.COUNT] + max(count, 0)
        self._slots[Slot.COUNT_LIMIT] = limit

    def _set_limit(self, limit: int) -> None:
        self._slots[Slot.LIMIT] = limit
        if self._kicked:
            self._slots[Slot.LIMIT] = 0

    # Second-level tables.

    def set_private(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the private half."""
        self._nested.set_private(gpa, size, state)
        self._stale_tlb = True

    def set_shared(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the shared half."""
        self._nested.set_shared(gpa, size, state)
        self._stale_tlb = True
        if self._ram.shared_offset and state is PageState.ABSENT:
            self._ram.discard_shared(gpa & ~self.shared_bit, size)

    def digest(self) -> str:
        """BLAKE2b-128 of the private half of RAM, in hexadecimal."""
        return self._ram.digest()

    @property
    def shared_fd(self) -> int:
        """The memfd behind `shared_ram`; pages that are not mapped are holes in it."""
        return self._ram.shared_fd

    # Running.

    def run(self, handler: ExitHandler) -> None:
        """Run until `stop`, calling `handler` on each exit."""
        self._start()
        enter, slots, plain = self._hooks.enter, self._slots, PLAIN
        while not self._stopping:
            if self._stale_tlb:
                self._flush_tlb()
            enter()
            kind = plain.get(slots[0]) or self._decode()
            if kind is None:
                continue
            handler(kind)
            if self._vectoring is not None:
                self._requeue()
            if self._triple_fault:
                self._triple_fault = False
                handler(Exit.TRIPLE_FAULT)

    def stop(self) -> None:
        """Make `run` return when the handler does; callable from the handler only."""
        self._stopping = True

    def step(self, handler: ExitHandler) -> None:
        """Execute one instruction, or deliver one event; exits on the way go to `handler`."""
        self._start()
        self._stepping = True
        try:
            while self._stepping and not self._stopping:
                self._arm_step()
                rip = self.regs[16]
                self._hooks.enter()
                kind = PLAIN.get(self._slots[0]) or self._decode()
                if kind is not None:
                    handler(kind)
                if self._vectoring is not None:
                    self._requeue()
                elif self._slots[Slot.KIND] == Delivery.NONE and self.regs[16] != rip:
                    self._stepping = False
        finally:
            self._stepping = False
            self._slots[Slot.STEP] = 0
            self._set_limit(self._budget)

    def _arm_step(self) -> None:
        """Let one block of one instruction pass, or none if an event is to be delivered."""
        if self._stale_tlb:
            self._flush_tlb()
        if self._slots[Slot.KIND] == Delivery.NONE:
            self._let_one_pass()
        else:
            self._slots[Slot.STEP] = 0
            self._slots[Slot.LIMIT] = 0

    def _exit_boundary(self) -> Exit | None:
        """Sort out who wanted to stop here: a request, a step, the NMI window, the budget."""
        slots = self._slots
        slots[Slot.WANTED] &= ~Request.HARD
        used_up = slots[Slot.LIMIT] == self._budget
        requested, self._kicked = self._kicked, False
        self._stepping = False
        if used_up:
            self._budget = NEVER
        self._set_limit(self._budget)
        if self._nmi_window and not self._nmi_blocked:
            if self.interrupt_shadow:
                # Whoever else wants to stop here stops one instruction later, too.
                self._kicked = requested or used_up
                self._let_one_pass()
                return None
            self._nmi_window = False
            if requested or used_up:
                self.request_boundary()
            return Exit.NMI_WINDOW
        return Exit.BOUNDARY if requested or used_up else None

    def _exit_count(self) -> Exit:
        self._slots[Slot.COUNT_LIMIT] = NEVER
        self._slots[Slot.RESUME] = self.regs[16]
        return Exit.BOUNDARY

    def _exit_breakpoint(self) -> Exit:
        """Let the instruction pass when the guest goes on from here without an event."""
        self._slots[Slot.SKIP] = self._slots[Slot.RESUME] = self.regs[16]
        return Exit.BREAKPOINT

    def _exit_entry(self) -> Exit:
        """Let the block pass when the guest goes on from here without an event."""
        self._slots[Slot.ENTRY_SKIP] = self.regs[16]
        if self._slots[Slot.STEP]:
            self._let_one_pass()  # it has not passed yet
        return Exit.ENTRY

    def _exit_iret(self) -> None:
        """NMIs are no longer blocked; the IRET itself has yet to execute."""
        self._block_nmi(False)
        if self._nmi_window:
            self._let_one_pass()

    def _let_one_pass(self) -> None:
        """Stop at the boundary after the next instruction."""
        self._slots[Slot.STEP] = 1
        self._slots[Slot.LIMIT] = 0
        self._fields.cpu32[Cpu.CFLAGS_NEXT_TB // 4] = 1

    def _start(self) -> None:
        if self._closed:
            raise ValueError("the engine is closed")
        self._stopping = False
        self._thread = get_ident()

    def _decode(self) -> Exit | None:
        """Name the exit, or handle it and return None."""
        slots = self._slots
        code = slots[_EXIT]
        if code & IN_DELIVERY_FLAG:
            code ^= IN_DELIVERY_FLAG
            slots[Slot.EXIT] = code
            self._vectoring = slots[Slot.IN_VECTOR]
            self._interrupted = slots[Slot.IN_KIND]
            slots[Slot.IN_KIND] = Delivery.NONE
            if code in PLAIN:
                return PLAIN[code]
        decoder = self._decoders.get(code)
        if decoder is None:
            self._no_exit(code)
            return None
        return decoder()

    def _no_exit(self, code: int) -> None:
        """Go on after a return without exit, unless the guest makes no progress."""
        entered = self._slots[Slot.BYTES]
        if entered == self._stuck_at:
            raise EngineMismatchError(
                f"the CPU core stopped at {self.regs[16]:#x} for a reason that trapline does "
                f"not know ({code:#x}): report it with the guest that caused it"
            )
        self._stuck_at = entered

    def _flush_tlb(self) -> None:
        self._stale_tlb = False
        self._library.tlb_flush(self._fields.cpu)

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        if self._closed:
            return
        self._closed = True
        self._fields.nested_level[0] = 0
        self._library.uc_close(self._uc)
        self.ram = self.shared_ram = memoryview(b"")
        self._hooks.close()
        self._code_map.close()
        self._write_log.close()
        self._nested.close()
        self._control.close()
        self._ram.close()
