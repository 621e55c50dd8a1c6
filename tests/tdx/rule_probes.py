"""What a guest can find out of a TD: a battery of probes for each rule table.

`probes_of(table, row)` lists the functions that show what the row decides; each takes rules, builds
what it needs with them, and returns everything that was seen.
"""

import struct
from functools import cache, partial
from itertools import product

from fake_td import CODE, CODE_32, MEMORY, SHARED_BIT, FakeMemory, build_td

from trapline.cpu.engine import CrWrite, EptViolation, Exit, Fault, IoAccess, Reg
from trapline.explore import events
from trapline.machine.devices.bus import Bus
from trapline.machine.devices.lapic import LocalApic
from trapline.machine.vmm.ghci import TdVmCall
from trapline.machine.vmm.services import Services
from trapline.rules.rows import CpuidKind, Feature, FieldScope, MsrKind
from trapline.tdx.controls import Controls
from trapline.tdx.sept import LEVEL_2M, Sept
from trapline.tdx.vmm_interface import TdConfig, VeInfo

M64 = (1 << 64) - 1
EVERYTHING = {
    "attributes": 1 << 28 | 1 << 30 | 1 << 63,
    "xfam": 0x3 | 1 << 8 | 1 << 9 | 3 << 11 | 1 << 14 | 1 << 15 | 3 << 17,
    "features_on": frozenset(Feature) - {Feature.NONE},
}
CONFIGS = ("off", "on", "reduced")
CR0, CR4 = 0x80010033, 0x668
TD_CTLS, NOTIFY_ENABLES = 0x1110000300000017, 0x9100000000000010
FEATURE_PARAVIRT_CTLS = 0x9110000300000022
SWITCHES = {Feature.NONE, Feature.REDUCE_VE, Feature.ENUM_TOPOLOGY, Feature.VIRT_CPUID2}


def seen(td, events_=()):
    """What the last step did: events, VE_INFO (which is then collected), TD exits, registers."""
    info = td.module.ve_info
    result = (
        tuple(events_),
        info,
        tuple(td.vmm.violations),
        tuple(td.vmm.exits),
        tuple(td.regs),
        td.vcpu.rflags,
    )
    td.vmm.violations.clear()
    td.vmm.exits.clear()
    td.module._ve.take()
    td.vcpu.rflags = 2
    td.regs[:] = [0] * 16 + [CODE]
    return result


def take(td, exit_, **registers):
    return seen(td, td.take(exit_, **registers))


# MSRs, CPUID leaves and fields: what the row is about, with all off and all on.


def td_with(rules, config):
    """A TD with all off, all on, or all off that the guest can switch off, too."""
    if config != "reduced":
        return build_td(rules, **(EVERYTHING if config == "on" else {}))
    td = build_td(rules, features_on=frozenset())
    take(td, Exit.TDCALL, rax=8, rdx=TD_CTLS, r8=8, r9=8)
    return td


def msr(index, config, rules):
    td = td_with(rules, config)
    result = [take(td, Exit.RDMSR, rcx=index)]
    values = (0, 1, td.vcpu.msr(index))
    result += [take(td, Exit.WRMSR, rcx=index, rax=value) for value in values]
    return result


def cpuid(leaf, subleaf, asked, rules):
    result = []
    for config in CONFIGS:
        td = td_with(rules, config)
        if asked:
            td.call(5, rcx=1)
        result.append(take(td, Exit.CPUID, rax=leaf, rcx=subleaf))
    return result


def field(scope, code, rules):
    td = build_td(rules)
    read, write = {"td": (7, 8), "vp": (9, 10), "sys": (11, None)}[scope]
    result = [take(td, Exit.TDCALL, rax=read, rdx=code)]
    if write is not None:
        result.append(take(td, Exit.TDCALL, rax=write, rdx=code, r8=0, r9=M64))
        result.append(take(td, Exit.TDCALL, rax=write, rdx=code, r8=M64, r9=M64))
    return result


# Instructions and events.

