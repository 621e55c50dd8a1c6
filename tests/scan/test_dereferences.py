"""Accesses to device memory without an accessor: planted ones are found, their twins are not."""

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.report.records import SCAN
from trapline.scan.wholekernel import scan

_FILE = "drivers/demo/planted.c"
_SOURCE = """
    typedef unsigned int u32;
    void *ioremap(unsigned long a, unsigned long n);
    void *kmalloc(unsigned long n);
    void *memcpy(void *to, const void *from, unsigned long n);
    void other(void);
    extern u32 buffer[16];

    void plain(void) { volatile u32 *r = MAP; r[1] = 5; }
    u32 plain_read(void) { volatile u32 *r = MAP; if (!r) return 0; other(); return r[3]; }
    void change(void) { u32 *r = MAP; r[2] |= 4; }
    void around(void) { volatile u32 *r = MAP;
        asm volatile("movnti %1,%0" : "=m" (r[3]) : "r" (7)); }
    void strings(void) { void *to = MAP; const void *from = buffer; unsigned long n = 64;
        asm volatile("rep movsb" : "+D" (to), "+S" (from), "+c" (n) : : "memory"); }
    void bits(void) { volatile u32 *r = MAP;
        asm volatile("lock btsl %1,%0" : "+m" (*r) : "r" (5)); }
    void looped(void) { volatile u32 *r = MAP; for (int i = 0; i < 99; i++) *r++ = buffer[i & 15]; }
    void copied(void) { memcpy(buffer, MAP, 4096); other(); }

    static u32 *kept;
    static struct { int use; u32 *regs; } state;
    int probe(void) { kept = MAP; state.regs = kept; return kept != 0; }
    void release(void) { kept = 0; state.regs = 0; other(); }
    void use_variable(void) { *(volatile u32 *)kept = 1; }
    void use_member(void) { state.regs[2] = 1; }
"""
# Of either kind: nothing can be said of what it points to.
_MIXED = """
    void *ioremap(unsigned long a, unsigned long n);
    void *kmalloc(unsigned long n);
    void other(void);
    static unsigned *kept;
    void put(int device) { kept = device ? ioremap(0, 64) : kmalloc(64); other(); }
    void put_memory(void) { kept = kmalloc(64); }
    void put_device(void) { kept = ioremap(0, 64); }
    void use(void) { *(volatile unsigned *)kept = 1; }
    void choose(int device) {
        volatile unsigned *r = device ? ioremap(0, 64) : kmalloc(64); r[1] = 5; }
    void given(unsigned *r) { ioremap(0, 64); r[1] = 5; other(); r[2] = 6; }
"""
_HELPERS = """
    unsigned buffer[16];
    void *kmalloc(unsigned long n) { static char heap[8192]; return heap + n; }
    void *memcpy(void *to, const void *from, unsigned long n) {
        char *t = to; const char *f = from;
        while (n--) { *t++ = *f++; asm volatile(""); } return to; }
    void other(void) { asm volatile(""); }
"""
_PLANTED = {
    "plain": ("write", 4, "instruction"),
    "plain_read": ("read", 4, "instruction"),
    "change": ("read-write", 4, "instruction"),
    "around": ("write", 4, "instruction"),
    "strings": ("write", 1, "instruction"),
    "bits": ("read-write", 4, "instruction"),
    "looped": ("write", 4, "instruction"),
    "copied": ("read", 0, "call"),
    "use_variable": ("write", 4, "instruction"),
    "use_member": ("write", 4, "instruction"),
}


def scanned(folder, source, *flags):
    helpers = {_FILE: source, "lib/memory.c": _HELPERS}
    path = tiny_kernel.build_vmlinux(folder, helpers, "-fno-ipa-ra", *flags)
    return scan(KernelFiles("6.12.0", path, None, ()), load(), workers=1)


def dereferences(result):
    return {
        site.function: (site.access, site.width, site.form)
        for site in result.sites
        if site.mapped_by is not None
    }


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return scanned(folder, "#define MAP ioremap(0xfee00000, 4096)\n" + _SOURCE)


def test_each_planted_access_is_a_site_with_its_evidence(planted):
    assert dereferences(planted) == _PLANTED
    sites = [site for site in planted.sites if site.mapped_by]
    assert {site.mapped_by for site in sites} == {"ioremap"}
    assert {site.trap for site in sites} == {"mmio"}
    assert all(site.file == _FILE and site.line for site in sites)
    shown = " ".join(b"".join(SCAN.render(planted, "text", 1)).decode().split())
    assert "MMIO read-write 32 bit through what ioremap() returned" in shown


def test_what_the_handler_cannot_decode_is_refused(planted):
    verdicts = {site.function: site.emulable for site in planted.sites if site.mapped_by}
    assert [name for name, emulable in verdicts.items() if not emulable] == [
        *("change", "around", "strings", "bits", "copied"),
    ]


def test_the_same_on_allocated_memory_is_clean(tmp_path):
    assert dereferences(scanned(tmp_path, "#define MAP kmalloc(4096)\n" + _SOURCE)) == {}


def test_pointers_that_may_be_either_are_not_sites(tmp_path):
    # With -O2 there would be a store for each, of which one is a site.
    assert dereferences(scanned(tmp_path, _MIXED, "-Os")) == {}


def test_a_module_has_the_sites_of_built_in_code(tmp_path):
    source = {_FILE: "#define MAP ioremap(0xfee00000, 4096)\n" + _SOURCE}
    path = tiny_kernel.build_module(tmp_path, "demo", [_FILE], source, "-fno-ipa-ra")
    module = ModuleFile("demo", path, path, "kernel/drivers/demo.ko")
    found = scan(KernelFiles("6.12.0", None, None, (module,)), load(), workers=1)
    assert dereferences(found) == _PLANTED
