"""gdb on Debian's kernel: a back trace in the #VE handler, with symbols and source lines."""

import re
import shutil
import subprocess

import pytest

from trapline.boot.plan import BootOptions, make_plan, open_symbols
from trapline.boot.run import BootRun
from trapline.kernel.binary import Binary
from trapline.machine.gdb.debugview import TdTarget
from trapline.machine.gdb.server import GdbServer
from trapline.machine.loader import kernelimage
from trapline.machine.machine import Machine, MachineConfig
from trapline.machine.observe.symbols import GuestSymbols

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed"),
]

SECONDS = 300
COMMAND_LINE = "earlyprintk=serial,ttyS0,115200 console=ttyS0"


def debug(path, symbols_of, *commands, slide=None):
    """Boot `path` under gdb with the symbols of `symbols_of`; return what gdb printed."""
    with Binary.open_vmlinux(symbols_of) as vmlinux:
        image = kernelimage.open_image(path)
        machine = Machine(
            MachineConfig(image=image, command_line=COMMAND_LINE, initrd=b"", seconds=SECONDS)
        )
        symbols = GuestSymbols(machine.vcpu, vmlinux)
        if slide is not None:
            symbols.place_kernel(slide, 0)
        target = TdTarget(machine.vcpu, symbols, lambda _: [], symbols_of)
        with GdbServer("127.0.0.1:0", machine.vcpu, target, lambda _: None) as server:
            output = _drive(machine, server, symbols_of, commands)
        symbols.close()
        machine.close()
    return output


def _drive(machine, server, symbols_of, commands):
    def boot():
        with machine.module.listening(server):
            outcome = machine.run(lambda handler: server.run(handler, machine.ended))
        server.finish(clean=outcome.is_clean, text=outcome.detail)

    return gdb_session(server, symbols_of, commands, boot)


def gdb_session(server, symbols_of, commands, boot):
    """Run gdb beside `boot`; return what it printed."""
    host, port = server.address
    script = ["set pagination off", "set confirm off", f"target remote {host}:{port}", *commands]
    arguments = [word for command in (*script, "kill") for word in ("-ex", command)]
    with subprocess.Popen(
        ["gdb", "-nx", "-q", "-batch", *arguments, str(symbols_of)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as gdb:
        try:
            boot()
            output, _ = gdb.communicate(timeout=SECONDS)
        finally:
            gdb.kill()
    return output


def test_a_back_trace_in_the_ve_handler(debian_kernel):
    output = debug(
        debian_kernel.vmlinux,
        debian_kernel.vmlinux,
        "break tdx_handle_virt_exception",
        "continue",
        "bt",
        "print ve->exit_reason",
        'printf "@rip %s\\n", $_as_string(regs->ip)',
        "monitor bt",
        slide=0,
    )
    assert "Breakpoint 1, tdx_handle_virt_exception (regs=" in output
    assert re.search(r"#\d .*\bexc_virtualization_exception \(regs=.*traps\.c:\d+", output)
    assert re.search(r"#\d .* in asm_exc_virtualization_exception ", output)
    assert "Ignoring packet error" not in output
    # gdb has no unwind information for the entry code; trapline has the kernel's own.
    walked = output[output.rindex(" tdx_handle_virt_exception+0x") :]
    assert " asm_exc_virtualization_exception+0x" in walked
    assert " start_kernel+0x" in walked
    assert "the stack makes no sense" not in walked


def test_a_boot_image_is_found_where_kaslr_put_it(debian_kernel):
    """Stop at #VEs until the kernel proper runs, then let gdb load its symbols there."""
    output = debug(
        debian_kernel.vmlinuz,
        debian_kernel.vmlinux,
        "monitor kaslr",
        "monitor stop-on ve",
        "continue",
        "monitor kaslr",
    )
    assert "the kernel does not run at its own addresses yet" in output
    found = re.search(r"^symbol-file .* -o 0x([0-9a-f]+)$", output, re.MULTILINE)
    assert found, output
    slide = int(found[1], 16)
    assert slide % (2 << 20) == 0
    assert slide < 1 << 30


def test_a_module_is_debugged_where_it_was_loaded(debian_kernel):
    """The back trace goes from the module through its init call to the system call."""
    plan = make_plan(debian_kernel, BootOptions(insmod=("dummy",), timeout=SECONDS), print)

    def load(pattern):
        return (
            f"python import re; gdb.execute(re.search(r'^{pattern}.*$', "
            "gdb.execute('monitor kaslr', to_string=True), re.M)[0])"
        )

    commands = [
        "monitor stop-on ve",
        "continue",
        "monitor stop-on none",
        load("symbol-file"),
        "break do_init_module",
        "continue",
        load("add-symbol-file"),
        "break dummy_setup",
        "continue",
        "monitor bt",
    ]
    with open_symbols(plan) as vmlinux, BootRun(plan, vmlinux, reproduce="") as run:
        target = run.debug_target()
        with GdbServer("127.0.0.1:0", run.machine.vcpu, target, lambda _: None) as server:
            output = gdb_session(server, debian_kernel.vmlinux, commands, lambda: run.run(server))
    trace = output[output.rindex(" dummy_setup+0x0/") :]
    assert "dummy_setup+0x0/" in trace
    assert "[dummy]\n     drivers/net/dummy.c:" in trace
    assert re.search(r"drivers/net/dummy\.c:\d+ dummy_init_one \(inlined\)", trace)
    assert " do_one_initcall+0x" in trace
    assert " do_syscall_64+0x" in trace
    assert "\n user+0x" in trace


def test_a_function_is_found_by_name_in_one_step(debian_kernel):
    """KASLR is on, and nobody says so: the breakpoint is hit, and *ve is at hand."""
    plan = make_plan(debian_kernel, BootOptions(timeout=SECONDS))
    commands = [
        "info symbol $pc",
        "break tdx_handle_virt_exception if ve->exit_reason == 32",
        "continue",
        "print *ve",
    ]
    with open_symbols(plan) as vmlinux, BootRun(plan, vmlinux, reproduce="") as run:
        target = run.debug_target()
        with GdbServer("127.0.0.1:0", run.machine.vcpu, target, lambda _: None) as server:
            output = gdb_session(
                server, debian_kernel.vmlinux, commands, lambda: run.run(server, "kernel")
            )
        assert run.symbols.slide
    assert "start_kernel in section" in output
    assert "Breakpoint 1, tdx_handle_virt_exception" in output
    assert "{exit_reason = 32," in output
