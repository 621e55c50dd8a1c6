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
    engine = guest.engine
    digest = hashlib.blake2b(engine.ram, digest_size=16).hexdigest()
    registers = tuple(engine.regs), engine.rflags, engine.cycles, engine.instructions
    segments = [engine.segment(name) for name in ("cs", "ss", "ds", "gs", "tr", "idtr")]
    return digest, registers, segments, engine.cr(2), engine.nmi_blocked


def test_a_thousand_restores_give_the_same_run():
    with BareGuest(WORK) as guest:
        engine = guest.engine
        engine.exact_counts(True)
        engine.set_time_budget(1_000_000)
        snapshot = engine.freeze()
        before = state_of(guest)
        engine.run(guest.handle)
        after = state_of(guest)
        assert before != after
        for count in range(1000):
            engine.restore(snapshot)
            if count % 250 == 0:
                assert state_of(guest) == before
            engine.run(guest.handle)
            if count % 250 == 0:
                assert state_of(guest) == after
            registers = tuple(engine.regs), engine.rflags, engine.cycles, engine.instructions
            assert registers == after[1]
        assert state_of(guest) == after


def test_memory_comes_back_whoever_wrote_it():
    with BareGuest("mov ebx, DATA\n mov dword ptr [rbx], 5\n hlt") as guest:
        engine = guest.engine
        engine.ram[DATA + 0x5000] = 1
        snapshot = engine.freeze()
        guest.run()
        engine.ram[DATA + 0x5000] = 2
        engine.write(HIGH + DATA + 0x9000, b"outside")
        engine.restore(snapshot)
        assert engine.ram[DATA] == 0
        assert engine.ram[DATA + 0x5000] == 1
        assert engine.read(DATA + 0x9000, 7) == bytes(7)
        assert guest.reg("RIP") == CODE


def test_a_snapshot_inside_the_handler_can_be_restored_there():
    with BareGuest("xor eax, eax\n xor ecx, ecx\n cpuid\n inc eax\n hlt") as guest:
        engine = guest.engine
        kept = []

        def take():
            kept.append(engine.freeze())
            engine.advance(2)

        guest.on[Exit.CPUID] = take
        guest.run()
        guest.on[Exit.CPUID] = lambda: engine.advance(2)
        engine.restore(kept[0])
        assert engine.ram[CODE] == guest.code[0]
        guest.run()
        assert guest.reg("RAX") == 1


def test_waiting_events_nmis_and_windows_are_part_of_a_snapshot():
    with BareGuest("nop\n hlt\nvec_2: nop\n iretq") as guest:
        engine = guest.engine
        engine.deliver_nmi()
        snapshot = engine.freeze()
        engine.step(guest.handle)
        engine.step(guest.handle)
        engine.step(guest.handle)
        assert not engine.nmi_blocked
        engine.restore(snapshot)
        assert engine.nmi_blocked
        engine.step(guest.handle)
        assert guest.at("vec_2")
        guest.run()
        assert not engine.nmi_blocked


def test_second_level_tables_are_part_of_a_snapshot():
    with BareGuest("mov ebx, DATA\n mov eax, [rbx]\n hlt") as guest:
        engine = guest.engine
        engine.set_private(DATA, 0x1000, PageState.ABSENT)
        guest.on[Exit.EPT_VIOLATION] = engine.stop
        snapshot = engine.freeze()
        engine.set_private(DATA, 0x1000, PageState.MAPPED)
        guest.run()
        assert guest.exits[-1][0] is Exit.HLT
        engine.restore(snapshot)
        guest.run()
        assert guest.exits[-1][0] is Exit.EPT_VIOLATION


def test_a_saved_cpu_goes_with_the_frozen_memory():
    with BareGuest("mov eax, 1\n cpuid\n mov ebx, DATA\n mov [rbx], eax\n hlt") as guest:
        engine = guest.engine
        engine.freeze()
        guest.on[Exit.CPUID] = engine.stop
        guest.run()
        later = engine.save()
        del guest.on[Exit.CPUID]
        guest.run()
        assert engine.ram[DATA] == 1
        engine.restore(later)
        assert engine.ram[DATA] == 0
        assert guest.reg("RIP") == CODE + 5


def test_snapshots_of_an_earlier_freeze_are_refused():
    with BareGuest("hlt") as guest:
        engine = guest.engine
        first = engine.freeze()
        engine.ram[DATA] = 7
        second = engine.freeze()
        engine.ram[DATA] = 8
        with pytest.raises(ValueError, match="frozen anew"):
            engine.restore(first)
        engine.restore(second)
        assert engine.ram[DATA] == 7
        engine.ram[DATA] = 9
        third = engine.freeze()
        engine.ram[DATA] = 0
        engine.restore(third)
        assert engine.ram[DATA] == 9


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
        engine = guest.engine
        snapshot = engine.freeze()
        for _ in range(3):
            guest.run()
            assert guest.reg("RAX") == 2
            engine.restore(snapshot)
            engine.regs[Reg.RIP] = guest.labels["first"]
            guest.run()
            assert guest.reg("RAX") == 1
            engine.restore(snapshot)


