"""Events in the engine: frames, stacks, nesting, shadows, NMIs, steps.

Outcomes are those of the SDM; sections are of volume 3A unless another volume is named.
"""

import pytest

from bare_guest import (
    ABSENT,
    CODE,
    DATA,
    IST,
    KERNEL_CS,
    KERNEL_SS,
    RSP0,
    STACK,
    USER_CS,
    USER_SS,
    USER_STACK,
    BareGuest,
)
from trapline.cpu.engine import Exit, Reg, SegmentRegister

HANDLER = "hlt; nop\n"


def test_a_fault_without_error_code_pushes_five_words():
    """Section 6.14.2; #DE is a fault: RIP is that of the instruction (6.15)."""
    with BareGuest("xor edx, edx\n xor ecx, ecx\nbad: div ecx\n hlt\nvec_0: hlt") as guest:
        guest.run()
        assert guest.at("vec_0")
        frame = guest.frame()
        assert frame["rip"] == guest.labels["bad"]
        assert (frame["cs"], frame["ss"], frame["rsp"]) == (KERNEL_CS, KERNEL_SS, STACK)
        assert guest.reg("RSP") == STACK - 40


def test_a_fault_with_error_code_pushes_it_last():
    """Section 6.13: the selector's index is the error code of a #GP from a segment load."""
    with BareGuest("mov eax, 0x58\nbad: mov ds, ax\n hlt\nvec_13: hlt") as guest:
        guest.run()
        frame = guest.frame(error_code=True)
        assert frame["code"] == 0x58
        assert frame["rip"] == guest.labels["bad"]
        assert guest.reg("RSP") == STACK - 48


@pytest.mark.parametrize(
    ("access", "code"),
    [
        ("mov eax, [rbx]", 0),
        ("mov [rbx], eax", 2),
        ("jmp rbx", 0x10),  # EFER.NXE is set: instruction fetch is told
    ],
)
def test_a_page_fault_tells_address_and_access(access, code):
    """Section 4.7: error code of a page fault, CR2."""
    with BareGuest(f"mov ebx, ABSENT + 8\nbad: {access}\n hlt\nvec_14: hlt") as guest:
        guest.run()
        frame = guest.frame(error_code=True)
        assert frame["code"] == code
        assert guest.vcpu.cr(2) == ABSENT + 8
        assert frame["rip"] == (ABSENT + 8 if code == 0x10 else guest.labels["bad"])
        assert not [kind for kind, _ in guest.exits if kind is not Exit.HLT]
        assert guest.at("vec_14")


def test_the_second_page_fault_is_a_page_fault():
    """Section 6.15, #DF: only a fault during the delivery of another makes a double fault."""
    source = "xor ecx, ecx\n mov ebx, ABSENT\n mov eax, [rbx]\n mov eax, [rbx]\nend: hlt\n"
    source += "vec_14: inc ecx\n add qword ptr [rsp + 8], 2\n add rsp, 8\n iretq"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.reg("RCX") == 2
        assert guest.at("end")


def test_an_undefined_instruction_is_told_and_delivered():
    with BareGuest("bad: ud2\n hlt\nvec_6: hlt") as guest:
        guest.run()
        assert guest.exits[0] == (Exit.UNDEFINED, guest.labels["bad"])
        assert guest.frame()["rip"] == guest.labels["bad"]


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupt_stack_table_entry_is_used(number):
    """Section 6.14.5: IST, aligned to 16 bytes, at whatever CPL."""
    source = "mov rsp, STACK - 3\n ud2\nvec_6: hlt"
    with BareGuest(source, ist={6: number}) as guest:
        guest.run()
        assert guest.reg("RSP") == IST[number - 1] - 40
        assert guest.frame()["rsp"] == STACK - 3


def test_the_stack_is_aligned_without_ist():
    """Section 6.14.2: RSP is aligned to 16 bytes before the frame is pushed."""
    with BareGuest("mov rsp, STACK - 3\n ud2\nvec_6: hlt") as guest:
        guest.run()
        assert guest.reg("RSP") == STACK - 16 - 40