CODES = {
    "getsec": "0f37", "rsm": "0faa", "vmclear": "660fc730", "vmlaunch": "0f01c2",
    "vmptrld": "0fc730", "vmptrst": "0fc738", "vmread": "0f78c1", "vmresume": "0f01c3",
    "vmwrite": "0f79c1", "vmxoff": "0f01c4", "vmxon": "f30fc730", "invept": "660f388008",
    "invvpid": "660f388108", "vmfunc": "0f01d4", "encls": "0f01cf", "enclv": "0f01c0",
    "seamcall": "660f01cf", "vmmcall": "0f01d9", "pconfig": "0f01c5", "ud2": "0f0b",
}  # fmt: skip
WRITES = [
    (0, CR0 & ~(1 << 5)), (0, CR0 & ~1), (0, CR0 & ~(1 | 1 << 31)), (0, CR0 | 1 << 29),
    (0, CR0 | 1 << 30), (0, CR0 | 1 << 32), (0, CR0 | 1 << 6), (0, CR0 | 1 << 3),
    (4, CR4 & ~(1 << 6)), (4, CR4 | 1 << 13), (4, CR4 | 1 << 15), (4, CR4 | 1 << 22),
    (4, CR4 | 1 << 23), (4, CR4 | 1 << 24), (4, CR4 | 1 << 25), (4, CR4 & ~(1 << 5)),
    (4, CR4 | 1 << 20),
]  # fmt: skip


def instructions(rules):
    result = {}
    td = build_td(rules)
    for exit_ in (Exit.HLT, Exit.MONITOR, Exit.MWAIT, Exit.INVD, Exit.VMCALL, Exit.RDPMC):
        result[exit_] = take(td, exit_)
    td.memory.ram[CODE : CODE + 3] = b"\xf3\x0f\x09"
    for td.vcpu.length in (2, 3):
        result[Exit.WBINVD, td.vcpu.length] = take(td, Exit.WBINVD)
    td.vcpu.length = 2
    for is_in, is_string in product((False, True), repeat=2):
        td.vcpu.io = IoAccess(0x3F8, 1, is_in, is_string, False, False, 1)
        result[is_in, is_string] = take(td, Exit.IO)
    for name, code in CODES.items():
        data = bytes.fromhex(code)
        td.memory.ram[CODE : CODE + len(data)] = data
        result[name] = take(td, Exit.UNDEFINED)
    for exit_ in (Exit.CPUID, Exit.RDMSR, Exit.WRMSR):
        result[exit_] = take(td, exit_, rax=0, rcx=0x10)
    result["tdcall"] = take(td, Exit.TDCALL, rax=1)
    td.vcpu.cs = CODE_32
    result["tdcall 32"] = take(td, Exit.TDCALL, rax=1)
    result["triple fault"] = take(td, Exit.TRIPLE_FAULT)
    for vector in (18, 14, 3):
        td.vcpu.fault = Fault(vector, 2)
        result["exception", vector] = take(td, Exit.EXCEPTION)
    result["self ipi"] = take(td, Exit.WRMSR, rcx=0x83F, rax=15)
    perfmon = build_td(rules, attributes=1 << 63)
    result["perfmon"] = take(perfmon, Exit.RDPMC)
    for number, value in WRITES:
        td = build_td(rules)
        td.vcpu.cr_write = CrWrite(number, value, 3)
        result[number, value] = (take(td, Exit.CR_WRITE), tuple(td.vcpu.crs.items()))
    result["xfam"] = xfam(rules)
    result["decisions"] = decisions(rules)
    return result


def xfam(rules):
    """CR4 bits that XFAM and ATTRIBUTES allow."""
    result = []
    for config in ({"xfam": 3 | 1 << 9}, {"xfam": 3 | 3 << 11}, {"xfam": 3 | 1 << 14}):
        td = build_td(rules, **config)
        for bit in (22, 23, 25):
            td.vcpu.cr_write = CrWrite(4, CR4 | 1 << bit, 3)
            result.append(take(td, Exit.CR_WRITE))
    return result


