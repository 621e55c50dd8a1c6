"""The functions through which Linux touches what a host controls, by name.

Inlined ones leave no symbol and no call: their instructions are found through DWARF. Out-of-line
ones are found as calls. A kernel that lacks a name simply has no site for it.

Sources, read in v6.1 and v6.12: arch/x86/include/asm/io.h, asm/apic.h, asm/pci_x86.h,
asm/special_insns.h; arch/x86/lib/iomem.c; include/asm-generic/iomap.h, lib/iomap.c,
lib/iomap_copy.c; include/linux/pci.h, drivers/pci/access.c; arch/x86/include/asm/msr.h,
asm/paravirt_types.h.
"""

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.results.scan import Access
    from trapline.results.trapclass import TrapClass

_SIZES: Final = {"b": 1, "w": 2, "l": 4, "q": 8}
_BITS: Final = {"8": 1, "16": 2, "32": 4, "64": 8}


#: Where accessors of device memory are inline assembly: what a line table says of a MOV from here.
HEADERS: Final = frozenset(
    (
        "arch/x86/include/asm/io.h",
        "arch/x86/include/asm/apic.h",
        "arch/x86/include/asm/pci_x86.h",
    )
)


class Inlined(NamedTuple):
    """An inlined accessor: the memory operand that is the device's, and how wide it is.

    `access` is None for copies in both directions (the functions around them tell which),
    `width` is None where an instruction of any width is meant.
    """

    access: "Access | None"
    width: int | None


class Called(NamedTuple):
    """An out-of-line accessor: what a call of it does; `width` in bytes, 0 where it varies.

    `operand` is the number of the argument, from 0, that says what is accessed: an address, a
    port, an MSR, a place in the configuration space. None where there is nothing to say.
    """

    trap: "TrapClass"
    access: "Access"
    width: int
    operand: int | None = None


def _inlined() -> "Iterator[tuple[str, Inlined]]":
    for suffix, size in _SIZES.items():
        for prefix in ("", "__", "__raw_"):
            yield f"{prefix}read{suffix}", Inlined("read", size)
            yield f"{prefix}write{suffix}", Inlined("write", size)
    # The memory-mapped PCI configuration space: movs by hand, apart from readl() and kin.
    for suffix in "bwl":
        yield f"mmio_config_read{suffix}", Inlined("read", _SIZES[suffix])
        yield f"mmio_config_write{suffix}", Inlined("write", _SIZES[suffix])
    yield "native_apic_mem_write", Inlined("write", 4)
    # String moves of arch/x86/lib/iomem.c, refused by TDX's handler.
    yield "string_memcpy_fromio", Inlined("read", None)
    yield "string_memcpy_toio", Inlined("write", None)
    yield "memcpy_fromio", Inlined("read", None)
    yield "memcpy_toio", Inlined("write", None)
    yield "memset_io", Inlined("write", None)
    yield "rep_movs", Inlined(None, None)
    yield "__iowrite32_copy", Inlined("write", None)
    # 64-byte writes to device queues; of movdir64b() those below QUEUES only.
    yield "movdir64b", Inlined("write", 64)
    yield "movdir64b_io", Inlined("write", 64)
    yield "iosubmit_cmds512", Inlined("write", 64)
    yield "enqcmds", Inlined("write", 64)
    # Reads of write-combined memory of graphics devices by MOVNTDQA: drivers/gpu/drm/drm_cache.c,
    # drivers/gpu/drm/i915/i915_memcpy.c.
    yield "__memcpy_ntdqa", Inlined("read", 16)
    yield "__memcpy_ntdqu", Inlined("read", 16)


