"""What the VMM does for each TDVMCALL leaf.

`Services.call` gets the 16 registers that the module hands over and writes its answer into
them: the status to R10, the first output to R11. The statuses are those of the table
`tdvmcalls`, looked up once; a function that the table gives a status for any case is not served.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from trapline.cpu.engine import Memory, Reg
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.vmm.fatal import FatalError, decode
from trapline.machine.vmm.ghci import PAGE, QuoteStatus, TdVmCall
from trapline.machine.vmm.kvm_msrs import HostMsrs
from trapline.rules.rows import TdvmcallRule
from trapline.rules.ruleset import RuleSet
from trapline.tdx.sept import LARGE_SIZE, Sept, SharedState

if TYPE_CHECKING:
    from collections.abc import Callable

MASK32: Final = 0xFFFF_FFFF
PORT_LIMIT: Final = 1 << 16
READ: Final = 0
WRITE: Final = 1
IO_SIZES: Final = frozenset({1, 2, 4})
MMIO_SIZES: Final = frozenset({1, 2, 4, 8})
FIRST_USER_VECTOR: Final = 32
LAST_VECTOR: Final = 255

# The hypervisor is KVM to its guests: Linux keeps x2APIC mode only under hypervisors it knows.
# No paravirtual feature is offered.
HYPERVISOR_LEAF: Final = 0x4000_0000
HYPERVISOR_LEAVES: Final = {
    HYPERVISOR_LEAF: (0x4000_0001, *struct.unpack("<3I", b"KVMKVMKVM\0\0\0")),
    HYPERVISOR_LEAF + 1: (0, 0, 0, 0),
}

CALL_INFO_BASE: Final = 0
CALL_INFO_EXTENDED: Final = 1
# The optional calls that R11 then names, as QEMU gives them to KVM: GetQuote is not among them.
CALL_INFO_NAMES: Final = ("SETUP_EVENT_NOTIFY_INTERRUPT",)

# struct tdx_quote_buf: version, status, in_len, out_len (drivers/virt/coco/tdx-guest).
QUOTE_HEADER: Final = struct.Struct("<QQII")
QUOTE_VERSION: Final = 1
MAX_QUOTE: Final = 1 << 20


class HostEvents(Protocol):
    """What a call can do to the machine as a whole."""

    def halt(self, *, interrupts_blocked: bool) -> None:
        """Let time pass until an interrupt is pending."""

    def fatal_error(self, error: FatalError) -> None:
        """End the run: the guest has given up."""


class Answerer(Protocol):
    """Who may serve calls before the services do."""

    def answer(self, registers: list[int]) -> bool:
        """Serve one TDVMCALL; False leaves it, with its registers, to who comes next."""


_OK: Final = "ok"
# The cases of each function that is served, besides success.
_CASES: Final = {
    TdVmCall.CPUID: (),
    TdVmCall.HLT: (),
    TdVmCall.IO: ("bad_operands",),
    TdVmCall.RDMSR: ("refused",),
    TdVmCall.WRMSR: ("refused",),
    TdVmCall.REQUEST_MMIO: ("bad_operands",),
    TdVmCall.GET_TD_VM_CALL_INFO: ("bad_leaf",),
    TdVmCall.MAP_GPA: ("bad_range", "unaligned", "no_ram", "interrupted"),
    TdVmCall.GET_QUOTE: ("bad_buffer", "unaligned"),
    TdVmCall.REPORT_FATAL_ERROR: (),
    TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT: ("bad_vector",),
}


class Services:
    """The GHCI services of one TD.

    `expect` and `answering` let others serve calls first.
    """

    def __init__(
        self,
        *,
        ports: Bus,
        mmio: Bus,
        apic: LocalApic,
        sept: Sept,
        memory: Memory,
        events: HostEvents,
        rules: RuleSet,
    ) -> None:
        self.msrs = HostMsrs(apic)
        self.notify_vector: int | None = None
        self._ports = ports
        self._mmio = mmio
        self._apic = apic
        self._sept = sept
        self._ram = memory.shared_ram
        self._shared_bit = memory.shared_bit
        self._events = events
        # Who is asked first, and whether for one call only.
        self._answerers: list[tuple[Answerer, bool]] = []
        self._status = {
            (function, case): rules.status(rules.ask(TdvmcallRule, function, case).status)
            for function, cases in _CASES.items()
            for case in (_OK, *cases)
        }
        self._call_info_bits = rules.mask("call_info", *CALL_INFO_NAMES)
        self._unknown = rules.status(rules.ask(TdvmcallRule, None, "any").status)
        self._others = {
            row.function: rules.status(row.status)
            for row in rules.each(TdvmcallRule)
            if row.case == "any" and row.function is not None
        }
        self._calls: dict[int, Callable[[list[int]], int]] = {
            TdVmCall.CPUID: self._cpuid,
            TdVmCall.HLT: self._hlt,
            TdVmCall.IO: self._io,
            TdVmCall.RDMSR: self._rdmsr,
            TdVmCall.WRMSR: self._wrmsr,
            TdVmCall.REQUEST_MMIO: self._request_mmio,
            TdVmCall.GET_TD_VM_CALL_INFO: self._call_info,
            TdVmCall.MAP_GPA: self._map_gpa,
            TdVmCall.GET_QUOTE: self._get_quote,
            TdVmCall.REPORT_FATAL_ERROR: self._report_fatal_error,
            TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT: self._setup_event_notify,
        }

    def call(self, registers: list[int]) -> None:
        """Serve one TDVMCALL; R10 other than 0 is a vendor's own call, of which there are none."""
        if self._answerers and self._is_answered(registers):
            return
        if registers[Reg.R10]:
            registers[Reg.R10] = self._unknown
            return
        function = registers[Reg.R11]
        serve = self._calls.get(function)
        if serve is None:
            registers[Reg.R10] = self._others.get(function, self._unknown)
        else:
            registers[Reg.R10] = serve(registers)

    @contextmanager
    def answering(self, answerer: Answerer) -> Iterator[None]:
        """Have `answerer` asked before all others while the context lasts."""
        entry = (answerer, False)
        self._answerers.insert(0, entry)
        try:
            yield
        finally:
            self._answerers.remove(entry)

    def expect(self, answerer: Answerer) -> None:
        """Have `answerer` asked until it has served one call."""
        self._answerers.append((answerer, True))

    def _is_answered(self, registers: list[int]) -> bool:
        for entry in self._answerers:
            answerer, once = entry
            if answerer.answer(registers):
                if once:
                    self._answerers.remove(entry)
                return True
        return False

    # Instructions.

    def _io(self, registers: list[int]) -> int:
        size, direction, port = registers[Reg.R12], registers[Reg.R13], registers[Reg.R14]
        if size not in IO_SIZES or port >= PORT_LIMIT or direction not in (READ, WRITE):
            return self._status[TdVmCall.IO, "bad_operands"]
        if direction == READ:
            registers[Reg.R11] = self._ports.read(port, size)
        else:
            self._ports.write(port, size, registers[Reg.R15])
        return self._status[TdVmCall.IO, _OK]

    def _cpuid(self, registers: list[int]) -> int:
        leaf = registers[Reg.R12] & MASK32
        answer = HYPERVISOR_LEAVES.get(leaf, (0, 0, 0, 0))
        registers[Reg.R12 : Reg.R15 + 1] = answer
        return self._status[TdVmCall.CPUID, _OK]

    def _hlt(self, registers: list[int]) -> int:
        self._events.halt(interrupts_blocked=bool(registers[Reg.R12] & 1))
        return self._status[TdVmCall.HLT, _OK]

    def _rdmsr(self, registers: list[int]) -> int:
        value = self.msrs.read(registers[Reg.R12] & MASK32)
        if value is None:
            return self._status[TdVmCall.RDMSR, "refused"]
        registers[Reg.R11] = value
        return self._status[TdVmCall.RDMSR, _OK]

    def _wrmsr(self, registers: list[int]) -> int:
        done = self.msrs.write(registers[Reg.R12] & MASK32, registers[Reg.R13])
        return self._status[TdVmCall.WRMSR, _OK if done else "refused"]

    def _request_mmio(self, registers: list[int]) -> int:
        size, direction, gpa = registers[Reg.R12], registers[Reg.R13], registers[Reg.R14]
        address = gpa & ~self._shared_bit
        inside = gpa & self._shared_bit and address + size <= self._shared_bit
        is_ram = address < self._sept.memory_size
        if size not in MMIO_SIZES or not inside or is_ram or direction not in (READ, WRITE):
            return self._status[TdVmCall.REQUEST_MMIO, "bad_operands"]
        if direction == READ:
            registers[Reg.R11] = self._mmio.read(address, size)
        else:
            self._mmio.write(address, size, registers[Reg.R15])
        return self._status[TdVmCall.REQUEST_MMIO, _OK]

    # Memory.

    def _map_gpa(self, registers: list[int]) -> int:
        """Convert pages; like KVM, in 2 MiB steps between which an interrupt makes it RETRY.

        R11 is the start of what was not converted (`tdx_map_gpa()`).
        """
        start, size = registers[Reg.R12], registers[Reg.R13]
        registers[Reg.R11] = start
        share = start & self._shared_bit
        gpa = start & ~self._shared_bit
        if not size or gpa >= self._shared_bit or gpa + size > self._shared_bit:
            return self._status[TdVmCall.MAP_GPA, "bad_range"]
        if (gpa | size) & PAGE - 1:
            return self._status[TdVmCall.MAP_GPA, "unaligned"]
        end, ram = gpa + size, self._sept.memory_size
        while gpa < end:
            if gpa >= ram:
                # What is no RAM is shared from the start, and cannot be made private.
                if share:
                    break
                registers[Reg.R11] = gpa
                return self._status[TdVmCall.MAP_GPA, "no_ram"]
            step = min(end, gpa + LARGE_SIZE)
            self._convert(gpa, min(step, ram) - gpa, share=bool(share))
            gpa = step
            if gpa < end and self._apic.pending() is not None:
                registers[Reg.R11] = gpa | share
                return self._status[TdVmCall.MAP_GPA, "interrupted"]
        registers[Reg.R11] = 0
        return self._status[TdVmCall.MAP_GPA, _OK]

    def _convert(self, gpa: int, size: int, *, share: bool) -> None:
        if share:
            self._sept.share(gpa, size)
            return
        # Shared pages go away; the private ones come with TDG.MEM.PAGE.ACCEPT (`host`).
        for page in range(gpa, gpa + size, PAGE):
            if self._sept.shared_state(page) == SharedState.MAPPED:
                self._sept.unshare(gpa, size)
                return

    # The TD as a whole.

    def _call_info(self, registers: list[int]) -> int:
        leaf = registers[Reg.R12]
        if leaf not in (CALL_INFO_BASE, CALL_INFO_EXTENDED):
            return self._status[TdVmCall.GET_TD_VM_CALL_INFO, "bad_leaf"]
        supported = self._call_info_bits if leaf == CALL_INFO_EXTENDED else 0
        registers[Reg.R11 : Reg.R14 + 1] = (supported, 0, 0, 0)
        return self._status[TdVmCall.GET_TD_VM_CALL_INFO, _OK]

    def _get_quote(self, registers: list[int]) -> int:
        """Answer that there is no quoting service: nothing here could sign a quote."""
        bad = self._status[TdVmCall.GET_QUOTE, "bad_buffer"]
        gpa, size = registers[Reg.R12], registers[Reg.R13]
        address = gpa & ~self._shared_bit
        if not gpa & self._shared_bit or not 0 < size <= MAX_QUOTE:
            return bad
        if (address | size) & PAGE - 1:
            return self._status[TdVmCall.GET_QUOTE, "unaligned"]
        if not self._is_shared(address, size):
            return bad
        version, _, in_length, _ = QUOTE_HEADER.unpack_from(self._ram, address)
        if version != QUOTE_VERSION or in_length > size - QUOTE_HEADER.size:
            return bad
        QUOTE_HEADER.pack_into(
            self._ram, address, version, QuoteStatus.SERVICE_UNAVAILABLE, in_length, 0
        )
        return self._status[TdVmCall.GET_QUOTE, _OK]

    def _is_shared(self, address: int, size: int) -> bool:
        return self._sept.in_ram(address, size) and all(
            self._sept.shared_state(page) == SharedState.MAPPED
            for page in range(address, address + size, PAGE)
        )

    def _report_fatal_error(self, registers: list[int]) -> int:
        self._events.fatal_error(decode(registers))
        return self._status[TdVmCall.REPORT_FATAL_ERROR, _OK]

    def _setup_event_notify(self, registers: list[int]) -> int:
        vector = registers[Reg.R12]
        if not FIRST_USER_VECTOR <= vector <= LAST_VECTOR:
            return self._status[TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, "bad_vector"]
        self.notify_vector = vector
        return self._status[TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, _OK]
