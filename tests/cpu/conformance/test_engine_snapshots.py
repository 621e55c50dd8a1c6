"""Snapshots of the engine: a restore brings back everything, as often as wanted."""

import hashlib

import pytest

from bare_guest import CODE, DATA, HIGH, STACK, BareGuest
from trapline.cpu.engine import Exit, PageState, Reg

WORK = """
        mov ebx, DATA
        mov ecx, 50
1:      mov [rbx], rax
        imul rax, rax, 0x5DEECE66
        add rax, 11
        rdrand rdx
        xor rax, rdx
        rdtsc
        push rax
        int 0x40
        pop rax
        movq xmm1, rax
        paddq xmm0, xmm1
        add rbx, 0x1234
        loop 1b
        hlt
vec_64: add r8, 1
        iretq
"""


def state_of(guest):
    vcpu = guest.vcpu
    digest = hashlib.blake2b(guest.memory.ram, digest_size=16).hexdigest()
    registers = tuple(vcpu.regs), vcpu.rflags, vcpu.cycles, vcpu.instructions
    segments = [vcpu.segment(name) for name in ("cs", "ss", "ds", "gs", "tr", "idtr")]
    return digest, registers, segments, vcpu.cr(2), vcpu.nmi_blocked


def test_a_thousand_restores_give_the_same_run():
    with BareGuest(WORK) as guest:
        vcpu = guest.vcpu
        vcpu.exact_counts(True)
        vcpu.set_time_budget(1_000_000)
        snapshot = guest.engine.freeze()
        before = state_of(guest)
        vcpu.run(guest.handle)
        after = state_of(guest)
        assert before != after
        for count in range(1000):
            guest.engine.restore(snapshot)
            if count % 250 == 0:
                assert state_of(guest) == before
            vcpu.run(guest.handle)
            if count % 250 == 0:
                assert state_of(guest) == after
            registers = tuple(vcpu.regs), vcpu.rflags, vcpu.cycles, vcpu.instructions
            assert registers == after[1]
        assert state_of(guest) == after


def test_memory_comes_back_whoever_wrote_it():
    with BareGuest("mov ebx, DATA\n mov dword ptr [rbx], 5\n hlt") as guest:
        vcpu = guest.vcpu
        guest.memory.ram[DATA + 0x5000] = 1
        snapshot = guest.engine.freeze()
        guest.run()
        guest.memory.ram[DATA + 0x5000] = 2
        vcpu.write(HIGH + DATA + 0x9000, b"outside")
        guest.engine.restore(snapshot)
        assert guest.memory.ram[DATA] == 0
        assert guest.memory.ram[DATA + 0x5000] == 1
        assert vcpu.read(DATA + 0x9000, 7) == bytes(7)
        assert guest.reg("RIP") == CODE


def test_a_snapshot_inside_the_handler_can_be_restored_there():
    with BareGuest("xor eax, eax\n xor ecx, ecx\n cpuid\n inc eax\n hlt") as guest:
        vcpu = guest.vcpu
        kept = []

        def take():
            kept.append(guest.engine.freeze())
            vcpu.advance(2)

        guest.on[Exit.CPUID] = take
        guest.run()
        guest.on[Exit.CPUID] = lambda: vcpu.advance(2)
        guest.engine.restore(kept[0])
        assert guest.memory.ram[CODE] == guest.code[0]
        guest.run()
        assert guest.reg("RAX") == 1


def test_waiting_events_nmis_and_windows_are_part_of_a_snapshot():
    with BareGuest("nop\n hlt\nvec_2: nop\n iretq") as guest:
        vcpu = guest.vcpu
        vcpu.deliver_nmi()
        snapshot = guest.engine.freeze()
        vcpu.step(guest.handle)
        vcpu.step(guest.handle)
        vcpu.step(guest.handle)
        assert not vcpu.nmi_blocked
        guest.engine.restore(snapshot)
        assert vcpu.nmi_blocked
        vcpu.step(guest.handle)
        assert guest.at("vec_2")
        guest.run()
        assert not vcpu.nmi_blocked


def test_second_level_tables_are_part_of_a_snapshot():
    with BareGuest("mov ebx, DATA\n mov eax, [rbx]\n hlt") as guest:
        vcpu = guest.vcpu
        guest.memory.set_private(DATA, 0x1000, PageState.ABSENT)
        guest.on[Exit.EPT_VIOLATION] = vcpu.stop
        snapshot = guest.engine.freeze()
        guest.memory.set_private(DATA, 0x1000, PageState.MAPPED)
        guest.run()
        assert guest.exits[-1][0] is Exit.HLT
        guest.engine.restore(snapshot)
        guest.run()
        assert guest.exits[-1][0] is Exit.EPT_VIOLATION


