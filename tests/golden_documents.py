"""A small document of every kind, with a bit of everything that a report can say."""

import datetime as dt

import msgspec

from scan_documents import clean, document, driver, mapping, site
from trapline.allowlist import listfile
from trapline.api.label import list_labels
from trapline.devicefilter.check import check
from trapline.diff.changes import compare
from trapline.gate import placecounts
from trapline.gate.checks import Judge
from trapline.labels.applied import Labels, labelled
from trapline.results.boot import (
    BootDevice,
    BootKernel,
    BootMachine,
    BootOutcome,
    BootPolicy,
    BootResult,
    Hashes,
    Milestone,
    OtherModule,
    Refusals,
    Scream,
    Soundness,
    TrapSite,
)
from trapline.results.contexts import (
    ContextsKernel,
    ContextsResult,
    Gap,
    GapEdge,
    GapEntry,
    GapInstruction,
    GapSite,
)
from trapline.results.contexts import Place as CodePlace
from trapline.results.explore import (
    Boundary,
    ExploreResult,
    Footprint,
    FootprintWord,
    Forbidden,
    NotOpened,
    Result,
    Window,
)
from trapline.results.filter_live import LiveCheck, LiveDevice, LiveResult
from trapline.results.gate import GatePolicy, GateResult
from trapline.results.labels import LabelEntry
from trapline.results.reach import Gate as ReachedGate
from trapline.results.reach import Reach, ReachedSite, Step, Untold
from trapline.results.rules import (
    ColumnChange,
    RuleAnswer,
    RuleChange,
    RuleProblem,
    RuleQuestion,
    RuleRow,
    RulesCompared,
    RulesExplained,
    RulesLinted,
    RulesShown,
    RuleTable,
)
from trapline.results.scan import Coverage, Frame, Outside
from trapline.results.splat import Code, Place, Registers, Splat
from trapline.results.tradeoff import Design, TradeoffResult, WorkStep
from trapline.results.verify import SEVERITY, Finding, Refused, VerifiedKernel, VerifyResult, Worse

_GENERAL = (
    "rax",
    "rbx",
    "rcx",
    "rdx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    *(f"r{n}" for n in range(8, 16)),
)


def splat(**changes):
    registers = Registers(
        rip="early_serial_putc+0x2b/0x40",
        cs="0010",
        ss="0018",
        rflags="00000046",
        general={name: f"{n:016x}" for n, name in enumerate(_GENERAL)},
        segments={"fs": "0000", "gs": "0000", "ds": "0000", "es": "0000"},
        bases={"fs": "0" * 16, "gs": "ffff888000000000", "kernel_gs": "0" * 16},
        control={"cr0": "80050033", "cr2": "0" * 16, "cr3": "2" * 16, "cr4": "3" * 16},
        debug={f"dr{n}": "0" * 16 for n in (0, 1, 2, 3, 6, 7)},
    )
    frames = (
        Frame(function="outb", file="arch/x86/include/asm/shared/io.h", line=22),
        Frame(function="early_serial_putc", file="arch/x86/kernel/early_printk.c", line=105),
    )
    place = Place(
        address="0xffffffff81000010",
        label="early_serial_putc+0x2b/0x40",
        image="vmlinux",
        frames=frames,
    )
    trace = (
        msgspec.structs.replace(
            place, registers=msgspec.structs.replace(registers, bases={}, control={}, debug={})
        ),
        Place(address="0x1", label="guess+0x1/0x2", image="vmlinux", is_guess=True),
        Place(
            address="0x2",
            label="evil\x1b[2J+0x0/0x1 [odd]",
            image="odd",
            frames=(Frame(function="evil", file=None, line=None),),
        ),
    )
    whole = Splat(
        banner="Oops: general protection fault, probably for non-canonical address: 0000 [#1]",
        injected=("nmi before instruction 1 of the window syscall-gap",),
        registers=registers,
        code=Code(bytes="90" * 10 + "ee" + "90" * 20, at=10),
        place=place,
        trace=trace,
        complete=False,
        traps=("#VE pio out 0x3f8 at early_serial_putc+0x2b/0x40, " + "and so on " * 8,),
        reproduce="trapline boot vmlinux --append 'console=ttyS0 earlyprintk=serial' --device hpet",
    )
    return msgspec.structs.replace(whole, **changes)