def test_from_user_mode_the_stack_is_that_of_the_tss():
    """Section 6.14.4: RSP0; SS is the null selector with the new CPL as RPL."""
    with BareGuest("to_user user\nuser: ud2\nvec_6: hlt") as guest:
        guest.run()
        frame = guest.frame()
        assert (frame["cs"], frame["ss"], frame["rsp"]) == (USER_CS | 3, USER_SS | 3, USER_STACK)
        assert guest.reg("RSP") == RSP0 - 40
        assert guest.vcpu.cpl == 0
        assert guest.vcpu.segment("ss").selector == 0


def test_a_page_fault_while_a_page_fault_is_delivered_is_a_double_fault():
    """Section 6.15, table 6-5."""
    source = "mov ebx, ABSENT\n mov rsp, ABSENT\nbad: mov eax, [rbx]\nvec_14: hlt\nvec_8: hlt"
    with BareGuest(source, ist={8: 1}) as guest:
        guest.run()
        assert guest.at("vec_8")
        assert guest.frame(error_code=True)["code"] == 0
        assert guest.frame(error_code=True)["rip"] == guest.labels["bad"]


def test_a_missing_gate_while_a_page_fault_is_delivered_is_a_double_fault():
    """Table 6-5: #NP is contributory; section 6.15 of #NP."""
    with BareGuest("mov ebx, ABSENT\n mov eax, [rbx]\nvec_8: hlt", ist={8: 1}) as guest:
        guest.run()
        assert guest.at("vec_8")


def test_a_missing_gate_while_an_interrupt_is_delivered_is_told_as_such():
    """Section 6.13: IDT and EXT bits of the error code; a benign first event gives no #DF."""
    with BareGuest("1: jmp 1b\nvec_13: hlt\nvec_11: hlt") as guest:
        guest.vcpu.deliver_interrupt(0x60)
        guest.run()
        # A gate of type 0 is no gate at all: #GP, not #NP (section 6.14.1).
        assert guest.at("vec_13")
        assert guest.frame(error_code=True)["code"] == 0x60 * 8 + 3


@pytest.mark.parametrize("source", ["ud2", "mov ebx, ABSENT\n mov eax, [rbx]", "int 3"])
def test_without_any_gate_there_is_a_triple_fault(source):
    """Section 6.15, #DF: a fault while a double fault is delivered shuts the processor down."""
    with BareGuest(source + "\n hlt") as guest:
        guest.run()
        assert guest.exits[-1][0] is Exit.TRIPLE_FAULT


def test_an_exception_wanted_is_told_and_can_be_delivered():
    with BareGuest("xor ecx, ecx\n xor edx, edx\nbad: div ecx\nvec_0: hlt") as guest:
        seen = []
        guest.vcpu.intercept_exceptions(frozenset({0}))
        guest.on[Exit.EXCEPTION] = lambda: (
            seen.append(guest.vcpu.fault),
            guest.vcpu.deliver(guest.vcpu.fault.vector, guest.vcpu.fault.error_code),
        )
        guest.run()
        assert seen[0].vector == 0
        assert guest.exits[0] == (Exit.EXCEPTION, guest.labels["bad"])
        assert guest.at("vec_0")


def test_a_double_fault_can_be_told_too():
    source = "mov ebx, ABSENT\n mov rsp, ABSENT\n mov eax, [rbx]\nvec_14: hlt\nvec_8: hlt"
    with BareGuest(source, ist={8: 1}) as guest:
        guest.vcpu.intercept_exceptions(frozenset({8}))
        guest.on[Exit.EXCEPTION] = guest.vcpu.stop
        guest.run()
        assert guest.vcpu.fault.vector == 8


# Software interrupts.


@pytest.mark.parametrize(
    ("instruction", "vector", "length"), [("int 0x80", 128, 2), ("int3", 3, 1), ("int 3", 3, 1)]
)
def test_a_software_interrupt_pushes_the_next_instruction(instruction, vector, length):
    """INT n in volume 2A."""
    source = f"to_user user\nuser: {instruction}\nvec_{vector}: hlt"
    with BareGuest(source, user_gates={vector}) as guest:
        guest.run()
        assert guest.frame()["rip"] == guest.labels["user"] + length
        assert guest.reg("RSP") == RSP0 - 40


