"""Which subsystem a site belongs to, told by its source path and function.

The rules are tried from top to bottom, the first that fits wins: what is specific stands above
what is general. A pattern that ends in "/" fits everything below that folder; any other is a
file's path without suffix, "*" standing for anything but a "/". After them come functions, for
code whose path says nothing (headers, assembly without line numbers), then folders, so that
nothing is left without a name.

A rule's `core` says that the code is part of the kernel proper even where it lies below drivers/:
always built in, not a driver that a filter could keep out.
"""

import posixpath
import re
from functools import lru_cache
from typing import Final, NamedTuple


class Rule(NamedTuple):
    """One line of a table. `core` is false for code that Kbuild can make a driver of."""

    pattern: str
    subsystem: str
    core: bool = True


_DRIVER: Final = False

#: In order; paths are relative to the top of the source tree.
PATHS: Final = (
    # Interrupt controllers and timers.
    Rule("arch/x86/kernel/apic/io_apic", "IO-APIC"),
    Rule("drivers/acpi/ioapic", "IO-APIC"),
    Rule("drivers/pci/ioapic", "IO-APIC"),
    Rule("arch/x86/include/asm/io_apic", "IO-APIC"),
    Rule("arch/x86/kernel/apic/msi", "PCI MSI"),
    Rule("arch/x86/kernel/apic/", "local APIC"),
    Rule("arch/x86/include/asm/apic", "local APIC"),
    Rule("arch/x86/kernel/hpet", "HPET"),
    Rule("drivers/char/hpet", "HPET"),
    Rule("arch/x86/kernel/i8259", "PIC and PIT"),
    Rule("arch/x86/kernel/i8253", "PIC and PIT"),
    Rule("drivers/clocksource/i8253", "PIC and PIT"),
    Rule("drivers/clocksource/hyperv_timer", "Hyper-V guest"),
    Rule("drivers/clocksource/acpi_pm", "ACPI"),
    Rule("arch/x86/kernel/rtc", "RTC and CMOS"),
    Rule("drivers/rtc/", "RTC and CMOS", _DRIVER),
    Rule("arch/x86/kernel/tsc*", "TSC and timekeeping"),
    Rule("drivers/clocksource/", "TSC and timekeeping"),
    Rule("arch/x86/kernel/time", "TSC and timekeeping"),
    # Confidential and other guests.
    Rule("arch/x86/coco/tdx/", "TDX guest"),
    Rule("arch/x86/coco/sev/", "SEV guest"),
    Rule("arch/x86/kernel/sev*", "SEV guest"),
    Rule("arch/x86/mm/mem_encrypt*", "SEV guest"),
    Rule("arch/x86/coco/", "confidential guest core"),
    Rule("arch/x86/hyperv/", "Hyper-V guest"),
    Rule("arch/x86/kernel/cpu/mshyperv", "Hyper-V guest"),
    Rule("drivers/hv/", "Hyper-V guest"),
    Rule("arch/x86/xen/", "Xen guest"),
    Rule("arch/x86/pci/xen", "Xen guest"),
    Rule("arch/x86/platform/pvh/", "Xen guest"),
    Rule("drivers/xen/", "Xen guest"),
    Rule("arch/x86/kernel/kvm*", "KVM guest"),
    Rule("arch/x86/kernel/cpu/vmware", "VMware guest"),
    Rule("arch/x86/kernel/cpu/acrn", "ACRN guest"),
    Rule("arch/x86/kernel/jailhouse", "Jailhouse guest"),
    Rule("arch/x86/kernel/paravirt*", "paravirt"),
    Rule("arch/x86/kvm/", "KVM host"),
    Rule("arch/x86/virt/", "KVM host"),
    # PCI.
    Rule("drivers/pci/msi/", "PCI MSI"),
    Rule("drivers/pci/msi", "PCI MSI"),
    Rule("arch/x86/pci/", "PCI configuration"),
    Rule("drivers/pci/access", "PCI configuration"),
    Rule("drivers/pci/ecam", "PCI configuration"),
    Rule("arch/x86/kernel/early-quirks", "early code"),
    Rule("drivers/pci/", "PCI core"),
    Rule("drivers/virtio/", "virtio", _DRIVER),
    # Firmware.
    Rule("arch/x86/kernel/acpi/cstate", "CPU idle"),
    Rule("arch/x86/kernel/acpi/", "ACPI"),
    Rule("drivers/acpi/", "ACPI"),
    Rule("drivers/pnp/", "ACPI"),
    Rule("drivers/mailbox/pcc", "ACPI"),
    Rule("drivers/firmware/efi/earlycon", "early console"),
    Rule("arch/x86/platform/efi/", "EFI"),
    Rule("drivers/firmware/efi/", "EFI"),
    Rule("drivers/firmware/dmi*", "DMI"),
    Rule("drivers/firmware/", "firmware tables"),
    Rule("arch/x86/kernel/probe_roms", "firmware tables"),
    Rule("arch/x86/kernel/mpparse", "firmware tables"),
    Rule("arch/x86/kernel/e820", "firmware tables"),
    # Consoles.
    Rule("arch/x86/kernel/early_printk", "early console"),
    Rule("drivers/tty/serial/earlycon", "early console"),
    Rule("drivers/tty/serial/8250/8250_early", "early console"),
    Rule("drivers/usb/early/", "early console"),
    Rule("drivers/tty/serial/", "serial console", _DRIVER),
    Rule("drivers/tty/hvc/", "console", _DRIVER),
    Rule("drivers/tty/vt/", "console"),
    Rule("drivers/tty/", "terminals", _DRIVER),
    Rule("drivers/video/console/", "console", _DRIVER),
    Rule("drivers/video/fbdev/core/", "framebuffer", _DRIVER),
    Rule("drivers/video/", "framebuffer", _DRIVER),
    Rule("arch/x86/video/", "framebuffer"),
    # Processor features.
    Rule("arch/x86/events/", "perf events"),
    Rule("drivers/perf/", "perf events"),
    Rule("arch/x86/kernel/cpu/mtrr/", "MTRR and PAT"),
    Rule("arch/x86/mm/pat/", "MTRR and PAT"),
    Rule("arch/x86/kernel/cpu/microcode/", "microcode"),
    Rule("arch/x86/kernel/cpu/mce/", "machine check"),
    Rule("drivers/edac/", "machine check", _DRIVER),
    Rule("drivers/ras/", "machine check"),
    Rule("arch/x86/kernel/cpu/resctrl/", "resctrl"),
    Rule("arch/x86/kernel/cpu/sgx/", "SGX"),
    Rule("arch/x86/kernel/cpu/aperfmperf", "CPU frequency"),
    Rule("arch/x86/kernel/cpu/intel_epb", "CPU frequency"),
    Rule("drivers/cpufreq/", "CPU frequency"),
    Rule("arch/x86/kernel/cpu/umwait", "CPU idle"),
    Rule("drivers/idle/", "CPU idle"),
    Rule("drivers/cpuidle/", "CPU idle"),
    Rule("arch/x86/kernel/cpu/bugs", "CPU mitigations"),
    Rule("arch/x86/kernel/cpu/tsx", "CPU mitigations"),
    Rule("arch/x86/kernel/cpu/", "CPU identification"),
    Rule("arch/x86/kernel/amd_gart*", "IOMMU"),
    Rule("arch/x86/kernel/amd_*", "CPU identification"),
    Rule("arch/x86/kernel/fpu/", "FPU and extended state"),
    Rule("arch/x86/kernel/shstk", "shadow stacks"),
    Rule("arch/x86/kernel/cet", "shadow stacks"),
    Rule("drivers/thermal/", "thermal"),
    Rule("drivers/powercap/", "thermal"),
    Rule("drivers/iommu/", "IOMMU"),
    Rule("arch/x86/kernel/pci-dma", "IOMMU"),
    # Early and late.
    Rule("arch/x86/boot/", "early code"),
    Rule("arch/x86/realmode/", "early code"),
    Rule("arch/x86/kernel/head*", "early code"),
    Rule("arch/x86/kernel/verify_cpu", "early code"),
    Rule("arch/x86/kernel/setup*", "early code"),
    Rule("arch/x86/kernel/quirks", "early code"),
    Rule("arch/x86/kernel/mmconf-fam10h*", "early code"),
    Rule("arch/x86/lib/kaslr", "early code"),
    Rule("arch/x86/kernel/smpboot", "CPU bring-up"),
    Rule("arch/x86/kernel/vsmp*", "CPU bring-up"),
    Rule("arch/x86/kernel/reboot*", "reboot"),
    Rule("arch/x86/kernel/crash*", "kexec and crash"),
    Rule("arch/x86/kernel/machine_kexec*", "kexec and crash"),
    Rule("arch/x86/kernel/relocate_kernel*", "kexec and crash"),
    Rule("kernel/crash*", "kexec and crash"),
    Rule("kernel/kexec*", "kexec and crash"),
    Rule("arch/x86/kernel/tboot", "suspend and resume"),
    Rule("arch/x86/power/", "suspend and resume"),
    Rule("kernel/power/", "suspend and resume"),
    # Entry, scheduling, memory.
    Rule("arch/x86/entry/", "entry code"),
    Rule("arch/x86/kernel/traps", "entry code"),
    Rule("arch/x86/kernel/nmi", "entry code"),
    Rule("arch/x86/kernel/process*", "context switch and idle"),
    Rule("arch/x86/kernel/step", "context switch and idle"),
    Rule("arch/x86/kernel/ioport", "context switch and idle"),
    Rule("arch/x86/mm/ioremap", "ioremap"),
    Rule("mm/ioremap", "ioremap"),
    Rule("mm/early_ioremap", "ioremap"),
    Rule("kernel/iomem", "ioremap"),
    Rule("arch/x86/mm/", "memory management"),
    Rule("mm/", "memory management"),
    # Accessors that everyone calls: who calls them is a site of its own.
    Rule("arch/x86/lib/iomem", "I/O accessors"),
    Rule("lib/iomap*", "I/O accessors"),
    Rule("lib/devres", "I/O accessors"),
    Rule("lib/pci_iomap", "I/O accessors"),
    Rule("arch/x86/kernel/io_delay", "I/O accessors"),
    Rule("arch/x86/lib/msr*", "MSR accessors"),
    Rule("arch/x86/kernel/msr", "MSR accessors"),
    Rule("arch/x86/kernel/cpuid", "CPUID accessors"),
    Rule("drivers/base/", "driver core"),
)

