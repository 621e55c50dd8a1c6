"""Debian's gdb against the stub: a small guest with symbols on the real engine."""

import re
import shutil
import subprocess

import pytest

from trapline.cpu.default import open_engine
from trapline.cpu.engine import Exit, Reg
from trapline.kernel.binary import Binary
from trapline.machine.gdb.debugview import TdTarget
from trapline.machine.gdb.server import GdbServer
from trapline.machine.loader import cpustate
from trapline.machine.observe.symbols import GuestSymbols

pytestmark = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")

MEMORY = 32 << 20
STACK = 0x300000
SECONDS = 120

LINK = "-nostdlib -static -Wl,-Ttext=0x200000,-estart,-z,noseparate-code,--build-id=none"
SOURCE = """
int counter;
int table[4] = {10, 20, 30, 40};

__attribute__((noinline)) int inner(int n)
{
    counter += n;
    asm volatile("cpuid" : : "a"(0), "c"(0) : "ebx", "edx");
    return counter;
}

__attribute__((noinline)) int outer(int n)
{
    return inner(n) + table[n];
}

void start(void)
{
    int sum = 0;
    for (int i = 0; i < 3; i++)
        sum += outer(i);
    asm volatile("hlt" : : "a"(sum));
    for (;;)
        ;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.c").write_text(SOURCE)
    flags = "-g -O0 -ffreestanding -fno-pic -no-pie -mno-sse -fcf-protection=none -mno-red-zone"
    subprocess.run(
        ["gcc", *flags.split(), *LINK.split(), "-o", "guest", "guest.c"],
        cwd=folder,
        check=True,
    )
    return folder / "guest"


class Guest:
    """The program on the engine: CPUID is answered with nothing, HLT is the end."""

    def __init__(self, program):
        self.engine = open_engine(MEMORY)
        self.vcpu = self.engine.vcpus[0]
        self.binary = Binary.open_vmlinux(program)
        for segment in self.binary.elf.segments:
            data = self.binary.elf.data[segment.offset : segment.offset + segment.file_size]
            at = segment.physical_address
            self.vcpu.memory.ram[at : at + len(data)] = data
        cpustate.enter_long_mode(self.vcpu, self.binary.elf.entry)
        # As if called: the return address is 0.
        self.vcpu.regs[Reg.RSP] = STACK - 8
        self.ended = False
        self.cpuids = 0
        symbols = GuestSymbols(self.vcpu, self.binary)
        symbols.runtime.place_vmlinux(self.binary, 0)
        target = TdTarget(self.vcpu, symbols, lambda _: ["#VE CPUID at inner"], program)
        self.server = GdbServer("127.0.0.1:0", self.vcpu, target, lambda _: None)

    def handle(self, reason):
        if reason is Exit.HLT:
            self.ended = True
            self.vcpu.stop()
        elif reason is Exit.CPUID:
            self.cpuids += 1
            self.vcpu.advance(self.vcpu.length)
        elif reason is not Exit.BOUNDARY:
            raise AssertionError(f"unexpected {reason!r}")

    def close(self):
        self.server.close()
        self.engine.close()
        self.binary.close()


@pytest.fixture
def guest(program):
    made = Guest(program)
    yield made
    made.close()


def debug(guest, program, *commands):
    """Run the guest under gdb; return what gdb printed, and its lines that start with @."""
    host, port = guest.server.address
    script = ["set pagination off", "set confirm off", f"target remote {host}:{port}", *commands]
    arguments = [word for command in script for word in ("-ex", command)]
    with subprocess.Popen(
        ["gdb", "-nx", "-q", "-batch", *arguments, str(program)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as gdb:
        try:
            guest.server.run(guest.handle, lambda: guest.ended)
            guest.server.finish(clean=True, text="")
            output, _ = gdb.communicate(timeout=SECONDS)
        finally:
            gdb.kill()
    return output


def test_breakpoints_back_traces_variables_and_the_end(guest, program):
    output = debug(
        guest,
        program,
        "break inner if n == 2",
        "continue",
        "bt",
        "print counter",
        "print table",
        "up",
        "info locals",
        "delete",
        "continue",
    )
    assert "Breakpoint 1, inner (n=" in output
    assert "#1" in output
    assert re.search(r"in outer \(n=.*2\) at guest.c:14", output)
    assert "in start () at guest.c:21" in output
    assert "= 1" in output
    assert "{10, 20, 30, 40}" in output
    assert "exited normally" in output
    assert guest.ended
    assert guest.cpuids == 3


def test_steps_registers_and_memory(guest, program):
    output = debug(
        guest,
        program,
        "print $pc == (long) start",
        "stepi",
        "print $pc > (long) start",
        "hbreak outer",
        "continue",
        'printf "@cs %d cr0 %lx efer %lx\\n", $cs, $cr0, $efer',
        "info registers rip eflags",
        "set var n = 3",
        "set var table[3] = 77",
        "finish",
        "x/2i $pc",
        "x/1xb 0x7fffffff0000",
        "kill",
    )
    assert "= 1\n" in output
    assert "Value returned is $" in output
    assert "= 80" in output  # counter 3 + table[3] 77
    assert "Cannot access memory at address 0x7fffffff0000" in output
    cs, cr0, efer = next(line for line in output.splitlines() if "@cs" in line).split()[1::2]
    assert int(cr0, 16) & 0x80000001 == 0x80000001
    assert int(efer, 16) & 0x400
    assert int(cs) == guest.vcpu.segment("cs").selector
    assert guest.server.was_killed
    assert not guest.ended


def test_stepping_passes_instructions_that_exit(guest, program):
    output = debug(guest, program, "break inner", "continue", "next", "next", "info line", "kill")
    assert guest.cpuids == 1
    assert "9\t    return counter;" in output
    assert "Line 9 of " in output


def test_monitor_shows_what_gdb_cannot_know(guest, program):
    output = debug(
        guest, program, "break inner", "continue", "monitor kaslr", "monitor traps", "monitor bt"
    )
    assert f"symbol-file {program} -o 0x0" in output
    assert "#VE CPUID at inner" in output
    assert re.search(r"\n inner\+0x[0-9a-f]+/0x[0-9a-f]+\n", output)


def test_detaching_lets_the_guest_finish(guest, program):
    debug(guest, program, "break inner", "continue", "detach")
    assert guest.ended
    assert guest.cpuids == 3
