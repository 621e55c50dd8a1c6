"""Instructions, register states and causes, without a guest."""

import pytest

from trapline.rules.tables import load
from trapline.verify import features
from trapline.verify.cases import Case, Subjects, first_round, ring3_round, second_round
from trapline.verify.causes import SOMETIMES, Tried, find_causes
from trapline.verify.differences import Mismatch
from trapline.verify.inputs import (
    LANES,
    Field,
    Request,
    decode,
    lanes,
    read_fields,
)
from trapline.verify.judge import Judgement
from trapline.verify.testpages import (
    END,
    KERNEL_BASE,
    OPERAND,
    STACK_AT,
    STACK_SIZE,
    USER_BASE,
)

STACK = KERNEL_BASE + STACK_AT + STACK_SIZE
SEGMENTS = {"fs": 0, "gs": 0xFFFF888000000000}
FORMS, PROBES = first_round()
SUBJECTS = Subjects.of(load())
NAMES = {form.name: form for form in FORMS}
MOV = {
    name: NAMES[name].code
    for name in ("MOV r/m8, r8", "MOV r8, r/m8", "MOV r/m32, imm32", "MOVZX r32, r/m8")
}


def test_probes_hold_every_map_and_encoding():
    for name in ("MOV AL, moffs8", "MOVNTI m32, r32", "MOVBE r16, m16", "XLATB", "STOSQ", "INSB"):
        assert name in NAMES
    encodings = {form.name.rpartition(" [")[2].partition(".")[0] for form in FORMS}
    assert {"VEX", "EVEX"} <= encodings
    assert len(PROBES) == len(FORMS) == len({form.code for form in FORMS}) > 3000


def test_second_round_varies_what_was_accepted():
    cases = second_round(FORMS, frozenset(MOV.values()), SUBJECTS)
    texts = {str(decode(case.code, END)) for case in cases if case.trap == "mmio"}
    assert "mov [rax],ah" in texts
    assert "mov [r15-70h],r8b" in texts
    assert "mov dh,[rsp+rcx*8+33h]" in texts
    assert any("gs:[" in text for text in texts)
    assert any(case.crossing for case in cases)
    assert any(case.user and case.smap for case in cases)
    assert any(case.rewritten for case in cases)
    assert len(cases) == len(set(cases))
    assert all(decode(case.code, END, strict=False).len == len(case.code) for case in cases)


def test_enough_cases_for_what_linux_accepts():
    linux = frozenset(
        form.code
        for form in FORMS
        if form.name.startswith(("MOV r", "MOVZX", "MOVSX r")) and "[" not in form.name
    )
    assert len(second_round(FORMS, linux, SUBJECTS)) + len(PROBES) >= 20_000


def test_ring3_tries_what_traps_by_itself():
    cases = ring3_round(FORMS, SUBJECTS)
    assert {case.trap for case in cases} == {"mmio", "pio", "cpuid", "msr", "hlt"}
    assert all(case.ring3 for case in cases)


@pytest.mark.parametrize(
    "code",
    ["8803", "488b4490f0", "88644de0", "8a05f0080000", "c604250010fdff5a", "658803", "a4", "d7",
     "678a03", "890424"],
)  # fmt: skip
def test_lanes_share_the_operands_and_nothing_else(code):
    instruction = decode(bytes.fromhex(code), END)
    found = lanes(instruction, Request(STACK), SEGMENTS, 7)
    if code in {"c604250010fdff5a", "890424"}:  # another address; the stack itself
        assert found is None
        return
    narrow = code.startswith("67")
    assert found.gla == (OPERAND - KERNEL_BASE + USER_BASE if narrow else OPERAND)
    read = dict.fromkeys(range(16), 0)
    for number, mask in read_fields(instruction):
        read[number] |= mask
    assert len(found.regs) == LANES
    first, second, _ = found.regs
    for number in range(16):
        assert not (first[number] ^ second[number]) & read[number]
        if not read[number] and number != 4:
            assert first[number] ^ second[number] == (1 << 64) - 1


def test_crossing_and_user_addresses():
    instruction = decode(bytes.fromhex("8b03"), END)
    crossing = lanes(instruction, Request(STACK, crossing=True), SEGMENTS, 1)
    assert crossing.gla % 4096 == 4094
    user = lanes(instruction, Request(STACK, user=True), SEGMENTS, 1)
    assert user.gla < 1 << 47