@pytest.mark.parametrize(("instruction", "vector"), [("int 0x20", 0x20), ("int3", 3)])
def test_a_gate_of_more_privilege_refuses_a_software_interrupt(instruction, vector):
    """Section 6.12.1.2: #GP(vector * 8 + 2) at the instruction itself."""
    source = f"to_user user\nuser: {instruction}\nvec_{vector}: hlt\nvec_13: hlt"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.at("vec_13")
        frame = guest.frame(error_code=True)
        assert (frame["code"], frame["rip"]) == (vector * 8 + 2, guest.labels["user"])


def test_a_fault_after_a_software_interrupt_has_its_own_address():
    """The core remembers that an INT n was under way; nothing of it may reach later events."""
    source = "int 0x40\n mov ebx, ABSENT\nbad: mov eax, [rbx]\nvec_64: iretq\nvec_14: hlt"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.frame(error_code=True)["rip"] == guest.labels["bad"]


# Single step, breakpoints, counts.


def test_the_trap_flag_traps_after_one_instruction():
    """Section 17.3.1.4: #DB after the instruction, DR6.BS."""
    source = "pushfq\n or dword ptr [rsp], 0x100\n popfq\n nop\nafter: nop\n hlt\nvec_1: hlt"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.at("vec_1")
        assert guest.frame()["rip"] == guest.labels["after"]
        assert guest.vcpu.dr(6) & 1 << 14


def test_the_trap_flag_traps_after_an_emulated_instruction():
    source = "pushfq\n or dword ptr [rsp], 0x100\n popfq\n cpuid\nafter: nop\n hlt\nvec_1: hlt"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.frame()["rip"] == guest.labels["after"]


def test_a_debug_register_breaks_before_its_instruction():
    """Section 17.3.1.1: an instruction breakpoint is a fault."""
    source = """
        lea rax, [rip + here]
        mov dr0, rax
        mov eax, 0x401
        mov dr7, rax
        nop
here:   nop
        hlt
vec_1:  hlt
    """
    with BareGuest(source) as guest:
        guest.run()
        assert guest.at("vec_1")
        assert guest.frame()["rip"] == guest.labels["here"]
        assert guest.vcpu.dr(6) & 1


def test_a_step_is_one_instruction():
    source = "one: nop\ntwo: mov eax, 1\nthree: call four\n nop\nfour: rep stosb\nfive: hlt"
    with BareGuest(source) as guest:
        guest.vcpu.regs[Reg.RCX] = 0
        seen = []
        for _ in range(4):
            seen.append(guest.reg("RIP"))
            guest.vcpu.step(guest.handle)
        assert seen == [guest.labels[name] for name in ("one", "two", "three", "four")]
        assert guest.at("five")
        assert guest.exits == []


def test_a_step_over_an_exit_ends_when_the_handler_has_advanced():
    with BareGuest("one: cpuid\ntwo: rdtsc\nthree: nop") as guest:
        for label in ("two", "three"):
            guest.vcpu.step(guest.handle)
            assert guest.at(label)
        assert [kind for kind, _ in guest.exits] == [Exit.CPUID]


def test_a_step_into_an_event_stops_before_its_handler():
    with BareGuest("ud2\nvec_6: nop\n hlt") as guest:
        guest.vcpu.step(guest.handle)
        assert guest.at("vec_6")


def test_a_step_of_a_software_interrupt_stops_before_its_handler():
    with BareGuest("int 0x40\nvec_64: nop\n hlt") as guest:
        guest.vcpu.step(guest.handle)
        assert guest.at("vec_64")


def test_a_step_delivers_a_waiting_event_and_no_more():
    with BareGuest("nop\nvec_64: nop\n hlt") as guest:
        guest.vcpu.deliver_interrupt(64)
        guest.vcpu.step(guest.handle)
        assert guest.at("vec_64")


def test_a_breakpoint_stops_before_its_instruction_once():
    with BareGuest("mov ecx, 3\nhere: dec ecx\n jnz here\n hlt") as guest:
        guest.vcpu.set_breakpoints(frozenset({guest.labels["here"]}))
        guest.on[Exit.BREAKPOINT] = lambda: None
        guest.run()
        hits = [rip for kind, rip in guest.exits if kind is Exit.BREAKPOINT]
        assert hits == [guest.labels["here"]] * 3
        assert guest.reg("RCX") == 0


def test_a_breakpoint_on_an_instruction_that_exits_stops_once():
    with BareGuest("here: cpuid\n hlt") as guest:
        guest.vcpu.set_breakpoints(frozenset({CODE}))
        guest.on[Exit.BREAKPOINT] = lambda: None
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.BREAKPOINT, Exit.CPUID, Exit.HLT]


