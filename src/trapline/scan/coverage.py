"""What a scan could not see, and what would help, in sentences a report prints as they are."""

from typing import TYPE_CHECKING, Final

from trapline.results.scan import Coverage
from trapline.scan.objects import ObjectResult
from trapline.scan.pool import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trapline.kernel.find.kernelfiles import KernelFiles

# Measured on Debian's linux-image-6.12.117+deb12-cloud-amd64, with and without its DWARF.
_WITHOUT_DWARF: Final = (
    "MMIO is seen only in functions with a symbol of their own, about 1 of 80 sites in Debian's "
    "6.12 kernel; inlined mappings, source lines and inline chains are unknown; opcodes, calls "
    "and paravirt calls are complete"
)
_NOTHING: Final = (
    "vmlinux has neither debug information nor symbols: only instructions that trap by themselves "
    "are seen, without the names of their functions; no MMIO, no calls, no mappings."
)
_NO_CODE: Final = (
    "vmlinux has no code: the file holds debug information only, its sections of code are empty; "
    "not one instruction of the kernel itself was seen. Give the kernel it was split from, in "
    "one folder with it."
)
_UNRECOGNISED: Final = (
    "each is small, can be called from elsewhere and accesses what its caller says, and is neither "
    "known to trapline nor reviewed; their own traps are listed, what calls them is not"
)
_MENTIONED: Final = 5  # names in one sentence
# What the missing boot image and modules of a kernel mean is not for a scan to say.
_BOOT: Final = "cannot be booted"


def coverage(
    kernel: "KernelFiles", outcomes: "Mapping[str, ObjectResult | Failure]", vmlinux: str
) -> Coverage:
    """Describe what is missing of a scan whose main object is called `vmlinux`."""
    missing = []
    main = outcomes.get(vmlinux)
    if main is None:
        missing.append("vmlinux was not scanned: there is none.")
    elif not isinstance(main, Failure):
        missing.extend(_of_vmlinux(main))
    modules = [outcome for name, outcome in sorted(outcomes.items()) if name != vmlinux]
    missing.extend(
        f"Module {outcome.name} was not scanned: {outcome.reason.rstrip('.')}."
        for outcome in modules
        if isinstance(outcome, Failure)
    )
    hollow = [o.name for o in modules if not isinstance(o, Failure) and not o.has_code]
    if hollow:
        missing.append(f"{_names(hollow)} without code, in files of debug information only.")
    stripped = [
        outcome.name
        for outcome in modules
        if not isinstance(outcome, Failure) and not outcome.has_dwarf
    ]
    if stripped:
        missing.append(f"{_names(stripped)} without debug information: {_WITHOUT_DWARF}.")
    missing.extend(_split(outcomes))
    unrecognised = tuple(
        function
        for outcome in outcomes.values()
        if not isinstance(outcome, Failure)
        for function in outcome.unrecognised
    )
    if unrecognised:
        names = _listed(sorted({f"{function.function}()" for function in unrecognised}))
        missing.append(f"Calls of {names}, which may be accessors: {_UNRECOGNISED}.")
    advice = tuple(text for text in kernel.missing if _BOOT not in text)
    return Coverage(
        complete=not missing,
        missing=tuple(missing),
        advice=advice,
        outside=main.outside if isinstance(main, ObjectResult) else (),
        unrecognised=tuple(sorted(unrecognised, key=lambda f: (f.module, f.function))),
    )


def _split(outcomes: "Mapping[str, ObjectResult | Failure]") -> list[str]:
    """Say of which objects a part of the debug information is in files that are not read."""
    found: dict[str, list[str]] = {}
    for name, outcome in sorted(outcomes.items()):
        if isinstance(outcome, ObjectResult) and outcome.debug_elsewhere is not None:
            found.setdefault(outcome.debug_elsewhere, []).append(name)
    return [
        f"Of {_listed(names)} {why}, which is not read: inlined accessors may be missing; "
        "build without it, or undo it with dwz's or the linker's own tools."
        for why, names in found.items()
    ]


def _of_vmlinux(result: "ObjectResult") -> list[str]:
    if not result.has_code:
        return [_NO_CODE]
    if result.has_dwarf:
        return []
    if result.has_symbols:
        return [f"vmlinux has no debug information: {_WITHOUT_DWARF}."]
    return [_NOTHING]


def _listed(names: "Sequence[str]") -> str:
    if len(names) > _MENTIONED:
        return f"{len(names):,} functions ({', '.join(names[:_MENTIONED])}, …)"
    return ", ".join(names)


def _names(names: "Sequence[str]") -> str:
    if len(names) > _MENTIONED:
        return f"{len(names):,} modules ({', '.join(names[:_MENTIONED])}, …) are"
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"
