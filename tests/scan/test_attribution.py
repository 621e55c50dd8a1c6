"""Whose code a site is: drivers and subsystems."""

import pytest

from trapline.allowlist.listfile import load
from trapline.kernel.drivers.modinfo import ModuleInfo, module_info
from trapline.kernel.elf.file import MAX_MODULE, ElfFile
from trapline.kernel.find.kernelfiles import KernelFiles, ModuleFile
from trapline.linux import subsystems
from trapline.scan.attribution import VMLINUX, Attribution, SiteCount


@pytest.fixture
def attribution(tmp_path):
    (tmp_path / "modules.builtin").write_text(
        "kernel/drivers/virtio/virtio_pci.ko\nkernel/drivers/tty/serial/8250/8250.ko\n"
        "kernel/arch/x86/events/amd/amd-uncore.ko\n"
    )
    (tmp_path / "modules.builtin.modinfo").write_bytes(
        b"virtio_pci.alias=pci:v00001AF4d*sv*sd*bc*sc*i*\0virtio_pci.license=GPL\0"
    )
    modules = tuple(
        ModuleFile(name, tmp_path / name, None, f"kernel/{folder}/{name}.ko")
        for name, folder in (("virtio_net", "drivers/net"), ("kvm", "arch/x86/kvm"))
    )
    return Attribution(KernelFiles("6.12", None, None, modules, tmp_path), load())


@pytest.mark.parametrize(
    ("module", "unit", "file", "driver"),
    [
        (VMLINUX, "drivers/virtio/virtio_pci_common.c", None, "virtio_pci"),
        (VMLINUX, None, "drivers/virtio/virtio_pci_common.c", "virtio_pci"),
        (VMLINUX, "drivers/virtio/virtio_pci_common.c", "include/linux/io.h", "virtio_pci"),
        (VMLINUX, "drivers/tty/serial/8250/8250_port.c", None, "8250"),
        (VMLINUX, "drivers/video/fbdev/efifb.c", None, "efifb"),
        (VMLINUX, "drivers/pci/msi/msi.c", None, None),
        (VMLINUX, "drivers/acpi/osl.c", None, None),
        (VMLINUX, "drivers/char/hpet.c", None, None),
        (VMLINUX, "arch/x86/events/amd/uncore.c", None, None),
        (VMLINUX, "arch/x86/kernel/apic/apic.c", None, None),
        (VMLINUX, "arch/x86/include/asm/io.h", None, None),
        (VMLINUX, None, None, None),
        ("virtio_net", "drivers/net/virtio_net.c", None, "virtio_net"),
        ("virtio_net", None, None, "virtio_net"),
        ("kvm", "arch/x86/kvm/x86.c", None, None),
        ("out_of_tree", None, None, "out_of_tree"),
    ],
)
def test_the_driver_of_code(attribution, module, unit, file, driver):
    assert attribution.driver_of(module, unit, file) == driver


def test_the_subsystem_of_a_module_without_paths(attribution):
    assert attribution.subsystem_of("virtio_net", None, None, "f") == "network drivers"
    assert attribution.subsystem_of("kvm", None, None, "f") == "KVM host"