def test_code_translated_before_the_freeze_survives_it():
    with BareGuest("1: inc eax\n cmp eax, 1000\n jb 1b\n hlt") as guest:
        engine = guest.engine
        engine.regs[Reg.RAX] = 0
        guest.run()
        engine.regs[Reg.RIP], engine.regs[Reg.RAX] = CODE, 0
        snapshot = engine.freeze()
        guest.run()
        engine.restore(snapshot)
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
        engine = guest.engine
        plain = engine.freeze()
        engine.regs[Reg.RIP] = guest.labels["arm"]
        kept = []
        guest.on[Exit.CPUID] = lambda: (engine.advance(2), kept.append(engine.save()))
        guest.run()
        assert guest.at("vec_1")
        engine.restore(plain)
        guest.run()
        assert not guest.at("vec_1")
        for _ in range(3):
            engine.restore(kept[0])
            guest.run()
            assert guest.at("vec_1")
        engine.restore(plain)
        guest.run()
        assert not guest.at("vec_1")


def test_a_restored_stack_is_the_frozen_one():
    with BareGuest("push 1\n push 2\n pop rax\n pop rbx\n hlt") as guest:
        engine = guest.engine
        snapshot = engine.freeze()
        guest.run()
        engine.restore(snapshot)
        assert bytes(engine.ram[STACK - 16 : STACK]) == bytes(16)
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
        engine = guest.engine
        guest.run()  # sets accessed and dirty bits
        engine.regs[Reg.RIP], engine.regs[Reg.RSP] = CODE, STACK
        snapshot = engine.freeze()
        assert engine.written_pages() == []
        before = bytes(engine.ram)
        guest.run()
        engine.write(DATA + 0x9000, b"from outside")
        changed = {
            at
            for at in range(0, len(before), 4096)
            if before[at : at + 4096] != engine.ram[at : at + 4096]
        }
        written = set(engine.written_pages())
        assert changed <= written
        expected = {DATA + 0x1000, DATA + 0x2000, DATA + 0x3000, DATA + 0x7000, DATA + 0x9000}
        assert expected | {STACK - 0x1000} <= written
        assert DATA + 0x5000 not in written
        engine.restore(snapshot)
        assert engine.written_pages() == []


def test_page_tables_whose_bits_were_set_are_written_pages():
    with BareGuest("mov ebx, DATA\n mov [rbx], eax\n hlt") as guest:
        guest.engine.freeze()
        guest.run()
        table = 0x10000 + 0x5000 + (DATA >> 12) * 8 & ~0xFFF
        assert table in guest.engine.written_pages()


def test_announced_writes_are_copied_back():
    with BareGuest(WORK) as guest:
        engine = guest.engine
        engine.exact_counts(True)
        engine.set_time_budget(1_000_000)
        snapshot = engine.freeze(announced=True)
        before = state_of(guest)
        engine.run(guest.handle)
        after = state_of(guest)
        for count in range(50):
            engine.ram[DATA + 0x40000 : DATA + 0x40004] = b"host"
            engine.code_changed(DATA + 0x40000, 4)
            engine.write(DATA + 0x80FFE, b"both")
            engine.restore(snapshot)
            assert state_of(guest) == before
            engine.run(guest.handle)
            if count % 10 == 0:
                assert state_of(guest) == after


def test_freezing_again_keeps_what_was_written_and_copied_back():
    with BareGuest("mov ebx, DATA\n inc dword ptr [rbx]\n hlt") as guest:
        engine = guest.engine
        first = engine.freeze(announced=True)
        guest.run()
        engine.restore(first)
        guest.run()
        engine.regs[Reg.RIP] = CODE
        second = engine.freeze(announced=True)
        assert engine.ram[DATA] == 1
        for _ in range(3):
            guest.run()
            assert engine.ram[DATA] == 2
            engine.restore(second)
            assert engine.ram[DATA] == 1


FLOATS = """
        fninit
        fld1
        movq xmm15, rax
        hlt
"""


def test_floating_point_state_is_told_and_can_be_set():
    with BareGuest("mov rax, cr4\n or rax, 0x200\n mov cr4, rax" + FLOATS) as guest:
        before = guest.engine.fpu
        guest.run()
        after = guest.engine.fpu
        assert after != before
        guest.engine.fpu = before
        assert guest.engine.fpu == before
        with pytest.raises(ValueError, match="no x87 and SSE state"):
            guest.engine.fpu = before[:-1]
    for same in ("fld1", "movq xmm15, rax"):
        with BareGuest(
            ("mov rax, cr4\n or rax, 0x200\n mov cr4, rax" + FLOATS).replace(same, "nop")
        ) as guest:
            guest.run()
            assert guest.engine.fpu != after