def _called() -> "Iterator[tuple[str, Called]]":
    yield from _called_memory()
    yield "native_io_delay", Called("pio", "write", 1)
    yield "io_delay", Called("pio", "write", 1)
    yield from _called_configuration()
    yield from _called_msrs()
    yield "native_wbinvd", Called("wbinvd", "execute", 0)
    for kind in ("wbinvd", "wbnoinvd"):
        yield f"{kind}_on_cpu", Called("wbinvd", "execute", 0)
        yield f"{kind}_on_all_cpus", Called("wbinvd", "execute", 0)
        yield f"{kind}_on_cpus_mask", Called("wbinvd", "execute", 0)
    yield from _called_by_some()


def _called_by_some() -> "Iterator[tuple[str, Called]]":
    """Give accessors of one language, subsystem or family of drivers, which others call."""
    # What Rust calls in place of inline functions: rust/helpers/io.c.
    for suffix, size in _SIZES.items():
        for order in ("", "_relaxed"):
            yield f"rust_helper_read{suffix}{order}", Called("mmio", "read", size, 0)
            yield f"rust_helper_write{suffix}{order}", Called("mmio", "write", size, 1)
    yield "rust_helper_memcpy_fromio", Called("mmio", "read", 0, 1)
    yield "rust_helper_memcpy_toio", Called("mmio", "write", 0, 0)
    # drivers/acpi/osl.c: where firmware's code says, of which the host is the author.
    yield "acpi_os_read_iomem", Called("mmio", "read", 0, 0)
    both: tuple[Access, ...] = ("read", "write")
    for access in both:
        yield f"acpi_os_{access}_memory", Called("mmio", access, 0, 0)
        yield f"acpi_os_{access}_port", Called("pio", access, 0, 0)
        yield f"acpi_hw_{access}_port", Called("pio", access, 0, 0)
        yield f"acpi_os_{access}_pci_configuration", Called("pio", access, 0, 1)
    # arch/x86/pci/early.c
    for suffix, size in (("_byte", 1), ("_16", 2), ("", 4)):
        yield f"read_pci_config{suffix}", Called("pio", "read", size, 3)
        yield f"write_pci_config{suffix}", Called("pio", "write", size, 3)
    # drivers/ata/libata-core.c, vfio/pci/vfio_pci_rdwr.c, misc/cardreader/alcor_pci.c
    yield "ata_wait_register", Called("mmio", "read", 4, 1)
    for bits, size in _BITS.items():
        yield f"vfio_pci_core_ioread{bits}", Called("mmio", "read", size, 3)
        yield f"vfio_pci_core_iowrite{bits}", Called("mmio", "write", size, 3)
        for order in ("", "be"):
            yield f"alcor_read{bits}{order}", Called("mmio", "read", size, 1)
            yield f"alcor_write{bits}{order}", Called("mmio", "write", size, 2)


def _called_memory() -> "Iterator[tuple[str, Called]]":
    for bits, size in _BITS.items():
        for order in ("", "be"):
            yield f"ioread{bits}{order}", Called("mmio", "read", size, 0)
            yield f"iowrite{bits}{order}", Called("mmio", "write", size, 1)
        yield f"ioread{bits}_rep", Called("mmio", "read", size, 0)
        yield f"iowrite{bits}_rep", Called("mmio", "write", size, 0)
    for order in ("_lo_hi", "_hi_lo", "be_lo_hi", "be_hi_lo"):
        for prefix in ("", "__"):  # with underscores since v6.13
            yield f"{prefix}ioread64{order}", Called("mmio", "read", 8, 0)
            yield f"{prefix}iowrite64{order}", Called("mmio", "write", 8, 1)
    yield "memcpy_fromio", Called("mmio", "read", 0, 1)
    yield "memcpy_toio", Called("mmio", "write", 0, 0)
    yield "memset_io", Called("mmio", "write", 0, 0)
    yield "__ioread32_copy", Called("mmio", "read", 4, 1)
    yield "__iowrite32_copy", Called("mmio", "write", 4, 0)
    yield "__iowrite64_copy", Called("mmio", "write", 8, 0)


