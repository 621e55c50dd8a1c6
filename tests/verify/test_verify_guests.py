"""Planted faults in a #VE handler are found; the sound twin is clean."""

import multiprocessing

import msgspec
import pytest
from instruction_handler import FAULTS as IN_FAULTS
from verify_guests import FAULTS, source, verified, verified_instructions

from reports import rendered, text
from trapline.base.errors import BadMachineError, ExitCode
from trapline.results.findings import exit_code
from trapline.results.verify import VerifyResult
from trapline.rules.tables import load
from trapline.verify import baseline, rounds
from trapline.verify.cases import Subjects, first_round, second_round
from trapline.verify.causes import find_causes
from trapline.verify.chunks import run_cases, verify_pool
from trapline.verify.rounds import Options, run

SUBJECTS = Subjects.of(load())

# Fault -> kind and cause of the finding, and a form that must be among its forms.
PLANTED = {
    "FAULT_ZERO_EXTEND": ("stale-bits", "above the destination: any operand", "MOVZX r32, r/m8"),
    "FAULT_HIGH_BYTE": ("wrong-memory", "register AH, CH, DH or BH", "MOV r/m8, r8"),
    "FAULT_STALE_DATA": ("leak-to-host", "R15: any operand", "MOV r/m8, r8"),
    "FAULT_EXTRA_REGISTER": ("leak-to-host", "RBX: any operand", "MOV r64, r/m64"),
    "FAULT_MOVS": ("wrong-memory", "any operand", "MOVSB"),
    "FAULT_FLAGS": ("wrong-flags", "CF: any operand", "MOV r/m8, imm8"),
    "FAULT_XMM": ("wrong-register", "SSE or x87 register: any operand", "MOV r/m8, imm8"),
    "FAULT_SIGN": ("wrong-register", "the extension: negative values in memory", "MOVSX r64, r/m8"),
    "FAULT_NO_RECHECK": (
        "not-refused", "an instruction that changes under the handler", None,
    ),
    "FAULT_USER_ADDRESS": ("not-refused", "an address of the user", None),
    "FAULT_TRUST": ("from-host", "the extension: any operand", "MOVZX r32, r/m8"),
    "FAULT_WIDTH": ("wrong-access", "any operand", "MOV r16, r/m16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound():
    return verified(limit=1200)


def test_a_sound_handler_has_no_finding(sound):
    assert sound.findings == ()
    assert sound.verdicts["mmio"]["same"] > 500
    assert "different" not in sound.verdicts["mmio"]


def test_what_it_does_not_emulate_is_refused_and_not_a_finding(sound):
    refused = {form.form for form in sound.refused}
    assert {"MOVSB", "XCHG r/m8, r8", "OUT DX, AL", "CPUID", "HLT"} <= refused
    assert "MOV r/m8, r8" not in refused


def test_what_the_engine_cannot_execute_is_injected(sound):
    assert sound.injected > 1000
    names = {form.form for form in sound.refused}
    assert any(name.startswith("VMOVUPS zmm") for name in names)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault):
    kind, cause, form = PLANTED[fault]
    result = verified(fault)
    found = [finding for finding in result.findings if finding.kind == kind]
    assert any(finding.cause.startswith(cause) for finding in found), result.findings
    assert form is None or any(form in finding.forms for finding in found)
    for finding in found:
        assert finding.trap == "mmio"
        assert finding.expected != finding.got


def test_only_a_handler_that_looks_where_its_operand_is_refuses_one_on_two_kinds_of_memory():
    forms, probes = first_round()
    movs = frozenset(
        form.code for form in forms if form.name in {"MOV r/m64, r64", "MOV r64, r/m64"}
    )
    cases = [case for case in second_round(forms, movs, SUBJECTS) if case.private is not None]
    assert len(cases) > 20
    for fault in (None, "FAULT_NO_CROSSING"):
        with verify_pool(source(*([fault] if fault else [])), 1, ring3=False) as pool:
            run_cases(pool, probes[:1])
            tried = rounds._tried(cases, run_cases(pool, cases))
        kinds = {cause.kind for cause in find_causes(tried)}
        assert kinds == ({"wrong-memory", "wrong-register"} if fault else set())


def test_a_fault_that_fails_like_a_known_one_makes_it_worse():
    """MOVZX that does not extend hides in nothing: the finding of before has grown."""
    small, large = verified("FAULT_ZERO_EXTEND", limit=300), verified("FAULT_ZERO_EXTEND")
    (finding,) = [each for each in large.findings if each.kind == "stale-bits"]
    less = msgspec.structs.replace(finding, forms=finding.forms[:1])
    before = msgspec.structs.replace(large, findings=(less,))
    assert baseline.worse(large, large) == ()
    (worse,) = baseline.worse(before, large)
    assert worse.id == finding.id
    assert "more forms, such as" in worse.why
    rarer = msgspec.structs.replace(finding, cases=finding.cases // 2)
    (worse,) = baseline.worse(msgspec.structs.replace(large, findings=(rarer,)), large)
    assert worse.why.startswith(f"fails {finding.cases} of {finding.tried} times")
    (worse,) = baseline.worse(msgspec.structs.replace(small, findings=()), large)
    assert worse.why == "new"
    # Told otherwise, as another fault hides what told its cause: the same example fails alike.
    other = msgspec.structs.replace(finding, id="0", cause="above the destination: prefix 66")
    before = msgspec.structs.replace(large, findings=(other,))
    assert baseline.worse(before, large) == ()
    for changed in ({"got": "RAX=0"}, {"cases": finding.cases // 2}, {"forms": finding.forms[1:]}):
        before = msgspec.structs.replace(
            large, findings=(msgspec.structs.replace(other, **changed),)
        )
        assert [each.id for each in baseline.worse(before, large)] == [finding.id]
    now = msgspec.structs.replace(large, worse_than_baseline=())
    assert exit_code(large) == ExitCode.FINDINGS
    assert exit_code(now) == ExitCode.CLEAN
    assert exit_code(msgspec.structs.replace(now, worse_than_baseline=(worse,))) == 1


def test_the_number_of_workers_does_not_matter():
    one, two = (verified("FAULT_ZERO_EXTEND", limit=200, workers=count) for count in (1, 2))
    assert one == two


def test_reports_show_every_finding():
    result = verified("FAULT_HIGH_BYTE")
    report = text(result)
    assert all(len(line) <= 80 for line in report.splitlines())
    assert "injected events" in report.replace("\n", " ")
    for finding in result.findings:
        assert finding.bytes in report
    lines = [msgspec.json.decode(line) for line in rendered(result, "jsonl").splitlines()]
    assert lines[0]["schema"] == "trapline/verify"
    assert [line["kind"] for line in lines if line.get("type") == "finding"] == [
        finding.kind for finding in result.findings
    ]
    assert {line["class"] for line in lines[1:]} <= {"mmio", "pio", "cpuid", "msr", "hlt"}
    document = rendered(result, "json")
    assert msgspec.json.decode(document, type=VerifyResult) == result


def test_verbose_text_lists_refused_forms(sound):
    short = text(sound)
    long = text(sound, 1)
    assert "XCHG r/m8, r8" not in short
    assert "XCHG r/m8, r8" in long
    assert all(len(line) <= 80 for line in long.splitlines())


def test_a_guest_that_never_gets_there_is_one_sentence():
    with pytest.raises(BadMachineError, match="does not reach init's first instruction"):
        run(source(), Options(workers=1, limit=1, ring3=True))


def test_a_worker_that_dies_is_replaced():
    _, probes = first_round()
    before = set(multiprocessing.active_children())
    with verify_pool(source(), 1, ring3=False) as pool:
        once = run_cases(pool, probes[:64])
        (process,) = set(multiprocessing.active_children()) - before
        process.kill()
        process.join()
        assert run_cases(pool, probes[:64]) == once


# Of each fault of what traps by itself: kind and cause of the finding, and one of its forms.
PLANTED_IN = {
    "FAULT_IN_STALE": ("pio", "stale-bits", "above the destination: any operand", "IN EAX, DX"),
    "FAULT_IN_TRUSTS": ("pio", "from-host", "above the destination: any operand", "IN AL, DX"),
    "FAULT_IN_CLEARS": ("pio", "wrong-register", "above the destination: any operand", "IN AX, DX"),
    "FAULT_OUT_LEAKS": ("pio", "leak-to-host", "R15: any operand", "OUT imm8, AL"),
    "FAULT_OUT_WIDTH": ("pio", "wrong-access", "any operand", "OUT DX, AX"),
    "FAULT_PORT_IN_DX": ("pio", "wrong-access", "any operand", "IN AL, imm8"),
    "FAULT_IN_MASK": ("pio", "wrong-register", "above the destination: any operand", "IN AL, DX"),
    "FAULT_STRING": ("pio", "wrong-memory", "any operand", "INSB"),
    "FAULT_CPUID_SWAPS": ("cpuid", "wrong-register", "a leaf of the range 40000000h", "CPUID"),
    "FAULT_CPUID_LEAF": ("cpuid", "wrong-access", "", "CPUID"),
    "FAULT_CPUID_SUBLEAF": (
        "cpuid",
        "wrong-access",
        "a leaf of the range 40000000h and a sub-leaf that is not 0",
        "CPUID",
    ),
    "FAULT_CPUID_STALE": ("cpuid", "stale-bits", "a leaf of the range 40000000h", "CPUID"),
    "FAULT_CPUID_TRUSTS": ("cpuid", "from-host", "a leaf of the range 40000000h", "CPUID"),
    "FAULT_CPUID_ASKS": ("cpuid", "from-host", "answer: a leaf of the processor's", "CPUID"),
    "FAULT_CPUID_LEAKS": ("cpuid", "leak-to-host", "R12: a leaf of the range 40000000h", "CPUID"),
    "FAULT_RDMSR_SWAPS": ("msr", "wrong-register", "any operand", "RDMSR"),
    "FAULT_RDMSR_STALE": ("msr", "stale-bits", "any operand", "RDMSR"),
    "FAULT_WRMSR_SWAPS": ("msr", "wrong-access", "any operand", "WRMSR"),
    "FAULT_WRMSR_DEADLINE": ("msr", "wrong-access", "MSR 0x6e0", "WRMSR"),
    "FAULT_WRMSR_RAX": ("msr", "wrong-access", "bits that are no operand: any operand", "WRMSR"),
    "FAULT_MSR_LEAKS": ("msr", "leak-to-host", "R12: any operand", "RDMSR"),
    "FAULT_HLT_STAYS": ("hlt", "hang", "the instruction traps again and again", "HLT"),
    "FAULT_HLT_SKIPS": ("hlt", "crash", "", "HLT"),
    "FAULT_HLT_INVERTS": ("hlt", "wrong-access", "any operand", "HLT"),
    "FAULT_HLT_LEAKS": ("hlt", "leak-to-host", "R12: any operand", "HLT"),
    "FAULT_HLT_CLI": ("hlt", "wrong-flags", "IF: interrupts on", "HLT"),
}


def test_a_sound_emulation_of_what_traps_by_itself_has_no_finding():
    result = verified_instructions(("pio", "cpuid", "msr", "hlt"))
    assert result.findings == ()
    for trap, at_least in (
        ("pio", 600),
        ("cpuid", 100),
        ("msr", 200),
        ("hlt", 40),
    ):
        assert result.verdicts[trap]["same"] >= at_least
        assert "different" not in result.verdicts[trap]
    assert sum(result.verdicts["msr"].values()) > 2 * len(SUBJECTS.msrs)  # RDMSR and WRMSR
    assert {form.form for form in result.refused} == {
        "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD",
    }  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED_IN)
def test_a_planted_fault_in_what_traps_by_itself_is_found(fault):
    trap, kind, cause, form = PLANTED_IN[fault]
    result = verified_instructions((trap,), fault)
    found = [finding for finding in result.findings if finding.kind == kind]
    assert any(
        finding.trap == trap and finding.cause.startswith(cause) and form in finding.forms
        for finding in found
    ), result.findings
    assert all(finding.expected != finding.got for finding in result.findings)


def test_every_fault_is_planted_once():
    assert {*PLANTED, "FAULT_NO_CROSSING"} == set(FAULTS)  # that one has a test of its own
    assert set(PLANTED_IN) == {each for faults in IN_FAULTS.values() for each in faults}
