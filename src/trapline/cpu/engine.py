"""The CPU engine as an interface: what the TDX module, the VMM and the explorer may ask of it.

An `Engine` is one `Memory` with the VCPUs that run on it. Nothing here, and nothing that
imports this, knows Unicorn: `trapline.cpu.unicorn` is the one implementation, a KVM engine
would be a neighbour, and tests/cpu/conformance says what each must do. All sizes are bytes, all
times are cycles of the virtual TSC, addresses are `int`: GLA is a guest linear address, GPA a
guest physical one.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum, auto
from typing import Final, NamedTuple, Protocol

MAX_ENTRIES: Final = 500  # of Vcpu.watch_entries()


class Reg(IntEnum):
    """Index into `Vcpu.regs`, in the order of the hardware encoding."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RSP = 4
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15
    RIP = 16


class Exit(IntEnum):
    """Why native execution stopped. RIP is that of the instruction, which has not executed.

    What the processor checks before it would exit has been checked: a privileged instruction
    at CPL 3, or port I/O that IOPL and the TSS forbid, is a #GP that the guest gets without
    an exit. RDTSC, RDTSCP, PAUSE, RDRAND, RDSEED, SYSCALL and INT n do not exit: the engine
    does them.
    """

    CPUID = auto()
    RDMSR = auto()
    WRMSR = auto()
    IO = auto()  # details in Vcpu.io
    HLT = auto()
    MONITOR = auto()
    MWAIT = auto()
    WBINVD = auto()
    INVD = auto()
    RDPMC = auto()
    VMCALL = auto()
    TDCALL = auto()
    CR_WRITE = auto()  # a bit given to watch_cr() would change; details in Vcpu.cr_write
    UNDEFINED = auto()  # the engine does not know the instruction: emulate it or deliver #UD
    EXCEPTION = auto()  # a vector given to intercept_exceptions(); details in Vcpu.fault
    EPT_VIOLATION = auto()  # details in Vcpu.ept
    INTERRUPT_WINDOW = auto()  # asked for by request_interrupt_window()
    NMI_WINDOW = auto()  # asked for by request_nmi_window()
    BOUNDARY = auto()  # asked for by request_boundary(), or the time budget ran out
    BREAKPOINT = auto()  # an address given to set_breakpoints() is about to execute
    TRIPLE_FAULT = auto()
    ENTRY = auto()  # asked for by watch_entries()
    IRET = auto()  # asked for by watch_iret(): one is about to execute


class IoAccess(NamedTuple):
    """Operands of the IN, OUT, INS or OUTS behind Exit.IO."""

    port: int
    size: int
    is_in: bool
    is_string: bool
    has_rep: bool
    immediate: bool
    length: int  # of the instruction


class CrWrite(NamedTuple):
    """The MOV to a control register behind Exit.CR_WRITE."""

    number: int
    value: int
    length: int


class Fault(NamedTuple):
    """The exception behind Exit.EXCEPTION, not yet delivered."""

    vector: int
    error_code: int


class EptViolation(NamedTuple):
    """The access behind Exit.EPT_VIOLATION; `gpa` holds the shared bit as the guest used it.

    `is_walk`: the access was to a page table entry while `gla` was translated.
    """

    gpa: int
    gla: int
    is_write: bool
    is_fetch: bool
    is_walk: bool


class PageState(IntEnum):
    """What the second-level tables say of one 4 KiB guest page, per half of the GPA space."""

    ABSENT = 0  # any access is an EPT violation
    MAPPED = 1


class SegmentRegister(NamedTuple):
    """A segment register with its hidden part; `attributes` as in the high descriptor word."""

    selector: int
    base: int
    limit: int
    attributes: int


class Snapshot(Protocol):
    """An opaque state of memory and VCPUs, valid for the engine that took it."""


ExitHandler = Callable[[Exit], None]