def test_driver_documents(attribution):
    counts = {"virtio_net": SiteCount(3, 2, 1), "efifb": SiteCount(4, 4, 0)}
    modules = [ModuleInfo("virtio_net", False, None, ("virtio:d00000001v*",), ())]
    found = {driver.name: driver for driver in attribution.drivers(counts, modules)}
    assert (found["virtio_net"].sites, found["virtio_net"].mmio, found["virtio_net"].calls) == (
        3,
        2,
        1,
    )
    assert found["virtio_net"].allowed
    assert found["virtio_pci"].builtin
    assert found["virtio_pci"].module == VMLINUX
    assert found["efifb"].sites == 4
    assert not found["efifb"].allowed
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    ("unit", "function", "expected"),
    [
        ("arch/x86/kernel/apic/io_apic.c", "f", "IO-APIC"),
        ("arch/x86/kernel/apic/apic.o", "f", "local APIC"),
        ("arch/x86/kernel/apic/msi.c", "f", "PCI MSI"),
        ("drivers/pci/msi/msi.c", "f", "PCI MSI"),
        ("drivers/pci/pci.c", "f", "PCI core"),
        ("drivers/pci/access.c", "f", "PCI configuration"),
        ("arch/x86/pci/direct.c", "f", "PCI configuration"),
        ("arch/x86/kernel/hpet.c", "f", "HPET"),
        ("arch/x86/kernel/i8259.c", "f", "PIC and PIT"),
        ("arch/x86/kernel/tsc_sync.c", "f", "TSC and timekeeping"),
        ("arch/x86/kernel/head_64.S", "f", "early code"),
        ("arch/x86/kernel/head64.c", "f", "early code"),
        ("arch/x86/kernel/early_printk.c", "f", "early console"),
        ("drivers/tty/serial/8250/8250_early.c", "f", "early console"),
        ("drivers/tty/serial/8250/8250_port.c", "f", "serial console"),
        ("arch/x86/kernel/kvmclock.c", "f", "KVM guest"),
        ("arch/x86/kernel/../xen/xen-head.S", "f", "Xen guest"),
        ("arch/x86/coco/tdx/tdcall.S", "f", "TDX guest"),
        ("arch/x86/kernel/cpu/mce/core.c", "f", "machine check"),
        ("arch/x86/kernel/cpu/intel.c", "f", "CPU identification"),
        ("drivers/iommu/intel/dmar.c", "f", "IOMMU"),
        ("arch/x86/include/asm/msr.h", "native_read_msr", "MSR accessors"),
        ("arch/x86/lib/delay.c", "f", "other x86 code"),
        ("drivers/net/ethernet/intel/e1000/e1000_main.c", "f", "network drivers"),
        ("drivers/nvme/host/pci.c", "f", "storage drivers"),
        ("drivers/misc/foo.c", "f", "misc drivers"),
        ("drivers/foo.c", "f", "drivers"),
        ("kernel/sched/core.c", "f", "core kernel"),
        ("Makefile", "f", "unknown"),
        (None, "entry_SYSCALL_64", "entry code"),
        (None, "secondary_startup_64", "early code"),
        (None, "__tdcall", "TDX guest"),
        (None, "no_such_prefix", "unknown"),
        ("", "", "unknown"),
    ],
)
def test_subsystems(unit, function, expected):
    assert subsystems.subsystem(unit, function) == expected


def test_no_rule_is_shadowed():
    """Each rule of the table is reached by a path made from its own pattern."""
    for rule in subsystems.PATHS:
        folder = rule.pattern.endswith("/")
        unit = rule.pattern + "x.c" if folder else rule.pattern.replace("*", "") + ".c"
        assert subsystems.path_rule(unit) == rule, rule


@pytest.mark.kernel
def test_the_default_list_on_a_real_kernel(debian_kernel):
    attribution = Attribution(debian_kernel, load())
    modules = []
    for file in debian_kernel.modules:
        if "virtio" in file.name:
            with ElfFile.open(file.path, limit=MAX_MODULE) as elf:
                modules.append(module_info(elf, file.name, file.location))
    found = {d.name: d for d in attribution.drivers({"virtio_net": SiteCount(3, 2, 1)}, modules)}
    assert {n for n, d in found.items() if d.allowed} == {
        "virtio_blk",
        "virtio_console",
        "virtio_net",
        "virtio_pci",
    }
    assert found["virtio_net"].sites == 3
    assert (
        attribution.driver_of(VMLINUX, "drivers/virtio/virtio_pci_modern.c", None) == "virtio_pci"
    )
    assert attribution.driver_of(VMLINUX, "drivers/pci/msi/msi.c", None) is None
    assert attribution.driver_of("virtio_net", None, "include/linux/io.h") == "virtio_net"
