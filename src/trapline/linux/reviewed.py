"""Functions that were read because they look like accessors, and are none.

`trapline.scan.unnamed` finds what is small, can be called from elsewhere and accesses what its
caller says. Here is what it finds in Debian's cloud kernels 6.1, 6.12, 7.2 and 7.3, and why
calls of it are no sites. The traps within them are sites as everywhere.
"""

import re
from typing import Final

_ONE_REGISTER: Final = "a part of one subsystem, which hands it a register of one device"
_BY_POINTER: Final = "called through a pointer only, for firmware's code"
_OTHER_GUESTS: Final = "runs under another hypervisor only"

#: By name, without what compilers append.
REVIEWED: Final[dict[str, str]] = {
    "hlt_play_dead": "takes the processor that runs it off line",
    "cpu_cache_invalidate_memregion": "for CXL memory; refuses to run under a hypervisor",
    "sme_encrypt_execute": "encrypts the kernel in place, on AMD's SME only",
    "__pi_sme_encrypt_execute": "encrypts the kernel in place, on AMD's SME only",
    "pv_native_wbinvd": "what pv_ops holds: calls through pv_ops are sites",
    "hv_para_get_synic_register": _OTHER_GUESTS,
    "hv_para_set_synic_register": _OTHER_GUESTS,
    "pmu_msr_read": _OTHER_GUESTS,
    "pmu_msr_write": _OTHER_GUESTS,
    "acpi_ex_pci_config_space_handler": _BY_POINTER,
    "acpi_ex_system_io_space_handler": _BY_POINTER,
    "acpi_ex_system_memory_space_handler": _BY_POINTER,
    "hpet_readl": _ONE_REGISTER,
    "cpc_read_ffh": _ONE_REGISTER,
    "cpc_write_ffh": _ONE_REGISTER,
    "intel_pmu_save_and_restart": _ONE_REGISTER,
    "x86_pmu_enable_event": _ONE_REGISTER,
    "perf_msr_probe": "probes the MSRs of a table of its caller's events, once",
    "mce_intel_handle_storm": _ONE_REGISTER,
    "set_dr_addr_mask": _ONE_REGISTER,
    "kvm_add_user_return_msr": "probes one of KVM's own list of MSRs",
    "__pci_size_stdbars": _ONE_REGISTER,
    "pci_wait_for_pending": _ONE_REGISTER,
    "pcie_read_tlp_log": _ONE_REGISTER,
    "cxl_handle_cor_ras": _ONE_REGISTER,
    "cxl_probe_component_regs": _ONE_REGISTER,
    "devm_pvpanic_probe": _ONE_REGISTER,
    "addi_watchdog_reset": _ONE_REGISTER,
    "subdev_8255_init": _ONE_REGISTER,
    "subdev_8255_mm_init": _ONE_REGISTER,
}
#: The same of Rust, where names hold a hash of the compiler: methods that generic code calls, which
#: is compiled into its users.
REVIEWED_RUST: Final = re.compile(r"_RNv\w+18ConfigSpaceBackend\w+(?:7io_read|8io_write)")
