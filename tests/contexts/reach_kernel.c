/* A kernel with the functions that contexts start in: test_reach.py puts a fault where AT_… stands. */
#define F __attribute__((noinline, noipa))
static inline unsigned int readl(const volatile void *a) {
    unsigned int v; asm volatile("movl %1,%0" : "=r" (v) : "m" (*(volatile unsigned int *)a)); return v; }
struct pt_regs { long ax, ip; };
struct ve_info { long reason, length; };
struct console { char name[16]; void (*write)(struct console *, const char *, unsigned);
                 void (*write_atomic)(struct console *, void *); };
struct nmiaction { struct nmiaction *next; int (*handler)(unsigned, struct pt_regs *); const char *name; };
struct port_ops { unsigned (*in)(long, int); void (*out)(long, int, int); };
struct port { const struct port_ops *ops; long base; };
struct static_call_key { void *func; unsigned long type; };
void *device, *sink;
long count;
F void touch(void) { count += readl(device); }
F void harmless(void) { count += *(unsigned *)sink; }
F void __warn_printk(const char *s) { count++; touch(); }
F void panic(const char *s) { core_0(); }

F unsigned mem_in(long a, int b) { AT_OPS; return b; }
F void mem_out(long a, int b, int c) { count = c; }
const struct port_ops mem_ops = { mem_in, mem_out };
struct port a_port = { &mem_ops };
F unsigned use_port(struct port *p) { return p->ops->in(p->base, 2) + 1; }

F int way(int n) { AT_STATIC; return n; }
struct static_call_key __SCK__way = { way };
asm(".globl __SCT__way\n.type __SCT__way,@function\n__SCT__way: jmp way\n.size __SCT__way, . - __SCT__way");
F int use_static(int n) { int r;
    asm volatile("1: call __SCT__way\n"
        ".pushsection .static_call_sites,\"aw\"\n.long 1b - ., __SCK__way - .\n.popsection"
        : "=a" (r) : "D" (n) : "memory", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11");
    return r + 1; }

F void early(struct pt_regs *r) { count++; AT_BEFORE; }
F void tdx_get_ve_info(struct ve_info *v) { asm volatile(".byte 0x66,0x0f,0x01,0xcc" ::: "memory"); v->reason = 1; }
F int tdx_handle_virt_exception(struct pt_regs *r, struct ve_info *v) { AT_AFTER; use_port(&a_port); return use_static(1); }
F void exc_virtualization_exception(struct pt_regs *r) {
    struct ve_info v; early(r); tdx_get_ve_info(&v);
    if (!tdx_handle_virt_exception(r, &v)) panic("ve"); count++; }

F int watchdog(unsigned t, struct pt_regs *r) { AT_NMI; return 1; }
struct nmiaction watch_na = { 0, watchdog, "watch" };
F int nmi_handle(unsigned t, struct pt_regs *r, struct nmiaction *a) { return a->handler(t, r) + 1; }
F void exc_nmi(struct pt_regs *r) { count += nmi_handle(0, r, &watch_na); AT_GATE; }

F void con_write(struct console *c, const char *s, unsigned n) { AT_CONSOLE; count += n; }
F void con_atomic(struct console *c, void *w) { count++; }
struct console con = { "tty", con_write, con_atomic };
F void _printk(struct console *c, const char *s) { c->write(c, s, 1); count++; }
F void notify(struct console *c) { AT_PRINTK; }
F void exc_int3(struct pt_regs *r) { notify(&con); count++; }
F void do_idle(void) { asm volatile("hlt"); }
void _start(void) { do_idle(); }
