/* A kernel of a few functions that calls in every way there is: test_calls.py. */
typedef unsigned int u32;
struct device { int id; void *data; };
struct ops { int (*open)(struct device *); void (*stop)(struct device *, long); int flags; };
struct driver { const char *name; const struct ops *ops; struct ops own; };
struct late { long pad; int (*hook)(struct driver *); };
struct paravirt_patch_template { void (*halt)(void); u32 (*read)(u32); } ;

#define F __attribute__((noinline, noipa))
F int disk_open(struct device *d) { return d->id; }
F void disk_stop(struct device *d, long n) { d->id = n; }
F int net_open(struct device *d) { return d->id + 1; }
F int other(struct device *d) { return d->id + 2; }   /* same prototype, in no table of ops */
F int set_later(struct driver *d) { return 3; }
F void native_halt(void) { asm volatile("hlt"); }
F u32 native_read(u32 n) { return n; }
F void guest_halt(void) { asm volatile("nop"); }
F int worker(struct device *d, u32 n) { return n; }
F int never_given(struct device *d, u32 n) { return n + 1; }

const struct ops disk_ops = { disk_open, disk_stop, 1 };
const struct ops net_ops = { net_open, 0, 2 };
struct other_table { long tag; int (*other)(struct device *); long more; } others = { 1, other, 2 };
struct paravirt_patch_template pv_ops = { native_halt, native_read };
struct late late;
int (*chosen)(struct device *, u32);
int (*wanted)(struct device *, u32) = never_given;
long jumps;

F int call_open(struct driver *d, struct device *dev) { return d->ops->open(dev) + 1; }
F void call_stop(struct driver *d, struct device *dev) { d->own.stop(dev, 2); jumps++; }
F void put(void) { late.hook = set_later; }
F int call_late(struct late *l, struct driver *d) { return l->hook(d) + 1; }
F int run(int (*fn)(struct device *, u32), struct device *d) { return fn(d, 4) + 1; }
F int give(struct device *d) { return run(worker, d) + 1; }
F int two(struct device *d, int n) { return n ? give(d) : disk_open(d); }
F void idle(void) { asm volatile("call *pv_ops(%%rip)" ::: "memory"); jumps++; }
F void as_guest(void) { pv_ops.halt = guest_halt; }
F int call_wanted(struct device *d) { return wanted(d, 3) + 1; }
F int call_unknown(void *p) { return (*(int (**)(void))p)() + 1; }

F int feature_on(void) { return 1; }
F int feature_off(void) { return 2; }
F int with_alternative(void) {
    int r;
    asm volatile("661: call feature_off\n662:\n"
        ".pushsection .altinstructions,\"a\"\n .long 661b - ., 663f - .\n .4byte 9\n"
        ".byte 662b-661b, 664f-663f\n.popsection\n"
        ".pushsection .altinstr_replacement,\"ax\"\n663: call feature_on\n664:\n.popsection"
        : "=a" (r) :: "memory", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11");
    return r;
}
struct static_call_key { void *func; unsigned long type; };
F int first(int n) { return n; }
F int second(int n) { return n + 1; }
F int third(int n) { return n + 2; }
struct static_call_key __SCK__way = { first };
F void __static_call_update(struct static_call_key *key, void *tramp, void *func) { key->func = func; }
asm(".globl __SCT__way\n.type __SCT__way,@function\n__SCT__way: jmp first\n.size __SCT__way, . - __SCT__way");
int __SCT__way(int n);
F int use_static(int n) {
    int r;
    asm volatile("1: call __SCT__way\n"
        ".pushsection .static_call_sites,\"aw\"\n.long 1b - ., __SCK__way - .\n.popsection"
        : "=a" (r) : "D" (n) : "memory");
    return r + 1;
}
F void change_way(void) { __static_call_update(&__SCK__way, __SCT__way, second); }
F int switched(int n) { switch (n) { case 0: return disk_open(0); case 1: return net_open(0);
    case 2: return other(0); case 3: return give(0); case 4: return first(9); case 5: return second(8);
    default: return 0; } }
struct worker { long pad; int (*current_func)(struct device *); };
struct work { int (*func)(struct device *); struct work *next; };
F int run_work(struct worker *w, struct work *k, struct device *d) {
    w->current_func = k->func; jumps++; return w->current_func(d) + 1; }
struct driver a_driver; struct worker *a_worker; struct work *a_work; struct late *a_late;
void _start(void) { two(0, 1); }
