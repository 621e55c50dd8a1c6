"""Every enforced row decides: another answer in it, and a guest, the VMM or a decision differs.

Each row is flipped alone, to every other answer that its columns may hold. What the software TD
cannot do it must refuse when it is built; at least one other answer it must be able to give, and
what a guest sees must then be different. The guest is `rule_probes`: a battery for each table.
"""

from dataclasses import fields, replace

import pytest
from rule_probes import probes_of

from trapline.base.errors import BadInputFileError
from trapline.rules.rows import (
    AttributeRule,
    CpuAccess,
    CpuidOutcome,
    CpuidRule,
    Feature,
    FieldRule,
    FieldScope,
    MsrAction,
    MsrRule,
    MsrSpecial,
    Outcome,
    Standing,
    StatusRule,
    TdcallRule,
    TdvmcallRule,
)
from trapline.rules.ruleset import TABLES
from trapline.rules.tables import load, versions
from trapline.tdx.msr import X2APIC_WRITABLE

M64 = (1 << 64) - 1
STATUSES = ("TDX_OPERAND_BUSY", "TDX_SUCCESS")
GHCI = ("TDVMCALL_STATUS_GPA_INUSE", "TDVMCALL_STATUS_SUCCESS")


def other_answers(row):
    """Yield the row with each other answer."""
    if isinstance(row, MsrRule):
        yield from other_actions(row)
    elif isinstance(row, CpuidRule):
        yield from other_leaves(row)
    elif isinstance(row, FieldRule):
        yield replace(row, read_mask=0 if row.read_mask else M64)
        if row.scope != FieldScope.SYS:  # nothing writes those
            yield replace(row, write_mask=0 if row.write_mask else M64)
    elif isinstance(row, StatusRule):
        yield replace(row, value=row.value ^ 1 << 37 if row.value > 255 else row.value ^ 64)
    elif isinstance(row, AttributeRule):
        yield replace(row, bit=(row.bit + 31) % 64)
    elif isinstance(row, TdcallRule):
        codes = (one for one in STATUSES if one != row.status)
        yield from (replace(row, status=one, operand="") for one in codes)
    elif isinstance(row, TdvmcallRule):
        yield from (replace(row, status=one) for one in GHCI if one != row.status)
    else:
        yield from (replace(row, outcome=one) for one in Outcome if one != row.outcome)


def other_leaves(row):
    yield from (replace(row, outcome=one) for one in CpuidOutcome if one != row.outcome)
    if row.control:
        yield replace(row, control=Feature.NONE)
    if row.feature:
        yield replace(row, feature=Feature.NONE)


def other_actions(row):
    """Yield an MSR's row with an action for each other effect on either access."""
    for way in ("read", "write"):
        found = {effect(row, way)}
        for action in MsrAction:
            other = replace(row, **{way: action, f"{way}_feature": Feature.NONE})
            if not action.needs_feature and effect(other, way) not in found:
                found.add(effect(other, way))
                yield other


def effect(row, way):
    """What an access comes to with all features off and on: answered, #VE or #GP.

    Whether the CPU or the module answers, no guest can tell; nor that an access is refused by the
    module which the CPU would refuse.
    """
    action = getattr(row, way)
    on, off = {
        MsrAction.NATIVE_UNLESS_GP: ("answered", "gp"),
        MsrAction.NATIVE_UNLESS_EMULATED: ("answered", "answered"),
        MsrAction.GP_UNLESS_VE: ("ve", "gp"),
        MsrAction.VE_UNLESS_GP: ("gp", "ve"),
        MsrAction.VE_UNLESS_EMULATED: ("answered", "ve"),
        MsrAction.VE: ("ve", "ve"),
        MsrAction.GP: ("gp", "gp"),
    }.get(action, ("answered", "answered"))
    read_only = row.special == MsrSpecial.X2APIC and row.first not in X2APIC_WRITABLE
    if row.cpu_access not in {CpuAccess.BOTH, CpuAccess(way)} or (way == "write" and read_only):
        on, off = (("gp" if one == "answered" else one) for one in (on, off))
    return off, on


def with_row(rules, table, row):
    rows = tuple(row if each.id == row.id else each for each in rules.table(table))
    return replace(rules, **{table: rows})


def enforced(version):
    rules = load(version)
    return [
        pytest.param(version, table, row.id, id=f"{version}-{table}-{row.id}")
        for table in TABLES
        for row in rules.table(table)
        if row.standing is Standing.ENFORCED and (row.module == version or version == versions()[0])
    ]


_BEFORE = {}


def before(rules, probe):
    """What the guest sees by the rules as they are."""
    key = rules.version, probe
    if key not in _BEFORE:
        _BEFORE[key] = probe(rules)
    return _BEFORE[key]


@pytest.mark.parametrize(
    ("version", "table", "row_id"),
    [param for version in versions() for param in enforced(version)],
)
def test_an_enforced_row_decides(version, table, row_id):
    rules = load(version)
    row = next(each for each in rules.table(table) if each.id == row_id)
    noticed, refused = [], 0
    for other in other_answers(row):
        try:
            changed = with_row(rules, table, other)
            seen = [probe(changed) != before(rules, probe) for probe in probes_of(table, row)]
        except BadInputFileError as error:
            refused += row.id in str(error)
            continue
        noticed.append((other, any(seen)))
    others = sum(1 for _ in other_answers(row))
    assert len(noticed) + refused == others, "a refusal does not name the row"
    assert noticed, f"{row.id}: no other answer is possible ({refused} are refused)"
    blind = [other.answer for other, seen in noticed if not seen]
    assert not blind, f"{row.id}: nobody sees {blind}"


def test_a_described_row_is_asked_by_nobody():
    """A change of what is only described changes nothing; otherwise it would be enforced."""
    rules = load(versions()[0])
    described = [
        (table, row)
        for table in ("instructions", "memory", "nesting", "attributes")
        for row in rules.table(table)
        if row.standing is Standing.DESCRIBED
    ]
    assert described
    changed = rules
    for table, row in described:
        changed = with_row(changed, table, next(other_answers(row)))
    for table in ("instructions", "memory", "nesting"):
        for probe in probes_of(table, None):
            assert probe(changed) == before(rules, probe)


def test_the_answer_columns_are_the_ones_that_are_flipped():
    for kind in TABLES.values():
        assert set(kind.ANSWER) <= {column.name for column in fields(kind)}
