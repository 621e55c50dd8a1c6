"""A kernel of a few functions, built by gcc: the least that has every kind of trap site.

It has the shape of the real thing: accessors in arch/x86/include/asm/io.h are inline assembly,
ioread32() and ioremap() are out of line, pv_ops has BTF, code for other processors stands in
.altinstr_replacement.
"""

import subprocess
from pathlib import Path

SOURCES = {
    "arch/x86/include/asm/io.h": """
        #define READ(name, size, type, reg) \\
        static inline type name(const volatile void *a) { type r; \\
            asm volatile("mov" size " %1,%0" : reg (r) : "m" (*(volatile type *)a)); return r; }
        #define WRITE(name, size, type, reg) \\
        static inline void name(type v, volatile void *a) { \\
            asm volatile("mov" size " %0,%1" : : reg (v), "m" (*(volatile type *)a)); }
        READ(readb, "b", unsigned char, "=q") READ(readl, "l", unsigned int, "=r")
        READ(readq, "q", unsigned long, "=r")
        WRITE(writeb, "b", unsigned char, "q") WRITE(writel, "l", unsigned int, "r")
        WRITE(writeq, "q", unsigned long, "r")
        static inline void outb(unsigned char v, unsigned short p) {
            asm volatile("outb %0,%1" : : "a" (v), "Nd" (p)); }
        static inline unsigned int inl(unsigned short p) {
            unsigned int v; asm volatile("inl %1,%0" : "=a" (v) : "Nd" (p)); return v; }
        static inline void rep_movs(void *to, const void *from, unsigned long n) {
            asm volatile("rep movsl" : "+D" (to), "+S" (from), "+c" (n) : : "memory"); }
        unsigned int ioread32(const void *a);
        void iowrite8(unsigned char v, void *a);
        void *ioremap(unsigned long a, unsigned long n);
    """,
    "arch/x86/include/asm/pv.h": """
        struct pv_cpu_ops { void (*io_delay)(void); unsigned long (*save)(void);
                            unsigned long (*read_msr)(unsigned int); };
        struct pv_irq_ops { void (*halt)(void); };
        struct paravirt_patch_template { struct pv_cpu_ops cpu; struct pv_irq_ops irq; };
        extern struct paravirt_patch_template pv_ops;
        #define PV(offset) \\
            asm volatile("mov $27,%%edi; call *pv_ops+" #offset "(%%rip)" : : : "memory", "edi")
    """,
    "arch/x86/kernel/paravirt.c": """
        #include "asm/pv.h"
        unsigned long native_read_msr(unsigned int m) { unsigned int a, d;
            asm volatile("rdmsr" : "=a" (a), "=d" (d) : "c" (m));
            return a | (unsigned long)d << 32; }
        void native_halt(void) { asm volatile("hlt"); }
        void native_io_delay(void) { asm volatile("outb %al,$0x80"); }
        unsigned long native_save(void) { return 0; }
        struct paravirt_patch_template pv_ops = {
            { native_io_delay, native_save, native_read_msr }, { native_halt } };
    """,
    "arch/x86/kernel/types.c": """
        #include "asm/pv.h"
        struct paravirt_patch_template pv_types;
        enum insn_mmio_type { INSN_MMIO_DECODE_FAILED, INSN_MMIO_WRITE, INSN_MMIO_WRITE_IMM,
                              INSN_MMIO_READ } mmio_types;
        void tdx_handle_virt_exception(void) { }
        void insn_decode_mmio(void) { }
    """,
    "arch/x86/lib/iomem.c": """
        #include "asm/io.h"
        static void string_memcpy_fromio(void *to, const void *from, unsigned long n) {
            rep_movs(to, from, n / 4); }
        void memcpy_fromio(void *to, const void *from, unsigned long n) {
            string_memcpy_fromio(to, from, n); }
    """,
    "lib/iomap.c": """
        #include "asm/io.h"
        unsigned int ioread32(const void *a) { return readl(a); }
        void iowrite8(unsigned char v, void *a) { writeb(v, a); }
        void *ioremap(unsigned long a, unsigned long n) { return (void *)(a + n); }
    """,
    "drivers/demo/demo.c": """
        #include "asm/io.h"
        #include "asm/pv.h"
        struct device { void *base; unsigned int saved[4]; };
        static inline void kick(struct device *d, unsigned int v) { writel(v, d->base + 16); }
        unsigned int demo_poll(struct device *d, unsigned int v) {
            kick(d, v);
            d->saved[0] = readl(d->base);
            return d->saved[1];
        }
        void demo_config(struct device *d) {
            iowrite8(1, d->base);
            d->saved[2] = ioread32(d->base);
            outb(3, 0x70); d->saved[3] = inl(0xcfc);
        }
        void *demo_probe(void) { return ioremap(0xfee00000, 4096); }
        unsigned long demo_hidden(void) { PV(16); PV(8); return 0; }
        void demo_id(unsigned int *r) {
            asm volatile("cpuid" : "=a" (r[0]), "=b" (r[1]), "=c" (r[2]), "=d" (r[3]) : "a" (1)); }
        __attribute__((section(".init.text"))) void demo_halt(void) { asm volatile("hlt"); }
    """,
    # The same shape as demo.c with ordinary memory in place of a device.
    "drivers/demo/clean.c": """
        struct device { unsigned int *base; unsigned int saved[4]; };
        static inline void kick(struct device *d, unsigned int v) { d->base[4] = v; }
        unsigned int clean_poll(struct device *d, unsigned int v) {
            kick(d, v);
            d->saved[0] = *(volatile unsigned int *)d->base;
            return d->saved[1];
        }
        unsigned char clean_constant(void) { return 0xf4; }
    """,
    # Spills and pointer loads within the accessor's range, which are not the access.
    "drivers/demo/spill.c": """
        #include "asm/io.h"
        static inline unsigned int twice(unsigned int **p) {
            unsigned int r;
            asm volatile("mov 8(%%rsp),%0" : "=r" (r));
            return r + **p; }
        unsigned int spill(unsigned int **p) { return twice(p); }
        unsigned long wide(void **a) { return readq(*a); }
    """,
    "arch/x86/kernel/head_64.S": """
        .text
        .globl startup_64
        .type startup_64, @function
        startup_64:
            movb $1, %al
            outb %al, $0x80
        0:  nop
            nop
            ret
        .size startup_64, . - startup_64
        .section .altinstr_replacement, "ax"
        1:  cpuid
        2:
        .section .altinstructions, "a"
            .long 0b - .
            .long 1b - .
            .4byte 3*32+5
            .byte 2
            .byte 2b-1b
        .section .noinstr.text, "ax"
        .globl quiet
        .type quiet, @function
        quiet: hlt
            ret
        .size quiet, . - quiet
    """,
}
_LINK = """
ENTRY(startup_64)
SECTIONS {
  . = 0xffffffff81000000;
  .text : { *(.text) __noinstr_text_start = .; *(.noinstr.text) __noinstr_text_end = .; }
  .rodata : { *(.rodata*) }
  .data : { *(.data) *(.bss) }
  .BTF : { *(.BTF) }
  .init.text : { *(.init.text) }
  .altinstructions : { *(.altinstructions) }
  .altinstr_replacement : { *(.altinstr_replacement) }
  .notes : { *(.note.*) }
  /DISCARD/ : { *(.comment) *(.eh_frame) }
}
"""
_FLAGS = (
    *("-O2", "-ffreestanding", "-fno-pie", "-mcmodel=kernel", "-mno-red-zone", "-nostdinc"),
    *("-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-fno-stack-protector"),
    *("-Iarch/x86/include", "-c"),
)