def scan_incomplete():
    """A scan that did not see all, with more advice than a report prints."""
    drivers = (
        driver(
            name="e1000",
            bus="pci",
            aliases=("pci:v00008086d0000100Esv*sd*bc*sc*i*",),
            allowed=False,
            via=(),
            reaches=(),
            sites=3,
            mmio=2,
        ),
        driver(name="cfb", bus="", builtin=True, allowed=False, via=(), sites=1, aliases=()),
    )
    sites = (
        site(driver="cfb", subsystem="graphics", module="vmlinux", file=None, line=None),
        site(id="01", driver="e1000", module="e1000", subsystem="network", origin="0xffff0010"),
        site(id="02", function="f" * 90, file="a/" * 50 + "x.c", line=None, width=0, accessor=None),
        site(id="03", form="paravirt", trap="cr", accessor=None, emulable=False, reason="no case"),
    )
    return document(
        sites=sites,
        drivers=drivers,
        mappings=(mapping(), mapping(id="04", mapper="memremap", module="e1000", driver="e1000")),
        coverage=Coverage(
            complete=False,
            missing=tuple(f"module m{n}: no debug information" for n in range(11)),
            advice=("install the debug package", "and the other one"),
            outside=(Outside(section=".rodata.odd", writable=False, size=4096, patterns=2),),
        ),
    )


def boot_site(**changes):
    fields = {
        "trap": "pio",
        "count": 1234,
        "image": "vmlinux",
        "address": "0xffffffffa5000010",
        "link_address": "0xffffffff81000010",
        "label": "io_serial_out+0x1a/0x20",
        "function": "io_serial_out",
        "file": "arch/x86/include/asm/shared/io.h",
        "line": 22,
        "inlined": (Frame(function="outb", file="arch/x86/include/asm/shared/io.h", line=22),),
        "standing": "found",
        "scan_id": "abcdef0123456789",
        "reason": "",
    }
    return TrapSite(**{**fields, **changes})


def boot_in_contexts():
    return boot(
        contexts={
            "pio": {"interrupts off": 1200, "NMI": 2, "user GS": 1},
            "msr": {"soft interrupt": 9},
        }
    )


def boot_on_two_modules():
    first = boot()
    other = OtherModule(
        module_version="1.5.34",
        outcome=first.outcome,
        traps={"pio": 1234, "msr": 9},
        places={"pio": 1, "msr": 1},
        tdvmcalls={"Instruction.IO": 1234},
        gone=("cpuid user+0x401000",),
        new=("msr read_msr+0x4/0x9",),
    )
    return boot(other_module=other)


_STRANGE = boot_site(
    trap="mmio",
    count=3,
    label="mystery+0x4/0x9",
    standing="unaccounted",
    scan_id=None,
    inlined=(),
    reason="the scan has no mmio site at this address",
)


def boot(**changes):
    sites = (
        boot_site(),
        _STRANGE,
        boot_site(trap="cpuid", count=7, image="user", label="user+0x401000", file=None),
    )
    fields = {
        "generator": "trapline 0",
        "kernel": BootKernel(
            release="6.12.0-test",
            build_id="00ff",
            image="bzImage",
            file="vmlinuz",
            slide="0x24000000",
        ),
        "machine": BootMachine(
            module_version="1.5.01",
            memory=512 << 20,
            unaccepted=64 << 20,
            command_line="console=ttyS0 " + "x=y " * 40,
            initrd="self-test",
            devices=(),
        ),
        "outcome": BootOutcome(
            kind="powered-off",
            detail="The guest powered itself off.",
            exit_code=0,
            seconds=2.5,
            place="acpi_os_enter_sleep+0x1/0x2",
        ),
        "milestones": (Milestone(name="TDX detected", seconds=0.4, evidence="console"),),
        "traps": {"pio": 1234, "cpuid": 7, "mmio": 3},
        "tdcalls": {"TDG.VP.VMCALL": 1244, "TDG.VP.VEINFO.GET": 1244},
        "tdvmcalls": {"Instruction.IO": 1234},
        "sites": sites,
        "sites_dropped": 0,
        "soundness": Soundness(
            scanned=True, traps=1237, traps_found=1234, sites=2, sites_found=1, outside_traps=7
        ),
        "unaccounted": (_STRANGE,),
        "refused": Refusals(ports={"0x2e9": 6, "0x80": 1}, mmio={}, msrs={"0x4e": 1}),
        "console_bytes": 10,
        "hashes": Hashes(trace="aa", console="bb", ram="cc"),
        "splat": None,
    }
    return BootResult(**{**fields, **changes})


