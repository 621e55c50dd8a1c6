"""Accessors that no list has: each planted one is said, each sound twin passes."""

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.base.errors import ExitCode
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.report.records import SCAN
from trapline.results.findings import exit_code
from trapline.scan.wholekernel import scan

_PLANTED = """
    #include "asm/io.h"
    #include "asm/pv.h"
    #define EXPORT(name) void *__ksymtab_##name = name
    void call_on(int cpu, void (*f)(void *), void *arg);
    struct request { unsigned int number; unsigned long value; };

    /* An MSR by number, as an argument and behind a pointer. */
    unsigned long fetch_register(unsigned int number) { unsigned int a, d;
        asm volatile("rdmsr" : "=a" (a), "=d" (d) : "c" (number));
        return a | (unsigned long)d << 32; }
    static void fetch_here(void *p) { struct request *r = p;
        r->value = fetch_register(r->number); }
    void fetch_there(int cpu, unsigned int number, unsigned long *value) {
        struct request r = { number, 0 };
        call_on(cpu, fetch_here, &r);
        *value = r.value; }
    /* The same, handed on in a member of a structure. */
    struct work { void (*f)(void *); struct request r; };
    void queue_on(int cpu, struct work *w);
    static void fetch_work(void *p) { struct work *w = p;
        w->r.value = fetch_register(w->r.number); }
    void fetch_later(int cpu, unsigned int number, unsigned long *value) {
        struct work w = { fetch_work, { number, 0 } };
        queue_on(cpu, &w);
        *value = w.r.value; }
    void poke_port(unsigned char v, unsigned short port) { outb(v, port); }
    unsigned int peek(const void *address) { return readl(address + 4); }
    unsigned int peek_called(const void *address) { return ioread32(address); }
    void flush_all(void) { asm volatile("wbinvd"); }
"""
_SOUND = """
    #include "asm/io.h"
    struct device { void *base; unsigned short port; };

    unsigned long fetch_register(void) { unsigned int a, d;
        asm volatile("rdmsr" : "=a" (a), "=d" (d) : "c" (0x1b));
        return a | (unsigned long)d << 32; }
    void poke_port(unsigned char v) { outb(v, 0x3f8); }
    unsigned int peek(struct device *d) { return readl(d->base + 4); }
    unsigned int peek_called(struct device *d) { return ioread32(d->base); }
    /* For its own file only: the site in it has a caller that says the rest. */
    static __attribute__((noinline)) unsigned int own(const void *a) { return readl(a); }
    unsigned int peek_own(struct device *d) { return own(d->base) + 1; }
    /* An operation that is put in a table is called through the table. */
    static unsigned int read_own(const void *a) { return readl(a); }
    struct operations { long pad; unsigned int (*read)(const void *); } table, *current;
    void install(void) { table.read = read_own; }
    void install_current(void) { current->read = read_own; }
    /* What a caller says is what is written, not where. */
    void poke_value(unsigned int v, struct device *d) { writel(v, d->base); }
"""
_NAMES = (
    "fetch_later", "fetch_register", "fetch_there", "flush_all", "peek", "peek_called", "poke_port",
)  # fmt: skip
_FILE = "drivers/demo/planted.c"


def kernel(folder, source):
    helper = {
        "lib/call.c": "void call_on(int c, void (*f)(void *), void *p) { f(p); }"
        "void queue_on(int c, void (**f)(void *)) { (*f)(f); }"
    }
    return tiny_kernel.build_vmlinux(folder, {_FILE: source, **helper}, "-fno-ipa-cp")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = kernel(tmp_path_factory.mktemp("planted"), _PLANTED)
    return scan(KernelFiles("6.12.0", path, None, ()), load(), workers=1)


def test_each_planted_accessor_is_said(planted):
    found = planted.coverage.unrecognised
    assert tuple(f.function for f in found if f.file == _FILE) == _NAMES
    assert {f.function: f.trap for f in found}["fetch_there"] == "msr"
    assert all(f.line for f in found)


def test_a_scan_with_one_is_not_whole(planted):
    assert not planted.coverage.complete
    assert "which may be accessors" in planted.coverage.missing[-1]
    lines = b"".join(SCAN.render(planted, "text")).splitlines()
    assert any(line.startswith(b"INCOMPLETE") for line in lines[:8])


def test_the_sound_twins_are_whole(tmp_path):
    path = kernel(tmp_path, _SOUND)
    found = scan(KernelFiles("6.12.0", path, None, ()), load(), workers=1)
    assert [f.function for f in found.coverage.unrecognised if f.file == _FILE] == []
    assert found.coverage.complete
    assert exit_code(found) in {ExitCode.CLEAN, ExitCode.FINDINGS}


def test_what_a_module_exports_counts_and_the_rest_does_not(tmp_path):
    source = _PLANTED + "EXPORT(peek); EXPORT(fetch_there);"
    path = tiny_kernel.build_module(tmp_path, "demo", [_FILE], {_FILE: source}, "-fno-ipa-cp")
    module = ModuleFile("demo", path, path, "kernel/drivers/demo.ko")
    found = scan(KernelFiles("6.12.0", None, None, (module,)), load(), workers=1)
    assert [f.function for f in found.coverage.unrecognised] == ["fetch_there", "peek"]
