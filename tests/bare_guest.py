"""A bare guest for the engine's tests: long mode, GDT, TSS, an IDT made of the guest's labels.

The guest is assembled by GNU as. A label `vec_N` becomes the gate of vector N; the others are
absent. Low memory is mapped one to one as user pages, and once more at HIGH as supervisor
pages that cannot be executed.
"""

import struct

from flatcode import assemble
from trapline.cpu.default import open_engine
from trapline.cpu.engine import Exit, Reg, SegmentRegister

RAM = 16 << 20
GDT = 0x1000
IDT = 0x2000
TSS = 0x3000
TABLES = 0x10000
CODE = 0x100000
STACK = 0x200000
RSP0 = 0x210000
IST = [0x220000, 0x230000]  # IST1, IST2
USER_STACK = 0x240000
DATA = 0x300000
HIGH = 0xFFFF_8000_0000_0000
ABSENT = 0x40000000  # no page table maps it

KERNEL_CS, KERNEL_SS, USER_CS32, USER_SS, USER_CS, TSS_SELECTOR = 8, 16, 24, 32, 40, 48
EFER = 0xC0000080
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 0x100, 0x400, 0x800

# What shows that a CPUID feature works, by (leaf, subleaf, register, bit), and the bits of CR4 it
# takes: OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE SMAP.
FEATURES = {
    (1, 0, "ecx", 0): "addsubps xmm0, xmm1",
    (1, 0, "ecx", 1): "pclmulqdq xmm0, xmm1, 0",
    (1, 0, "ecx", 9): "pshufb xmm0, xmm1",
    (1, 0, "ecx", 13): "cmpxchg16b [rsi]",
    (1, 0, "ecx", 19): "ptest xmm0, xmm1",
    (1, 0, "ecx", 20): "crc32 eax, ebx",
    (1, 0, "ecx", 22): "movbe eax, [rsi]",
    (1, 0, "ecx", 23): "popcnt eax, ebx",
    (1, 0, "ecx", 25): "aesenc xmm0, xmm1",
    (1, 0, "ecx", 26): "xgetbv",
    (1, 0, "ecx", 30): "rdrand eax",
    (7, 0, "ebx", 0): "rdfsbase rax",
    (7, 0, "ebx", 3): "andn eax, ebx, ecx",
    (7, 0, "ebx", 8): "shlx eax, ebx, ecx",
    (7, 0, "ebx", 9): "rep movsb",
    (7, 0, "ebx", 18): "rdseed eax",
    (7, 0, "ebx", 19): "adcx eax, ebx",
    (7, 0, "ebx", 20): "stac",
    (7, 0, "ebx", 23): "clflushopt [rsi]",
    (7, 0, "ebx", 24): "clwb [rsi]",
    (0x80000001, 0, "ecx", 5): "lzcnt eax, ebx",
    (0x80000001, 0, "edx", 27): "rdtscp",
}
FEATURES_CR4 = 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18 | 1 << 21

PRELUDE = f"""
        .intel_syntax noprefix
        .set DATA, {DATA}
        .set STACK, {STACK}
        .set USER_STACK, {USER_STACK}
        .set KERNEL_CS, {KERNEL_CS}
        .set USER_CS, {USER_CS | 3}
        .set USER_SS, {USER_SS | 3}
        .set ABSENT, {ABSENT}
        .macro tdcall
        .byte 0x66, 0x0f, 0x01, 0xcc
        .endm
        # To CPL 3 at `target`, with interrupts as `flags` says.
        .macro to_user target, flags=2
        push USER_SS
        push USER_STACK
        push \\flags
        push USER_CS
        lea rax, [rip + \\target]
        push rax
        iretq
        .endm
        .text
        .globl _start
_start:
"""