def test_breakpoints_can_be_removed():
    with BareGuest("here: nop\n hlt") as guest:
        guest.vcpu.set_breakpoints(frozenset({CODE, CODE + 1}))
        guest.vcpu.set_breakpoints(frozenset())
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT]


def test_exact_counts_count_what_retired():
    """Emulated instructions count once, faulting ones not, repeated ones once they are done."""
    source = """
        nop                      # 1
        cpuid                    # 2
        rdtsc                    # 3
        int 0x40                 # 4, then 6: 2 in the handler
        mov ebx, DATA            # 7
        mov eax, [rbx]           # 8
        ud2                      # delivered: 1 in the handler
        hlt
vec_64: nop
        iretq
vec_6:  nop
        hlt
    """
    with BareGuest(source) as guest:
        guest.vcpu.exact_counts(True)
        guest.run()
        assert guest.vcpu.instructions == 9


def test_an_instruction_budget_is_exact():
    with BareGuest("1: inc eax\n jmp 1b") as guest:
        vcpu = guest.vcpu
        vcpu.exact_counts(True)
        vcpu.regs[Reg.RAX] = 0
        for count in (1, 2, 99):
            before = vcpu.instructions
            vcpu.set_instruction_budget(count)
            guest.on[Exit.BOUNDARY] = vcpu.stop
            vcpu.run(guest.handle)
            assert vcpu.instructions - before == count
        assert guest.reg("RAX") == 51


# Interrupt windows and shadows.


def window_rip(source, *, flags=2):
    """RIP of the interrupt window that is asked for before the first instruction."""
    with BareGuest(source) as guest:
        guest.vcpu.rflags = flags
        guest.vcpu.request_interrupt_window(True)

        def window():
            guest.vcpu.request_interrupt_window(False)
            guest.vcpu.deliver_interrupt(0x40)

        guest.on[Exit.INTERRUPT_WINDOW] = window
        guest.run()
        rips = [rip for kind, rip in guest.exits if kind is Exit.INTERRUPT_WINDOW]
        assert len(rips) <= 1
        label = next((name for name, at in guest.labels.items() if rips and at == rips[0]), None)
        if label:
            assert guest.frame()["rip"] == guest.labels[label]
        return label


def test_a_window_is_open_at_once_with_interrupts_on():
    assert window_rip("here: nop\n nop\n hlt\nvec_64: hlt", flags=0x202) in {"here", "_start"}


def test_no_window_with_interrupts_off():
    assert window_rip("nop\n nop\n hlt\nvec_64: hlt") is None


def test_sti_holds_interrupts_for_one_instruction():
    """Section 6.8.3, and STI in volume 2B."""
    assert window_rip("sti\n nop\nhere: nop\n hlt\nvec_64: hlt") == "here"


def test_sti_and_hlt_wait_for_the_interrupt_in_hlt():
    """The window opens after HLT's exit, with RIP behind it, and not between the two."""
    with BareGuest("sti\n hlt\nhere: nop\n hlt\nvec_64: hlt") as guest:
        vcpu = guest.vcpu
        vcpu.request_interrupt_window(True)
        guest.on[Exit.HLT] = lambda: vcpu.advance(1)

        def window():
            vcpu.request_interrupt_window(False)
            vcpu.stop()

        guest.on[Exit.INTERRUPT_WINDOW] = window
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.HLT, Exit.INTERRUPT_WINDOW]
        assert guest.at("here")


def test_a_load_of_ss_holds_interrupts_for_one_instruction():
    """Section 6.8.3: blocking by MOV SS."""
    source = f"mov eax, {KERNEL_SS}\n mov ss, ax\nnext: nop\nhere: nop\n hlt\nvec_64: hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.rflags = 0x202
        vcpu.step(guest.handle)
        vcpu.step(guest.handle)
        assert guest.at("next")
        assert vcpu.interrupt_shadow
        vcpu.request_interrupt_window(True)
        guest.on[Exit.INTERRUPT_WINDOW] = vcpu.stop
        guest.run()
        assert guest.at("here")


