"""`gate`: what of a kernel fails a policy, held against a baseline and labels."""

from pathlib import Path
from typing import TYPE_CHECKING

from trapline.api.boot import boot
from trapline.api.contexts import contexts
from trapline.api.kernel import as_kernel
from trapline.api.known_scan import scanned
from trapline.api.label import known_labels, with_labels
from trapline.base.errors import BadInputFileError, UsageError
from trapline.base.version import GENERATOR
from trapline.gate import placecounts, policyfile
from trapline.gate.checks import Judge
from trapline.results.gate import GateResult

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.progress import Announce, OnProgress
    from trapline.gate.policyfile import Policy
    from trapline.results.gate import GateBaseline, GateCheck
    from trapline.results.scan import ScanResult


def gate(
    policy: "AnyPath",
    kernel: "AnyKernel",
    *,
    modules: "AnyPath | None" = None,
    write_baseline: bool = False,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> GateResult:
    """Hold a kernel against a policy: a TOML file that says what fails.

    The kernel is scanned, or the scan of it taken from the cache; it is booted, and its contexts
    proved, where the policy asks for that. `write_baseline` writes down what it has, for later
    kernels to be held against.

    Raises BadInputFileError for an unsound policy, baseline or file of labels, UsageError where
    there is no place to write a baseline to, and what `scan`, `boot` and `contexts` raise.
    """
    read = policyfile.load(Path(policy))
    target = read.beside(read.said.baseline)
    if write_baseline and target is None:
        raise UsageError(
            f'{read.path}: names no baseline to write; add baseline = "baseline.toml".'
        )
    before = None if target is None or write_baseline else _baseline(target, read)
    labels = known_labels(read.beside(read.said.labels))
    opened = as_kernel(kernel, modules, announce)
    scan = scanned(opened, allow=read.beside(read.said.allow), progress=progress, announce=announce)
    if before is not None:
        _require_like(before, scan, read)
    booted = None
    if read.said.boot is not None:
        policies: dict[str, str] = dict.fromkeys(read.said.boot.forbid, "forbid")
        booted = boot(opened, policies=policies, scan=scan, announce=announce)
    proved = None
    if read.said.contexts is not None and read.said.contexts.gaps:
        proved = contexts(opened, announce=announce)
    if write_baseline and target is not None:
        others = [document for document in (booted, proved) if document is not None]
        before = placecounts.baseline(scan, others)
        placecounts.write(target, before)
    judge = Judge(read.said, before, labels)

    def checks() -> "Iterator[GateCheck]":
        yield from judge.scan(with_labels(scan, labels))
        if booted is not None:
            yield judge.boot(with_labels(booted, labels))
        if proved is not None:
            yield judge.contexts(proved)

    return GateResult(
        generator=GENERATOR,
        policy=str(read.path),
        kernel=opened.name,
        release=scan.kernel.release,
        build_id=scan.kernel.build_id,
        baseline=None if before is None else before.kernel,
        checks=tuple(checks()),
    )


def _baseline(target: Path, policy: "Policy") -> "GateBaseline":
    if not target.exists():
        raise BadInputFileError(
            f"{target}: there is no such baseline; make it of a kernel that you know with "
            f"trapline gate {policy.path} KERNEL --write-baseline."
        )
    return placecounts.load(target)


def _require_like(before: "GateBaseline", scan: "ScanResult", policy: "Policy") -> None:
    """Refuse a baseline that has nothing to do with this kernel: everything would be new."""
    objects = {site.object or site.module for site in scan.sites}
    if objects and before.places and objects.isdisjoint(before.places):
        raise BadInputFileError(
            f"{policy.beside(policy.said.baseline)}: is the baseline of another kernel "
            f"({before.kernel}): they have no source file in common."
        )
