"""Guests whose #VE handler emulates MOV to and from MMIO, sound or with one known fault.

The handler decodes ModRM, SIB and prefixes, checks that the instruction is the one that
trapped, and refuses all else through die_addr(), as Linux does. `FAULT_*` plants a fault.
A second guest emulates what traps by itself instead (`instruction_handler`).
"""

import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import instruction_handler

from trapline.guest.target import TargetSource
from trapline.results.verify import VerifiedKernel
from trapline.rules.tables import load
from trapline.verify import rounds
from trapline.verify.cases import Subjects, first_round, second_round
from trapline.verify.chunks import run_cases, verify_pool
from trapline.verify.rounds import Options, verify

MEMORY = 32 << 20

FAULTS = (
    "FAULT_ZERO_EXTEND",
    "FAULT_HIGH_BYTE",
    "FAULT_STALE_DATA",
    "FAULT_EXTRA_REGISTER",
    "FAULT_MOVS",
    "FAULT_FLAGS",
    "FAULT_XMM",
    "FAULT_NO_CROSSING",
    "FAULT_SIGN",
    "FAULT_NO_RECHECK",
    "FAULT_USER_ADDRESS",
    "FAULT_TRUST",
    "FAULT_WIDTH",
)

ENTRY = r"""
        .intel_syntax noprefix
        .text
        .globl _start
_start: lea rax, [rip + pml4]
        mov cr3, rax
        lea rsp, [rip + stack_top]
        lgdt [rip + gdt_pointer]
        push 8
        lea rax, [rip + reloaded]
        push rax
        retfq
reloaded:
        mov eax, 0x10
        mov ss, eax
        mov ds, eax
        mov es, eax
        lea rax, [rip + asm_ve]
        lea rdi, [rip + idt + 16 * 20]
        mov [rdi], ax
        mov word ptr [rdi + 2], 8
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], ax
        lidt [rip + idt_pointer]
        mov rax, cr4
        or eax, 0x600           # OSFXSR, OSXMMEXCPT
        mov cr4, rax
        call do_syscall_64
        hlt

        .globl do_syscall_64
        .type do_syscall_64, @function
do_syscall_64:
        ret
        .size do_syscall_64, . - do_syscall_64
        .globl die_addr
        .type die_addr, @function
die_addr:
        hlt
        jmp die_addr
        .size die_addr, . - die_addr

        # struct pt_regs of Linux: 15 registers, the error code's place, the IRET frame.
        .globl asm_ve
        .type asm_ve, @function
asm_ve: cld
        push -1
        push rdi
        push rsi
        push rdx
        push rcx
        push rax
        push r8
        push r9
        push r10
        push r11
        push rbx
        push rbp
        push r12
        push r13
        push r14
        push r15
        mov rdi, rsp
        mov rbp, rsp
        and rsp, -16
        call on_ve
        mov rsp, rbp
        pop r15
        pop r14
        pop r13
        pop r12
        pop rbp
        pop rbx
        pop r11
        pop r10
        pop r9
        pop r8
        pop rax
        pop rcx
        pop rdx
        pop rsi
        pop rdi
        add rsp, 8
        iretq
        .size asm_ve, . - asm_ve

        .data
        .balign 4096
pml4:   .quad pdpt + 3
        .zero 4088
pdpt:   .quad directory + 3
        .zero 4088
directory:
        .set at, 0
        .rept 16
        .quad at * 0x200000 + 0x83
        .set at, at + 1
        .endr
        .zero 4096 - 128
idt:    .zero 4096
gdt:    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word 23
        .quad gdt
idt_pointer:
        .word 4095
        .quad idt
        .balign 16
        .zero 4096
stack_top:
        .section .rodata
        .asciz "tdx: Guest detected"
        .section .note.GNU-stack, "", @progbits
"""