def _called_configuration() -> "Iterator[tuple[str, Called]]":
    for size_name, size in (("byte", 1), ("word", 2), ("dword", 4)):
        for prefix, operand in (("pci", 1), ("pci_bus", 2), ("pci_user", 1)):
            yield f"{prefix}_read_config_{size_name}", Called("pio", "read", size, operand)
            yield f"{prefix}_write_config_{size_name}", Called("pio", "write", size, operand)
        yield f"pcie_capability_read_{size_name}", Called("pio", "read", size, 1)
        yield f"pcie_capability_write_{size_name}", Called("pio", "write", size, 1)
        # Read, change, write; some kernels have two, with and without a lock.
        for lock in ("", "_locked", "_unlocked"):
            name = f"pcie_capability_clear_and_set_{size_name}{lock}"
            yield name, Called("pio", "read-write", size, 1)
        yield f"pci_clear_and_set_config_{size_name}", Called("pio", "read-write", size, 1)
    yield "raw_pci_read", Called("pio", "read", 0, 3)
    yield "raw_pci_write", Called("pio", "write", 0, 3)


def _called_msrs() -> "Iterator[tuple[str, Called]]":
    # rdmsrl() is rdmsrq() since v6.16.
    for suffix in ("", "_safe"):
        yield f"native_read_msr{suffix}", Called("msr", "read", 8, 0)
        yield f"native_write_msr{suffix}", Called("msr", "write", 8, 0)
        for size in ("", "l", "q"):
            yield f"rdmsr{size}{suffix}_on_cpu", Called("msr", "read", 8, 1)
            yield f"wrmsr{size}{suffix}_on_cpu", Called("msr", "write", 8, 1)
    yield "rdmsr_on_cpus", Called("msr", "read", 8, 1)
    yield "wrmsr_on_cpus", Called("msr", "write", 8, 1)
    # With all registers in a table, for MSRs of K8 that want a password.
    for prefix in ("", "native_"):
        yield f"{prefix}rdmsr_safe_regs", Called("msr", "read", 8, 0)
        yield f"{prefix}wrmsr_safe_regs", Called("msr", "write", 8, 0)
    yield "rdmsr_safe_regs_on_cpu", Called("msr", "read", 8, 1)
    yield "wrmsr_safe_regs_on_cpu", Called("msr", "write", 8, 1)
    # Of machine checks, which tests feed: arch/x86/kernel/cpu/mce/core.c.
    for size in ("l", "q"):
        yield f"mce_rdmsr{size}", Called("msr", "read", 8, 0)
        yield f"mce_wrmsr{size}", Called("msr", "write", 8, 0)
    # arch/x86/kernel/cpu/mshyperv.c, arch/x86/kernel/cpu/mtrr/generic.c
    for nested in ("", "_non_nested"):
        yield f"hv_get{nested}_msr", Called("msr", "read", 8, 0)
        yield f"hv_set{nested}_msr", Called("msr", "write", 8, 0)
    yield "mtrr_wrmsr", Called("msr", "write", 8, 0)
    yield "msr_set_bit", Called("msr", "read-write", 8, 0)
    yield "msr_clear_bit", Called("msr", "read-write", 8, 0)


INLINED: Final = dict(_inlined())
#: What movdir64b() is inlined into where it writes to a device; elsewhere it clears memory
#: (arch/x86/virt/vmx/tdx/tdx.c).
QUEUES: Final = frozenset({"movdir64b_io", "iosubmit_cmds512"})
CALLED: Final = dict(_called())