def decisions(rules):
    """What explore decides of each event, in each state."""
    result = []
    for event in ("nmi", "int80", "ve:wrmsr", "ve:mmio", "ve:notification", "mce"):
        for flags in product((False, True), repeat=4):
            here = events.Conditions(*flags)
            row = events.decide(rules, event, here)
            result.append((event, flags, row, events.is_open(rules, event, here)))
    return result


# Memory.


def touch(td, gpa, *, write=False, fetch=False):
    td.vcpu.ept = EptViolation(gpa, 0x7000, write, fetch, False)
    return take(td, Exit.EPT_VIOLATION)


def memory(rules):
    result = {}
    for name, attributes in (("exits", 1 << 28), ("faults", 0)):
        td = build_td(rules, attributes=attributes)
        sept = td.module.sept
        sept.remove(0x5000, 0x3000)
        sept.aug(0x5000, 0x1000)
        sept.share(0x7000, 0x1000)
        sept.block(0x8000, 0x1000)
        for gpa in (0x5000, 0x6000, 0x7000, 0x8000):
            result[name, gpa] = touch(td, gpa)
        for gpa in (0x5000, 0x6000):
            result[name, "operand", gpa] = take(td, Exit.TDCALL, rax=2, rcx=gpa)
        mmio = SHARED_BIT | 0xFEC00000
        result[name, "mmio"] = touch(td, mmio)
        result[name, "fetch"] = touch(td, mmio, fetch=True)
        td.vcpu.vectoring = 14
        result[name, "vectoring"] = touch(td, mmio)
        td.vcpu.vectoring = None
        for gpa in (SHARED_BIT | 0x6000, SHARED_BIT | 0x9000, SHARED_BIT << 2):
            result[name, gpa] = touch(td, gpa)
        for gpa in (SHARED_BIT | 0xFEC00000, SHARED_BIT | 0x9000):
            result[name, "report", gpa] = take(td, Exit.TDCALL, rax=4, rcx=0x1000, rdx=gpa)
    result["decisions"] = decisions(rules)
    return result


# Events that meet.


def nesting(rules):
    result = {"decisions": decisions(rules)}
    td = build_td(rules)
    td.take(Exit.HLT)
    result["second"] = td.take(Exit.HLT), td.module.ve_info, td.vcpu.rflags
    td.vcpu.ept = EptViolation(SHARED_BIT | 0xFEC00000, 0x7000, False, False, False)
    result["mmio"] = td.take(Exit.EPT_VIOLATION), len(td.vmm.violations), td.module.ve_info
    result["operand"] = td.take(Exit.TDCALL, rax=2, rcx=0x1000), td.module.ve_info
    td.regs[Reg.RIP] = CODE
    result["operand mmio"] = td.take(Exit.TDCALL, rax=4, rcx=0x1000, rdx=SHARED_BIT | 0xFEC00000)
    td.module.pend_nmi()
    td.module.pend_nmi()
    steps = [td.vcpu.nmi_window, td.take(Exit.NMI_WINDOW)]
    td.call(3)
    for _ in range(3):
        steps += [td.vcpu.nmi_window, td.take(Exit.NMI_WINDOW), td.module.nmi_pending]
        td.take(Exit.BOUNDARY)
    result["nmi"] = steps
    td = build_td(rules)
    td.call(8, rdx=NOTIFY_ENABLES, r8=1, r9=1)
    td.module.sept.remove(0x5000, 0x1000)
    td.regs[Reg.RIP] = CODE
    td.vcpu.ept = EptViolation(0x5008, 0x5008, False, False, False)
    result["stepping"] = [td.take(Exit.EPT_VIOLATION) for _ in range(8)]
    td.call(3)
    td.vcpu.nmi_blocked = True
    result["blocked"] = td.module.notify_ept_fault(0x5000)
    td.vcpu.nmi_blocked, td.vcpu.vectoring = False, 14
    td.call(3)
    result["vectoring"] = td.module.notify_ept_fault(0x5000)
    td.vcpu.vectoring = None
    td.module.inject_ve(VeInfo(12))
    result["busy"] = td.module.notify_ept_fault(0x5000)
    return result


