"""Each fault that a gap can have, planted in assembled entry code, and its sound twin."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

import entry_kernel
import tiny_kernel
import trapline
from trapline.base.errors import ExitCode
from trapline.results.findings import exit_code, findings


@cache
def result(**planted):
    return trapline.contexts(entry_kernel.build(mkdtemp(), **planted))


def gap_of(document, name):
    (gap,) = (gap for gap in document.gaps if gap.id == name)
    return gap


def faults(document, name):
    return [site for site in gap_of(document, name).sites if site.answer != "no"]


def test_the_kernel_itself_is_proved():
    document = result()
    assert [gap.id for gap in document.gaps] == ["syscall", "interrupts", "ve", "nmi"]
    assert all(gap.proved for gap in document.gaps)
    assert exit_code(document) == ExitCode.CLEAN
    assert findings(document) == ()


def test_the_gap_is_what_runs_before_the_stack_is_the_kernels():
    gap = gap_of(result(), "syscall")
    assert [each.instruction.partition(" ")[0] for each in gap.instructions] == [
        *("swapgs", "mov", "mov", "swapgs", "sysretq")
    ]
    first, _, third, fourth, last = gap.instructions
    assert first.conditions == ("user GS", "user stack")
    assert third.conditions == ("user stack",)
    assert fourth.directions == last.directions == ("out",)
    assert (gap.in_, gap.out, gap.leaves) == (3, 2, ("SYSRET",))


CPUID = "mov $0x40000000, %eax; cpuid"
ONE_SIDE = f"test $1, %eax; jz 9f; {CPUID}; 9:"
NEVER = f"cmpb $0, never(%rip); je 9f; {CPUID}; 9:"
WRMSR = "mov $0x1b, %ecx; wrmsr"
NATIVE = "mov $0x48, %ecx; wrmsr"
APIC = "mov $0xffffffffff5fd000, %rax; mov 0x20(%rax), %ebx"
OWN = "mov $never, %rax; mov (%rax), %ebx"
USER_GS = "mov %gs:0x10, %rax"
THROUGH_USER = "mov 8(%rsp), %rax"


def alternative(old, new, feature):
    return f"""
        8: {old}
        9: .pushsection .altinstr_replacement, "ax"
        6: {new}
        7: .popsection
        ALTERNATIVE_AT 8b, 9b, 6b, 7b, {feature}
    """


NOPS = ".byte 0x0f, 0x1f, 0x40, 0x00, 0x90, 0x0f, 0x1f, 0x40, 0x00"
ONE_FORM = alternative(NOPS, CPUID, "9*32+5")
OTHER_FORM = alternative(CPUID, NOPS, "9*32+5")
XEN_FORM = alternative(NOPS, CPUID, "8*32+16")


@pytest.mark.parametrize(
    ("gap", "planted", "where", "twin"),
    [
        ("syscall", ONE_SIDE, "syscall_unsafe", {"syscall_safe": ONE_SIDE}),
        ("syscall", NEVER, "syscall_unsafe", {"syscall_safe": NEVER}),
        ("syscall", CPUID, "syscall_leaving", {"syscall_safe": CPUID}),
        ("syscall", WRMSR, "syscall_last", {"syscall_last": NATIVE}),
        ("syscall", ONE_FORM, "syscall_unsafe", {"syscall_unsafe": XEN_FORM}),
        ("syscall", OTHER_FORM, "syscall_unsafe", {"syscall_safe": OTHER_FORM}),
        ("syscall", USER_GS, "syscall_user_gs", {"syscall_unsafe": USER_GS}),
        ("syscall", THROUGH_USER, "syscall_unsafe", {"syscall_safe": THROUGH_USER}),
        ("syscall", "push %rax; pop %rax", "syscall_unsafe", {"syscall_safe": "push $1; pop %rax"}),
        ("interrupts", CPUID, "error_user_gs", {"iret_leaving": CPUID}),
        ("interrupts", CPUID, "error_kernel_gs", {"iret_leaving": CPUID}),
        ("interrupts", WRMSR, "iret_last", {"iret_leaving": WRMSR}),
        ("interrupts", USER_GS, "iret_last", {"iret_leaving": USER_GS}),
        ("ve", APIC, "ve_before_get", {"ve_after_get": APIC}),
        ("ve", APIC, "ve_before_get", {"ve_before_get": OWN}),
        ("ve", CPUID, "ve_before_get", {"ve_after_get": CPUID}),
        ("ve", WRMSR, "ve_before_get", {"ve_before_get": NATIVE}),
        ("nmi", CPUID, "nmi_unknown_gs", {"syscall_safe": CPUID}),
    ],
)
def test_a_fault_is_found_and_its_twin_passes(gap, planted, where, twin):
    bad, sound = result(**{where: planted}), result(**twin)
    assert faults(bad, gap)
    assert exit_code(bad) == ExitCode.FINDINGS
    assert not faults(sound, gap)
    assert gap_of(sound, gap).proved


def test_what_the_rules_let_pass_is_named_with_the_row():
    (site,) = gap_of(result(syscall_last=NATIVE), "syscall").sites
    assert (site.answer, site.rule, site.subject) == ("no", "msr-0x48", "0x48")
    (site,) = faults(result(syscall_last=WRMSR), "syscall")
    assert (site.answer, site.rule, site.directions) == ("ve", "msr-0x1b", ("out",))
    assert "user GS" in site.conditions


def test_a_number_that_is_not_known_is_said_to_be():
    (site,) = faults(result(syscall_unsafe="rdmsr"), "syscall")
    assert (site.answer, site.rule, site.subject) == ("may", "", "")


def test_a_fault_has_the_same_id_wherever_the_linker_puts_it():
    first = faults(result(syscall_unsafe=CPUID), "syscall")
    moved = faults(result(syscall_unsafe=f".nops 32; {CPUID}"), "syscall")
    assert [site.id for site in first] == [site.id for site in moved]
    assert first[0].place.address != moved[0].place.address


def test_the_sign_of_the_gs_base_decides_and_its_absence_is_seen():
    assert gap_of(result(), "nmi").proved
    blind = result(nmi_test="nop")
    inside = gap_of(blind, "nmi")
    by_handler = {each.place.function: each.conditions for each in inside.instructions}
    assert any("user GS" in found for name, found in by_handler.items() if name == "exc_nmi")


def test_a_jump_that_cannot_be_followed_is_no_proof():
    document = result(syscall_unsafe="test $1, %eax; jz 9f; jmp *%rax; 9:")
    gap = gap_of(document, "syscall")
    assert [edge.kind for edge in gap.edges] == ["indirect jump"]
    assert not gap.proved
    assert exit_code(document) == ExitCode.INCOMPLETE
    assert gap_of(result(syscall_safe="test $1, %eax; jz 9f; jmp *%rax; 9:"), "syscall").proved


def test_a_warning_while_ve_info_is_in_use_is_named_and_no_gap_of_the_proof():
    document = result(ve_before_get="test $1, %ebp; jz 9f; ud2; 9:")
    (edge,) = gap_of(document, "ve").edges
    assert (edge.kind, edge.place.function) == ("exception", "exc_ve")
    assert exit_code(document) == ExitCode.CLEAN
    assert [found.level for found in findings(document)] == ["note"]


def test_stubs_that_differ_only_in_what_they_call_are_walked_once():
    first, second = gap_of(result(), "interrupts").entries
    assert (first.function, first.like) == ("asm_sysvec_timer", None)
    assert (second.function, second.like) == ("asm_sysvec_ipi", "asm_sysvec_timer")
    assert (second.vector, second.found) == (251, "IDT table")


def test_what_is_true_of_a_stub_is_said_of_its_copies():
    gap = gap_of(result(error_user_gs=CPUID), "interrupts")
    stubs = {}
    for each in gap.instructions:
        if each.place.function.startswith("asm_sysvec"):
            found = each.place.offset, each.instruction.partition(" ")[0], each.conditions
            stubs.setdefault(each.place.function, []).append(found)
    assert len(stubs["asm_sysvec_timer"]) > 1
    assert stubs["asm_sysvec_timer"] == stubs["asm_sysvec_ipi"]


def test_a_stub_that_differs_is_walked():
    odd = """
        .section .entry.odd, "ax"
        FUNC asm_sysvec_odd
            push $-1
            mov $0x1b, %ecx
            rdmsr
            call error_entry
            mov %rax, %rsp
            mov %rsp, %rdi
            call handler
            jmp error_return
        DONE asm_sysvec_odd
        GATE 240, 0, asm_sysvec_odd
    """
    document = result(elsewhere=odd)
    assert [entry.like for entry in gap_of(document, "interrupts").entries] == [
        *(None, None, "asm_sysvec_timer")
    ]
    (site,) = faults(document, "interrupts")
    assert site.place.function == "asm_sysvec_odd"


@pytest.mark.parametrize(("name", "found"), [("ve_before_get", True), ("ve_after_get", False)])
def test_an_accessor_of_device_memory_is_told_by_its_header(name, found):
    folder = Path(mkdtemp())
    tiny_kernel.write_sources(folder)
    (folder / "drivers/demo/touch.c").write_text("""
        #include "asm/io.h"
        const void *device;
        unsigned int touch(void) { return readl(device); }
        unsigned int leave(void) { return *(const unsigned int *)device; }
    """)
    tiny_kernel.compile_object(folder, "drivers/demo/touch.c")
    for function, is_device in (("touch", found), ("leave", False)):
        vmlinux = entry_kernel.build(
            folder, objects=("drivers/demo/touch.o",), **{name: f"call {function}"}
        )
        gap = gap_of(trapline.contexts(vmlinux), "ve")
        assert bool([site for site in gap.sites if site.trap == "mmio"]) == is_device


def test_a_kernel_without_symbols_is_not_called_clean(tmp_path):
    vmlinux = entry_kernel.build(tmp_path)
    tiny_kernel.run(tmp_path, "strip", "-s", "vmlinux")
    document = trapline.contexts(vmlinux)
    assert document.missing
    assert exit_code(document) == ExitCode.INCOMPLETE


def test_the_same_kernel_gives_the_same_document(tmp_path):
    vmlinux = entry_kernel.build(tmp_path, ve_before_get=APIC)
    assert trapline.contexts(vmlinux) == trapline.contexts(vmlinux)
