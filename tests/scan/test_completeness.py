"""The scan against independent walks of all debugging information entries."""

import dataclasses

import pytest

import diewalk
import suspectwalk
import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.scan.wholekernel import scan

# Folders of modules with many MMIO sites, and few enough to walk in a test.
_FOLDERS = ("kernel/drivers/net/ethernet/intel/", "kernel/drivers/gpu/", "kernel/drivers/virtio/")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def tiny_places(tiny):
    result = scan(KernelFiles("6.12.0", tiny, None), load(), workers=1)
    return diewalk.scanned_places(result.sites, "vmlinux")


def test_both_ways_agree_on_a_tiny_kernel(tiny, tiny_places):
    walked = diewalk.find(tiny)
    assert len(walked) >= 5
    assert diewalk.compare(walked, tiny_places) == ((), ())


def test_a_site_that_the_scan_lost_is_missing(tiny, tiny_places):
    walked = diewalk.find(tiny)
    missing, extra = diewalk.compare(walked, tiny_places[1:])
    assert [item.address for item in missing] == [tiny_places[0][1]]
    assert extra == ()


def test_a_site_that_the_scan_made_up_is_extra(tiny, tiny_places):
    made_up = (".text", tiny_places[0][1] + 1)
    missing, extra = diewalk.compare(diewalk.find(tiny), [*tiny_places, made_up])
    assert missing == ()
    assert extra == (made_up,)


# Accessors that nobody has heard of, as a kernel might grow them.
_NOVEL = {
    "arch/x86/include/asm/novel.h": """
        static inline unsigned int novel_peek(const volatile void *a) { unsigned int r;
            asm volatile("movl %1,%0" : "=r" (r) : "m" (*(volatile unsigned int *)a)); return r; }
        static inline void novel_poke(void *a, unsigned int v) {
            asm volatile("movl %%eax,(%1)" : : "a" (v), "r" (a) : "memory"); }
    """,
    "drivers/demo/novel.c": """
        #include "asm/novel.h"
        void novel_move(void *a) { novel_poke(a, novel_peek(a)); }
        void novel_store(void *a, void *b) {
            asm volatile("movdir64b (%1),%0" : : "r" (a), "r" (b) : "memory"); }
    """,
}
# The same with accessors that the scan knows.
_FAMILIAR = {
    "arch/x86/include/asm/novel.h": """
        #include "asm/io.h"
        static inline unsigned int novel_peek(const volatile void *a) { return readl(a); }
        static inline void novel_poke(void *a, unsigned int v) { writel(v, a); }
    """,
    "drivers/demo/novel.c": """
        #include "asm/novel.h"
        void novel_move(void *a) { novel_poke(a, novel_peek(a)); }
    """,
}


def _unexplained(vmlinux):
    sites = scan(KernelFiles("6.12.0", vmlinux, None), load(), workers=1).sites
    found = suspectwalk.unexplained(suspectwalk.find(vmlinux), sites, "vmlinux")
    return {(suspect.mark, suspect.function, suspect.file) for suspect in found}


def test_accessors_of_unknown_names_are_noticed(tmp_path):
    vmlinux = tiny_kernel.build_vmlinux(tmp_path, _NOVEL)
    assert _unexplained(vmlinux) == {
        ("volatile", "novel_peek", "arch/x86/include/asm/novel.h"),
        ("void", "novel_poke", "arch/x86/include/asm/novel.h"),
        ("instruction", "movdir64b", ""),
    }


def test_accessors_that_are_known_need_no_explanation(tmp_path):
    assert _unexplained(tiny_kernel.build_vmlinux(tmp_path, _FAMILIAR)) == set()


def test_an_accessor_that_the_list_lost_is_noticed(tiny):
    sites = scan(KernelFiles("6.12.0", tiny, None), load(), workers=1).sites
    suspects = suspectwalk.find(tiny)
    assert suspectwalk.unexplained(suspects, sites, "vmlinux") == []
    kept = [site for site in sites if site.accessor != "readq"]
    lost = suspectwalk.unexplained(suspects, kept, "vmlinux")
    assert {suspect.function for suspect in lost} == {"readq"}


def test_a_module_is_searched_too(tmp_path):
    module = tiny_kernel.build_module(tmp_path, "novel", ["drivers/demo/novel.c"], _NOVEL)
    found = suspectwalk.unexplained(suspectwalk.find(module), (), "novel")
    assert {suspect.function for suspect in found} == {"novel_peek", "novel_poke", "movdir64b"}
    assert {suspect.section for suspect in found} == {".text"}
    start = min(start for suspect in found for start, _ in suspect.spans)
    assert start < 64


@pytest.mark.kernel
def test_both_ways_agree_on_a_real_kernel(debian_kernel):
    modules = tuple(
        module
        for module in debian_kernel.modules
        if module.debug is not None and module.location.startswith(_FOLDERS)
    )
    result = scan(dataclasses.replace(debian_kernel, modules=modules), load())
    objects = [("vmlinux", debian_kernel.vmlinux)]
    objects += [(module.name, module.debug) for module in modules]
    found = 0
    for name, path in objects:
        walked = diewalk.find(path)
        places = diewalk.scanned_places(result.sites, name)
        assert diewalk.compare(walked, places) == ((), ()), name
        suspects = suspectwalk.find(path)
        assert suspectwalk.unexplained(suspects, result.sites, name) == [], name
        found += len(places)
    assert found > 800
