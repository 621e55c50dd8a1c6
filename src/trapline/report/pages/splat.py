"""A dead guest in the kernel's own form, so that it reads, and pastes, as any oops does.

The order and layout of registers are those of __show_regs() (arch/x86/kernel/process_64.c), the
code bytes those of show_opcodes(), the trace that of show_trace_log_lvl() (dumpstack.c): "?" marks
guesses. Below each line of the trace is what decode_stacktrace.sh would add: the source line of
the function and of everything inlined there. All lines but the code bytes fit into 80 columns
unless a name is longer than that.
"""

from typing import TYPE_CHECKING

from trapline.report.blocks import Code, Paragraph
from trapline.results.splat import trace_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from trapline.report.blocks import Block
    from trapline.results.splat import Code as Bytes
    from trapline.results.splat import Place, Registers, Splat

_ROWS = (
    ("rax", "rbx", "rcx"),
    ("rdx", "rsi", "rdi"),
    ("rbp", "r8", "r9"),
    ("r10", "r11", "r12"),
    ("r13", "r14", "r15"),
)


def page(splat: "Splat") -> "Iterator[Block]":
    """Yield the blocks of a splat; the first lines announce what trapline itself injected."""
    yield Code(tuple(_lines(splat)))
    for line in splat.traps:
        yield Paragraph(line, indent=2, hanging=2)
    if splat.reproduce:  # a script has no command line
        yield Code(("To reproduce:", f"  {splat.reproduce}"))


def _lines(splat: "Splat") -> "Iterator[str]":
    for event in splat.injected:
        yield f"INJECTED by trapline: {event}"
    yield splat.banner
    yield from _registers(splat.registers, splat.code)
    yield from trace_lines(splat.place)
    yield "Call Trace:"
    for place in splat.trace:
        yield from _trace_entry(place)
    if not splat.complete:
        yield " (the stack makes no sense from here on)"
    if splat.traps:
        yield "Last traps, newest last:"


def _trace_entry(place: "Place") -> "Iterator[str]":
    yield from trace_lines(place)
    if place.registers is not None:
        for line in _short(place.registers):
            yield f" {line}"


def _registers(registers: "Registers", code: "Bytes") -> "Iterator[str]":
    head, *rest = _short(registers)
    yield head
    yield _code(code)
    yield from rest
    bases, segments, control = registers.bases, registers.segments, registers.control
    if bases:
        yield (
            f"FS:  {bases['fs']}({segments['fs']}) GS:{bases['gs']}({segments['gs']}) "
            f"knlGS:{bases['kernel_gs']}"
        )
    if control:
        yield (
            f"CS:  {registers.cs} DS: {segments['ds']} ES: {segments['es']} CR0: {control['cr0']}"
        )
        yield _named(control, ("cr2", "cr3", "cr4"))
    if registers.debug:
        yield _named(registers.debug, ("dr0", "dr1", "dr2"))
        yield _named(registers.debug, ("dr3", "dr6", "dr7"))


def _short(registers: "Registers") -> "Iterator[str]":
    yield f"RIP: {registers.cs}:{registers.rip}"
    yield f"RSP: {registers.ss}:{registers.general['rsp']} EFLAGS: {registers.rflags}"
    for row in _ROWS:
        yield _named(registers.general, row)


def _named(values: "Mapping[str, str]", names: tuple[str, ...]) -> str:
    """Lay out registers as the kernel does; it writes R8 and R9 as R08 and R09."""
    shown = {"r8": "R08", "r9": "R09"}
    return " ".join(f"{shown.get(name, name.upper())}: {values[name]}" for name in names)


def _code(code: "Bytes") -> str:
    if not code.bytes:
        return "Code: Unable to access opcode bytes."
    parts = [code.bytes[i : i + 2] for i in range(0, len(code.bytes), 2)]
    parts[code.at] = f"<{parts[code.at]}>"
    return "Code: " + " ".join(parts)
