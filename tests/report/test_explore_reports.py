import json
from pathlib import Path

import jsonschema
import msgspec
import pytest

from reports import rendered, text
from trapline.report.schemas import render as schema
from trapline.results.explore import Boundary, ExploreResult, Forbidden, Result, Window
from trapline.results.splat import Code, Place, Registers, Splat

CODE = [("entry", "swapgs"), ("entry", "mov %rsp,@"), ("work", "nop"), ("work", "ret")]


def splat():
    names = ("rax rbx rcx rdx rsi rdi rbp rsp " + " ".join(f"r{i}" for i in range(8, 16))).split()
    registers = Registers(
        rip="f+0x0/0x1", cs="0010", ss="0018", rflags="00000046",
        general=dict.fromkeys(names, "0" * 16),
    )  # fmt: skip
    return Splat(
        banner="privilege: x", injected=("nmi before instruction 1",), registers=registers,
        code=Code(bytes="", at=0), place=Place(address="0x1", label="f+0x0/0x1", image="vmlinux"),
        trace=(), complete=True, traps=(), reproduce="trapline explore …",
    )  # fmt: skip


def run(boundary, verdict, event="nmi", nested=None, at=None, *, expected=False):
    bad = verdict in ("privilege", "panic")
    return Result(
        scenario="gap", event=event, boundary=boundary, nested=nested, nested_at=at, allowed=True,
        rule="nmi-after-get", verdict=verdict, expected=expected,
        detail="exc_nmi() runs with the user's GS base, 0x0." if bad else "",
        differs=(), instructions=7, splat=splat() if bad else None,
        last=("f+0x0/0x1: ret",) if bad else (),
        reproduce=f"trapline explore K --scenario gap --event {event} --at {boundary}",
    )  # fmt: skip


def document(results, windows=None, worse=None):
    repeated = CODE * 64
    boundaries = tuple(
        Boundary(index=i, function=f, offset=i, ordinal=0, instruction=text)
        for i, (f, text) in enumerate(repeated)
    )
    window = Window(
        scenario="gap", title="A gap", instructions=len(boundaries), boundaries=boundaries,
        forbidden=(Forbidden(event="ve:wrmsr", rule="private-mapped", boundaries=256),),
    )  # fmt: skip
    return ExploreResult(
        generator="trapline 1", injected=sum(1 + (r.nested is not None) for r in results),
        kernel="6.12", build_id="ab", module_version="1.5.01", beyond_rules=False,
        windows=(window,) if windows is None else windows, results=tuple(results),
        counts={"gap": {}}, worse_than_baseline=worse,
    )  # fmt: skip


@pytest.fixture
def found():
    return document(
        [run(0, "same"), run(1, "privilege"), run(2, "held"), run(3, "same", nested="nmi", at=4),
         run(5, "panic", "int80", expected=True)]
    )  # fmt: skip


def test_the_first_line_says_how_many_events_were_injected(found):
    assert text(found).splitlines()[0] == "6 events were injected by trapline."


def test_the_matrix_counts_verdicts(found):
    lines = [line.split() for line in text(found).splitlines()]
    assert ["same", "held", "panic", "priv"] in lines
    at = lines.index(["gap"])
    assert lines[at + 1 : at + 3] == [
        ["nmi", "1", "1", "0", "1"], ["nmi,nmi", "1", "0", "0", "0"],
    ]  # fmt: skip


def test_what_the_scenario_wants_is_no_finding(found):
    report = text(found)
    assert "gap: panic is what int80 is meant to lead to. 1 of 1: " in report
    assert "1 run went wrong." in report
    assert "PANIC" not in report


def test_what_the_rules_forbid_is_said(found):
    assert ["gap", "ve:wrmsr", "256", "private-mapped"] in [
        line.split() for line in text(found).splitlines()
    ]


def test_a_strip_has_a_character_for_each_boundary(found):
    lines = text(found).splitlines()
    at = lines.index("  nmi, 256 instructions:")
    assert lines[at + 1] == "     0  .!-" + " " * 61
    assert lines[at + 2].split()[0] == "entry"
    assert not any(line.startswith("    64") for line in lines)  # nothing was tried there