def test_a_boundary_is_reported_inside_a_shadow():
    with BareGuest("sti\nhere: nop\n hlt") as guest:
        vcpu = guest.vcpu
        vcpu.step(guest.handle)
        vcpu.request_boundary()
        guest.on[Exit.BOUNDARY] = vcpu.stop
        vcpu.run(guest.handle)
        assert guest.at("here")
        assert vcpu.interrupt_shadow


def test_an_interrupt_pushes_no_error_code():
    with BareGuest("here: nop\nvec_14: hlt") as guest:
        guest.vcpu.deliver_interrupt(14)
        guest.run()
        assert guest.reg("RSP") == STACK - 40


# NMIs.


def test_an_nmi_blocks_further_ones_until_iret():
    """Section 6.7.1."""
    source = "here: nop\n hlt\nvec_2: nop\n iretq"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.deliver_nmi()
        assert vcpu.nmi_blocked
        vcpu.step(guest.handle)
        assert guest.at("vec_2")
        vcpu.step(guest.handle)
        assert vcpu.nmi_blocked
        vcpu.step(guest.handle)
        assert guest.at("here")
        assert not vcpu.nmi_blocked


def test_the_nmi_window_opens_after_the_iret():
    source = "here: nop\n hlt\nvec_2: cpuid\n nop\n iretq"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.deliver_nmi()
        guest.on[Exit.CPUID] = lambda: (vcpu.request_nmi_window(True), vcpu.advance(2))
        guest.on[Exit.NMI_WINDOW] = vcpu.stop
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.CPUID, Exit.NMI_WINDOW]
        assert guest.at("here")


def test_the_nmi_window_opens_in_the_handler_of_a_fault_of_the_iret():
    """Section 6.7.1: IRET unblocks NMIs even if it faults."""
    source = "nop\nvec_2: mov dword ptr [rsp + 8], 0x58\nbad: iretq\nvec_13: nop\n hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.deliver_nmi()
        vcpu.request_nmi_window(True)
        guest.on[Exit.NMI_WINDOW] = vcpu.stop
        guest.run()
        assert guest.at("vec_13")


def test_the_nmi_window_is_open_at_once_when_nothing_blocks():
    with BareGuest("here: nop\n hlt") as guest:
        guest.vcpu.request_nmi_window(True)
        guest.on[Exit.NMI_WINDOW] = guest.vcpu.stop
        guest.run()
        assert guest.reg("RIP") == CODE


def test_an_nmi_takes_its_own_stack():
    with BareGuest("nop\nvec_2: hlt", ist={2: 2}) as guest:
        guest.vcpu.deliver_nmi()
        guest.run()
        assert guest.reg("RSP") == IST[1] - 40


# Events that end in exits.


def test_an_event_whose_delivery_exits_is_delivered_again():
    """The handler makes the stack's page reachable; the event must not be lost."""
    with BareGuest("int 0x40\n hlt\nvec_64: hlt") as guest:
        vcpu = guest.vcpu
        guest.map(STACK - 0x1000, guest.memory.shared_bit | STACK - 0x1000 | 7)
        seen = []

        def serve():
            seen.append((vcpu.vectoring, vcpu.ept.gpa))
            guest.map(STACK - 0x1000, STACK - 0x1000 | 7)

        guest.on[Exit.EPT_VIOLATION] = serve
        guest.run()
        assert guest.at("vec_64")
        assert seen == [(64, guest.memory.shared_bit | STACK - 8)]
        assert guest.frame()["rip"] == CODE + 2


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ("int 0x40", 20, "vec_20"),  # benign, then #VE: handled serially
        ("mov eax, [rbx]", 20, "vec_8"),  # #PF, then #VE: table 6-5
        ("mov eax, [rbx]", 13, "vec_8"),  # #PF, then #GP
        ("div ecx", 13, "vec_8"),  # contributory, then contributory
        ("div ecx", 20, "vec_20"),  # contributory, then #VE: not a double fault
    ],
)
def test_an_exception_during_delivery_is_combined(first, second, outcome):
    """Table 6-5; #VE counts as a page fault."""
    gates = "vec_64: hlt\nvec_14: hlt\nvec_0: hlt\n"
    source = f"xor edx, edx\n xor ecx, ecx\n mov ebx, ABSENT\n {first}\n{gates}"
    source += "vec_20: hlt\nvec_8: hlt\nvec_13: hlt"
    with BareGuest(source, ist={20: 1, 8: 1, 13: 1}) as guest:
        vcpu = guest.vcpu
        guest.map(STACK - 0x1000, guest.memory.shared_bit | STACK - 0x1000 | 7)
        guest.on[Exit.EPT_VIOLATION] = lambda: vcpu.deliver(second, 0)
        guest.run()
        assert guest.at(outcome)


