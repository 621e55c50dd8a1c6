"""The text of a boot: what it says, and that it pastes into a mail."""

import msgspec
import pytest

from reports import text
from trapline.base.errors import ExitCode
from trapline.results.boot import (
    BootKernel,
    BootMachine,
    BootOutcome,
    BootResult,
    Complaint,
    Hashes,
    Milestone,
    Refusals,
    RunProgram,
    Soundness,
    TrapSite,
)
from trapline.results.findings import exit_code
from trapline.results.scan import Frame
from trapline.results.splat import Task


def site(**changes):
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


STRANGE = site(
    trap="mmio", count=3, label="mystery+0x4/0x9", standing="unaccounted", scan_id=None,
    reason="the scan has no mmio site at this address",
)  # fmt: skip


def boot(**changes):
    sites = (site(), STRANGE, site(trap="cpuid", count=7, image="user", label="user+0x401000"))
    fields = {
        "generator": "trapline 0",
        "kernel": BootKernel(
            release="6.12.0-test", build_id="00ff", image="bzImage", file="vmlinuz",
            slide="0x24000000",
        ),
        "machine": BootMachine(
            module_version="1.5.01", memory=512 << 20, unaccepted=0,
            command_line="console=ttyS0 " + "x=y " * 40, initrd="self-test", devices=(),
        ),
        "outcome": BootOutcome(
            kind="powered-off", detail="The guest powered itself off.", exit_code=0, seconds=2.5,
            place="acpi_os_enter_sleep+0x1/0x2",
        ),
        "milestones": (Milestone(name="TDX detected", seconds=0.4, evidence="console"),),
        "traps": {"pio": 1234, "cpuid": 7, "mmio": 3},
        "tdcalls": {"TDG.VP.VMCALL": 1244},
        "tdvmcalls": {"Instruction.IO": 1234},
        "sites": sites,
        "sites_dropped": 0,
        "soundness": Soundness(
            scanned=True, traps=1237, traps_found=1234, sites=2, sites_found=1, outside_traps=7
        ),
        "unaccounted": (STRANGE,),
        "refused": Refusals(ports={"0x2e9": 6, "0x80": 1}, mmio={}, msrs={"0x4e": 1}),
        "console_bytes": 10,
        "hashes": Hashes(trace="aa", console="bb", ram="cc"),
        "splat": None,
    }  # fmt: skip
    return BootResult(**{**fields, **changes})


@pytest.mark.parametrize("verbosity", [0, 1])
def test_no_line_is_wider_than_a_mail(verbosity):
    assert max(map(len, text(boot(), verbosity).splitlines())) <= 80


def test_the_first_lines_say_what_ran_and_how_it_ended():
    lines = text(boot()).splitlines()
    assert lines[0].startswith("6.12.0-test (bzImage) as a TD: TDX module 1.5.01, 512 MiB")
    assert "KASLR slide: 0x24000000" in lines
    assert "powered-off after 2.500 s of virtual time. The guest powered itself off." in lines


def test_a_guest_that_died_says_where():
    outcome = BootOutcome(
        kind="panic", detail="Kernel panic: oh.", exit_code=20, seconds=1.0, place="panic+0x1/0x2"
    )
    assert "The guest was at panic+0x1/0x2." in text(boot(outcome=outcome))
    assert "The guest was at" not in text(boot())


def complaint(**changes):
    fields = {
        "kind": "oops", "count": 2, "seconds": 0.5, "text": "Oops: VE fault: 0000 [#1]",
        "fails": True, "splat": None,
    }  # fmt: skip
    return Complaint(**{**fields, **changes})


def test_a_guest_whose_kernel_complained_is_no_success():
    sick = boot(complaints=(complaint(), complaint(kind="warning", count=1, fails=False)))
    report = text(sick)
    assert "The guest's kernel complained 3 times" in report
    assert "oops at 0.500000 s, first of 2: Oops: VE fault: 0000 [#1]" in report
    assert "warning, put up with at 0.500000 s:" in report
    assert exit_code(sick) == ExitCode.GUEST_COMPLAINED
    assert exit_code(boot(complaints=(complaint(fails=False),))) == ExitCode.CLEAN
    assert "complained" not in text(boot())


