"""The part of the guests' #VE handler that emulates what traps by itself, with its faults.

IN and OUT, CPUID, RDMSR and WRMSR, HLT; INS and OUTS are refused, as Linux does. It is included
by the handler of `verify_guests`, whose registers and TDVMCALL it uses.
"""

FAULTS = {
    "pio": (
        "FAULT_IN_STALE",
        "FAULT_IN_TRUSTS",
        "FAULT_IN_CLEARS",
        "FAULT_OUT_LEAKS",
        "FAULT_OUT_WIDTH",
        "FAULT_PORT_IN_DX",
        "FAULT_STRING",
        "FAULT_IN_MASK",
    ),
    "cpuid": (
        "FAULT_CPUID_SWAPS",
        "FAULT_CPUID_LEAF",
        "FAULT_CPUID_SUBLEAF",
        "FAULT_CPUID_STALE",
        "FAULT_CPUID_TRUSTS",
        "FAULT_CPUID_LEAKS",
        "FAULT_CPUID_ASKS",
    ),
    "msr": (
        "FAULT_RDMSR_SWAPS",
        "FAULT_RDMSR_STALE",
        "FAULT_WRMSR_SWAPS",
        "FAULT_WRMSR_RAX",
        "FAULT_WRMSR_DEADLINE",
        "FAULT_MSR_LEAKS",
    ),
    "hlt": (
        "FAULT_HLT_STAYS",
        "FAULT_HLT_INVERTS",
        "FAULT_HLT_LEAKS",
        "FAULT_HLT_CLI",
        "FAULT_HLT_SKIPS",
    ),
}

HANDLER = r"""
enum { AX = 10, CX = 11, DX = 12, BX = 5 };

static void on_port(struct regs *regs, struct ve *ve)
{
        int size = (ve->qualification & 7) + 1;
        u64 keep = size == 4 ? 0 : ~mask(size), data;
        struct call call = { 30 };

#ifndef FAULT_STRING
        if (ve->qualification & 16)
                return die_addr();
#endif
        call.size = size;
        call.direction = !(ve->qualification & 8);
        call.address = ve->qualification >> 16 & 0xffff;
#ifdef FAULT_PORT_IN_DX
        call.address = (u16)regs->r[DX];
#endif
        if (call.direction) {
#ifdef FAULT_OUT_WIDTH
                if (size == 2)
                        call.size = 4;
#endif
                call.data = regs->r[AX];
#ifndef FAULT_OUT_LEAKS
                call.data &= mask(size);
#endif
                tdvmcall(&call, 0);
                return;
        }
#ifdef FAULT_IN_STALE
        keep = ~mask(size);
#endif
#ifdef FAULT_IN_CLEARS
        keep = 0;
#endif
        data = tdvmcall(&call, 0);
#ifndef FAULT_IN_TRUSTS
        data &= mask(size);
#endif
#ifdef FAULT_IN_MASK
        if (size < 4)
                keep &= ~(1ul << 8 * size); /* a mask of one bit too many */
#endif
        regs->r[AX] = (regs->r[AX] & keep) | data;
}

static void on_cpuid(struct regs *regs)
{
        struct call call = { 10, (u32)regs->r[AX], (u32)regs->r[CX] };
        u64 keep = 0, take = (u32)~0;

#ifndef FAULT_CPUID_ASKS
        /* Leaves of the processor's are none of the host's business. */
        if ((u32)regs->r[AX] >> 28 != 4) {
                regs->r[AX] = regs->r[BX] = regs->r[CX] = regs->r[DX] = 0;
                return;
        }
#endif
#ifdef FAULT_CPUID_LEAF
        call.size = 0x40000000;
#endif
#ifdef FAULT_CPUID_SUBLEAF
        call.direction = 0;
#endif
#ifdef FAULT_CPUID_LEAKS
        call.size = regs->r[AX];
#endif
#ifdef FAULT_CPUID_STALE
        keep = ~take;
#endif
#ifdef FAULT_CPUID_TRUSTS
        take = ~0ul;
#endif
        tdvmcall(&call, 0);
        regs->r[AX] = (regs->r[AX] & keep) | (call.size & take);
#ifdef FAULT_CPUID_SWAPS
        regs->r[CX] = (regs->r[CX] & keep) | (call.direction & take);
        regs->r[BX] = (regs->r[BX] & keep) | (call.address & take);
#else
        regs->r[BX] = (regs->r[BX] & keep) | (call.direction & take);
        regs->r[CX] = (regs->r[CX] & keep) | (call.address & take);
#endif
        regs->r[DX] = (regs->r[DX] & keep) | (call.data & take);
}

static void on_msr(struct regs *regs, int is_write)
{
        struct call call = { is_write ? 32 : 31, (u32)regs->r[CX] };
        u64 value, keep = 0;

#ifdef FAULT_MSR_LEAKS
        call.size = regs->r[CX];
#endif
        if (is_write) {
#if defined(FAULT_WRMSR_SWAPS)
                call.direction = (u32)regs->r[DX] | regs->r[AX] << 32;
#elif defined(FAULT_WRMSR_RAX)
                call.direction = regs->r[AX] | regs->r[DX] << 32;
#else
                call.direction = (u32)regs->r[AX] | regs->r[DX] << 32;
#endif
#ifdef FAULT_WRMSR_DEADLINE
                if (call.size == 0x6e0)
                        call.direction = (u32)regs->r[AX];
#endif
                tdvmcall(&call, 0);
                return;
        }
        value = tdvmcall(&call, 0);
#ifdef FAULT_RDMSR_SWAPS
        value = value >> 32 | value << 32;
#endif
#ifdef FAULT_RDMSR_STALE
        keep = ~(u64)(u32)~0;
#endif
        regs->r[AX] = (regs->r[AX] & keep) | (u32)value;
        regs->r[DX] = (regs->r[DX] & keep) | value >> 32;
}

static void on_hlt(struct regs *regs)
{
        struct call call = { 12, !(regs->flags & 1 << 9) };

#ifdef FAULT_HLT_INVERTS
        call.size = !call.size;
#endif
#ifdef FAULT_HLT_LEAKS
        call.size |= regs->flags & ~1ul;
#endif
        tdvmcall(&call, 0);
#ifdef FAULT_HLT_CLI
        regs->flags &= ~(1ul << 9);
#endif
}

static void on_instruction(struct regs *regs, struct ve *ve)
{
        switch (ve->reason) {
        case 10: on_cpuid(regs); break;
        case 12: on_hlt(regs); break;
        case 30: on_port(regs, ve); break;
        case 31: on_msr(regs, 0); break;
        case 32: on_msr(regs, 1); break;
        default: return die_addr();
        }
#ifdef FAULT_HLT_STAYS
        if (ve->reason == 12)
                return;
#endif
#ifdef FAULT_HLT_SKIPS
        if (ve->reason == 12)
                regs->ip = (regs->ip & ~4095ul) + 0x800 - 1; /* the last byte, as if no prefix */
#endif
        regs->ip += ve->length;
        regs->flags &= ~(1ul << 16); /* RF: the instruction is complete */
}
"""
