"""A gdb remote stub: Debian's gdb, or any other, looks into a running TD.

- `codec`            packets to bytes and back, no I/O
- `targetregisters`  which registers gdb sees, in which order, and the target description
- `commands`         what each packet does to a VCPU
- `monitor`          the commands behind gdb's `monitor`
- `server`           one TCP client, and the run loop under its control

PyPI has no maintained server side of the protocol (clients, and stubs tied to one probe), so
this is written from the specification: "Debugging with GDB", appendix E, Remote Serial Protocol.
"""