class BareGuest:
    """An engine with a guest in it. `exits` collects (kind, RIP) of all exits of `run`."""

    factory = staticmethod(open_engine)

    def __init__(self, source, *, ist=None, user_gates=(), ram=RAM, seed=0, split=False):
        self.code, self.labels = assemble(PRELUDE + source, CODE)
        self.engine = self.factory(ram, seed=seed, split_ram=split)
        self.memory, self.vcpu = self.engine.memory, self.engine.vcpus[0]
        self.exits = []
        self.on = {}
        self.stop_at = {Exit.HLT, Exit.TRIPLE_FAULT}
        self._place(ist or {}, user_gates)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.engine.close()

    def _put(self, at, data):
        self.memory.ram[at : at + len(data)] = data

    def _place(self, ist, user_gates):
        vcpu = self.vcpu
        self._put(CODE, self.code)
        descriptors = [0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF]
        descriptors += [0x00CFFB000000FFFF, 0x00CFF3000000FFFF, 0x00AFFB000000FFFF]
        descriptors += [0x0000890000000067 | TSS << 16, 0]
        self._put(GDT, struct.pack("<8Q", *descriptors))
        tss = bytearray(0x68)
        struct.pack_into("<Q", tss, 4, RSP0)
        for index, stack in enumerate(IST):
            struct.pack_into("<Q", tss, 0x24 + 8 * index, stack)
        struct.pack_into("<H", tss, 0x66, 0x68)  # no I/O map
        self._put(TSS, tss)
        for label, address in self.labels.items():
            if label.startswith("vec_"):
                vector = int(label.removeprefix("vec_"))
                self.gate(vector, address, ist.get(vector, 0), 3 if vector in user_gates else 0)
        self._page_tables()
        vcpu.set_segment("gdtr", SegmentRegister(0, GDT, 8 * 8 - 1, 0))
        vcpu.set_segment("idtr", SegmentRegister(0, IDT, 0xFFF, 0))
        vcpu.set_segment("tr", SegmentRegister(TSS_SELECTOR, TSS, 0x67, 0x8B00))
        vcpu.set_msr(EFER, EFER_LME | EFER_LMA | EFER_NXE)
        vcpu.set_cr(4, 0x20)
        vcpu.set_cr(3, TABLES)
        vcpu.set_cr(0, 0x80010033)
        vcpu.set_segment("cs", SegmentRegister(KERNEL_CS, 0, 0xFFFFFFFF, 0x00AF9B00))
        for name in ("ss", "ds", "es"):
            vcpu.set_segment(name, SegmentRegister(KERNEL_SS, 0, 0xFFFFFFFF, 0x00CF9300))
        vcpu.rflags = 2
        vcpu.regs[Reg.RIP] = CODE
        vcpu.regs[Reg.RSP] = STACK

    def gate(self, vector, address, ist=0, dpl=0, kind=0x8E):
        """Write an interrupt gate."""
        low = address & 0xFFFF | KERNEL_CS << 16 | ist << 32 | (kind | dpl << 5) << 40
        low |= (address >> 16 & 0xFFFF) << 48
        self._put(IDT + 16 * vector, struct.pack("<QQ", low, address >> 32))

    def _page_tables(self):
        pml4 = [0] * 512
        pml4[0] = TABLES + 0x1000 | 7
        pml4[HIGH >> 39 & 511] = TABLES + 0x2000 | 7
        low = [TABLES + 0x3000 | 7] + [0] * 511
        high = [TABLES + 0x4000 | 7] + [0] * 511
        # The low mapping has 4 KiB pages in its first 4 MiB, to be changed by tests.
        tables = [TABLES + 0x5000 | 7, TABLES + 0x6000 | 7]
        size = len(self.memory.ram)
        large = [address | 0x87 for address in range(0x400000, size, 2 << 20)]
        low_directory = (tables + large + [0] * 512)[:512]
        supervisor = [1 << 63 | address | 0x83 for address in range(0, size, 2 << 20)]
        high_directory = (supervisor + [0] * 512)[:512]
        pages = [address | 7 for address in range(0, 0x400000, 0x1000)]
        for index, table in enumerate(
            (pml4, low, high, low_directory, high_directory, pages[:512], pages[512:])
        ):
            self._put(TABLES + 0x1000 * index, struct.pack("<512Q", *table))

    def map(self, gla, entry):
        """Set the page table entry of a page below 4 MiB."""
        self._put(TABLES + 0x5000 + (gla >> 12) * 8, struct.pack("<Q", entry))

    def handle(self, kind):
        """Serve one exit: as `on` says, else stop or step over."""
        vcpu = self.vcpu
        self.exits.append((kind, vcpu.regs[Reg.RIP]))
        if kind in self.on:
            self.on[kind]()
        elif kind in self.stop_at:
            vcpu.stop()
        elif kind is Exit.UNDEFINED:
            vcpu.deliver(6)
        else:
            assert vcpu.length, kind
            vcpu.advance(vcpu.length)

    def run(self, cycles=10_000_000):
        """Run until HLT or triple fault; a guest that does neither fails the test."""
        self.vcpu.set_time_budget(cycles)
        self.on.setdefault(Exit.BOUNDARY, self._late)
        self.vcpu.run(self.handle)
        return self

    def _late(self):
        raise AssertionError(f"the guest loops at {self.vcpu.regs[Reg.RIP]:#x}")

    def reg(self, name):
        """A register by name."""
        return self.vcpu.regs[Reg[name]]

    def frame(self, *, error_code=False):
        """What the processor pushed: RIP, CS, RFLAGS, RSP, SS, and the error code."""
        words = struct.unpack("<6Q", self.vcpu.read(self.reg("RSP"), 48))
        code, rest = (words[0], words[1:]) if error_code else (None, words[:5])
        return dict(zip(("rip", "cs", "rflags", "rsp", "ss"), rest, strict=True)) | {"code": code}

    def at(self, label):
        """Whether RIP is at a label."""
        return self.reg("RIP") == self.labels[label]