def test_how_a_guest_died_says_more_than_that_it_complained():
    outcome = BootOutcome(
        kind="panic", detail="Kernel panic: oh.", exit_code=20, seconds=1.0, place="panic+0x1/0x2"
    )
    assert exit_code(boot(outcome=outcome, complaints=(complaint(),))) == ExitCode.GUEST_PANIC


def test_a_program_decides_the_exit_code_where_all_else_went_well():
    ran = RunProgram(name="t.sh", exit_code=42, out=10, err=0)
    assert exit_code(boot(program=ran)) == 42
    assert "t.sh exited with 42; it printed 10 bytes" in text(boot(program=ran))
    assert exit_code(boot(program=ran, complaints=(complaint(),))) == ExitCode.GUEST_COMPLAINED
    untold = RunProgram(name="t.sh", exit_code=None, out=0, err=0)
    assert exit_code(boot(program=untold)) == ExitCode.INCOMPLETE
    assert "ended before t.sh told its exit code" in text(boot(program=untold))


def test_a_guest_that_came_to_no_end_shows_what_its_tasks_wait_for():
    waits = Task(pid=1, comm="init", state="D", is_running=False, trace=("a+1/2", "b+1/2"))
    idle = Task(pid=9, comm="kworker/0", state="I", is_running=False, trace=("worker+1/2",))
    runs = Task(pid=0, comm="swapper", state="R", is_running=True, trace=("halt+1/2",))
    hung = boot(tasks=(waits, idle, runs), last_line="Waiting for root device")
    lines = text(hung).splitlines()
    assert "What its tasks wait for: 2 of 3 tasks" in lines
    at = lines.index("init (PID 1) D")
    assert lines[at + 1 : at + 3] == ["  a+1/2", "  b+1/2"]
    assert "swapper (PID 0) R, running" in lines
    assert "The last line of its console: Waiting for root device" in lines
    assert "kworker/0" not in text(hung)
    assert "kworker/0 (PID 9) I" in text(hung, 1)


def test_classes_count_places_and_ring_3():
    rows = [line.split() for line in text(boot()).splitlines()]
    assert ["pio", "1,234", "1", "0"] in rows
    assert ["cpuid", "7", "1", "7"] in rows


def test_soundness_names_what_the_scan_missed():
    report = text(boot())
    joined = " ".join(report.split())
    assert "99.75 % of the #VEs and TDCALLs (1,234 of 1,237)" in joined  # rounded down
    assert "1 of the 2 places" in joined
    assert "mystery+0x4/0x9" in report.partition("Not accounted for")[2]


def test_without_a_scan_nothing_is_claimed():
    unmeasured = Soundness(
        scanned=False, traps=1237, traps_found=0, sites=2, sites_found=0, outside_traps=7
    )
    report = text(boot(soundness=unmeasured))
    assert "Soundness: not measured" in report
    assert "%" not in report


@pytest.mark.parametrize("verbosity", [0, 1])
def test_what_was_dropped_is_said(verbosity):
    said = "NOT LISTED: 1,234 traps from other places than these 3."
    assert said in text(boot(sites_dropped=1234), verbosity)
    assert "NOT LISTED" not in text(boot(), verbosity)


def test_verbose_lists_every_place_with_its_chain():
    report = text(boot(), 1)
    assert "outb (inlined) arch/x86/include/asm/shared/io.h:22" in report
    assert "[scan abcdef0123456789]" in report


def test_refusals_are_listed_and_left_out_when_there_are_none():
    assert "0x2e9 x6, 0x80" in text(boot()).replace("\n", " ")
    assert "not there" not in text(boot(refused=Refusals(ports={}, mmio={}, msrs={})))


def test_control_characters_in_names_do_not_reach_the_terminal():
    hostile = site(label="evil\x1b]0;x\x07+0x0/0x1", function="evil")
    assert "\x1b" not in text(boot(sites=(hostile,)))
    assert "\x1b" not in text(boot(sites=(hostile,)), 1)


def test_the_document_can_be_read_back():
    result = boot()
    assert msgspec.json.decode(msgspec.json.encode(result), type=BootResult) == result
