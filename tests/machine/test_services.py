"""TDVMCALLs: what each answers, and that no argument does harm."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trapline.cpu.engine import Reg
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import ApicMsr, LocalApic
from trapline.machine.vmm.ghci import QuoteStatus, Status, TdVmCall
from trapline.machine.vmm.services import Services
from trapline.rules.tables import load
from trapline.tdx.sept import Sept, SeptState, SharedState

MIB = 1 << 20
MEMORY = 8 * MIB
SHARED = 1 << 39
U64 = (1 << 64) - 1


class Memory:
    """The part of a memory that page states are pushed to."""

    def __init__(self):
        self.ram = memoryview(bytearray(MEMORY))
        self.shared_ram = self.ram
        self.shared_bit = SHARED

    def set_private(self, gpa, size, _state):
        assert 0 <= gpa < gpa + size <= MEMORY

    set_shared = set_private


class Events:
    def __init__(self):
        self.seen = []

    def halt(self, *, interrupts_blocked):
        self.seen.append(("halt", interrupts_blocked))

    def fatal_error(self, error):
        self.seen.append(("fatal", error))


class Echo:
    """A device that remembers the last write and answers with it."""

    def __init__(self):
        self.value = 0

    def read(self, _offset, _size):
        return self.value

    def write(self, _offset, _size, value):
        self.value = value


class Host:
    def __init__(self):
        self.memory = Memory()
        self.events = Events()
        self.sept = Sept(self.memory, MEMORY)
        self.sept.add(0, MEMORY)
        self.ports, self.mmio = Bus("port", 1 << 16), Bus("MMIO", SHARED)
        self.ports.add(0x3F8, 8, "uart", Echo(), width=4)
        self.mmio.add(0xFEC00000, 0x1000, "ioapic", Echo(), width=8)
        self.now = 0
        self.apic = LocalApic(lambda: self.now, 2_000_000_000, lambda: None)
        self.services = Services(
            ports=self.ports,
            mmio=self.mmio,
            apic=self.apic,
            sept=self.sept,
            memory=self.memory,
            events=self.events,
            rules=load("1.5.01"),
        )

    def call(self, leaf, r12=0, r13=0, r14=0, r15=0, **others):
        registers = [0] * 16
        registers[Reg.R11 : Reg.R15 + 1] = leaf, r12, r13, r14, r15
        for name, value in others.items():
            registers[Reg[name.upper()]] = value
        self.services.call(registers)
        self.answer = registers
        return registers[Reg.R10]


@pytest.fixture
def host():
    return Host()


# Instructions


def test_port_reads_and_writes_reach_the_bus(host):
    assert host.call(TdVmCall.IO, 2, 1, 0x3F8, 0xABCD1234) == Status.SUCCESS
    assert host.call(TdVmCall.IO, 2, 0, 0x3F8) == Status.SUCCESS
    assert host.answer[Reg.R11] == 0x1234
    assert host.call(TdVmCall.IO, 4, 0, 0x80) == Status.SUCCESS
    assert host.answer[Reg.R11] == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("size", "direction", "port"),
    [(0, 0, 0x3F8), (3, 0, 0x3F8), (8, 0, 0x3F8), (1, 2, 0x3F8), (1, 0, 0x10000), (U64, U64, U64)],
)
def test_bad_port_accesses_are_refused(host, size, direction, port):
    assert host.call(TdVmCall.IO, size, direction, port) == Status.INVALID_OPERAND


def test_mmio_reads_and_writes_reach_the_bus(host):
    gpa = SHARED | 0xFEC00010
    assert host.call(TdVmCall.REQUEST_MMIO, 8, 1, gpa, U64) == Status.SUCCESS
    assert host.call(TdVmCall.REQUEST_MMIO, 4, 0, gpa) == Status.SUCCESS
    assert host.answer[Reg.R11] == 0xFFFFFFFF


@pytest.mark.parametrize(
    ("size", "direction", "gpa"),
    [
        (4, 0, 0xFEC00000),  # private
        (4, 0, SHARED | 0x1000),  # RAM
        (3, 0, SHARED | 0xFEC00000),
        (16, 0, SHARED | 0xFEC00000),
        (4, 2, SHARED | 0xFEC00000),
        (4, 0, SHARED << 1 | SHARED),  # beyond the GPA width
        (8, 0, 2 * SHARED - 4),  # over the end of the space
        (U64, 0, U64),
    ],
)
def test_bad_mmio_accesses_are_refused(host, size, direction, gpa):
    assert host.call(TdVmCall.REQUEST_MMIO, size, direction, gpa) == Status.INVALID_OPERAND


def test_cpuid_names_the_hypervisor_and_answers_zeros_elsewhere(host):
    assert host.call(TdVmCall.CPUID, 0x40000000) == Status.SUCCESS
    assert struct.pack("<3I", *host.answer[Reg.R13 : Reg.R15 + 1]).startswith(b"KVMKVMKVM")
    host.call(TdVmCall.CPUID, 0x2, 7)
    assert host.answer[Reg.R12 : Reg.R15 + 1] == [0, 0, 0, 0]


def test_hlt_tells_whether_interrupts_are_blocked(host):
    host.call(TdVmCall.HLT, 1)
    host.call(TdVmCall.HLT, 0)
    assert host.events.seen == [("halt", True), ("halt", False)]


def test_apic_registers_are_msrs_of_the_host(host):
    assert host.call(TdVmCall.WRMSR, ApicMsr.SVR, 0x1FF) == Status.SUCCESS
    assert host.call(TdVmCall.RDMSR, ApicMsr.SVR) == Status.SUCCESS
    assert host.answer[Reg.R11] == 0x1FF
    assert host.call(TdVmCall.RDMSR, 0x1B) == Status.SUCCESS
    assert host.answer[Reg.R11] == 0xFEE00D00


def test_unknown_msrs_are_refused_and_noted(host):
    assert host.call(TdVmCall.RDMSR, 0x1234) == Status.INVALID_OPERAND
    assert host.call(TdVmCall.WRMSR, 0x1234, 1) == Status.INVALID_OPERAND
    assert host.services.msrs.refused == {0x1234: 2}


@pytest.mark.parametrize("index", [0x1B, 0x3A, 0xCE, 0xFE, 0x179, 0xC0000080])
def test_a_read_only_msr_takes_no_value_not_even_its_own(host, index):
    assert host.call(TdVmCall.RDMSR, index) == Status.SUCCESS
    value = host.answer[Reg.R11]
    assert host.call(TdVmCall.WRMSR, index, value) == Status.INVALID_OPERAND


def test_the_microcode_revision_is_the_hosts(host):
    """Linux writes 0, runs CPUID and reads (intel_get_microcode_revision)."""
    assert host.call(TdVmCall.WRMSR, 0x8B, 0) == Status.SUCCESS
    assert host.call(TdVmCall.RDMSR, 0x8B) == Status.SUCCESS
    assert host.answer[Reg.R11] == 1 << 32


@pytest.mark.parametrize(
    ("index", "good", "bad"),
    [
        (0x200, 0x8000_0006, 0x8000_0002),  # base: no such memory type
        (0x20F, 0xF_8000_0800, 0xF_8000_0801),  # mask: a reserved bit
        (0x250, 0x0606060606060606, 0x0606060606060603),
        (0x2FF, 0xC06, 0x1C06),
        (0x277, 0x0007010600070106, 0x0007010600070102),
        (0x1A0, 0x1801, 0),  # PEBS and BTS unavailable are read-only
        (0x1FC, 2, None),
        (0x140, 0, 1),
    ],
)
def test_what_kvm_emulates_keeps_valid_values(host, index, good, bad):
    assert host.call(TdVmCall.WRMSR, index, good) == Status.SUCCESS
    if bad is not None:
        assert host.call(TdVmCall.WRMSR, index, bad) == Status.INVALID_OPERAND
    assert host.call(TdVmCall.RDMSR, index) == Status.SUCCESS
    assert host.answer[Reg.R11] == good


@pytest.mark.parametrize("index", [0x17B, 0x4D0, 0x400, 0x280, 0x4B564D05, 0x210, 0x3B])
def test_what_kvm_refuses_a_td(host, index):
    assert host.call(TdVmCall.RDMSR, index) == Status.INVALID_OPERAND
    assert host.call(TdVmCall.WRMSR, index, 0) == Status.INVALID_OPERAND


# Memory


def test_map_gpa_shares_and_takes_back(host):
    assert host.call(TdVmCall.MAP_GPA, SHARED | 0x3000, 0x2000) == Status.SUCCESS
    assert host.sept.shared_state(0x3000) == SharedState.MAPPED
    assert host.sept.private_state(0x3000) == SeptState.FREE
    assert host.sept.private_state(0x5000) == SeptState.MAPPED
    assert host.call(TdVmCall.MAP_GPA, 0x3000, 0x1000) == Status.SUCCESS
    assert host.sept.shared_state(0x3000) == SharedState.ABSENT
    assert host.sept.private_state(0x3000) == SeptState.FREE  # until the guest accepts it
    assert host.sept.shared_state(0x4000) == SharedState.MAPPED


def test_map_gpa_leaves_private_pages_that_were_never_shared_alone(host):
    assert host.call(TdVmCall.MAP_GPA, 0x3000, 0x1000) == Status.SUCCESS
    assert host.sept.private_state(0x3000) == SeptState.MAPPED


@pytest.mark.parametrize(
    ("start", "size", "status"),
    [
        (SHARED | 0x800, 0x1000, Status.ALIGN_ERROR),
        (SHARED, 0x800, Status.ALIGN_ERROR),
        (SHARED, 0, Status.INVALID_OPERAND),
        (SHARED, SHARED + 0x1000, Status.INVALID_OPERAND),
        (SHARED << 1, 0x1000, Status.INVALID_OPERAND),
        (0, U64 & -4096, Status.INVALID_OPERAND),
        (SHARED | 0xFEC00000, 0x1000, Status.SUCCESS),  # MMIO is shared already
        (0xFEC00000, 0x1000, Status.INVALID_OPERAND),  # and cannot be made private
        (MEMORY, 0x1000, Status.INVALID_OPERAND),
    ],
)
def test_map_gpa_checks_its_range(host, start, size, status):
    assert host.call(TdVmCall.MAP_GPA, start, size) == status
    assert host.answer[Reg.R11] == (0 if status == Status.SUCCESS else start)
    assert host.sept.count(SeptState.MAPPED) == MEMORY // 4096


def test_map_gpa_to_private_ends_where_ram_does(host):
    assert host.call(TdVmCall.MAP_GPA, 0, 2 * MEMORY) == Status.INVALID_OPERAND
    assert host.answer[Reg.R11] == MEMORY


def test_map_gpa_of_everything_is_bounded_by_ram(host):
    assert host.call(TdVmCall.MAP_GPA, SHARED, SHARED) == Status.SUCCESS
    assert host.sept.count(SeptState.FREE) == MEMORY // 4096


def test_map_gpa_retries_when_an_interrupt_is_pending(host):
    host.apic.raise_vector(0x40)
    assert host.call(TdVmCall.MAP_GPA, SHARED | 0x1FF000, 0x300000) == Status.RETRY
    assert host.answer[Reg.R11] == SHARED | 0x3FF000  # 2 MiB from the start
    assert host.sept.shared_state(0x3FE000) == SharedState.MAPPED
    assert host.sept.shared_state(0x3FF000) == SharedState.ABSENT
    host.apic.accept()
    assert host.call(TdVmCall.MAP_GPA, SHARED | 0x3FF000, 0x100000) == Status.SUCCESS
    assert host.sept.shared_state(0x4FE000) == SharedState.MAPPED


# The TD as a whole


def quote(host, gpa, size, version=1, length=1024):
    host.memory.ram[0x8000:0x8018] = struct.pack("<QQII", version, 5, length, 77)
    return host.call(TdVmCall.GET_QUOTE, gpa, size)


def test_get_quote_says_that_there_is_no_service(host):
    host.call(TdVmCall.MAP_GPA, SHARED | 0x8000, 0x2000)
    assert quote(host, SHARED | 0x8000, 0x2000) == Status.SUCCESS
    header = struct.unpack_from("<QQII", host.memory.ram, 0x8000)
    assert header == (1, QuoteStatus.SERVICE_UNAVAILABLE, 1024, 0)


@pytest.mark.parametrize(
    ("gpa", "size", "fields", "status"),
    [
        (0x8000, 0x2000, {}, Status.INVALID_OPERAND),  # private
        (SHARED | 0x8000, 0x3000, {}, Status.INVALID_OPERAND),  # not all shared
        (SHARED | 0x8008, 0x1000, {}, Status.ALIGN_ERROR),
        (SHARED | 0x8000, 0, {}, Status.INVALID_OPERAND),
        (SHARED | 0x8000, 1 << 40, {}, Status.INVALID_OPERAND),
        (SHARED | MEMORY, 0x1000, {}, Status.INVALID_OPERAND),
        (SHARED | 0x8000, 0x1000, {"version": 2}, Status.INVALID_OPERAND),
        (SHARED | 0x8000, 0x1000, {"length": 0x1000}, Status.INVALID_OPERAND),
    ],
)
def test_get_quote_checks_its_buffer(host, gpa, size, fields, status):
    host.call(TdVmCall.MAP_GPA, SHARED | 0x8000, 0x2000)
    assert quote(host, gpa, size, **fields) == status
    assert struct.unpack_from("<Q", host.memory.ram, 0x8008) == (5,)  # untouched


def test_a_fatal_error_is_decoded_in_the_order_of_the_ghci(host):
    words = struct.unpack(
        "<8Q", b"TD misconfiguration: SEPT #VE has to be disabled".ljust(64, b"\0")
    )
    names = ("r14", "r15", "rbx", "rdi", "rsi", "r8", "r9", "rdx")
    host.call(TdVmCall.REPORT_FATAL_ERROR, 3, **dict(zip(names, words, strict=True)))
    ((_, error),) = host.events.seen
    assert error == (3, "TD misconfiguration: SEPT #VE has to be disabled", None)


def test_a_hostile_message_is_made_printable(host):
    host.call(TdVmCall.REPORT_FATAL_ERROR, 1 << 63 | 7, 0x5000, 0x1B5D_FF0A_41)
    ((_, error),) = host.events.seen
    bad = "\N{REPLACEMENT CHARACTER}"
    assert error.message == f"A{bad}{bad}]{bad}"
    assert (error.code, error.gpa) == (7, 0x5000)


def test_event_notification_wants_a_user_vector(host):
    assert host.call(TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, 0x20) == Status.SUCCESS
    assert host.services.notify_vector == 0x20
    for vector in (0, 31, 256, U64):
        assert host.call(TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, vector) == Status.INVALID_OPERAND


def test_call_info(host):
    assert host.call(TdVmCall.GET_TD_VM_CALL_INFO, 0) == Status.SUCCESS
    assert host.answer[Reg.R11 : Reg.R14 + 1] == [0, 0, 0, 0]
    assert host.call(TdVmCall.GET_TD_VM_CALL_INFO, 1) == Status.SUCCESS
    assert host.answer[Reg.R11] == 2  # SetupEventNotifyInterrupt; KVM does not name GetQuote
    assert host.call(TdVmCall.GET_TD_VM_CALL_INFO, 2) == Status.INVALID_OPERAND


@pytest.mark.parametrize("leaf", [0, 1, 65, 0x10005, 0x10006, 0x10007, U64, TdVmCall.WBINVD])
def test_unknown_leaves_are_unsupported(host, leaf):
    assert host.call(leaf) == Status.SUBFUNC_UNSUPPORTED


def test_vendor_calls_are_unsupported(host):
    assert host.call(TdVmCall.HLT, r10=1) == Status.SUBFUNC_UNSUPPORTED
    assert host.events.seen == []


INTERESTING = st.one_of(
    st.integers(0, U64),
    st.sampled_from([0, 1, 4096, MEMORY, MEMORY - 4096, SHARED, SHARED | 4096, U64, 1 << 63]),
    st.integers(0, 2 * MEMORY).map(lambda value: SHARED | value & -4096),
)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(list(TdVmCall)), st.integers(0, U64)),
            st.lists(INTERESTING, min_size=16, max_size=16),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_no_arguments_do_harm(calls):
    host = Host()
    for leaf, values in calls:
        registers = list(values)
        registers[Reg.R10] = 0
        registers[Reg.R11] = leaf
        host.services.call(registers)
        assert len(registers) == 16
        assert all(0 <= value <= U64 for value in registers)
        assert registers[Reg.R10] in set(Status)


# Who serves calls first.


class Answers:
    """Answers calls of one leaf with a number of its own in R11."""

    def __init__(self, leaf, number):
        self.leaf, self.number, self.asked = leaf, number, 0

    def answer(self, registers):
        self.asked += 1
        if registers[Reg.R11] != self.leaf:
            return False
        registers[Reg.R10], registers[Reg.R11] = Status.SUCCESS, self.number
        return True


def test_an_answerer_is_asked_first_while_its_context_lasts(host):
    outer, inner = Answers(TdVmCall.RDMSR, 1), Answers(TdVmCall.RDMSR, 2)
    with host.services.answering(outer):
        with host.services.answering(inner):
            host.call(TdVmCall.RDMSR, 0x1234)
            assert host.answer[Reg.R11] == 2
        host.call(TdVmCall.RDMSR, 0x1234)
        assert host.answer[Reg.R11] == 1
        # What none of them answers is served as always.
        assert host.call(TdVmCall.IO, 1, 0, 0x3F8) == Status.SUCCESS
    assert (outer.asked, inner.asked) == (2, 1)
    assert host.call(TdVmCall.RDMSR, 0x1234) == Status.INVALID_OPERAND
    assert (outer.asked, inner.asked) == (2, 1)


def test_an_answerer_goes_with_its_context_whatever_ends_it(host):
    with pytest.raises(KeyError), host.services.answering(Answers(TdVmCall.RDMSR, 1)):
        raise KeyError
    assert host.call(TdVmCall.RDMSR, 0x1234) == Status.INVALID_OPERAND


def test_an_expected_call_is_answered_once(host):
    host.services.expect(Answers(TdVmCall.RDMSR, 7))
    host.services.expect(Answers(TdVmCall.WRMSR, 8))
    assert host.call(TdVmCall.WRMSR, 0x1234) == Status.SUCCESS
    assert host.call(TdVmCall.WRMSR, 0x1234) == Status.INVALID_OPERAND
    assert host.call(TdVmCall.RDMSR, 0x1234) == Status.SUCCESS
    assert host.answer[Reg.R11] == 7
    assert host.call(TdVmCall.RDMSR, 0x1234) == Status.INVALID_OPERAND