def test_a_saved_cpu_goes_with_the_frozen_memory():
    with BareGuest("mov eax, 1\n cpuid\n mov ebx, DATA\n mov [rbx], eax\n hlt") as guest:
        vcpu = guest.vcpu
        guest.engine.freeze()
        guest.on[Exit.CPUID] = vcpu.stop
        guest.run()
        later = guest.engine.save()
        del guest.on[Exit.CPUID]
        guest.run()
        assert guest.memory.ram[DATA] == 1
        guest.engine.restore(later)
        assert guest.memory.ram[DATA] == 0
        assert guest.reg("RIP") == CODE + 5


def test_snapshots_of_an_earlier_freeze_are_refused():
    with BareGuest("hlt") as guest:
        first = guest.engine.freeze()
        guest.memory.ram[DATA] = 7
        second = guest.engine.freeze()
        guest.memory.ram[DATA] = 8
        with pytest.raises(ValueError, match="frozen anew"):
            guest.engine.restore(first)
        guest.engine.restore(second)
        assert guest.memory.ram[DATA] == 7
        guest.memory.ram[DATA] = 9
        third = guest.engine.freeze()
        guest.memory.ram[DATA] = 0
        guest.engine.restore(third)
        assert guest.memory.ram[DATA] == 9


def test_what_is_not_a_snapshot_is_refused():
    with BareGuest("hlt") as guest:
        before = guest.engine.save()
        with pytest.raises(ValueError, match="frozen anew"):
            guest.engine.restore(before)
        with pytest.raises(TypeError):
            guest.engine.restore(object())


@pytest.mark.parametrize("through", ["", f"add rbx, {HIGH >> 12}"])
def test_code_translated_after_a_change_is_not_executed_after_the_restore(through):
    """The guest changes a page, then executes it; the restore takes the change back."""
    source = """
        lea rbx, [rip + there]
        THROUGH
        mov byte ptr [rbx + 1], 2
        call there
        hlt
        .org 0x1000
first:  call there
        hlt
        .org 0x2000
there:  mov eax, 1
        ret
    """
    high = f"mov rcx, {HIGH}\n add rbx, rcx" if through else ""
    with BareGuest(source.replace("THROUGH", high)) as guest:
        vcpu = guest.vcpu
        snapshot = guest.engine.freeze()
        for _ in range(3):
            guest.run()
            assert guest.reg("RAX") == 2
            guest.engine.restore(snapshot)
            vcpu.regs[Reg.RIP] = guest.labels["first"]
            guest.run()
            assert guest.reg("RAX") == 1
            guest.engine.restore(snapshot)


def test_code_translated_before_the_freeze_survives_it():
    with BareGuest("1: inc eax\n cmp eax, 1000\n jb 1b\n hlt") as guest:
        vcpu = guest.vcpu
        vcpu.regs[Reg.RAX] = 0
        guest.run()
        vcpu.regs[Reg.RIP], vcpu.regs[Reg.RAX] = CODE, 0
        snapshot = guest.engine.freeze()
        guest.run()
        guest.engine.restore(snapshot)
        guest.run()
        assert guest.reg("RAX") == 1000


def test_debug_registers_come_back_armed_or_not():
    source = """
        jmp there
arm:    lea rax, [rip + here]
        mov dr0, rax
        mov eax, 0x401
        mov dr7, rax
        cpuid
there:  nop
here:   nop
        hlt
vec_1:  hlt
    """
    with BareGuest(source) as guest:
        vcpu = guest.vcpu
        plain = guest.engine.freeze()
        vcpu.regs[Reg.RIP] = guest.labels["arm"]
        kept = []
        guest.on[Exit.CPUID] = lambda: (vcpu.advance(2), kept.append(guest.engine.save()))
        guest.run()
        assert guest.at("vec_1")
        guest.engine.restore(plain)
        guest.run()
        assert not guest.at("vec_1")
        for _ in range(3):
            guest.engine.restore(kept[0])
            guest.run()
            assert guest.at("vec_1")
        guest.engine.restore(plain)
        guest.run()
        assert not guest.at("vec_1")