# TDCALLs.


def tdcalls(rules):
    td = build_td(rules)
    sept = td.module.sept
    sept.remove(0x5000, 0x3000)
    sept.aug(0x5000, 0x1000)
    sept.remove(0x200000, 0x400000)
    sept.aug(0x200000, 0x200000)
    sept.aug(0x400000, 0x200000, LEVEL_2M)
    null, none, sys = M64, 0x1110000300FFFFFF, 0x0800000200000000
    fatal = 0x8010000000000001  # not for the guest
    calls = [
        (100, {}), (1 << 24 | 1, {}), (1 << 16 | 1, {}), (1 << 16 | 3, {}), (2 << 16 | 3, {}),
        (0, {"rcx": 0x400}), (0, {"rcx": 1}), (0, {"rcx": 1 << 5}), (1, {}),
        (2, {"rcx": 0x1000}), (2, {"rcx": 0x1001}), (2, {"rcx": SHARED_BIT}),
        (2, {"rcx": 0x1000, "rdx": 9}), (3, {}),
        (4, {"rcx": 0x1000, "rdx": 0x2000}), (4, {"rcx": 0x1001}), (4, {"rdx": 1}),
        (4, {"rdx": SHARED_BIT << 2}), (4, {"rcx": SHARED_BIT << 2}), (4, {"r8": 1}),
        (5, {"rcx": 0}), (5, {"rcx": 8}),
        (6, {"rcx": 0x5000}), (6, {"rcx": 0x5008}), (6, {"rcx": 0x5000}),
        (6, {"rcx": 0x200001}), (6, {"rcx": 0x6000}),
        (7, {"rdx": TD_CTLS}), (7, {"rcx": 1}), (2 << 16 | 7, {}),
        (1 << 16 | 7, {"rdx": null}), (7, {"rdx": none}), (7, {"rdx": fatal}),
        (8, {"rdx": TD_CTLS, "r8": 0, "r9": 0}), (8, {"rdx": TD_CTLS, "r8": 1, "r9": 1}),
        (8, {"rcx": 1}), (8, {"rdx": none}), (8, {"rdx": fatal, "r9": 1}),
        (8, {"rdx": TD_CTLS, "r8": 1 << 40 | 1, "r9": 1 << 40 | 1}),
        (9, {"rdx": 0xA020000000000005}), (9, {"rcx": 1}), (9, {"rdx": null}),
        (9, {"rdx": none}), (9, {"rdx": 0x8020000000000000}),
        (10, {"rcx": 1}), (10, {"rdx": none}), (10, {"rdx": 0x8020000000000000, "r9": 1}),
        (11, {"rdx": null}), (11, {"rdx": none}), (11, {"rdx": sys}), (12, {}),
        (18, {}), (20, {}), (22, {}),
        (23, {"rcx": 0x1000}), (23, {"rcx": SHARED_BIT}), (23, {"rcx": 0x6000}),
        (24, {"rdx": 1}), (24, {"r8": 1}), (24, {"rcx": 0x1008}), (24, {"rcx": 0x1000}),
        (25, {"rdx": 1}), (25, {}), (26, {}), (26, {"rcx": 1}), (27, {}),
    ]  # fmt: skip
    result = [take(td, Exit.TDCALL, rax=leaf, **registers) for leaf, registers in calls]
    for row in rules.fields:
        if row.scope != FieldScope.TD and (row.write_mask or not row.read_mask):
            leaves = (9, 10) if row.scope == FieldScope.VP else (11,)
            result += [
                take(td, Exit.TDCALL, rax=leaf, rdx=row.code, r8=M64, r9=M64) for leaf in leaves
            ]
            result.append(take(td, Exit.TDCALL, rax=leaves[-1], rdx=row.code, r8=0, r9=M64))
    fixed = build_td(rules, flexible_pending_ve=False)
    result.append(take(fixed, Exit.TDCALL, rax=8, rdx=TD_CTLS, r8=0, r9=1))
    result.append(take(build_td(rules, no_rbp_mod=True), Exit.TDCALL, rax=0, rcx=1 << 5))
    for version in (0, 1, 2):
        td.take(Exit.HLT)
        result.append(take_without_collecting(td, version))
        td.module._ve.take()
    return result


