"""The gate: what is planted in a kernel fails it, what it had already does not."""

import tomllib

import pytest
from msgspec.structs import replace

import scan_documents
import tiny_kernel
import trapline
from reports import rendered, text
from trapline.base.errors import BadInputFileError, ExitCode, UsageError
from trapline.cli.main import run
from trapline.gate import placecounts
from trapline.gate.checks import Judge
from trapline.results.findings import exit_code
from trapline.results.gate import FailOn, GatePolicy

POLICY = 'schema = "trapline/gate-policy"\nversion = 1\n'
DEMO = "drivers/demo/demo.c"


def policy(**changes):
    return replace(GatePolicy(schema_="trapline/gate-policy", version=1), **changes)


def judged(before, scan, *, labels=None, **fail):
    made = None if before is None else placecounts.baseline(before, ())
    checks = Judge(policy(fail=FailOn(**fail)), made, labels).scan(scan)
    return {check.name: check for check in checks}


def test_what_the_baseline_has_passes():
    whole = scan_documents.document()
    assert all(not check.items for check in judged(whole, whole).values())


def test_without_a_baseline_every_finding_fails():
    checks = judged(None, scan_documents.document())
    assert "new-places" not in checks
    assert len(checks["refused"].items) == 1
    assert len(checks["drivers"].items) == 1


def test_a_place_more_fails_and_a_moved_one_passes():
    site = scan_documents.site(owner="probe", spot="3:2", object="d/d.o", driver="d")
    before = scan_documents.document(sites=(site,))
    moved = scan_documents.document(sites=(replace(site, id="0b", spot="9:2"),))
    assert not judged(before, moved)["new-places"].items
    copied = scan_documents.document(sites=(site, replace(site, id="0b", landed="x")))
    assert not judged(before, copied)["new-places"].items
    grown = scan_documents.document(sites=(site, replace(site, id="0b", spot="9:2")))
    (item,) = judged(before, grown)["new-places"].items
    assert item.id == "0b"
    assert not judged(before, grown, classes=("pio",))["new-places"].items


def test_a_part_that_is_not_seen_any_more_fails():
    whole = scan_documents.document()
    less = replace(
        whole, coverage=replace(whole.coverage, complete=False, missing=("vmlinux has no code.",))
    )
    assert judged(whole, less)["complete"].items
    assert not judged(less, less)["complete"].items
    assert "complete" not in judged(whole, less, incomplete=False)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """A kernel, and one with a write to a device more."""
    folder = tmp_path_factory.mktemp("kernels")
    base = tiny_kernel.build_vmlinux(folder)
    planted = "\nvoid demo_added(struct device *d) { writel(1, d->base); }\n"
    text = tiny_kernel.SOURCES[DEMO] + planted
    grown = tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("grown"), {DEMO: text})
    return base, grown


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "p.toml").write_text(POLICY + 'baseline = "b.toml"\n')
    return tmp_path


def test_a_gate_from_baseline_to_failure_to_label(kernels, folder, capsys):
    base, grown = kernels
    path = str(folder / "p.toml")
    assert run(["gate", path, str(base), "--write-baseline"]) == ExitCode.CLEAN
    baseline = tomllib.loads((folder / "b.toml").read_text())
    assert baseline["places"]["drivers/demo/demo.o"]
    assert run(["gate", path, str(base)]) == ExitCode.CLEAN
    capsys.readouterr()
    assert run(["gate", path, str(grown), "--format", "ktap"]) == ExitCode.FINDINGS
    out = capsys.readouterr().out
    assert out.startswith("KTAP version 1\n")
    assert "not ok 2 trapline.new-places" in out
    assert "demo_added(): mmio write (writel)" in out
    assert "ok 3 trapline.refused" in out
    labels = (
        'schema = "trapline/labels"\nversion = 1\n[[label]]\nlabel = "safe"\nreason = "r"\n'
        'owner = "o"\ndate = 2026-11-28\nfunction = "demo_added"\n'
    )
    (folder / "l.toml").write_text(labels)
    (folder / "p.toml").write_text(POLICY + 'baseline = "b.toml"\nlabels = "l.toml"\n')
    assert run(["gate", path, str(grown)]) == ExitCode.CLEAN
    assert "1 settled by labels" in capsys.readouterr().out


def test_a_result_is_text_of_80_columns(kernels, folder):
    base, grown = kernels
    trapline.gate(folder / "p.toml", base, write_baseline=True)
    result = trapline.gate(folder / "p.toml", grown)
    assert exit_code(result) == ExitCode.FINDINGS
    assert max(map(len, text(result, 1).splitlines())) <= 80
    assert rendered(result, "json")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "is no policy of a gate"),
        ('schema = "trapline/labels"\nversion = 1\n', "is no policy of a gate"),
        (POLICY + 'surprise = "x"\n', "surprise"),
        (POLICY + '[fail]\nclasses = ["mnio"]\n', "mnio"),
        (POLICY + "[boot]\nforbid = 3\n", "forbid"),
        (POLICY + 'baseline = "none.toml"\n', "there is no such baseline"),
    ],
)
def test_an_unsound_policy_is_one_sentence(data, says, kernels, folder, capsys):
    (folder / "p.toml").write_text(data)
    assert run(["gate", str(folder / "p.toml"), str(kernels[0])]) == ExitCode.BAD_INPUT_FILE
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert says in error[0]


BASELINE = 'schema = "trapline/gate-baseline"\nversion = 1\nkernel = "k"\nfindings = []\n[places]\n'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("x", "TOML"),
        (POLICY, "is no baseline"),
        (BASELINE + '"drivers/demo/demo.o" = "12345678"\n', "HASH:COUNT"),
        (BASELINE + f'"drivers/demo/demo.o" = "12345678:{"9" * 5000}"\n', "HASH:COUNT"),
        (BASELINE + '"a/b.o" = "12345678:1"\n', "of another kernel"),
    ],
)
def test_an_unsound_baseline_is_one_sentence(data, says, kernels, folder):
    (folder / "b.toml").write_text(data)
    with pytest.raises(BadInputFileError, match=says):
        trapline.gate(folder / "p.toml", kernels[0])


def test_a_baseline_without_a_place_for_it_is_wrong_usage(kernels, folder):
    (folder / "p.toml").write_text(POLICY)
    with pytest.raises(UsageError, match="names no baseline"):
        trapline.gate(folder / "p.toml", kernels[0], write_baseline=True)