def test_rows_that_are_clean_are_folded_unless_all_is_asked_for():
    result = document([run(i, "same") for i in range(256)])
    assert "    64-255: 192 same" in text(result).splitlines()
    assert "   192  " + "." * 64 in text(result, 1).splitlines()


def test_a_finding_comes_with_what_reproduces_it(found):
    report = text(found)
    assert "PRIVILEGE: gap, nmi in entry(), 1 run: exc_nmi() runs with the user's" in report
    assert "    f+0x0/0x1: ret" in report
    assert "    trapline explore K --scenario gap --event nmi --at 1" in report
    assert "RIP: 0010:f+0x0/0x1" in text(found, 1)


def test_a_clean_campaign_says_so():
    assert text(document([run(0, "same")])).endswith("No run went wrong.\n")


def test_a_baseline_lists_what_became_worse(found):
    worse = document(found.results, worse=("gap nmi entry+0x1 (mov): same, now privilege",))
    assert text(worse).endswith(
        "Worse than the baseline: 1 boundary.\n  gap nmi entry+0x1 (mov): same, now privilege\n"
    )
    assert text(document(found.results, worse=())).endswith(
        "Worse than the baseline: 0 boundaries.\n"
    )


def test_text_is_narrow_ascii(found):
    for verbosity in (0, 1):
        for line in text(found, verbosity).splitlines():
            assert line.isascii()
            assert len(line) <= 80


def test_no_name_drives_a_terminal():
    evil = Boundary(index=0, function="f\x1b[2J\n", offset=0, ordinal=0, instruction="nop\x07")
    window = Window(
        scenario="gap", title="t", instructions=1, boundaries=(evil,), forbidden=()
    )  # fmt: skip
    result = document([run(0, "privilege")], windows=(window,))
    for report in (text(result, 1), rendered(result, "ktap").decode()):
        assert "\x1b" not in report
        assert "\x07" not in report


def test_ktap(found):
    lines = rendered(found, "ktap").decode().splitlines()
    assert lines[:2] == ["KTAP version 1", "# 6 events were injected by trapline."]
    assert lines[2:6] == ["1..1", "  KTAP version 1", "  # Subtest: gap", "  1..5"]
    assert lines[6] == "  ok 1 nmi.0.entry+0 same"
    assert lines[7] == "  not ok 2 nmi.1.entry+1 privilege"
    assert lines[-2] == "  ok 5 int80.5.entry+5 panic"
    assert lines[-1] == "not ok 1 gap"


def test_documents_validate(found):
    for name, form in (
        ("explore", "json"),
        ("explore-lines", "jsonl"),
    ):
        validator = jsonschema.Draft202012Validator(json.loads(schema(name)))
        lines = rendered(found, form).splitlines()
        assert lines
        for line in lines:
            validator.validate(json.loads(line))


def test_lines_hold_all(found):
    head, *rest = [json.loads(line) for line in rendered(found, "jsonl").splitlines()]
    assert (head["schema"], head["injected"]) == ("trapline/explore", 6)
    assert [line["type"] for line in rest] == ["window"] + ["run"] * 5


def test_a_run_outside_its_window_is_refused(found):
    broken = json.loads(rendered(found, "json"))
    broken["results"][0]["boundary"] = 256
    with pytest.raises(msgspec.ValidationError, match="a run at 256 of gap, which has no such"):
        msgspec.convert(broken, ExploreResult)
    broken["results"][0] |= {"boundary": 0, "scenario": "gone"}
    with pytest.raises(msgspec.ValidationError, match="a run at 0 of gone"):
        msgspec.convert(broken, ExploreResult)


def test_every_scenario_is_on_its_page():
    from trapline.explore import scenario  # noqa: PLC0415 - the page is about them

    page = (Path(__file__).parents[2] / "docs" / "explore.md").read_text("utf-8")
    for name in scenario.shipped():
        assert f"`{name}`" in page
