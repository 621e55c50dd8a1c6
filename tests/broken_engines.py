"""Engines with one fault each, for which the conformance suite must fail."""

from trapline.cpu.default import open_engine

__all__ = ["counts_one_less", "forgets_nmi_blocking", "loses_host_writes", "sound"]


def sound(ram_size, **options):
    return open_engine(ram_size, **options)


def forgets_nmi_blocking(ram_size, **options):
    engine = open_engine(ram_size, **options)
    vcpu = engine.vcpus[0]
    vcpu.deliver_nmi = lambda: vcpu.deliver_interrupt(2)
    return engine


def loses_host_writes(ram_size, **options):
    """Restores leave what the host has written through linear addresses."""
    engine = open_engine(ram_size, **options)
    vcpu, restore, written = engine.vcpus[0], engine.restore, []
    write = vcpu.write

    def write_again(snapshot):
        restore(snapshot)
        for gla, data in written:
            write(gla, data)

    def note(gla, data):
        written.append((gla, data))
        return write(gla, data)

    vcpu.write, engine.restore = note, write_again
    return engine


def counts_one_less(ram_size, **options):
    engine = open_engine(ram_size, **options)
    vcpu = engine.vcpus[0]
    budget = vcpu.set_instruction_budget
    vcpu.set_instruction_budget = lambda count: budget(count - 1)
    return engine