def boot_with_devices():
    """A boot with devices, a policy, screams and many places."""
    screams = tuple(
        Scream(
            reason="forbidden",
            trap="mmio",
            count=n + 1,
            address=f"0xfee0{n:04x}",
            label=f"touch_{n}+0x1/0x2",
            device="00:02.0" if n else None,
            driver="virtio-pci" if n else None,
            scan_id=None,
            splat=splat(injected=()) if n < 3 else None,
        )
        for n in range(22)
    )
    devices = tuple(
        BootDevice(
            slot=f"00:0{n}.0",
            id="1af4:1042",
            name="Virtio 1.0 block",
            allowed=allowed,
            hidden=hidden,
            drivers=("virtio-pci", "virtio_blk") if allowed else (),
        )
        for n, (allowed, hidden) in enumerate(
            ((None, False), (True, False), (False, True), (False, False))
        )
    )
    return boot(
        devices=devices,
        policy=BootPolicy(
            classes={"mmio": "forbid", "pio": "paravirt"},
            paravirtualised={"pio": 12},
            missed={"pio": 3},
        ),
        sites=tuple(boot_site(label=f"out_{n}+0x1a/0x20", count=99 - n) for n in range(25)),
        screams=screams,
        soundness=Soundness(
            scanned=False, traps=0, traps_found=0, sites=0, sites_found=0, outside_traps=0
        ),
        unaccounted=(),
        refused=Refusals(ports={}, mmio={}, msrs={}, dma=("0x1000", "0x2000")),
        repeatable=False,
        milestones=(),
    )


def boot_panic():
    """A guest that died."""
    return boot(
        outcome=BootOutcome(
            kind="panic",
            detail="Kernel panic: not syncing: oh.",
            exit_code=20,
            seconds=1.0,
            place="panic+0x1/0x2",
        ),
        splat=splat(),
        unaccounted=(),
        refused=Refusals(ports={}, mmio={}, msrs={}),
    )


def run(boundary, verdict, event="nmi", nested=None, at=None, *, expected=False):
    bad = verdict in ("privilege", "panic", "corrupt")
    return Result(
        scenario="gap",
        event=event,
        boundary=boundary,
        nested=nested,
        nested_at=at,
        allowed=True,
        rule="nmi-after-get",
        verdict=verdict,
        expected=expected,
        detail="exc_nmi() runs with the user's GS base, 0x0." if bad else "",
        differs=("rax: 0x1, not 0x2", "jiffies: +1") if verdict == "corrupt" else (),
        instructions=7,
        splat=splat() if bad and boundary % 2 else None,
        last=tuple(f"work+0x{n:x}/0x40: mov %rax,%rbx" for n in range(7)) if bad else (),
        reproduce=f"trapline explore K --scenario gap --event {event} --at {boundary}",
    )


_CODE = (("entry", "swapgs"), ("entry", "mov %rsp,@"), ("work", "nop"), ("work", "ret"))


def _footprint(basis, boundaries):
    words = (
        FootprintWord(name="nmi_count", gpa=0x1000, kind="value", was=1, now=2),
        FootprintWord(name="tick", gpa=0x1008, kind="time", was=7, now=None),
        FootprintWord(name="stack", gpa=0x1010, kind="stack", was=0, now=0x28),
        FootprintWord(name="stack", gpa=0x1018, kind="rip", was=0, now=None),
    )
    return Footprint(
        id=f"footprint-{basis}",
        scenario="gap",
        event="nmi",
        nested=None if basis == "ordinary" else "nmi",
        basis=basis,
        count=4,
        words=words,
        runs=12,
        boundaries=boundaries,
    )


