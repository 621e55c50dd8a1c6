"""Real device models: a QEMU process that runs no guest code and serves its devices to the TD.

QEMU's own vCPU idles in a 64 KiB ROM. The devices are driven over the qtest socket, guest
memory is shared through a file descriptor so that DMA copies nothing, and MSI-X messages come
back as eventfds through an ivshmem doorbell device, which the guest never sees. QEMU's clock is
the wall clock, so a run with such devices is not deterministic.
"""