def test_a_fault_during_a_double_fault_is_a_triple_fault():
    source = "mov ebx, ABSENT\n mov rsp, ABSENT\n mov eax, [rbx]\nvec_14: hlt\nvec_8: hlt"
    with BareGuest(source, ist={8: 1}) as guest:
        vcpu = guest.vcpu
        page = IST[0] - 0x1000
        guest.map(page, guest.memory.shared_bit | page | 7)
        guest.on[Exit.EPT_VIOLATION] = lambda: vcpu.deliver(20)
        guest.run()
        assert [kind for kind, _ in guest.exits] == [Exit.EPT_VIOLATION, Exit.TRIPLE_FAULT]


# What must not take the process down.


def test_a_null_task_register_is_a_fault_not_an_abort():
    source = "xor eax, eax\n ltr ax\n to_user user\nuser: ud2\nvec_6: hlt\nvec_10: hlt\nvec_8: hlt"
    with BareGuest(source) as guest:
        guest.run()
        assert guest.exits[-1][0] in {Exit.TRIPLE_FAULT, Exit.HLT}


def test_an_exception_of_the_handler_leaves_run_and_the_engine_lives():
    with BareGuest("cpuid\n mov eax, 7\n hlt") as guest:

        def fail():
            raise KeyError("from the handler")

        guest.on[Exit.CPUID] = fail
        with pytest.raises(KeyError, match="from the handler"):
            guest.run()
        assert guest.reg("RIP") == CODE
        del guest.on[Exit.CPUID]
        guest.run()
        assert guest.reg("RAX") == 7


def test_state_is_exact_at_every_boundary():
    """At every boundary of a loop RIP, registers and memory belong together."""
    source = "mov ebx, DATA\n1: inc rax\n mov [rbx], rax\n inc rcx\n jmp 1b\nvec_64: hlt"
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        vcpu.exact_counts(True)
        for count in range(1, 30):
            vcpu.regs[Reg.RIP] = CODE
            vcpu.regs[Reg.RAX] = vcpu.regs[Reg.RCX] = 0
            guest.memory.ram[DATA : DATA + 8] = bytes(8)
            vcpu.set_instruction_budget(count)
            guest.on[Exit.BOUNDARY] = vcpu.stop
            vcpu.run(guest.handle)
            done, part = divmod(count - 1, 4)
            rax = done + (part >= 1)
            stored = done + (part >= 2)
            assert guest.reg("RAX") == rax
            assert int.from_bytes(guest.memory.ram[DATA : DATA + 8], "little") == stored
            assert guest.reg("RCX") == done + (part >= 3)


def test_segment_registers_read_back_what_was_set():
    with BareGuest("hlt") as guest:
        value = SegmentRegister(0x33, 0x1234_5678_9ABC, 0xFFFFF, 0xC0F300)
        guest.vcpu.set_segment("gs", value)
        assert guest.vcpu.segment("gs") == value
        assert guest.vcpu.msr(0xC0000101) == 0x1234_5678_9ABC


def test_a_fault_during_delivery_that_exits_has_the_right_error_code():
    """Section 6.13: the IDT entry's index is vector * 8; EXT is not set for INT n."""
    with BareGuest("int 0x40\nvec_13: hlt") as guest:
        vcpu = guest.vcpu
        vcpu.intercept_exceptions(frozenset({13}))
        vectoring = []
        guest.on[Exit.EXCEPTION] = lambda: (vectoring.append(vcpu.vectoring), vcpu.stop())
        guest.run()
        assert vcpu.fault == (13, 0x40 * 8 + 2)
        assert vectoring == [0x40]


def test_a_guest_that_does_nothing_but_fault_is_stopped():
    """The page fault's handler cannot be fetched: no instruction is ever executed."""
    with BareGuest("mov ebx, ABSENT\n mov eax, [rbx]\nvec_14: hlt", ist={14: 1}) as guest:
        guest.gate(14, ABSENT, ist=1)
        guest.on[Exit.BOUNDARY] = guest.vcpu.stop
        guest.run(cycles=1_000_000)
        assert guest.exits[-1] == (Exit.BOUNDARY, ABSENT)


