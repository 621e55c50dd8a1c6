"""Measures the CPU engine: exits a second by kind, MIPS against QEMU, restores by dirty pages.

    python benchmarks/engine.py [ROUNDS]

The guests are assembled here with GNU as. The compute loop also runs in
`qemu-system-x86_64 -accel tcg -cpu max` when that is installed, started by multiboot; the time
of an empty run is taken off on both sides, and the fastest of the rounds counts. Asked for: a
restore of 100 dirty pages in at most 25 us.
"""

import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trapline.cpu.default import open_engine
from trapline.cpu.engine import Engine, Exit, ExitHandler, Reg, SegmentRegister

RAM = 512 << 20
GDT, IDT, TABLES, CODE, STACK = 0x1000, 0x2000, 0x10000, 0x100000, 0x200000
GDT_ENTRIES = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF)

EXITS = {
    "CPUID": "cpuid",
    "RDMSR": "rdmsr",
    "TDCALL": ".byte 0x66, 0x0f, 0x01, 0xcc",
    "OUT": "out dx, al",
    "RDTSC (no exit)": "rdtsc",
    "#PF (no exit)": "mov [rsi], eax",
    "OUT, as #VE with two TDCALLs": "out dx, al",
    "EPT violation": "mov [rdi], eax",
}

# About twelve instructions an iteration: arithmetic, loads, stores, a call, two branches.
LOOP = """
        mov rbx, 0x300000
        mov rax, 88172645463325252
1:      mov rdx, rax
        shl rdx, 13
        xor rax, rdx
        mov rdx, rax
        shr rdx, 7
        xor rax, rdx
        movzx edx, ax
        call 2f
        test al, 1
        jz 3f
        add rsi, rdx
3:      dec r15
        jnz 1b
        jmp 4f
2:      add [rbx + rdx * 8], rax
        ret
4:
"""
PER_ITERATION = 14
ITERATIONS = 40_000_000

MULTIBOOT = """
        .code32
        .set FLAGS, 0x10000
        .long 0x1BADB002, FLAGS, -(0x1BADB002 + FLAGS)
        .long 0x100000, 0x100000, 0, 0, start
start:  mov edi, 0x10000
        xor eax, eax
        mov ecx, 0xc00
        rep stosd
        mov dword ptr [0x10000], 0x11003
        mov dword ptr [0x11000], 0x12003
        mov eax, 0x83
        mov edi, 0x12000
1:      mov [edi], eax
        add eax, 0x200000
        add edi, 8
        cmp edi, 0x13000
        jb 1b
        mov eax, 0x20
        mov cr4, eax
        mov eax, 0x10000
        mov cr3, eax
        mov ecx, 0xc0000080
        mov eax, 0x100
        xor edx, edx
        wrmsr
        mov eax, 0x80000011
        mov cr0, eax
        lgdt [pointer]
        ljmp 8, offset long
pointer: .word 23
        .long table
        .align 8
table:  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
        .code64
long:   mov eax, 16
        mov ss, eax
        mov ds, eax
        mov rsp, 0x200000
"""
DEBUG_EXIT = "mov edx, 0xf4\n xor eax, eax\n out dx, eax\n"


def assemble(source: str) -> bytes:
    """Assemble for 1 MiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.s").write_text(f".intel_syntax noprefix\n.globl _start\n_start:\n{source}\n")
        for command in (
            ["as", "-o", "a.o", "a.s"],
            ["ld", "-Ttext", hex(CODE), "-o", "a.elf", "a.o"],
            ["objcopy", "-O", "binary", "-j", ".text", "a.elf", "a.bin"],
        ):
            subprocess.run(command, cwd=folder, check=True)
        return (folder / "a.bin").read_bytes()


def guest(source: str, gates: dict[int, int] | None = None) -> Engine:
    """Build an engine in long mode at the start of `source`."""
    engine = open_engine(RAM)
    vcpu, ram = engine.vcpus[0], engine.memory.ram
    code = assemble(source)
    ram[CODE : CODE + len(code)] = code
    ram[GDT : GDT + 24] = struct.pack("<3Q", *GDT_ENTRIES)
    for vector, at in (gates or {}).items():
        entry = at & 0xFFFF | 8 << 16 | 0x8E << 40 | at >> 16 << 48
        ram[IDT + vector * 16 : IDT + vector * 16 + 8] = struct.pack("<Q", entry)
    ram[TABLES : TABLES + 8] = struct.pack("<Q", TABLES + 0x1000 | 3)
    ram[TABLES + 0x1000 : TABLES + 0x1008] = struct.pack("<Q", TABLES + 0x2000 | 3)
    pages = [page << 21 | 0x83 for page in range(RAM >> 21)]
    pages.append(engine.memory.shared_bit | 0x83)  # right behind RAM: nothing there
    ram[TABLES + 0x2000 : TABLES + 0x2000 + len(pages) * 8] = struct.pack(f"<{len(pages)}Q", *pages)
    vcpu.set_segment("gdtr", SegmentRegister(0, GDT, 23, 0))
    vcpu.set_segment("idtr", SegmentRegister(0, IDT, 0xFFF, 0))
    vcpu.set_msr(0xC0000080, 0xD00)
    vcpu.set_cr(4, 0x20)
    vcpu.set_cr(3, TABLES)
    vcpu.set_cr(0, 0x80010033)
    vcpu.set_segment("cs", SegmentRegister(8, 0, 0xFFFFFFFF, 0x00AF9B00))
    for name in ("ss", "ds", "es"):
        vcpu.set_segment(name, SegmentRegister(16, 0, 0xFFFFFFFF, 0x00CF9300))
    vcpu.rflags = 2
    vcpu.regs[Reg.RIP], vcpu.regs[Reg.RSP] = CODE, STACK
    return engine


def seconds(engine: Engine, handler: ExitHandler) -> float:
    """Time a run to the guest's HLT."""
    started = time.perf_counter()
    engine.vcpus[0].run(handler)
    return time.perf_counter() - started


