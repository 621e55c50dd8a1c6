"""`verify`: what the #VE handler emulates, held against the processor."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trapline.api.kernel import as_kernel
from trapline.api.known_scan import KnownScan
from trapline.api.label import known_labels, with_labels
from trapline.api.progress import steps
from trapline.base.workers import how_many
from trapline.guest.target import TargetSource
from trapline.results.verify import VerifiedKernel
from trapline.rules.tables import DEFAULT_VERSION
from trapline.verify import baseline as earlier
from trapline.verify import rounds
from trapline.verify.launch import initrd
from trapline.verify.named import msrs_of
from trapline.verify.occurs import Occurrences

if TYPE_CHECKING:
    from trapline.api.kernel import AnyKernel, AnyPath
    from trapline.api.known_scan import AnyScan
    from trapline.api.label import AnyLabels
    from trapline.api.progress import Announce, OnProgress
    from trapline.results.verify import VerifyResult


def verify(
    kernel: "AnyKernel",
    *,
    scan: "AnyScan" = True,
    limit: int | None = None,
    module_version: str = DEFAULT_VERSION,
    baseline: "AnyPath | None" = None,
    workers: int | None = None,
    labels: "AnyLabels" = None,
    progress: "OnProgress | None" = None,
    announce: "Announce | None" = None,
) -> "VerifyResult":
    """Run each instruction form that the #VE handler takes upon itself twice, and compare.

    Sites of each form are counted in `scan`: a scan of this kernel, the JSON file of one, True
    to make it once into the cache, False for none. `limit` is how many cases are run beside one
    for each form. `module_version` is the TDX module's. `baseline` is an earlier JSON result: what
    is new or has grown since is in `VerifyResult.worse_than_baseline`. `workers` is the number of
    processes, by default one for each CPU. `labels` are what people said of findings.

    Raises NoDebugInfoError without a vmlinux, NotATdxKernelError, BadMachineError where the
    kernel does not come to where the tests begin, BadInputFileError for another kernel's scan.
    """
    said = known_labels(labels)
    known = KnownScan.of(scan)
    before = None if baseline is None else earlier.load(Path(baseline))
    opened = as_kernel(kernel, announce=announce)
    vmlinux, build_id = opened.vmlinux, opened.build_id
    known.require(build_id)
    if known.given is None and known.wanted and announce is not None:
        announce("scanning vmlinux, to know which forms it has")
    found = known.make(opened.files, (), build_id)
    source = TargetSource(
        kernel=opened.name,
        vmlinux=vmlinux,
        initrd=initrd(),
        release=opened.release,
        module_version=module_version,
    )
    result = rounds.verify(
        source,
        VerifiedKernel(name=opened.name, release=opened.release, build_id=build_id),
        rounds.Options(
            workers=how_many(workers),
            limit=limit,
            msrs=() if found is None else msrs_of(found, vmlinux),
        ),
        None if found is None else Occurrences(found),
        steps("verified", progress),
    )
    if before is not None:
        worse = earlier.worse(before, result)
        result = msgspec.structs.replace(result, worse_than_baseline=worse)
    return with_labels(result, said)
