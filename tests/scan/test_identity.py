"""Ids name places in the source: what compilers and edits elsewhere do to a kernel keeps them."""

import pytest

import tiny_kernel
from trapline.allowlist.listfile import load
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.linux import spelling
from trapline.scan.identity import Key, ids
from trapline.scan.wholekernel import scan

PLACES = """
#include "asm/io.h"
void other(void);
static void setup(void *base) {
    writel(1, base + 4);
    writel(2, base + 8); writel(3, base + 12);
}
unsigned int places_probe(void *base) {
    setup(base);
    if (ioread32(base))
        return ioread32(base + 4);
    writel(4, base);
    return readl(base) + readl(base + 4);
}
void places_remove(void *base) {
    setup(base);
    writel(0, base);
}
"""
NAME = "drivers/demo/places.c"


def sites(folder, text, *flags):
    """Scan a kernel with this driver: id -> text of the source line, and spot."""
    folder.mkdir(exist_ok=True)
    vmlinux = tiny_kernel.build_vmlinux(folder, {NAME: text}, *flags)
    result = scan(KernelFiles("6.12.0", vmlinux, None, ()), load(), workers=1)
    found = [site for site in result.sites if site.object == "drivers/demo/places.o"]
    assert len({site.id for site in found}) == len(found) > 0
    return {site.id: site for site in found}


def place(site, text):
    """The source line that names a site, without the compiler's choices."""
    frames = [(f.function, f.file, f.line) for f in site.inlined]
    frames.append((site.function, site.file, site.line))
    own = next(f for f in frames if f[0].partition(".")[0] == site.owner)
    return (site.owner, text.splitlines()[own[2] - 1].strip(), site.access, site.spot)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return sites(tmp_path_factory.mktemp("base"), PLACES, "-fno-inline-small-functions")


@pytest.mark.parametrize(
    "flags",
    [
        ("-O1",),
        ("-Os",),
        ("-O3", "-fno-inline-small-functions"),
        ("-O2", "-mtune=atom", "-fno-reorder-blocks", "-fno-inline-small-functions"),
        ("-gdwarf-4",),
    ],
)
def test_another_compilation_names_no_other_place(flags, base, tmp_path):
    other = sites(tmp_path, PLACES, *flags)
    kept = base.keys() & other.keys()
    assert len(kept) >= 6
    for identity in kept:
        assert place(base[identity], PLACES) == place(other[identity], PLACES)


def test_a_function_keeps_its_ids_where_it_was_inlined_once(tmp_path):
    once = PLACES.replace(
        "void places_remove(void *base) {\n    setup(base);", "void x(void *base) {"
    )
    inside = sites(tmp_path / "in", once, "-O2")
    outside = sites(tmp_path / "out", once, "-O2", "-fno-inline")
    assert {site.landed for site in inside.values() if site.owner == "setup"} == {"places_probe"}
    assert {site.landed for site in outside.values() if site.owner == "setup"} <= {None}
    named = {identity for identity, site in inside.items() if site.owner == "setup"}
    assert len(named) == 3


def test_what_is_added_elsewhere_changes_no_id(base, tmp_path):
    grown = PLACES.replace("void other(void);", "void other(void);\n\nint grown;\n#define X 1\n")
    grown = grown.replace(
        "void places_remove", "void early(void *b) { writel(9, b); }\nvoid places_remove"
    )
    other = sites(tmp_path, grown, "-fno-inline-small-functions")
    assert base.keys() < other.keys()


def test_likes_that_an_edit_moves_get_new_ids_and_never_each_other_s(base, tmp_path):
    edited = PLACES.replace(
        "    writel(1, base + 4);", "    writel(7, base);\n    writel(1, base + 4);"
    )
    other = sites(tmp_path, edited, "-fno-inline-small-functions")
    for identity in base.keys() & other.keys():
        mine, theirs = place(base[identity], PLACES), place(other[identity], edited)
        # By its spot: what stands there now is another access to the same function's line.
        assert mine[0] == theirs[0]
        assert mine[3] == theirs[3]


def test_two_likes_on_one_line_are_told_apart_by_column(base):
    twins = [site for site in base.values() if site.owner == "setup"]
    spots = {site.spot for site in twins}
    assert len({spot.partition(":")[0] for spot in spots}) == 2
    assert len(spots) == 3


def test_an_id_takes_in_only_what_tells_likes_apart():
    alone, edited = Key(("f", "readl"), "3:2"), Key(("f", "readl"), "4:2")
    assert ids([alone]) == ids([edited])
    like = Key(("f", "readl"), "9:2")
    assert ids([alone, like]) == ids([like, alone])[::-1]
    assert set(ids([alone, like])).isdisjoint(ids([edited, like])[:1])
    copies = [Key(("f", "readl"), "3:2", "", "probe"), Key(("f", "readl"), "3:2", "", "remove")]
    assert len(set(ids([*copies, *copies]))) == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rdmsrl", "rdmsrq"),
        ("wrmsrl_safe", "wrmsrq_safe"),
        ("rdmsrl_on_cpu", "rdmsrq_on_cpu"),
        ("mce_wrmsrl", "mce_wrmsrq"),
        ("ioread64_lo_hi", "__ioread64_lo_hi"),
        ("__outb", "outb"),
        ("native_wrmsrl", "wrmsrq"),
        ("__readl", "readl"),
    ],
)
def test_renamed_accessors_have_one_name(old, new):
    assert spelling.canonical(old) == spelling.canonical(new) == new.lstrip("_")


@pytest.mark.parametrize(
    "name", ["hpet_readl", "wrmsr_on_cpus", "cpuid_deps", "inbox", "ring_writel"]
)
def test_what_does_more_than_access_is_no_accessor(name):
    assert not spelling.is_access(name)
    assert spelling.canonical(name) == name