def time_exit(name: str, instruction: str, count: int = 50_000) -> float:
    """Microseconds for one exit of a kind, the handler's least work included."""
    length = {"#PF (no exit)": 2, "EPT violation": 2}.get(name, 1)
    source = f"""
        mov r15d, {count}
        mov ecx, 0x10
        mov rsi, {1 << 35}
        mov rdi, {RAM}
1:      {instruction}
        dec r15d
        jnz 1b
        hlt
        .org 0x1000
        # #PF: step over the access
        add qword ptr [rsp + 8], {length}
        add rsp, 8
        iretq
        .org 0x2000
        # #VE: what a handler asks of the module, and the way back
        .byte 0x66, 0x0f, 0x01, 0xcc, 0x66, 0x0f, 0x01, 0xcc
        add qword ptr [rsp], {length}
        iretq
    """
    engine = guest(source, {14: CODE + 0x1000, 20: CODE + 0x2000})
    vcpu = engine.vcpus[0]
    as_ve = "#VE" in name

    def handler(kind: Exit) -> None:
        if kind is Exit.HLT:
            vcpu.stop()
        elif as_ve and kind is Exit.IO:
            vcpu.deliver(20)
        else:
            vcpu.advance(vcpu.length)

    taken = seconds(engine, handler)
    engine.close()
    return taken / count * 1e6


def loop_seconds(iterations: int) -> float:
    """Time the compute loop on the engine."""
    engine = guest(f"mov r15, {iterations}\n{LOOP}\n hlt")
    taken = seconds(engine, lambda _kind: engine.vcpus[0].stop())
    engine.close()
    return taken


def qemu_seconds(iterations: int) -> float:
    """Time the compute loop on QEMU, start and end of the process included."""
    code = assemble(f"{MULTIBOOT}\n mov r15, {iterations}\n{LOOP}\n{DEBUG_EXIT}\n hlt")
    with tempfile.NamedTemporaryFile(suffix=".bin") as image:
        image.write(code)
        image.flush()
        command = [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "64"),
            *("-nodefaults", "-display", "none", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-kernel", image.name),
        ]
        started = time.perf_counter()
        status = subprocess.run(command, check=False, timeout=120).returncode
        taken = time.perf_counter() - started
    if status != 1:
        raise SystemExit(f"QEMU did not run the loop: status {status}")
    return taken


def restore_microseconds(pages: int, *, announced: bool, rounds: int = 200) -> tuple[float, float]:
    """Time a restore with that many dirty pages, and the run that made them."""
    engine = guest(
        f"mov rbx, 0x1000000\n mov ecx, {pages}\n1: mov [rbx], ecx\n add rbx, 4096\n loop 1b\n hlt"
    )
    engine.memory.ram[0x1000000 : 0x1000000 + pages * 4096] = b"\1" * (pages * 4096)
    snapshot = engine.freeze(announced=announced)
    restores, runs = [], []
    for _ in range(rounds):
        runs.append(seconds(engine, lambda _kind: engine.vcpus[0].stop()))
        started = time.perf_counter()
        engine.restore(snapshot)
        restores.append(time.perf_counter() - started)
    engine.close()
    return sorted(restores)[rounds // 2] * 1e6, sorted(runs)[rounds // 2] * 1e6


def main() -> None:
    """Print a table of each."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("exits, with a handler that does nothing but go on")
    for name, instruction in EXITS.items():
        best = min(time_exit(name, instruction) for _ in range(rounds))
        print(f"  {name:<30} {best:6.2f} us {1e6 / best:10,.0f}/s")
    millions = ITERATIONS * PER_ITERATION / 1e6
    best = min(loop_seconds(ITERATIONS) - loop_seconds(1) for _ in range(rounds))
    print(f"compute loop\n  engine {millions / best:6.0f} MIPS")
    if shutil.which("qemu-system-x86_64"):
        other = min(qemu_seconds(ITERATIONS) - qemu_seconds(1) for _ in range(rounds))
        print(
            f"  QEMU   {millions / other:6.0f} MIPS; the engine takes {best / other:.2f} x its time"
        )
    else:
        print("  QEMU is not installed: apt-get install qemu-system-x86")
    print("restore, median; in brackets the run that wrote the pages")
    for announced in (True, False):
        print("  writes of the host announced" if announced else "  not announced")
        for pages in (10, 100, 1000):
            restore, run = restore_microseconds(pages, announced=announced)
            print(f"    {pages:4} pages {restore:6.0f} us ({run:.0f} us)")


if __name__ == "__main__":
    main()
