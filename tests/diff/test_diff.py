"""Two results compared: what the source changed is told, what a compiler did is told apart."""

import pytest
from msgspec.structs import replace

import golden_documents
import scan_documents
import tiny_kernel
import trapline
from reports import rendered, text
from trapline.base.errors import BadInputFileError, ExitCode
from trapline.cli.main import run
from trapline.diff.changes import compare
from trapline.labels.applied import Labels
from trapline.results.findings import exit_code, findings
from trapline.results.labels import LabelEntry

BASE = scan_documents.site(
    id="0a", owner="probe", function="probe", object="drivers/d/d.o", spot="3:2", driver="d"
)


def told(old, new, **options):
    return compare(
        scan_documents.document(sites=tuple(old)),
        scan_documents.document(sites=tuple(new)),
        **options,
    )


def kinds(result):
    return [change.change for change in result.changes]


def test_equal_results_have_no_difference():
    result = told([BASE], [BASE])
    assert result.changes == ()
    assert exit_code(result) == ExitCode.CLEAN
    assert "Nothing changed" in text(result)


def test_what_is_new_is_a_finding_and_what_is_gone_is_none():
    new = replace(BASE, id="0b", owner="open", function="open", spot="9:1")
    grown = told([BASE], [BASE, new])
    assert kinds(grown) == ["new"]
    assert [found.id for found in findings(grown)] == ["0b"]
    assert exit_code(grown) == ExitCode.FINDINGS
    shrunk = told([BASE, new], [BASE])
    assert kinds(shrunk) == ["gone"]
    assert exit_code(shrunk) == ExitCode.CLEAN


def test_a_verdict_that_changed_is_a_finding():
    result = told([BASE], [replace(BASE, emulable=False, reason="no such form")])
    assert kinds(result) == ["changed"]
    assert result.changes[0].why == "emulated -> refused: no such form"
    assert exit_code(result) == ExitCode.FINDINGS


@pytest.mark.parametrize(
    "changes",
    [{"spot": "8:2"}, {"object": "drivers/e/d.o"}, {"owner": "probe_one", "function": "probe_one"}],
)
def test_what_moved_or_was_renamed_is_not_new(changes):
    result = told([BASE], [replace(BASE, id="0b", **changes)])
    assert kinds(result) == ["moved"]
    assert result.changes[0].old_id == "0a"
    assert exit_code(result) == ExitCode.CLEAN


def test_a_copy_that_the_compiler_made_is_not_new():
    copy = replace(BASE, id="0b", landed="open", function="open")
    assert kinds(told([BASE], [BASE, copy])) == ["copied"]
    assert kinds(told([BASE, copy], [BASE])) == ["merged"]


def test_an_inline_function_that_the_compiler_left_alone_is_not_new():
    frame = scan_documents.Frame(function="hw_read", file="h.h", line=2)
    inside = replace(BASE, inlined=(*BASE.inlined, frame))
    alone = replace(BASE, id="0c", owner="hw_read", function="hw_read", inlined=(), spot="1:1")
    result = told([inside, replace(inside, id="0b", spot="9:2")], [alone])
    assert set(kinds(result)) <= {"outlined", "moved"}
    assert "outlined" in kinds(result)
    assert exit_code(result) == ExitCode.CLEAN
    back = told([alone], [inside, replace(inside, id="0b", spot="9:2")])
    assert set(kinds(back)) <= {"inlined", "moved"}
    assert exit_code(back) == ExitCode.CLEAN


def test_labels_say_which_change_is_all_right():
    new = replace(BASE, id="0b", owner="open", function="open", spot="9:1")
    entry = LabelEntry(
        label="safe", reason="r", owner="o", date=golden_documents.dt.date(2026, 1, 1), id="0b"
    )
    settled = told([BASE], [BASE, new], labels=Labels([entry], "ours.toml"))
    assert kinds(settled) == ["new"]
    assert exit_code(settled) == ExitCode.CLEAN
    assert "safe: r (o)" in text(settled)
    concern = Labels([replace(entry, label="concern")], "ours.toml")
    assert exit_code(told([BASE], [BASE, new], labels=concern)) == ExitCode.FINDINGS


def test_the_drivers_verdict_is_compared():
    whole = golden_documents.filtered()
    drivers = tuple(
        replace(driver, verdict="allowed") if driver.name == "ahci" else driver
        for driver in whole.drivers
    )
    result = compare(whole, replace(whole, drivers=drivers))
    assert [(change.change, change.driver) for change in result.changes] == [("changed", "ahci")]


def test_boots_and_verifications_are_compared():
    booted = golden_documents.boot()
    more = golden_documents.boot_site(function="new_one", scan_id="ff", label="new_one+0x1/0x2")
    grown = compare(booted, replace(booted, sites=(*booted.sites, more)))
    assert kinds(grown) == ["new"]
    assert kinds(compare(booted, booted)) == []
    verified = golden_documents.verify()
    less = compare(verified, replace(verified, findings=verified.findings[1:]))
    assert kinds(less) == ["gone"]
    assert kinds(compare(replace(verified, findings=verified.findings[1:]), verified)) == ["new"]


def test_results_of_two_commands_are_refused():
    with pytest.raises(BadInputFileError, match="two results of one command"):
        compare(golden_documents.boot(), scan_documents.document())


def test_a_part_that_was_not_seen_is_said_and_is_not_clean():
    whole = scan_documents.document()
    coverage = replace(whole.coverage, complete=False, missing=("vmlinux has no code.",))
    result = compare(replace(whole, coverage=coverage), whole)
    assert "INCOMPLETE" in text(result)
    assert exit_code(result) == ExitCode.INCOMPLETE


def test_no_line_is_longer_than_a_mail_s():
    result = compare(scan_documents.clean(), scan_documents.document())
    assert max(map(len, text(result, 1).splitlines())) <= 80


def test_the_command_takes_documents_and_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vmlinux = tiny_kernel.build_vmlinux(tmp_path)
    old = tmp_path / "old.json"
    old.write_bytes(rendered(trapline.scan(vmlinux), "json"))
    assert run(["diff", str(old), str(vmlinux)]) in {ExitCode.CLEAN, ExitCode.INCOMPLETE}
    demo = tiny_kernel.SOURCES["drivers/demo/demo.c"]
    planted = demo + "\nvoid demo_added(struct device *d) { writel(1, d->base); }\n"
    grown = tiny_kernel.build_vmlinux(tmp_path / "grown", {"drivers/demo/demo.c": planted})
    capsys.readouterr()
    assert run(["diff", str(vmlinux), str(grown)]) == ExitCode.FINDINGS
    out = capsys.readouterr().out
    assert "demo_added()" in out
    assert "1 new" in out


@pytest.mark.parametrize("data", [b"{", b"{}", b'{"schema":"trapline/scan","version":1}', b"[]"])
def test_what_is_no_document_is_one_sentence(data, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    assert run(["diff", str(path), str(path)]) == ExitCode.BAD_INPUT_FILE
    assert len(capsys.readouterr().err.splitlines()) == 1
