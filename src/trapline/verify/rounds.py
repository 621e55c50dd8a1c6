"""All of a verification: rounds of cases, findings, the result document."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import iced_x86 as ix

from trapline.base.version import GENERATOR
from trapline.guest.target import TargetSource
from trapline.results.trapclass import EMULATED_CLASSES, EmulatedClass
from trapline.results.verify import (
    SEVERITY,
    Finding,
    Refused,
    VerifiedKernel,
    VerifyResult,
)
from trapline.rules.tables import load
from trapline.verify.cases import Case, Subjects, first_round, ring3_round, second_round
from trapline.verify.causes import Cause, Tried, find_causes
from trapline.verify.chunks import run_cases, verify_pool
from trapline.verify.differences import Mismatch
from trapline.verify.forms import Form, name_of
from trapline.verify.inputs import decode
from trapline.verify.judge import Judgement
from trapline.verify.occurs import Occurrences
from trapline.verify.testpages import END, USER_END

_USED: Final = "forms that the kernel has sites of"

#: Told (cases done, cases in all so far).
Progress = Callable[[int, int], None]


class Options(NamedTuple):
    """`workers` are processes; `limit` is how many cases are run beyond one for each form.

    `ring3` is false for guests that have no user mode. `msrs` are tried beside what the rules name.
    """

    workers: int = 1
    limit: int | None = None
    ring3: bool = True
    msrs: tuple[int, ...] = ()


class _Counted:
    """Adds up progress over the rounds."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done = 0
        self._total = 0

    def add(self, cases: int) -> None:
        self._total += cases

    def __call__(self, done: int) -> None:
        self._done += done
        if self._progress is not None:
            self._progress(self._done, self._total)