def test_features_of_code():
    assert "register AH, CH, DH or BH" in features.of_code(bytes.fromhex("8823"))
    assert "register AH, CH, DH or BH" not in features.of_code(bytes.fromhex("408823"))
    assert "a RIP-relative address" in features.of_code(bytes.fromhex("8a05f0080000"))
    assert "more than one segment prefix" in features.of_code(bytes.fromhex("65648803"))
    for code in ("8803", "65648803", "408823", "8a05f0080000", "0fbe0424"):
        assert features.of_code(bytes.fromhex(code)) <= features.CODE


def tried(code, *kinds, form=1, seed=0, detail=""):
    mismatches = tuple(Mismatch(kind, detail, "this", "that") for kind in kinds)
    verdict = "different" if kinds else "same"
    return Tried(
        Case("mmio", bytes.fromhex(code), seed), form, f"form {form}",
        Judgement(verdict, mismatches, handled=True, compared=True),
    )  # fmt: skip


def test_a_cause_is_what_only_failing_cases_have():
    (cause,) = find_causes(
        [
            tried("8823", "wrong-memory"),
            tried("883b", "wrong-memory"),
            tried("8803"),
            tried("408823"),
        ]
    )
    assert cause.features == ("register AH, CH, DH or BH",)
    assert (cause.kind, cause.cases) == ("wrong-memory", 2)
    assert cause.example.code.hex() == "8823"


def test_forms_that_fail_of_the_same_cause_are_one_finding():
    (cause,) = find_causes(
        [tried("8803", "stale-bits", form=form, seed=form) for form in (1, 2, 3)]
    )
    assert cause.forms == (1, 2, 3)
    assert cause.features == ()


def test_two_causes_in_one_form_are_told_apart():
    cases = [tried(code, "wrong-memory") for code in ("8823", "883b", "882b")]
    cases += [tried(code, "wrong-memory") for code in ("8805f0080000", "880df0080000")]
    cases += [tried(code) for code in ("8803", "880b", "8813", "881b", "408823")]
    assert {cause.features for cause in find_causes(cases)} == {
        ("register AH, CH, DH or BH",),
        ("a RIP-relative address",),
    }


def test_what_explains_all_is_better_than_what_explains_half():
    """One sub-leaf alone has hardly a passing case; two features together explain both."""
    code = NAMES["CPUID"].bytes

    def case(leaf, subleaf, *kinds):
        return Tried(
            Case("cpuid", code, leaf, pinned=((Field(0, 1), leaf), (Field(1, 1), subleaf))), 1,
            "CPUID", Judgement("same", tuple(Mismatch(kind, "", "", "x") for kind in kinds), True,
            True),
        )  # fmt: skip

    software = [0x40000000 + number for number in range(20)]
    cases = [case(leaf, sub, "wrong-access") for leaf in software for sub in (1, 0x8765)]
    cases += [case(leaf, 0) for leaf in software]
    cases += [case(leaf, sub) for leaf in (0, 5, 7) for sub in (0, 0x8765)]
    (cause,) = find_causes(cases)
    assert cause.features == ("a leaf of the range 40000000h", "a sub-leaf that is not 0")


def test_a_cause_that_shows_in_memory_and_in_a_register_is_one_finding():
    """Stores and loads of the same wrong register; but not two parts wrong in one case."""
    sound = [tried(code) for code in ("8803", "408823")]
    sound += [tried(code, form=2) for code in ("8a03", "408a23")]
    stores = [tried(code, "wrong-memory") for code in ("8823", "883b")]
    loads = [
        tried(code, "wrong-register", form=2, detail="another register")
        for code in ("8a23", "8a3b")
    ]
    (cause,) = find_causes([*sound, *stores, *loads])
    assert (cause.kind, cause.forms, cause.cases) == ("wrong-memory", (1, 2), 4)
    assert cause.example.code.hex() == "8823"
    both = [tried(code, "wrong-memory", "wrong-register") for code in ("8823", "883b")]
    assert len(find_causes([*sound, *both])) == 2


def test_a_clean_run_has_no_cause():
    assert find_causes([tried("8803"), tried("8823")]) == ()