def write_sources(folder, replaced=None):
    """Write the source tree, with some files replaced or, where None, left out."""
    sources = {**SOURCES, **(replaced or {})}
    for name, text in sources.items():
        if text is not None:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return [name for name, text in sources.items() if text is not None and not name.endswith(".h")]


def compile_object(folder, source, *flags):
    """Compile one source file of the tree; returns the object, relative to the tree."""
    target = f"{source.rpartition('.')[0]}.o"
    options = ("-g", *flags)
    if source.endswith("types.c"):
        # BTF and DWARF in one object are more than gcc can do.
        options = ("-gbtf", *(flag for flag in flags if not flag.startswith("-g")))
    run(folder, "gcc", *_FLAGS, *options, source, "-o", target)
    return target


def build_vmlinux(folder, replaced=None, *flags):
    """Build a vmlinux below `folder` and return its path."""
    objects = [compile_object(folder, source, *flags) for source in write_sources(folder, replaced)]
    Path(folder, "vmlinux.lds").write_text(_LINK)
    run(folder, "ld", "-T", "vmlinux.lds", "--build-id", "-o", "vmlinux", *objects)
    return Path(folder, "vmlinux")


def build_module(folder, name, sources, replaced=None, *flags):
    """Build a relocatable module of some of the sources and return its path."""
    write_sources(folder, replaced)
    objects = [compile_object(folder, source, *flags) for source in sources]
    run(folder, "ld", "-r", "--build-id", "-o", f"{name}.ko", *objects)
    return Path(folder, f"{name}.ko")


def run(folder, *command):
    """Run a tool in a folder; what it says is part of the failure."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