#: Functions, for code whose path is unknown or a header; regular expressions, in order.
FUNCTIONS: Final = (
    (r"(native_)?apic_|x2apic_|lapic_", "local APIC"),
    (r"io_?apic_", "IO-APIC"),
    (r"hpet_", "HPET"),
    (r"_*(tdx|tdcall|tdvmcall)", "TDX guest"),
    (r"sev_|snp_|vc_", "SEV guest"),
    (r"xen_|startup_xen|pvh_start_xen|hypercall_page", "Xen guest"),
    (r"hv_|hyperv_", "Hyper-V guest"),
    (r"kvm_", "KVM guest"),
    (r"vmware_", "VMware guest"),
    (r"acpi_", "ACPI"),
    (r"efi_", "EFI"),
    (r"pci_msi|msi_", "PCI MSI"),
    (r"pci_", "PCI core"),
    (r"mce_", "machine check"),
    (r"early_|.*startup_|x86_64_start|verify_cpu|pvh_start", "early code"),
    (r"(native_|paravirt_|pv_)?(read|write|rd|wr)_?msr", "MSR accessors"),
    (r"(native_)?io_delay|io(read|write)\d|(read|write)[bwlq]$", "I/O accessors"),
    (r"mem(cpy|set)_(to|from)?_?io", "I/O accessors"),
    (r"entry_|asm_|error_|paranoid_|exc_|syscall_|swapgs_|.*irqentry", "entry code"),
    (r"(native_|default_|arch_)?(safe_)?(halt|idle)|mwait_", "context switch and idle"),
    (r"umwait_", "CPU idle"),
    (r"relocate_kernel|machine_kexec|crash_", "kexec and crash"),
)

