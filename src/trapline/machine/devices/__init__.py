"""The board of the software TD: what answers at its ports, MMIO and x2APIC registers.

Each device is a small class over named registers. None of them knows the TDX module, the
engine or the VMM: they get a clock (`interface.Clock`, cycles of the virtual TSC) and an
interrupt line, and are reached through a `bus.Bus`. The host side of a TD is hostile to the
guest, the guest is hostile to the host: a device takes any value at any offset.
"""