ENTERED = """
        mov ecx, 2
again:  call entered
        dec ecx
        jnz again
        hlt
        .balign 16
entered: nop
        ret
"""


def watching(guest, *labels):
    """Watch functions; addresses of the guest are in the user half, and so are all told of."""
    guest.vcpu.watch_entries(frozenset(guest.labels[label] for label in labels))
    guest.on[Exit.ENTRY] = lambda: None


def entries(guest):
    return [rip for kind, rip in guest.exits if kind is Exit.ENTRY]


def test_code_in_the_user_half_at_cpl_0_is_told_of():
    with BareGuest(ENTERED) as guest:
        watching(guest)
        guest.run()
        assert entries(guest)[0] == CODE
        assert guest.labels["entered"] in entries(guest)
        assert guest.reg("RCX") == 0


def test_entries_are_no_longer_told_of():
    with BareGuest(ENTERED) as guest:
        watching(guest, "entered")
        guest.vcpu.watch_entries(None)
        guest.run()
        assert entries(guest) == []


def test_an_entry_that_is_stepped_over_is_told_of_once():
    with BareGuest(ENTERED) as guest:
        watching(guest, "entered")
        guest.vcpu.step(guest.handle)
        assert entries(guest) == [CODE]
        assert guest.reg("RCX") == 2


def test_more_entries_than_there_is_room_for():
    with BareGuest("hlt") as guest, pytest.raises(ValueError, match="501 entries"):
        guest.vcpu.watch_entries(frozenset(range(501)))


RETURNS = """
        push 16
        push STACK
        push 2
        push KERNEL_CS
        lea rax, [rip + first]
        push rax
one:    iretq
first:  int 0x40
        hlt
vec_64: nop
two:    iretq
"""


def irets(guest):
    return [rip for kind, rip in guest.exits if kind is Exit.IRET]


@pytest.mark.parametrize("counted", [False, True])
def test_each_iret_is_told_of_before_it_executes(counted):
    with BareGuest(RETURNS) as guest:
        guest.vcpu.exact_counts(counted)
        guest.run()
        instructions, cycles = guest.vcpu.instructions, guest.vcpu.cycles
        assert irets(guest) == []
    with BareGuest(RETURNS) as guest:
        guest.vcpu.exact_counts(counted)
        guest.vcpu.watch_iret(True)
        pointers = []
        guest.on[Exit.IRET] = lambda: pointers.append(guest.reg("RSP"))
        guest.run()
        assert irets(guest) == [guest.labels["one"], guest.labels["two"]]
        assert pointers == [STACK - 40, STACK - 40]
        assert (guest.vcpu.instructions, guest.vcpu.cycles) == (instructions, cycles)


def test_irets_that_are_stepped_over_are_told_of_and_a_restore_goes_on_with_it():
    with BareGuest(RETURNS) as guest:
        snapshot = guest.engine.freeze()
        guest.vcpu.watch_iret(True)
        guest.on[Exit.IRET] = lambda: None
        for _ in range(2):
            guest.engine.restore(snapshot)
            guest.exits.clear()
            for _ in range(11):
                guest.vcpu.step(guest.handle)
            assert irets(guest) == [guest.labels["one"], guest.labels["two"]]
        guest.engine.restore(snapshot)
        guest.vcpu.watch_iret(False)
        guest.exits.clear()
        guest.run()
        assert irets(guest) == []


def test_an_iret_that_is_told_of_unblocks_nmis():
    with BareGuest("here: nop\n hlt\nvec_2: nop\nback: iretq") as guest:
        vcpu = guest.vcpu
        vcpu.watch_iret(True)
        blocked = []
        guest.on[Exit.IRET] = lambda: (
            blocked.append(vcpu.nmi_blocked),
            vcpu.request_nmi_window(True),
        )
        vcpu.deliver_nmi()
        guest.on[Exit.NMI_WINDOW] = vcpu.stop
        guest.run()
        assert blocked == [False]
        assert [kind for kind, _ in guest.exits] == [Exit.IRET, Exit.NMI_WINDOW]
        assert guest.at("here")