HANDLER = r"""
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

struct regs { u64 r[15], orig, ip, cs, flags, sp, ss; };
struct ve { u64 reason, qualification, gla, gpa; u32 length; };
struct call { u64 leaf, size, direction, address, data; };

void die_addr(void);

/* Register number of the encoding -> place in struct regs. */
static u64 *reg(struct regs *regs, int number)
{
        static const u8 place[16] = { 10, 11, 12, 5, 0, 4, 13, 14, 9, 8, 7, 6, 3, 2, 1, 0 };
        return number == 4 ? &regs->sp : &regs->r[place[number]];
}

static struct ve veinfo_get(void)
{
        register u64 r8 asm("r8");
        register u64 r9 asm("r9");
        register u64 r10 asm("r10");
        u64 rax = 3, rcx, rdx;
        asm volatile(".byte 0x66, 0x0f, 0x01, 0xcc"
                     : "+a" (rax), "=c" (rcx), "=d" (rdx), "=r" (r8), "=r" (r9),
                       "=r" (r10) : : "r11", "memory");
        return (struct ve){ rcx, rdx, r8, r9, r10 };
}

/* Returns R11; `call` becomes what R11 to R15 are then. */
static u64 tdvmcall(struct call *call, u64 extra)
{
        register u64 r10 asm("r10") = 0;
        register u64 r11 asm("r11") = call->leaf;
        register u64 r12 asm("r12") = call->size;
        register u64 r13 asm("r13") = call->direction;
        register u64 r14 asm("r14") = call->address;
        register u64 r15 asm("r15") = call->data;
        u64 rax = 0, rcx = 0xfc00 | (extra ? 1 << 3 : 0), rbx = extra;
        asm volatile(".byte 0x66, 0x0f, 0x01, 0xcc"
                     : "+a" (rax), "+c" (rcx), "+b" (rbx), "+r" (r10), "+r" (r11), "+r" (r12),
                       "+r" (r13), "+r" (r14), "+r" (r15) : : "memory");
        if (rax || r10)
                die_addr();
        *call = (struct call){ r11, r12, r13, r14, r15 };
        return r11;
}

static u64 rdmsr(u32 index)
{
        u32 low, high;
        asm volatile("rdmsr" : "=a" (low), "=d" (high) : "c" (index));
        return low | (u64)high << 32;
}

static u64 mask(int size)
{
        return size == 8 ? ~0ul : (1ul << 8 * size) - 1;
}

static long signed_bytes(const u8 *at, int size)
{
        return size == 1 ? *(const signed char *)at : size == 2 ? *(const short *)at
             : size == 4 ? *(const int *)at : 0;
}

struct insn {
        int rex, operand, narrow, segment, wide, opcode, modrm, length;
        u64 address;
        long imm;
};

/* 0 where it is no MOV, MOVZX or MOVSX with a memory operand. */
static int decode(struct regs *regs, struct insn *insn)
{
        const u8 *start = (const u8 *)regs->ip, *at = start;
        int size, mod, rm;
        *insn = (struct insn){ 0 };
        for (;; at++) {
                if (*at == 0x66) insn->operand = 1;
                else if (*at == 0x67) insn->narrow = 1;
                else if (*at == 0x64 || *at == 0x65) insn->segment = *at;
                else if (*at == 0xf2 || *at == 0xf3) ;
                else if (*at == 0x26 || *at == 0x2e || *at == 0x36 || *at == 0x3e) ;
                else if ((*at & 0xf0) == 0x40) { insn->rex = *at; continue; }
                else break;
                insn->rex = 0; /* a REX prefix counts only as the last one */
        }
        insn->wide = !!(insn->rex & 8);
        insn->opcode = *at++;
        if (insn->opcode == 0x0f)
                insn->opcode = 0x0f00 | *at++;
        switch (insn->opcode) {
#ifdef FAULT_MOVS
        case 0xa4: case 0xa5:
                insn->length = at - start;
                insn->address = 0;
                insn->modrm = 0;
                return 1;
#endif
        case 0x88: case 0x89: case 0x8a: case 0x8b: case 0xc6: case 0xc7:
        case 0x0fb6: case 0x0fb7: case 0x0fbe: case 0x0fbf:
                break;
        default:
                return 0;
        }
        insn->modrm = *at++;
        mod = insn->modrm >> 6;
        rm = insn->modrm & 7;
        if (mod == 3 || ((insn->opcode & ~1) == 0xc6 && insn->modrm & 0x38))
                return 0;
        size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
        if (rm == 4) {
                u8 sib = *at++;
                int index = (sib >> 3 & 7) | (insn->rex & 2) << 2;
                int base = (sib & 7) | (insn->rex & 1) << 3;
                if (index != 4)
                        insn->address = *reg(regs, index) << (sib >> 6);
                if ((sib & 7) == 5 && !mod)
                        size = 4;
                else
                        insn->address += *reg(regs, base);
        } else if (rm == 5 && !mod) {
                size = 4;
        } else {
                insn->address = *reg(regs, rm | (insn->rex & 1) << 3);
        }
        insn->address += signed_bytes(at, size);
        at += size;
        if ((insn->opcode & ~1) == 0xc6) {
                size = insn->opcode == 0xc6 ? 1 : insn->wide || !insn->operand ? 4 : 2;
                insn->imm = signed_bytes(at, size);
                at += size;
        }
        insn->length = at - start;
        if (rm == 5 && !mod)
                insn->address += regs->ip + insn->length;
        if (insn->narrow)
                insn->address = (u32)insn->address;
        if (insn->segment)
                insn->address += rdmsr(insn->segment == 0x64 ? 0xc0000100 : 0xc0000101);
        return 1;
}

#ifdef INSTRUCTIONS
#include "instructions.c"
#endif

void on_ve(struct regs *regs)
{
        struct ve ve = veinfo_get();
        struct insn insn;
        struct call call = { 48 };
        int width, size, is_write, is_byte, number, high = 0;
        u64 data = 0, *target;

#ifdef INSTRUCTIONS
        return on_instruction(regs, &ve);
#endif
        if (ve.reason != 48 || !decode(regs, &insn))
                return die_addr();
        number = (insn.modrm >> 3 & 7) | (insn.rex & 4) << 1;
        width = insn.wide ? 8 : insn.operand ? 2 : 4;
        is_write = insn.opcode == 0x88 || insn.opcode == 0x89 || (insn.opcode & ~1) == 0xc6;
        is_byte = insn.opcode == 0x88 || insn.opcode == 0x8a;
#ifdef FAULT_MOVS
        if ((insn.opcode & ~1) == 0xa4) {
                is_write = 1;
                width = insn.opcode == 0xa4 ? 1 : width;
                number = 6;
                insn.address = ve.gla;
        }
#endif
        if (is_byte && !insn.rex && number >= 4) {
                high = 1;
#ifdef FAULT_HIGH_BYTE
                high = 0;
#else
                number -= 4;
#endif
        }
        if (is_byte || insn.opcode == 0xc6)
                width = 1;
        target = reg(regs, number);
        call.size = insn.opcode == 0x0fb6 || insn.opcode == 0x0fbe ? 1
                  : insn.opcode == 0x0fb7 || insn.opcode == 0x0fbf ? 2 : width;
#ifndef FAULT_NO_RECHECK
        if (insn.address != ve.gla || is_write != !!(ve.qualification & 2))
                return die_addr();
#endif
#ifndef FAULT_USER_ADDRESS
        if (!(ve.gla >> 63))
                return die_addr();
#endif
#ifndef FAULT_NO_CROSSING
        if ((ve.gla & 4095) + call.size > 4096)
                return die_addr();
#endif
        call.direction = is_write;
        call.address = ve.gpa;
#ifdef FAULT_WIDTH
        if (call.size == 2)
                call.size = 1;
#endif
        if (is_write) {
                data = (insn.opcode & ~1) == 0xc6 ? (u64)insn.imm : *target >> (high ? 8 : 0);
#ifndef FAULT_STALE_DATA
                data &= mask(call.size);
#endif
                call.data = data;
        }
        size = call.size;
#ifdef FAULT_EXTRA_REGISTER
        data = tdvmcall(&call, regs->ip);
#else
        data = tdvmcall(&call, 0);
#endif
        if (!is_write) {
#ifndef FAULT_TRUST
                data &= mask(size);
#endif
#ifndef FAULT_SIGN
                if (insn.opcode == 0x0fbe) data = (long)(signed char)data;
                if (insn.opcode == 0x0fbf) data = (long)(short)data;
#endif
                if (high)
                        *target = (*target & ~0xff00ul) | data << 8;
                else if (width == 8)
                        *target = data;
#ifdef FAULT_ZERO_EXTEND
                else
#else
                else if (width == 4)
                        *target = (u32)data;
                else
#endif
                        *target = (*target & ~mask(width)) | (data & mask(width));
        }
        regs->ip += insn.length;
        regs->flags &= ~(1ul << 16); /* RF: the instruction is complete */
#ifdef FAULT_XMM
        asm volatile("pxor %xmm3, %xmm3");
#endif
#ifdef FAULT_FLAGS
        regs->flags ^= 1;
#endif
}
"""