def take_without_collecting(td, version):
    events = td.take(Exit.TDCALL, rax=version << 16 | 3)
    return events, tuple(td.regs), td.module.ve_info


# TDVMCALLs.


class _Events:
    def halt(self, *, interrupts_blocked):
        pass

    def fatal_error(self, error):
        pass


def tdvmcalls(rules):
    ram = FakeMemory(MEMORY)
    sept = Sept(ram, MEMORY)
    sept.add(0, MEMORY)
    apic = LocalApic(lambda: 0, 2_000_000_000, lambda: None)
    services = Services(
        ports=Bus("port", 1 << 16),
        mmio=Bus("MMIO", SHARED_BIT),
        apic=apic,
        sept=sept,
        memory=ram,
        events=_Events(),
        rules=rules,
    )
    shared = SHARED_BIT | 0x10000
    calls = [
        (TdVmCall.CPUID, 0x40000000), (TdVmCall.HLT, 0), (TdVmCall.IO, 1, 0, 0x80),
        (TdVmCall.IO, 3), (TdVmCall.RDMSR, 0x1B), (TdVmCall.RDMSR, 0x1234),
        (TdVmCall.WRMSR, 0x277, 0), (TdVmCall.WRMSR, 0x1234),
        (TdVmCall.REQUEST_MMIO, 4, 0, SHARED_BIT | 0xFEC00000), (TdVmCall.REQUEST_MMIO, 3),
        (TdVmCall.GET_TD_VM_CALL_INFO, 0), (TdVmCall.GET_TD_VM_CALL_INFO, 1),
        (TdVmCall.GET_TD_VM_CALL_INFO, 2), (TdVmCall.MAP_GPA, shared, 0x1000),
        (TdVmCall.MAP_GPA, 0, 0), (TdVmCall.MAP_GPA, 1, 0x1000),
        (TdVmCall.MAP_GPA, MEMORY, 0x1000), (TdVmCall.GET_QUOTE, shared, 0x1000),
        (TdVmCall.GET_QUOTE, 0, 0), (TdVmCall.GET_QUOTE, shared | 8, 0x1000),
        (TdVmCall.REPORT_FATAL_ERROR,), (TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, 0x20),
        (TdVmCall.SETUP_EVENT_NOTIFY_INTERRUPT, 1), (0x7777,), (0x27,), (0x36,), (0x41,),
        (0x10005,), (0x10006,),
    ]  # fmt: skip
    result = []
    for leaf, *arguments in calls:
        struct.pack_into("<QQII", ram.ram, 0x10000, 1, 5, 16, 7)
        result.append(vmcall(services, leaf, arguments))
    apic.raise_vector(0x40)
    result.append(vmcall(services, TdVmCall.MAP_GPA, [SHARED_BIT, 0x400000]))
    result.append(vmcall(services, TdVmCall.HLT, [0], vendor=1))
    return result


def vmcall(services, leaf, arguments, vendor=0):
    registers = [0] * 16
    registers[Reg.R10], registers[Reg.R11] = vendor, leaf
    registers[Reg.R12 : Reg.R12 + len(arguments)] = arguments
    services.call(registers)
    return tuple(registers)