# Members of pv_ops that hide a trap, by struct and member; the rest change no host-owned state.
# On a TDX guest they end in the native function.
PARAVIRT: Final[dict[str, Called]] = {
    "cpu.io_delay": Called("pio", "write", 1),
    "cpu.cpuid": Called("cpuid", "read", 16),
    "cpu.read_msr": Called("msr", "read", 8, 0),
    "cpu.read_msr_safe": Called("msr", "read", 8, 0),
    "cpu.write_msr": Called("msr", "write", 8, 0),
    "cpu.write_msr_safe": Called("msr", "write", 8, 0),
    "cpu.read_pmc": Called("rdpmc", "read", 8, 0),
    "cpu.write_cr0": Called("cr", "write", 8, 0),
    "cpu.write_cr4": Called("cr", "write", 8, 0),
    "cpu.wbinvd": Called("wbinvd", "execute", 0),
    "irq.safe_halt": Called("hlt", "execute", 0),
    "irq.halt": Called("hlt", "execute", 0),
}

#: Functions that map device memory or firmware tables, or ports as if they were memory.
MAPPERS: Final = frozenset(
    {
        "ioremap",
        "ioremap_cache",
        "ioremap_encrypted",
        "ioremap_nocache",
        "ioremap_np",
        "ioremap_prot",
        "ioremap_uc",
        "ioremap_wc",
        "ioremap_wt",
        "ioport_map",
        "memremap",
        "early_ioremap",
        "early_memremap",
        "early_memremap_decrypted",
        "early_memremap_decrypted_wp",
        "early_memremap_encrypted",
        "early_memremap_encrypted_wp",
        "early_memremap_prot",
        "early_memremap_ro",
        "acpi_os_map_generic_address",
        "acpi_os_map_iomem",
        "acpi_os_map_memory",
        "__acpi_map_table",
        "__set_fixmap",
        "native_set_fixmap",
        "__native_set_fixmap",
        "__early_set_fixmap",
        "pci_iomap",
        "pci_iomap_range",
        "pci_iomap_wc",
        "pci_iomap_wc_range",
        "pci_ioremap_bar",
        "pci_ioremap_wc_bar",
        "pci_map_rom",
        "pci_remap_iospace",
        "pcim_iomap",
        "pcim_iomap_range",
        "pcim_iomap_region",
        "pcim_iomap_regions",
        "pcim_iomap_regions_request_all",
        "devm_ioport_map",
        "devm_ioremap",
        "devm_ioremap_resource",
        "devm_ioremap_resource_wc",
        "devm_ioremap_uc",
        "devm_ioremap_wc",
        "devm_memremap",
        "devm_of_iomap",
        "devm_pci_remap_cfg_resource",
        "devm_pci_remap_cfgspace",
        "devm_platform_get_and_ioremap_resource",
        "devm_platform_ioremap_resource",
        "devm_platform_ioremap_resource_byname",
        "of_iomap",
        "of_io_request_and_map",
        "vm_iomap_memory",
    }
)
#: Functions that return a table of such pointers.
MAPPING_TABLES: Final = frozenset({"pcim_iomap_table"})
_OF_MEMORY: Final = ("memremap", "acpi_os_map_memory", "acpi_map_table", "fixmap", "ioport")
#: Those that return where device memory is mapped; the rest map ordinary memory, or return nothing.
DEVICE_MAPPERS: Final = MAPPING_TABLES | {
    name for name in MAPPERS if not any(part in name for part in _OF_MEMORY)
} - {"acpi_os_map_generic_address", "pci_remap_iospace", "vm_iomap_memory"}
#: Functions that access memory where arguments point to: (number, access) of each.
COPIERS: "Final[dict[str, tuple[tuple[int, Access], ...]]]" = {
    **{
        prefix + name: ((0, "write"), (1, "read"))
        for prefix in ("", "__")
        for name in ("memcpy", "memmove")
    },
    **{prefix + "memset": ((0, "write"),) for prefix in ("", "__")},
    "memcmp": ((0, "read"), (1, "read")),
    "memchr_inv": ((0, "read"),),
    "strlen": ((0, "read"),),
    "strncmp": ((0, "read"), (1, "read")),
}
#: Those of them that the paravirt table hides.
PARAVIRT_MAPPERS: Final = {"mmu.set_fixmap": "set_fixmap"}