def explore(results=None, worse=None, **changes):
    """A campaign over one window of 256 instructions."""
    boundaries = tuple(
        Boundary(index=i, function=function, offset=i, ordinal=i // 4, instruction=text)
        for i, (function, text) in enumerate(_CODE * 64)
    )
    window = Window(
        scenario="gap",
        title="The gap after SYSCALL, where the kernel runs on the user's stack",
        instructions=len(boundaries),
        boundaries=boundaries,
        forbidden=(Forbidden(event="ve:wrmsr", rule="private-mapped", boundaries=256),),
    )
    if results is None:
        results = [
            *(run(i, "same") for i in range(256)),
            run(1, "privilege"),
            run(2, "held"),
            run(3, "same", nested="nmi", at=4),
            run(5, "panic", "int80", expected=True),
            *(run(4 + i, "corrupt", f"irq:{i}") for i in range(9)),
        ]
    whole = ExploreResult(
        generator="trapline 1",
        injected=sum(1 + (r.nested is not None) for r in results),
        kernel="6.12",
        build_id="ab",
        module_version="1.5.01",
        beyond_rules=False,
        not_opened=(NotOpened(scenario="iret", why="no IRET came within a second " * 4),),
        windows=(window,),
        results=tuple(results),
        footprints=(_footprint("ordinary", ((0, 3), (9, 9))), _footprint("most", ((5, 8),) * 9)),
        counts={"gap": {}},
        worse_than_baseline=worse,
    )
    return msgspec.structs.replace(whole, **changes)


def explore_small():
    """A window of four instructions, with findings."""
    results = [run(0, "same"), run(1, "privilege"), run(3, "held", nested="ve:cpuid", at=2)]
    whole = explore(results)
    (window,) = whole.windows
    window = msgspec.structs.replace(window, instructions=4, boundaries=window.boundaries[:4])
    return msgspec.structs.replace(whole, windows=(window,))


def explore_baseline():
    """Two runs went wrong, one of them as before, and a window does not open any more."""
    results = [run(1, "privilege"), run(2, "privilege"), run(3, "same")]
    worse = (
        "iret: was tried, and now no IRET came",
        "gap nmi work+0x2 (nop): held, now privilege",
    )
    return explore(results, worse)


def verify(**changes):
    findings = tuple(
        Finding(
            id=f"{n:016x}",
            trap="mmio",
            kind=kind,
            cause=f"the operand is {n + 1} bytes wide and crosses the end of something long",
            forms=tuple(f"MOV r{size}, m{size}" for size in (8, 16, 32, 64)) * (n + 1),
            instruction="mov (%rax),%bl",
            bytes="8a18",
            circumstances="RFLAGS.DF=1" if n % 2 else "",
            expected="rbx=0x11",
            got="rbx=0x22",
            cases=n + 1,
            tried=10,
            occurs=n if n % 2 else None,
        )
        for n, kind in enumerate((SEVERITY[0], SEVERITY[4], SEVERITY[4]))
    )
    whole = VerifyResult(
        generator="trapline 1",
        kernel=VerifiedKernel(name="vmlinux", release="6.12", build_id="ab"),
        module_version="1.5.01",
        cases=1234,
        injected=12,
        verdicts={
            "mmio": {"same": 1000, "different": 3},
            "msr": {"refused": 2, "not-comparable": 1},
        },
        findings=findings,
        refused=tuple(
            Refused(
                trap="mmio",
                form=f"XADD m{size}, r{size}",
                instruction="xadd %eax,(%rbx)",
                bytes="0fc103",
                cases=4,
                occurs=size % 3,
            )
            for size in (8, 16, 32)
        ),
        scanned="6.12",
        digest="00" * 8,
    )
    return msgspec.structs.replace(whole, **changes)


def contexts(answer="ve", edge="indirect jump"):
    place = CodePlace(
        function="entry_SYSCALL_64",
        offset=0x1B,
        alternative=False,
        address="0xffffffff81e0009b",
        file="arch/x86/entry/entry_64.S",
        line=95,
    )
    conditions = ("user CR3", "user stack")
    entry = GapEntry(function="entry_SYSCALL_64", vector=None, found="written to MSR 0xc0000082")
    site = GapSite(
        id="syscall:entry_SYSCALL_64:cpuid",
        trap="cpuid",
        answer=answer,
        rule="cpuid-absent",
        subject="0x40000000",
        place=place,
        instruction="cpuid",
        directions=("in",),
        conditions=conditions,
        reason="the rules say that it traps",
    )
    sound = msgspec.structs.replace(site, id="syscall:wrmsr", trap="msr", answer="no", rule="msr-1")
    unread = GapEdge(
        id="syscall:edge",
        kind=edge,
        place=place,
        target="string\x1b",
        reason="where it goes is not known here",
    )
    instruction = GapInstruction(
        place=place, instruction="cpuid", directions=("in", "out"), conditions=conditions
    )
    gap = Gap(
        id="syscall",
        title="SYSCALL",
        entries=(entry, msgspec.structs.replace(entry, function="other", like=entry.function)),
        instructions=(instruction,),
        in_=1,
        out=1,
        paths=1344,
        leaves=("IRET", "SYSRET"),
        by_condition={"user CR3": 1, "user stack": 1},
        accesses={"per-CPU": 1},
        sites=(site, sound) if answer else (sound,),
        edges=(unread,) if edge else (),
    )
    return ContextsResult(
        generator="trapline",
        kernel=ContextsKernel(name="vmlinux", release="6.12.0", build_id="ab" * 20),
        module_version="1.5.01",
        missing=("No table of gates was found.",) if edge else (),
        assumptions=("It is no Xen guest. " * 5,),
        gaps=(gap, msgspec.structs.replace(gap, id="nmi", title="NMI", sites=(), edges=())),
        reach=tuple(reached(found=bool(answer))),
    )


def reached(*, found):
    def step(function, line, edge=None, targets=0):
        file = f"kernel/{function}.c"
        return Step(function=function, file=file, line=line, edge=edge, targets=targets)

    chain = (
        step("exc_virtualization_exception", 12, "call", 1),
        step("look", 34, "table", 3),
        step("port_in", 56),
    )
    site = ReachedSite(
        id="0123456789abcdef",
        trap="mmio",
        function="port_in",
        file="kernel/port_in.c",
        line=57,
        instruction="mov (%rdi),%eax\x1b",
        accessor="readl",
        emulable=True,
        chain=chain,
    )
    gate = ReachedGate(
        id="aaaa",
        function="_printk",
        file="kernel/printk/printk.c",
        line=2400,
        reason=None,
        source=None,
        by=None,
        functions=18_643,
        sites=1723,
        chain=(chain[0], step("_printk", 2400)),
    )
    closed = msgspec.structs.replace(
        gate,
        id="bbbb",
        function="panic",
        reason="does not return",
        source="kernel/panic.c, panic()",
        by="trapline",
    )
    untold = Untold(
        id="cccc",
        function="notify_die",
        file="kernel/notifier.c",
        line=None,
        kind="offset",
        targets=979,
        reason=None,
        source=None,
        by=None,
    )
    before = Reach(
        id="ve-before",
        title="#VE handler before TDG.VP.VEINFO.GET",
        roots=("exc_virtualization_exception",),
        forbidden=True,
        why="VE_INFO is in use",
        functions=("look", "port_in"),
        sites=(site,) if found else (),
        gates=(gate, closed) if found else (closed,),
        untold=(untold,) if found else (),
        console=(),
        missing=("this kernel has no such thing",) if found else (),
    )
    yield before
    changes = {"id": "ve-after", "title": "#VE handler after", "forbidden": False}
    yield msgspec.structs.replace(before, **changes)
    way = (chain[0], step("_printk", 7, "call", 1), step("con_write", 9)) if found else ()
    changes = {"id": "nmi", "title": "NMI handlers", "forbidden": False, "console": way}
    yield msgspec.structs.replace(before, **changes)


def tradeoff(**changes):
    def design(name):
        return Design(
            name=name,
            steps=(
                WorkStep(name="boot", passed=True),
                WorkStep(name="disk read", passed=name != "forbid"),
            ),
            outcome="powered-off",
            ves=18_000,
            mmio_ves=400,
            direct=12,
            missed=3,
            tdvmcalls=21_974,
            convert=887,
            convert_used=15,
            growth=18_493,
            nmis=1,
            in_nmi=2,
            nested=3,
            screams=1804,
            scream_places=41,
            virtual_seconds=1.8354,
            wall_seconds=23.04,
        )

    whole = TradeoffResult(
        generator="trapline",
        kernel=BootKernel(
            release="6.12.0", build_id=None, image="bzImage", file="vmlinuz", slide="0"
        ),
        module_version="1.5.01",
        devices=("1af4:1042 Virtio 1.0 block",),
        designs=tuple(map(design, ("trap", "paravirt", "forbid"))),
        missed_places=("iowrite8+0x1/0x2: string\x1b",),
        method={"#VEs": "counted in the module " * 5, "NMIs": "counted"},
    )
    return msgspec.structs.replace(whole, **changes)


def live():
    checks = (
        LiveCheck(name="TDX guest", found="yes", standing="ok", why="tdx_guest in /proc/cpuinfo"),
        LiveCheck(name="HPET", found="bound", standing="finding", why="the host emulates it " * 4),
        LiveCheck(name="clock", found="tsc", standing="note", why="no trap"),
    )
    devices = (
        LiveDevice(
            bus="pci",
            name="0000:00:02.0",
            modalias="pci:v00001AF4d00001041",
            driver="virtio-pci",
            allowed="1af4:1041",
        ),
        LiveDevice(bus="pci", name="0000:00:03.0", modalias="pci:v8086", driver=None, allowed=None),
    )
    return LiveResult(
        generator="trapline 1", title="a list", is_td=True, checks=checks, devices=devices
    )


# Rules.


def _row(row_id, columns, *, claimant="module", followed=True, enforced=None, note=""):
    return RuleRow(
        id=row_id,
        claimant=claimant,
        source="TDX module 1.5.01 src/td_dispatcher/tdx_td_dispatcher.c td_hlt_exit()",
        module="1.5.01",
        followed=followed,
        enforced=followed if enforced is None else enforced,
        note=note,
        columns=columns,
    )


def _msr(name, first, last, read, write, cpu="", **more):
    columns = {
        "name": name,
        "first": first,
        "last": last,
        "read": read,
        "read_feature": "",
        "write": write,
        "write_feature": "",
        "cpu_access": cpu,
    }
    return _row(f"msr-{name.lower()}", columns | more)


_TABLES = (
    RuleTable(
        name="instructions",
        key=("instruction", "condition"),
        rows=(
            _row(
                "hlt",
                {"instruction": "HLT", "condition": "", "outcome": "ve", "exit_reason": 12},
                note="Always.",
            ),
            _row(
                "hlt-other",
                {"instruction": "HLT", "condition": "", "outcome": "td_exit", "exit_reason": None},
                claimant="kvm",
                followed=False,
            ),
        ),
    ),
    RuleTable(
        name="msrs",
        key=("name",),
        rows=(
            _msr("IA32_TSC_DEADLINE", 0x6E0, 0x6E0, "ve", "ve"),
            _msr("x2APIC", 0x800, 0x8FF, "native", "gp", "read"),
            _msr("PERF", 0xC1, 0xC8, "native_unless_gp", "ve", read_feature="perf_mon"),
        ),
    ),
    RuleTable(
        name="cpuid",
        key=("first", "subleaf"),
        rows=(
            _row(
                "cpuid-4-2",
                {
                    "name": "caches",
                    "first": 4,
                    "last": 4,
                    "subleaf": 2,
                    "outcome": "emulated",
                    "configurable": True,
                    "dynamic": "by VCPU",
                },
                enforced=False,
            ),
            _row(
                "cpuid-hv",
                {
                    "name": "hypervisor",
                    "first": 0x4000_0000,
                    "last": 0x4FFF_FFFF,
                    "subleaf": None,
                    "outcome": "ve",
                    "control": "reduce_ve",
                    "feature": "dca",
                    "configurable": False,
                    "dynamic": "",
                },
            ),
        ),
    ),
    RuleTable(
        name="tdvmcalls",
        key=("function", "case"),
        rows=(
            _row(
                "mapgpa",
                {
                    "function": 0x10001,
                    "name": "MapGPA",
                    "inputs": "R12, R13",
                    "outputs": "R11",
                    "case": "ok",
                    "status": "TDVMCALL_STATUS_SUCCESS",
                },
            ),
        ),
    ),
    RuleTable(
        name="fields",
        key=("scope", "name"),
        rows=(
            _row(
                "td-ctls",
                {
                    "scope": "TD",
                    "name": "TD_CTLS",
                    "code": 0x1_0000_0017,
                    "elements": 1,
                    "read_mask": (1 << 64) - 1,
                    "write_mask": 0x1F,
                },
            ),
        ),
    ),
)


_LINUX = _row(
    "linux-hlt",
    {"exit_reason": 12, "condition": "interrupts_off", "does": "asks_host", "since": "v5.19, bfe6"},
    claimant="linux-code",
    enforced=False,
    note="A note on what Linux does.",
)


def rules(name=None):
    chosen = tuple(one for one in _TABLES if name in (None, one.name))
    return RulesShown(module_version="1.5.01", tables=chosen)


def explained():
    hlt, other = _TABLES[0].rows
    return RulesExplained(
        module_version="1.5.01",
        subject="HLT",
        questions=(
            RuleQuestion(
                table="instructions",
                title="HLT",
                answers=(RuleAnswer(row=hlt, agrees=True), RuleAnswer(row=other, agrees=False)),
                linux=(_LINUX,),
            ),
            RuleQuestion(
                table="msrs",
                title="x2APIC",
                answers=tuple(RuleAnswer(row=row, agrees=True) for row in _TABLES[1].rows),
                linux=(),
            ),
        ),
    )


def compared(*, same=False):
    hlt = _TABLES[0].rows[0]
    deadline = _TABLES[1].rows[0]
    changes = (
        RuleChange(
            table="instructions",
            id="hlt",
            title="HLT, cpl 0",
            change="changed",
            answers=True,
            old=hlt,
            new=msgspec.structs.replace(
                hlt, columns=hlt.columns | {"outcome": "gp", "exit_reason": None}, note="Newer."
            ),
            columns=(
                ColumnChange(column="outcome", old="ve", new="gp"),
                ColumnChange(column="exit_reason", old=12, new=None),
            ),
        ),
        RuleChange(
            table="instructions",
            id="hlt-other",
            title="HLT, kvm",
            change="changed",
            answers=False,
            old=_TABLES[0].rows[1],
            new=_TABLES[0].rows[1],
            columns=(ColumnChange(column="source", old="here", new="there"),),
        ),
        RuleChange(
            table="msrs",
            id="msr-new",
            title="IA32_TSC_DEADLINE (0x6e0)",
            change="added",
            answers=True,
            old=None,
            new=deadline,
            columns=(
                ColumnChange(column="first", old=None, new=0x6E0),
                ColumnChange(column="note", old=None, new=""),
                ColumnChange(column="standing", old=None, new="enforced"),
            ),
        ),
        RuleChange(
            table="msrs",
            id="msr-old",
            title="x2APIC (0x800-0x8ff)",
            change="removed",
            answers=True,
            old=_TABLES[1].rows[1],
            new=None,
            columns=(ColumnChange(column="note", old="word " * 30, new=None),),
        ),
    )
    return RulesCompared(old="1.5.01", new="1.5.16", changes=() if same else changes)


def linted(*texts):
    return RulesLinted(
        subject="the tables of trapline",
        problems=tuple(
            RuleProblem(table="msrs", line=n, text=text) for n, text in enumerate(texts)
        ),
    )


def filtered():
    """The kernel of `scan_documents` and two more drivers against the eight ids."""
    whole = document()
    more = (
        driver(
            name="virtio_blk", builtin=True, allowed=False, via=(), aliases=("virtio:d00000002v*",)
        ),
        driver(
            name="i8042",
            bus="platform",
            module="vmlinux",
            builtin=True,
            aliases=(),
            allowed=False,
            via=(),
            reaches=(),
        ),
        driver(
            name="ahci",
            bus="pci",
            module="vmlinux",
            builtin=True,
            aliases=("pci:v*d*sv*sd*bc01sc06i01*",),
            allowed=False,
            via=(),
            reaches=(),
        ),
    )
    sites = (*whole.sites, site(id="07", driver="ahci", subsystem="disks"))
    scanned = document(drivers=(*whole.drivers, *more), sites=sites)
    return check(scanned, listfile.load(None))


def scan_clean():
    return clean()


_LABELS = (
    LabelEntry(
        label="safe",
        reason="only printed",
        owner="ada@example.org",
        date=dt.date(2026, 11, 28),
        id="00000000000000d4",
        kernel="6.12.117+deb12-cloud-amd64",
    ),
    LabelEntry(
        label="excluded",
        reason="no parallel ATA here",
        owner="ada@example.org",
        date=dt.date(2026, 11, 27),
        driver="pata_*",
    ),
    LabelEntry(
        label="trusted",
        reason="checked before",
        owner="bob@example.org",
        date=dt.date(2026, 10, 1),
        id="00000000000000c3",
        carried="from 00000000000000c2: the same function and accessor",
    ),
)


def scan_labelled():
    return labelled(document(), Labels(_LABELS, "ours.toml"))


def compared_scans():
    sites = document().sites
    other = site(id="0b", function="new_one", owner="new_one", object="a/b.o", driver="8250")
    return compare(
        document(),
        document(sites=(*sites[1:], other)),
        names=("old.json", "new.json"),
        labels=Labels(_LABELS, "ours.toml"),
    )


def gated():
    sites = document().sites
    other = site(id="0b", function="new_one", owner="new_one", object="a/b.o", driver="8250")
    grown = document(sites=(*sites, other))
    judge = Judge(
        GatePolicy(schema_="trapline/gate-policy", version=1),
        placecounts.baseline(document(), ()),
        None,
    )
    return GateResult(
        generator="trapline 0.1.0",
        policy="ci/trapline.toml",
        kernel="vmlinux",
        release=grown.kernel.release,
        build_id=grown.kernel.build_id,
        baseline="6.12.107",
        checks=tuple(judge.scan(grown)),
    )


def label_list():
    return list_labels(Labels(_LABELS, "ours.toml"), document())


#: Name -> what makes the document, and the verbosities at which its report differs.
GOLDEN = {
    "scan": (document, (0, 1, 2)),
    "scan-clean": (scan_clean, (0,)),
    "scan-labelled": (scan_labelled, (0, 1)),
    "diff": (compared_scans, (0, 1)),
    "gate": (gated, (0, 1)),
    "label-list": (label_list, (0,)),
    "scan-incomplete": (scan_incomplete, (0, 2)),
    "boot": (boot, (0, 1)),
    "boot-devices": (boot_with_devices, (0, 1)),
    "boot-panic": (boot_panic, (0, 1)),
    "boot-two-modules": (boot_on_two_modules, (0, 1)),
    "explore": (explore, (0, 1)),
    "explore-clean": (
        lambda: explore([run(0, "same")], build_id=None, beyond_rules=True, not_opened=()),
        (0,),
    ),
    "explore-baseline": (explore_baseline, (0,)),
    "explore-small": (explore_small, (0,)),
    "explore-empty": (lambda: explore([], (), windows=()), (0,)),
    "verify": (verify, (0, 1)),
    "verify-baseline": (
        lambda: verify(worse_than_baseline=(Worse(id=verify().findings[0].id, why="new"),)),
        (0,),
    ),
    "verify-no-worse": (lambda: verify(worse_than_baseline=()), (0,)),
    "verify-clean": (lambda: verify(findings=(), refused=(), injected=0), (0,)),
    "boot-contexts": (boot_in_contexts, (0,)),
    "contexts": (contexts, (0, 1, 2)),
    "contexts-unread": (lambda: contexts(answer=""), (0,)),
    "contexts-edges": (lambda: contexts(answer="", edge="static call"), (0, 1)),
    "contexts-proved": (lambda: contexts(answer="", edge=""), (0,)),
    "tradeoff": (tradeoff, (0,)),
    "tradeoff-sound": (lambda: tradeoff(missed_places=()), (0,)),
    "filter-check": (filtered, (0,)),
    "filter-live": (live, (0,)),
    "allow-list": (lambda: listfile.load(None), (0,)),
    "rules": (rules, (0,)),
    **{f"rules-{one.name}": (lambda one=one: rules(one.name), (0,)) for one in _TABLES},
    "rules-explained": (explained, (0,)),
    "rules-linted": (lambda: linted("word " * 20, "msr-0x49 overlaps msr-0x48"), (0,)),
    "rules-linted-none": (linted, (0,)),
    "rules-diff": (compared, (0,)),
    "rules-diff-same": (lambda: compared(same=True), (0,)),
}