_folders = []  # removed when the process ends


@cache
def guest(*defines):
    """Build the guest with a fault; returns the path of its vmlinux."""
    _folders.append(TemporaryDirectory(prefix="trapline-verify-guest-"))
    folder = Path(_folders[-1].name)
    (folder / "entry.S").write_text(ENTRY)
    (folder / "handler.c").write_text(HANDLER)
    (folder / "instructions.c").write_text(instruction_handler.HANDLER)
    subprocess.run(
        ["gcc", "-O2", "-ffreestanding", "-fno-pic", "-no-pie", "-nostdlib", "-static",
         "-mgeneral-regs-only", "-mno-red-zone", "-fno-stack-protector", "-fcf-protection=none",
         "-fno-builtin", "-Wl,-Ttext=0x500000", "-Wl,--build-id=none", "-Wl,-z,norelro",
         *(f"-D{define}" for define in defines), "-o", "vmlinux", "entry.S", "handler.c"],
        cwd=folder, check=True,
    )  # fmt: skip
    return folder / "vmlinux"


def source(*defines):
    """Say how to boot the guest."""
    return TargetSource(
        kernel="guest", vmlinux=guest(*defines), initrd=b"", memory=MEMORY, command_line=""
    )


KERNEL = VerifiedKernel(name="guest", release=None, build_id=None)


def verified(fault=None, limit=600, workers=1):
    """Verify the guest's handler."""
    defines = () if fault is None else (fault,)
    return verify(source(*defines), KERNEL, Options(workers, limit, ring3=False))


def verified_instructions(classes, fault=None):
    """Verify all cases of some classes on the guest that emulates what traps by itself."""
    defines = ("INSTRUCTIONS",) if fault is None else ("INSTRUCTIONS", fault)
    forms = [form for form in first_round()[0] if form.trap in classes]
    cases = second_round(forms, frozenset(), Subjects.of(load()))
    with verify_pool(source(*defines), 1, ring3=False) as pool:
        tried = rounds._tried(cases, run_cases(pool, cases))
    tried = rounds._with_refusals(tuple(tried))
    return rounds.result(source(*defines), KERNEL, tried, None)