# Folders, longest first; what stands for no folder here gets the folder's own name.
_FOLDERS: Final = {
    "arch/x86": "other x86 code",
    "drivers/ata": "storage drivers",
    "drivers/block": "storage drivers",
    "drivers/char/tpm": "TPM drivers",
    "drivers/char": "character device drivers",
    "drivers/cxl": "CXL drivers",
    "drivers/gpu": "graphics drivers",
    "drivers/input": "input drivers",
    "drivers/mmc": "storage drivers",
    "drivers/mtd": "storage drivers",
    "drivers/net": "network drivers",
    "drivers/nvme": "storage drivers",
    "drivers/scsi": "storage drivers",
    "drivers/usb": "USB drivers",
    "block": "block layer",
    "fs": "file systems",
    "init": "early code",
    "kernel": "core kernel",
    "lib": "library code",
    "net": "network stack",
    "sound": "sound drivers",
}

_FUNCTION_RULES: Final = tuple((re.compile(text), name) for text, name in FUNCTIONS)


def _compile(pattern: str) -> str:
    if pattern.endswith("/"):
        return re.escape(pattern)
    return re.escape(pattern).replace(r"\*", "[^/]*") + "$"


# One alternation: group number n+1 is rule n.
_PATH_RULES: Final = re.compile("|".join(f"({_compile(rule.pattern)})" for rule in PATHS))


@lru_cache(maxsize=8192)
def path_rule(unit: str) -> Rule | None:
    """Return the rule for a source file or object, or None; suffixes do not matter."""
    stem = posixpath.splitext(posixpath.normpath(unit))[0]
    match = _PATH_RULES.match(stem)
    return PATHS[match.lastindex - 1] if match and match.lastindex else None


def function_subsystem(function: str) -> str | None:
    """Return the subsystem that a function's name alone tells, or None."""
    return next((name for rule, name in _FUNCTION_RULES if rule.match(function)), None)


def subsystem(unit: str | None, function: str) -> str:
    """Name the subsystem of `function` in source file or object `unit`; never empty."""
    if unit and (rule := path_rule(unit)):
        return rule.subsystem
    if not unit or unit.endswith((".h", ".S")) or "/" not in unit:
        found = function_subsystem(function)
        if found or not unit:
            return found or "unknown"
    return _folder(unit)


@lru_cache(maxsize=8192)
def _folder(unit: str) -> str:
    parts = unit.split("/")[:-1]
    for length in range(len(parts), 0, -1):
        if name := _FOLDERS.get("/".join(parts[:length])):
            return name
    if parts[:1] == ["drivers"] and len(parts) > 1:
        return f"{parts[1]} drivers"
    return parts[0] if parts else "unknown"