def test_chance_is_no_cause():
    """A fault of half the values: some prefix only has failing ones, and explains nothing."""
    failing = [tried("8803", "wrong-memory", seed=seed) for seed in range(20)]
    failing += [tried("f28803", "wrong-memory", seed=seed) for seed in range(4)]
    failing += [tried("678803", "wrong-memory", seed=seed) for seed in range(3)]
    passing = [tried("8803", seed=seed) for seed in range(40, 80)]
    (cause,) = find_causes(failing + passing)
    assert cause.features == (SOMETIMES,)
    assert cause.cases == 27
    # What fails much more often than the rest is a cause of its own.
    more = [tried("f28803", "wrong-memory", seed=seed) for seed in range(4, 40)]
    assert {each.features for each in find_causes(failing + more + passing)} == {
        ("prefix F2",), (SOMETIMES,),
    }  # fmt: skip


def test_what_passes_with_other_forms_is_not_the_cause_here():
    """In the first form, a segment with a base and two prefixes are had by the same cases."""
    first = [tried("65648803", "refused", form=1), tried("8803", form=1)]
    second = [tried("65648a03", "refused", form=2), tried("648a03", form=2), tried("8a03", form=2)]
    (cause,) = find_causes(first + second)
    assert cause.features == ("more than one segment prefix",)
    assert cause.forms == (1, 2)


def test_two_failures_do_not_make_a_cause_of_two_features():
    """Each of the features has passing cases; that both together have none may be chance."""
    failing = [tried("f28805f0080000", "wrong-memory", seed=seed) for seed in range(6)]
    passing = [tried(code) for code in ("f28803", "8805f0080000", "8803") for _ in range(20)]
    (cause,) = find_causes(failing[:2] + passing)
    assert cause.features == (SOMETIMES,)
    (cause,) = find_causes(failing + passing)
    assert cause.features == ("a RIP-relative address", "prefix F2")


def test_a_general_cause_is_better_than_one_value():
    code = NAMES["WRMSR"].bytes

    def case(index, *kinds):
        return Tried(
            Case("msr", code, index, pinned=((Field(1, 0xFFFFFFFF), index),)), 1, "WRMSR",
            Judgement("same", tuple(Mismatch(kind, "", "", "x") for kind in kinds), True, True),
        )  # fmt: skip

    others = [case(0x40000000 + index) for index in range(20)]
    (cause,) = find_causes([case(0x6E0, "wrong-access"), *others, case(0x10), case(0x1B)])
    assert cause.features == ("MSR 0x6e0",)
    low = [case(index, "wrong-access") for index in (0x10, 0x1B, 0x6E0)]
    (cause,) = find_causes([*low, *others])
    assert cause.features == ("an MSR of the range 00000000h",)


def test_a_wrong_register_that_held_the_value_is_the_same_fault():
    cases = [tried(code, "wrong-register", detail="another register") for code in ("8a23", "8a3b")]
    cases += [tried(code) for code in ("8a03", "8a0b", "8a13", "408a23")]
    cases += [tried("8a2b", "stale-bits")]
    (cause,) = find_causes(cases)
    assert cause.features == ("register AH, CH, DH or BH",)
    assert (cause.kind, cause.detail, cause.cases) == ("wrong-register", "another register", 3)


def test_values_are_told_by_their_sign_and_what_is_not_their_sign():
    case = Case("mmio", bytes.fromhex("0fbe03"), 0)
    assert features.NEGATIVE in features.of_case(case, 0x80)
    assert "values in memory whose bit 6 is not their sign" in features.of_case(case, 0x80)
    assert not {word for word in features.of_case(case, 0xC0) if "bit 6" in word}
    assert not {word for word in features.of_case(case, 0x00) if "sign" in word}


def test_addresses_are_told_by_what_they_are_no_multiple_of():
    case = Case("mmio", bytes.fromhex("8803"), 0)
    words = {
        at: {word for word in features.of_case(case, None, at) if "multiple" in word}
        for at in range(9)
    }
    assert words[0] == words[8] == set()
    assert words[4] == {"an address that is no multiple of 8"}
    assert words[2] == words[4] | {"an address that is no multiple of 4"}
    assert words[1] == words[2] | {"an address that is no multiple of 2"}