def verify(
    source: TargetSource,
    kernel: VerifiedKernel,
    options: Options,
    occurrences: Occurrences | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Try all cases on one kernel.

    Raises BadImageError, NotATdxKernelError, NoDebugInfoError or BadMachineError for a kernel
    that cannot be brought to where the tests begin.
    """
    tried = run(source, options, progress)
    return result(source, kernel, tried, occurrences)


def run(
    source: TargetSource, options: Options, progress: Progress | None = None
) -> tuple[Tried, ...]:
    """Run the rounds; the result does not depend on the number of workers."""
    counted = _Counted(progress)
    forms, probes = first_round()
    subjects = Subjects.of(load(source.module_version), options.msrs)
    in_ring3 = _limited(ring3_round(forms, subjects), options.limit) if options.ring3 else ()
    counted.add(len(in_ring3) + len(probes))
    with verify_pool(source, options.workers, ring3=options.ring3) as pool:
        tried = _tried(in_ring3, run_cases(pool, in_ring3, progress=counted))
        judged = run_cases(pool, probes, progress=counted)
        tried += _tried(probes, judged)
        accepted = _codes(forms, judged, lambda judgement: judgement.handled)
        executed = _codes(forms, judged, lambda judgement: judgement.executed)
        rest = _limited(second_round(forms, accepted, subjects), options.limit)
        counted.add(len(rest))
        tried += _tried(rest, run_cases(pool, rest, executed, counted))
    return _with_refusals(tuple(each for each in tried if each.judgement.verdict != "unreachable"))


def _limited(cases: tuple[Case, ...], limit: int | None) -> tuple[Case, ...]:
    """Choose cases evenly."""
    if limit is None or limit >= len(cases):
        return cases
    return tuple(cases[number * len(cases) // limit] for number in range(limit))


def _codes(
    forms: Sequence[Form], judged: Sequence[Judgement], wanted: Callable[[Judgement], bool]
) -> frozenset[int]:
    return frozenset(
        form.code for form, judgement in zip(forms, judged, strict=True) if wanted(judgement)
    )


def _tried(cases: Sequence[Case], judged: Sequence[Judgement]) -> list[Tried]:
    found = []
    for case, judgement in zip(cases, judged, strict=True):
        instruction = decode(case.code, END, strict=False)
        found.append(Tried(case, instruction.code, name_of(instruction), judgement))
    return found


def _with_refusals(tried: tuple[Tried, ...]) -> tuple[Tried, ...]:
    """Say of each refusal whether the handler takes the same form upon itself elsewhere."""
    claimed = {
        (each.case.trap, each.form, each.case.ring3)
        for each in tried
        if each.judgement.handled and each.judgement.executed
    }
    return tuple(
        each._replace(judgement=_refusal(each.judgement))
        if each.judgement.verdict == "refused"
        and not each.judgement.may_refuse
        and (each.case.trap, each.form, each.case.ring3) in claimed
        else each
        for each in tried
    )


def _refusal(judgement: Judgement) -> Judgement:
    mismatch = Mismatch("refused", "", "emulated, as with other operands", "refused")
    return judgement._replace(verdict="different", mismatches=(mismatch,))


# The result document.


def result(
    source: TargetSource,
    kernel: VerifiedKernel,
    tried: Sequence[Tried],
    occurrences: Occurrences | None,
) -> VerifyResult:
    """Turn judgements into findings."""
    verdicts: dict[str, Counter[str]] = {trap: Counter() for trap in EMULATED_CLASSES}
    for each in tried:
        verdicts[each.case.trap][each.judgement.verdict] += 1
    refused = _refused_forms(tried, occurrences)
    # A refusal says nothing of what an emulation leaves.
    of_form = Counter(
        (each.case.trap, each.form)
        for each in tried
        if each.judgement.handled or each.judgement.mismatches
    )
    findings = [
        _finding(cause, sum(of_form[cause.trap, form] for form in cause.forms), occurrences)
        for cause in find_causes(tried)
    ]
    findings += _refused_findings(refused)
    findings.sort(
        key=lambda finding: (
            SEVERITY.index(finding.kind), EMULATED_CLASSES.index(finding.trap), finding.cause,
            finding.forms,
        )
    )  # fmt: skip
    return VerifyResult(
        generator=GENERATOR,
        kernel=kernel,
        module_version=source.module_version,
        cases=len(tried),
        injected=sum(each.judgement.injected for each in tried),
        verdicts={trap: dict(sorted(counts.items())) for trap, counts in verdicts.items()},
        findings=tuple(findings),
        refused=refused,
        scanned=None if occurrences is None else occurrences.source,
        digest=_digest(tried),
    )


def _refused_forms(tried: Sequence[Tried], occurrences: Occurrences | None) -> tuple[Refused, ...]:
    """List the forms that were never emulated, and refused at least once."""
    by_form: dict[tuple[EmulatedClass, int], list[Tried]] = defaultdict(list)
    for each in tried:
        if not each.case.ring3:
            by_form[each.case.trap, each.form].append(each)
    found = []
    for (trap, form), cases in by_form.items():
        refused = [each for each in cases if each.judgement.refused]
        if not refused or any(each.judgement.handled for each in cases):
            continue
        example = min(refused, key=lambda each: (len(each.case.code), each.case.code))
        found.append(
            Refused(
                trap=trap,
                form=example.name,
                instruction=_text(example.case),
                bytes=example.case.code.hex(),
                cases=len(refused),
                occurs=None if occurrences is None else occurrences.count(trap, (form,), ()),
            )
        )
    return tuple(sorted(found, key=lambda each: (each.trap, -(each.occurs or 0), each.form)))


def _refused_findings(refused: Sequence[Refused]) -> list[Finding]:
    """Report the forms that the kernel itself uses on what its handler must emulate."""
    found = []
    for trap in EMULATED_CLASSES:
        forms = [form for form in refused if form.trap == trap and form.occurs]
        if not forms:
            continue
        names = tuple(sorted(form.form for form in forms))
        found.append(
            Finding(
                id=_identity(trap, "refused", _USED),
                trap=trap,
                kind="refused",
                cause=_USED,
                forms=names,
                instruction=forms[0].instruction,
                bytes=forms[0].bytes,
                circumstances="",
                expected="emulated, or not used on what traps",
                got="refused",
                cases=sum(form.cases for form in forms),
                tried=sum(form.cases for form in forms),
                occurs=sum(form.occurs or 0 for form in forms),
            )
        )
    return found


def _finding(cause: Cause, tried: int, occurrences: Occurrences | None) -> Finding:
    occurs = None
    if occurrences is not None:
        occurs = occurrences.count(cause.trap, cause.forms, cause.features)
    words = " and ".join(cause.features) or "any operand"
    if cause.detail:
        words = f"{cause.detail}: {words}"
    return Finding(
        id=_identity(cause.trap, cause.kind, words),
        trap=cause.trap,
        kind=cause.kind,
        cause=words,
        forms=cause.names,
        instruction=_text(cause.example),
        bytes=cause.example.code.hex(),
        circumstances=_circumstances(cause.example),
        expected=cause.mismatch.expected,
        got=cause.mismatch.got,
        cases=cause.cases,
        tried=tried,
        occurs=occurs,
    )


def _text(case: Case) -> str:
    """Disassemble an example; an address of ours is called so."""
    return _disassemble(case.code, ring3=case.ring3)


def _disassemble(code: bytes, *, ring3: bool) -> str:
    formatter = ix.Formatter(ix.FormatterSyntax.NASM)
    formatter.rip_relative_addresses = True
    return str(formatter.format(decode(code, USER_END if ring3 else END, strict=False)))


def _circumstances(case: Case) -> str:
    words = []
    if case.ring3:
        words.append("in ring 3")
    if case.user:
        words.append("user address, RFLAGS.AC=0" if case.smap else "user address")
    if case.crossing:
        words.append("page-crossing operand")
    if case.rewritten:
        words.append(f"becomes {_disassemble(case.rewritten, ring3=False)} under the handler")
    for field, value in case.pinned:
        name = ("RAX", "RCX", "RDX")[field.number]
        words.append(f"{name if field.mask >> 32 else 'E' + name[1:]}={value & field.mask:#x}")
    return ", ".join(words)


def _identity(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _digest(tried: Sequence[Tried]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for each in tried:
        digest.update(repr((each.case, each.judgement)).encode())
    return digest.hexdigest()
