"""The scan of a real Debian kernel, held against independent readers of the same files."""

from collections import Counter

import drgn
import msgspec
import numpy as np
import pytest

from trapline.allowlist.listfile import load
from trapline.kernel.binary import Binary
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.results.scan import ScanResult
from trapline.scan.wholekernel import scan

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("debian")]


def test_drgn_sees_the_same_inline_chains(debian_kernel, debian_scan):
    program = drgn.Program(drgn.Platform(drgn.Architecture.X86_64))
    with Binary.open_vmlinux(debian_kernel.vmlinux) as binary:
        spans = (binary.text[0].address, binary.text[-1].end)
    module = program.extra_module("vmlinux", create=True)
    module.address_range = spans
    module.try_file(debian_kernel.vmlinux, force=True)
    sites = [
        site
        for site in debian_scan.sites
        if site.module == "vmlinux" and site.file and site.file.endswith(".c") and not site.origin
    ][::3]
    assert len(sites) > 500
    differences = []
    for site in sites:
        # drgn takes an address for a return address, and looks at the byte before.
        trace = program.stack_trace_from_pcs([int(site.address, 16) + 1])
        theirs = [(frame.name, frame.source()[1]) for frame in trace]
        ours = [(frame.function, frame.line) for frame in site.inlined]
        ours.append((site.function, site.line))
        # A name with .cold or .part is the symbol's; DWARF has the function's.
        ours = [(name.partition(".")[0], line) for name, line in ours]
        if ours != theirs:
            differences.append((site.address, ours, theirs))
    assert differences == []


def test_bytes_are_those_of_the_file(debian_kernel, debian_scan):
    with Binary.open_vmlinux(debian_kernel.vmlinux) as binary:
        for site in debian_scan.sites:
            if site.module == "vmlinux":
                size = len(site.bytes) // 2
                assert binary.read(int(site.address, 16), size).hex() == site.bytes


def test_string_moves_are_the_only_mmio_that_is_refused(debian_scan):
    refused = [
        site
        for site in debian_scan.sites
        if (site.trap, site.form) == ("mmio", "instruction") and not site.emulable
        if site.mapped_by is None  # without an accessor the compiler chooses the form
    ]
    assert {site.object for site in refused} == {"arch/x86/lib/iomem.o"}
    assert {site.access for site in refused} == {"read", "write"}
    assert all("movs" in site.instruction for site in refused)


def test_what_is_known_of_this_kernel_is_found(debian_scan):
    """Facts that can be read in the source of any 6.12 kernel."""

    def sites(**wanted):
        return [
            site
            for site in debian_scan.sites
            if all(getattr(site, name) == value for name, value in wanted.items())
        ]

    # arch/x86/coco/tdx/tdcall.S: one TDCALL in each of its three functions.
    assert Counter(site.function for site in sites(trap="tdcall")) == Counter(
        ["__tdcall", "__tdcall_ret", "__tdcall_saved_ret"]
    )
    assert {site.file for site in sites(trap="tdcall")} == {"arch/x86/coco/tdx/tdcall.S"}
    # msi_writel() and kin: __pci_write_msi_msg writes a table entry with writel().
    assert sites(object="drivers/pci/msi/msi.o", accessor="writel")
    # virtio over PCI goes through lib/iomap.c.
    modern = [s for s in sites(trap="mmio") if s.object == "drivers/virtio/virtio_pci_modern_dev.o"]
    calls = [site for site in modern if site.form == "call"]
    assert {site.accessor for site in calls} >= {"ioread8", "iowrite8", "iowrite16", "iowrite32"}
    assert not sites(
        object="drivers/virtio/virtio_pci_modern_dev.o", trap="mmio", form="instruction"
    )
    # Code that replaces other code belongs to where it goes.
    replaced = [site for site in debian_scan.sites if site.origin]
    assert replaced
    assert {site.section for site in replaced} == {".altinstr_replacement"}
    assert all(site.function and site.subsystem for site in debian_scan.sites)
    assert {".init.text", ".noinstr.text", ".text"} <= {site.section for site in debian_scan.sites}
    mappers = Counter(mapping.mapper for mapping in debian_scan.mappings)
    assert mappers["ioremap"] > 30
    assert mappers["early_memremap"] > 10


def test_the_document_survives_and_ids_are_unique(debian_scan):
    again = msgspec.json.decode(msgspec.json.encode(debian_scan), type=ScanResult)
    assert again == debian_scan
    for findings in (debian_scan.sites, debian_scan.mappings):
        assert len({finding.id for finding in findings}) == len(findings)
    assert debian_scan.coverage.complete


def test_the_boot_image_alone_shows_all_but_inlined_mmio(debian_kernel, debian_scan):
    bare = scan(KernelFiles(debian_kernel.release, None, debian_kernel.vmlinuz), load(), workers=1)

    def rest(document, *names):
        return {
            site.address: tuple(
                getattr(site, name) for name in ("trap", "form", "accessor", "section", *names)
            )
            for site in document.sites
            if site.module == "vmlinux" and (site.trap, site.form) != ("mmio", "instruction")
        }

    assert rest(bare) == rest(debian_scan)
    # A boot image does not say where a function ends: code without a symbol, which a weak function
    # leaves behind when a strong one is linked, seems to be of the one before it.
    with Binary.open_vmlinux(debian_kernel.vmlinux) as binary:
        starts, ends = binary.functions.spans()
    named = rest(bare, "function")
    for address, site in rest(debian_scan, "function").items():
        if np.any((starts <= int(address, 16)) & (int(address, 16) < ends)):
            assert named[address] == site
    assert not bare.coverage.complete
    assert "no debug information" in bare.coverage.missing[0]