def features(rules):
    """MSRs that ATTRIBUTES and XFAM decide, bit by bit."""
    result = []
    bits = [{"attributes": 1 << bit} for bit in (28, 30, 63)]
    bits += [{"xfam": 3 | 1 << bit} for bit in (8, 9, 11, 12, 14, 15, 17, 18)]
    for config in bits:
        td = build_td(rules, **config)
        indices = (0xC1, 0x6E1, 0x560, 0x6A0, 0x985, 0x14CE, 0x1C4)
        result += [take(td, Exit.RDMSR, rcx=index) for index in indices]
        for bit in (22, 23, 24, 25):
            td.vcpu.cr_write = CrWrite(4, CR4 | 1 << bit, 3)
            result.append(take(td, Exit.CR_WRITE))
        result.append(take(td, Exit.RDPMC))
        result.append(take(td, Exit.TDCALL, rax=7, rdx=TD_CTLS))
    for config in ({"flexible_pending_ve": False}, {"no_rbp_mod": True}, {}):
        td = build_td(rules, **config)
        result.append(take(td, Exit.TDCALL, rax=7, rdx=TD_CTLS - 1))
        result.append(take(td, Exit.TDCALL, rax=8, rdx=TD_CTLS, r8=0, r9=1))
    return [*result, gpaw(rules), nesting(rules)["stepping"], td_ctls(rules)]


def td_ctls(rules):
    """What the bits of TD_CTLS and FEATURE_PARAVIRT_CTLS change, one by one."""
    result = []
    for bit in (0, 1, 2, 3, 63):
        td = build_td(rules)
        for value, mask in ((1 << bit, 1 << bit), (1 << bit | 1, 1 << bit | 1), (1, 1 << bit | 1)):
            result.append(take(td, Exit.TDCALL, rax=8, rdx=TD_CTLS, r8=value, r9=mask))
            result.append(take(td, Exit.TDCALL, rax=7, rdx=TD_CTLS))
            result += [take(td, Exit.CPUID, rax=leaf) for leaf in (1, 2, 6, 0xB)]
            result.append(take(td, Exit.RDMSR, rcx=0x1F00))
    for bit in range(12):
        td = build_td(rules, features_on=frozenset(Feature) - SWITCHES)
        result.append(take(td, Exit.TDCALL, rax=8, rdx=TD_CTLS, r8=8, r9=8))
        result.append(
            take(td, Exit.TDCALL, rax=8, rdx=FEATURE_PARAVIRT_CTLS, r8=1 << bit, r9=0xFFF)
        )
        result += [take(td, Exit.CPUID, rax=leaf) for leaf in (1, 7, 9, 0xF, 0x10, 0x1B)]
        indices = (0x33, 0x1F8, 0x198, 0x17A, 0x2FF, 0x87, 0xC81, 0xC8D, 0x19A, 0x19D, 0x981, 0x6E0)
        result += [take(td, Exit.RDMSR, rcx=index) for index in indices]
    return result


def gpaw(rules):
    """CONFIG_FLAGS of a TD with a wide GPA space."""
    return Controls(rules, TdConfig(memory_size=MEMORY), 52).config_flags


@cache
def _of_msr(index):
    return tuple(partial(msr, index, config) for config in CONFIGS)


@cache
def _of_cpuid(leaf, subleaf, asked):
    return (partial(cpuid, leaf, subleaf, asked),)


@cache
def _of_field(scope, code):
    return (partial(field, scope, code),)


_BATTERIES = {
    "instructions": (instructions,),
    "memory": (memory,),
    "nesting": (nesting,),
    "tdcalls": (tdcalls,),
    "tdvmcalls": (tdvmcalls,),
    "statuses": (tdcalls, tdvmcalls, instructions),
    "attributes": (features, tdvmcalls),
}
_MSR_OF_KIND = {MsrKind.ABSENT: 0x1F00, MsrKind.OUTSIDE: 0x4000}
_CPUID_OF_KIND = {
    CpuidKind.ABSENT: (4, 9, False),
    CpuidKind.CLAMP: (0x77, 1, False),
    CpuidKind.GUEST_ASKED: (1, 0, True),
}


def probes_of(table, row):
    if table == "msrs":
        return _of_msr(_MSR_OF_KIND.get(row.kind, row.first))
    if table == "cpuid":
        if row.kind in _CPUID_OF_KIND:
            return _of_cpuid(*_CPUID_OF_KIND[row.kind])
        return _of_cpuid(row.first, row.subleaf or 0, False)
    if table == "fields":
        return _of_field(row.scope, row.code)
    return _BATTERIES[table]