def test_a_restored_stack_is_the_frozen_one():
    with BareGuest("push 1\n push 2\n pop rax\n pop rbx\n hlt") as guest:
        snapshot = guest.engine.freeze()
        guest.run()
        guest.engine.restore(snapshot)
        assert bytes(guest.memory.ram[STACK - 16 : STACK]) == bytes(16)
        guest.run()
        assert (guest.reg("RAX"), guest.reg("RBX")) == (2, 1)


# Pages written.


def test_written_pages_are_those_the_guest_and_the_host_wrote():
    source = """
        mov ebx, DATA
        mov eax, [rbx + 0x5000]
        mov [rbx + 0x1000], eax
        mov dword ptr [rbx + 0x2fff], 1
        mov rcx, HIGH
        mov [rcx + DATA + 0x7000], eax
        push rax
        hlt
    """
    with BareGuest(
        f".set HIGH, {HIGH}\n" + source.replace("[rcx + DATA", "[rcx + 0x300000")
    ) as guest:
        vcpu = guest.vcpu
        guest.run()  # sets accessed and dirty bits
        vcpu.regs[Reg.RIP], vcpu.regs[Reg.RSP] = CODE, STACK
        snapshot = guest.engine.freeze()
        before = bytes(guest.memory.ram)
        guest.run()
        vcpu.write(DATA + 0x9000, b"from outside")
        changed = {
            at
            for at in range(0, len(before), 4096)
            if before[at : at + 4096] != guest.memory.ram[at : at + 4096]
        }
        written = set(guest.memory.written_pages())
        assert changed <= written
        expected = {DATA + 0x1000, DATA + 0x2000, DATA + 0x3000, DATA + 0x7000, DATA + 0x9000}
        assert expected | {STACK - 0x1000} <= written
        guest.engine.restore(snapshot)
        assert guest.memory.written_pages() == []


def test_page_tables_whose_bits_were_set_are_written_pages():
    with BareGuest("mov ebx, DATA\n mov [rbx], eax\n hlt") as guest:
        guest.engine.freeze()
        guest.run()
        table = 0x10000 + 0x5000 + (DATA >> 12) * 8 & ~0xFFF
        assert table in guest.memory.written_pages()


def test_announced_writes_are_copied_back():
    with BareGuest(WORK) as guest:
        vcpu = guest.vcpu
        vcpu.exact_counts(True)
        vcpu.set_time_budget(1_000_000)
        snapshot = guest.engine.freeze(announced=True)
        before = state_of(guest)
        vcpu.run(guest.handle)
        after = state_of(guest)
        for count in range(50):
            guest.memory.ram[DATA + 0x40000 : DATA + 0x40004] = b"host"
            guest.memory.code_changed(DATA + 0x40000, 4)
            vcpu.write(DATA + 0x80FFE, b"both")
            guest.engine.restore(snapshot)
            assert state_of(guest) == before
            vcpu.run(guest.handle)
            if count % 10 == 0:
                assert state_of(guest) == after


def test_freezing_again_keeps_what_was_written_and_copied_back():
    with BareGuest("mov ebx, DATA\n inc dword ptr [rbx]\n hlt") as guest:
        first = guest.engine.freeze(announced=True)
        guest.run()
        guest.engine.restore(first)
        guest.run()
        guest.vcpu.regs[Reg.RIP] = CODE
        second = guest.engine.freeze(announced=True)
        assert guest.memory.ram[DATA] == 1
        for _ in range(3):
            guest.run()
            assert guest.memory.ram[DATA] == 2
            guest.engine.restore(second)
            assert guest.memory.ram[DATA] == 1


FLOATS = """
        fninit
        fld1
        movq xmm15, rax
        hlt
"""


def test_floating_point_state_is_told_and_can_be_set():
    with BareGuest("mov rax, cr4\n or rax, 0x200\n mov cr4, rax" + FLOATS) as guest:
        before = guest.vcpu.fpu
        guest.run()
        after = guest.vcpu.fpu
        assert after != before
        guest.vcpu.fpu = before
        assert guest.vcpu.fpu == before
        with pytest.raises(ValueError, match="no x87 and SSE state"):
            guest.vcpu.fpu = before[:-1]
    for same in ("fld1", "movq xmm15, rax"):
        with BareGuest(
            ("mov rax, cr4\n or rax, 0x200\n mov cr4, rax" + FLOATS).replace(same, "nop")
        ) as guest:
            guest.run()
            assert guest.vcpu.fpu != after