class Memory(Protocol):
    """Guest RAM from GPA 0, and what the second-level tables map of it.

    The guest-physical space has two halves: GPAs with `shared_bit` are the shared one. Both show
    the same RAM, or the shared half has memory of its own (`Factory`, `split_ram`). In the
    beginning all RAM is mapped in the private half, none in the shared one.
    """

    ram: memoryview  # as the private half shows it
    shared_ram: memoryview  # the shared half's: `ram` itself, or memory of its own
    shared_bit: int  # 1 << (GPAW - 1)

    @property
    def shared_fd(self) -> int:
        """Descriptor of a file of `shared_ram`, for a process that shares it.

        Pages that are not mapped are holes in it. Raises ValueError once the memory is frozen.
        """

    def set_private(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the private half; ValueError if they are not."""

    def set_shared(self, gpa: int, size: int, state: PageState) -> None:
        """Map or unmap whole pages of RAM in the shared half; `gpa` with or without its bit.

        What was in memory of its own is lost when it is unmapped.
        """

    def code_changed(self, gpa: int, size: int) -> None:
        """Take note that the host wrote to RAM, at `gpa` without shared bit.

        What the guest executes from there is what is there now, and the pages are among
        `written_pages`.
        """

    def written_pages(self) -> list[int]:
        """Return the GPAs of the pages written since the last freeze or restore.

        By the guest, by `Vcpu.write`, or announced by `code_changed`; and maybe of some others.
        """

    def digest(self) -> str:
        """BLAKE2b-128 of `ram`, in hexadecimal."""


class Vcpu(Protocol):
    """One virtual CPU.

    `run` calls the handler on each exit, between two stretches of guest code; the handler may
    change any state, call `deliver` and `advance`, and returns to go on. An exception that it
    raises leaves `run`. An exit during which an event was being delivered (`vectoring`) ends
    with that event being delivered again, unless the handler delivers another: the two are
    then combined as the processor does (#DF, triple fault).
    """

    @property
    def memory(self) -> Memory: ...

    regs: memoryview  # 17 u64, by Reg
    cycles: int  # virtual TSC; executed code advances it, the handler may add to it

    def reseed(self, seed: int) -> None: ...  # as Factory's `seed`, from here to a restore

    # Details of the exit at hand.
    @property
    def io(self) -> IoAccess: ...
    @property
    def cr_write(self) -> CrWrite: ...
    @property
    def fault(self) -> Fault: ...
    @property
    def ept(self) -> EptViolation: ...
    @property
    def length(self) -> int: ...  # of the instruction that exited
    @property
    def vectoring(self) -> int | None: ...  # vector that was being delivered at the exit

    @property
    def instructions(self) -> int: ...  # retired; an estimate without exact_counts()
    # CPUID bits that the engine can execute, by (leaf, subleaf, register name).
    @property
    def cpuid_features(self) -> Mapping[tuple[int, int, str], int]: ...

    # Registers.
    @property
    def rflags(self) -> int: ...
    @rflags.setter
    def rflags(self, value: int) -> None: ...
    # x87 and SSE registers in a form of the engine's own: equal if all of them are.
    @property
    def fpu(self) -> bytes: ...
    @fpu.setter
    def fpu(self, value: bytes) -> None: ...
    @property
    def cpl(self) -> int: ...
    def cr(self, number: int) -> int: ...
    def set_cr(self, number: int, value: int) -> None: ...
    def dr(self, number: int) -> int: ...
    def segment(self, name: str) -> SegmentRegister: ...  # cs ss ds es fs gs tr ldtr gdtr idtr
    def set_segment(self, name: str, value: SegmentRegister) -> None: ...
    def msr(self, index: int) -> int: ...  # the value the CPU itself holds
    def set_msr(self, index: int, value: int) -> None: ...
    def native_msr(self, index: int, *, read: bool, write: bool) -> None: ...  # no exit

    # Linear memory, through the page tables that CR3 names.
    def translate(self, gla: int) -> int | None: ...  # GPA, shared bit kept; no side effects
    def read(self, gla: int, size: int) -> bytes | None: ...
    def write(self, gla: int, data: bytes) -> bool: ...

    # Events.
    def intercept_exceptions(self, vectors: frozenset[int]) -> None: ...  # Exit.EXCEPTION
    def watch_cr(self, number: int, mask: int) -> None: ...  # CR0, CR4: Exit.CR_WRITE
    def deliver(self, vector: int, error_code: int | None = None) -> None: ...  # as a fault
    def deliver_interrupt(self, vector: int) -> None: ...  # external interrupt
    def deliver_nmi(self) -> None: ...  # blocks further NMIs until IRET
    @property
    def nmi_blocked(self) -> bool: ...
    @property
    def interrupt_shadow(self) -> bool: ...  # STI or MOV SS
    def request_interrupt_window(self, wanted: bool) -> None: ...
    def request_nmi_window(self, wanted: bool) -> None: ...
    def request_boundary(self) -> None: ...  # may be called from another thread
    def set_time_budget(self, cycles: int | None) -> None: ...  # BOUNDARY when used up
    def set_instruction_budget(self, count: int | None) -> None: ...  # needs exact_counts()
    def advance(self, length: int) -> None: ...  # step RIP over the instruction, clear shadows

    # Running.
    def run(self, handler: ExitHandler) -> None: ...  # until stop()
    def stop(self) -> None: ...
    def step(self, handler: ExitHandler) -> None: ...  # exactly one instruction or event
    def set_breakpoints(self, addresses: frozenset[int]) -> None: ...
    # Exit.ENTRY before a branch to one of these (at most MAX_ENTRIES, in the kernel half) takes
    # effect, and before code in the user half executes at CPL 0; None: no longer. It costs
    # nothing while that does not happen.
    def watch_entries(self, addresses: frozenset[int] | None) -> None: ...
    # No state of the guest: a restore leaves both as they are.
    def watch_iret(self, wanted: bool) -> None: ...
    def exact_counts(self, wanted: bool) -> None: ...


class Engine(Protocol):
    """One memory and the VCPUs that run on it, with their snapshots."""

    @property
    def memory(self) -> Memory: ...
    @property
    def vcpus(self) -> Sequence[Vcpu]: ...  # at least one

    def freeze(self, *, announced: bool = False) -> Snapshot:
        """Make memory copy-on-write from here and return a snapshot of all state.

        Snapshots of an earlier freeze can no longer be restored. `announced`: the caller
        promises that each write through `Memory.ram` is told by `Memory.code_changed`, which
        makes `restore` faster. Raises ValueError for a split memory.
        """

    def save(self) -> Snapshot:
        """Return the state of the VCPUs and second-level tables; RAM is the last freeze's."""

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot: memory, VCPUs, second-level tables, time and counts.

        Raises TypeError for what is no snapshot, ValueError for one of another freeze.
        """

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards. May be repeated."""


class Factory(Protocol):
    """What opens an engine; `trapline.cpu.default` names the one that machines get."""

    def __call__(self, ram_size: int, *, seed: int = 0, split_ram: bool = False) -> Engine:
        """Open an engine with a VCPU in the state of reset, in real mode.

        `ram_size` is in bytes, a multiple of 4 KiB: BadMachineError if it is not. `seed`
        determines what RDRAND, RDSEED and the noise of RDTSC give. With `split_ram` the shared
        half is memory of its own, which devices may be given; then there are no snapshots.
        """
