"""Small scan documents for tests of what reads them; every argument replaces one field."""

import msgspec

from trapline.results.scan import (
    AllowedId,
    Coverage,
    Driver,
    Frame,
    Kernel,
    Mapping,
    ScanResult,
    Site,
)

_SITE = Site(
    id="5d0c1f0a2b3c4d5e",
    trap="mmio",
    form="instruction",
    access="read",
    width=4,
    accessor="readl",
    module="vmlinux",
    object="arch/x86/kernel/hpet.o",
    function="hpet_enable",
    file="arch/x86/kernel/hpet.c",
    line=981,
    inlined=(
        Frame(function="readl", file="arch/x86/include/asm/io.h", line=59),
        Frame(function="hpet_readl", file="arch/x86/kernel/hpet.c", line=78),
    ),
    instruction="mov (%rax),%eax",
    bytes="8b00",
    address="0xffffffff81055aa0",
    section=".init.text",
    origin=None,
    emulable=True,
    reason="handle_mmio() asks the VMM",
    driver=None,
    subsystem="HPET",
)
_MAPPING = Mapping(
    id="00aa11bb22cc33dd",
    mapper="ioremap",
    module="vmlinux",
    object="arch/x86/kernel/hpet.o",
    function="hpet_set_mapping",
    file="arch/x86/kernel/hpet.c",
    line=97,
    inlined=(),
    address="0xffffffff81055a00",
    section=".text",
    driver=None,
    subsystem="HPET",
)
_DRIVER = Driver(
    name="virtio_net",
    bus="virtio",
    module="virtio_net",
    builtin=False,
    aliases=("virtio:d00000001v*",),
    allowed=True,
    via=("1af4:1000 -> virtio_pci -> virtio:1", "1af4:1041 -> virtio_pci -> virtio:1"),
    reaches=("virtio_pci", "virtio_pci_modern_dev", "PCI MSI"),
    sites=0,
    mmio=0,
    calls=0,
)
_ALLOW = (
    AllowedId(id="1af4:1000", name="virtio network card (transitional)", note=None),
    AllowedId(
        id="1af4:1009",
        name="virtio 9P transport (transitional)",
        note='the e-mail says "Virtio FS", which is 1af4:105a',
    ),
    AllowedId(id="1af4:1041", name="virtio network card", note=None),
)


def site(**changes) -> Site:
    return msgspec.structs.replace(_SITE, **changes)


def mapping(**changes) -> Mapping:
    return msgspec.structs.replace(_MAPPING, **changes)


def driver(**changes) -> Driver:
    return msgspec.structs.replace(_DRIVER, **changes)


def kernel(**changes) -> Kernel:
    whole = Kernel(
        release="6.12.117+deb12-cloud-amd64",
        version="Linux version 6.12.117+deb12-cloud-amd64",
        build_id="0123456789abcdef0123456789abcdef01234567",
        config={"CONFIG_INTEL_TDX_GUEST": "y"},
        modules=1138,
        has_dwarf=True,
    )
    return msgspec.structs.replace(whole, **changes)


def document(**changes) -> ScanResult:
    """A kernel with a bit of everything: exits 1, as a Debian kernel does."""
    sites = (
        site(),
        site(
            id="00000000000000a1",
            function="native_apic_mem_write",
            subsystem="local APIC",
            object="arch/x86/kernel/apic/apic.o",
            file="arch/x86/include/asm/apic.h",
            line=107,
            inlined=(),
            access="write",
            accessor="native_apic_mem_write",
            instruction="mov %esi,-0xa03000(%rdi)",
        ),
        site(
            id="00000000000000b2",
            form="call",
            accessor="ioread8",
            function="vp_modern_get_status",
            inlined=(),
            object="drivers/virtio/virtio_pci_modern_dev.o",
            file="drivers/virtio/virtio_pci_modern_dev.c",
            line=476,
            subsystem="virtio",
            driver="virtio_pci_modern_dev",
            width=1,
            instruction="call ioread8",
            reason="the callee traps",
        ),
        site(
            id="00000000000000b3",
            function="pci_msix_write_vector_ctrl",
            object="drivers/pci/msi/msi.o",
            file="drivers/pci/msi/msi.c",
            line=40,
            subsystem="PCI MSI",
            access="write",
            accessor="writel",
        ),
        site(
            id="00000000000000c3",
            trap="pio",
            form="instruction",
            access="read",
            width=1,
            accessor="inb",
            function="io_serial_in",
            object="drivers/tty/serial/8250/8250_port.o",
            file="drivers/tty/serial/8250/8250_port.c",
            line=432,
            subsystem="serial console",
            driver="8250",
            instruction="in (%dx),%al",
            inlined=(),
        ),
        site(
            id="00000000000000d4",
            trap="wbinvd",
            access="execute",
            width=0,
            accessor=None,
            function="acpi_idle_play_dead",
            object="drivers/acpi/processor_idle.o",
            file="drivers/acpi/processor_idle.c",
            line=600,
            subsystem="ACPI",
            instruction="wbinvd",
            emulable=False,
            reason="virt_exception_kernel() has no case for it: a #VE here is an oops",
            inlined=(),
        ),
        site(
            id="00000000000000e5",
            trap="msr",
            form="paravirt",
            access="write",
            width=8,
            accessor="write_msr",
            function="native_apic_msr_write",
            file="arch/x86/include/asm/apic.h",
            line=200,
            subsystem="local APIC",
            inlined=(),
        ),
    )
    whole = ScanResult(
        generator="trapline 0.1.0",
        kernel=kernel(),
        allow=_ALLOW,
        coverage=Coverage(complete=True, missing=(), advice=()),
        counts={"sites": len(sites)},
        sites=sites,
        mappings=(mapping(),),
        drivers=(
            driver(),
            driver(
                name="virtio_pci",
                bus="pci",
                module="vmlinux",
                builtin=True,
                aliases=("pci:v00001AF4d*sv*sd*bc*sc*i*",),
                via=("1af4:1000 -> virtio_pci",),
                reaches=("virtio_pci_modern_dev", "PCI MSI"),
            ),
            driver(
                name="virtio_pci_modern_dev",
                bus="",
                module="vmlinux",
                builtin=True,
                aliases=(),
                allowed=False,
                via=(),
                reaches=(),
                sites=1,
                calls=1,
            ),
            driver(
                name="8250",
                bus="platform",
                module="vmlinux",
                builtin=True,
                aliases=(),
                allowed=False,
                via=(),
                reaches=(),
                sites=1,
            ),
        ),
    )
    return msgspec.structs.replace(whole, **changes)


def clean() -> ScanResult:
    """The same kernel with its findings mended: exits 0."""
    whole = document()
    return msgspec.structs.replace(
        whole,
        sites=tuple(s for s in whole.sites if s.emulable and s.driver != "8250"),
        drivers=tuple(d for d in whole.drivers if d.name != "8250"),
    )
