"""`trapline rules`: what it prints, in 80 columns, and how it fails."""

import json
import shutil
from importlib.resources import as_file, files

import jsonschema
import msgspec
import pytest

from trapline.cli.main import run
from trapline.report.schemas import render
from trapline.results.rules import RulesCompared, RulesExplained, RulesShown
from trapline.rules.ruleset import TABLES


@pytest.fixture
def rules(capsys):
    """Run a command line: exit code, standard output, standard error."""

    def call(*arguments):
        code = run(["rules", *map(str, arguments)])
        captured = capsys.readouterr()
        assert all(len(line) <= 80 for line in captured.out.splitlines()) or "json" in arguments
        return code, captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path):
    with as_file(files("trapline.rules") / "tdx-1.5.01") as shipped:
        return shutil.copytree(shipped, tmp_path / "mine")


def replace(folder, table, old, new):
    path = folder / f"{table}.csv"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


# show


def test_show_lists_the_tables(rules):
    code, out, _ = rules("show")
    assert code == 0
    assert all(name in out for name in TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_show_a_table(rules, table):
    code, out, _ = rules("show", table)
    assert code == 0
    assert out.startswith(f"{table}, TDX module 1.5.01: ")


@pytest.mark.parametrize("table", TABLES)
def test_csv_is_what_lint_and_diff_read(capsys, table):
    assert run(["rules", "show", table, "--format", "csv"]) == 0
    out = capsys.readouterr().out
    assert out == (files("trapline.rules") / "tdx-1.5.01" / f"{table}.csv").read_text()


def test_csv_of_all_tables_is_refused(rules):
    code, out, err = rules("show", "--format", "csv")
    assert (code, out) == (2, "")
    assert "name one of instructions, msrs" in err


def test_json_of_all_tables(rules):
    code, out, _ = rules("show", "--format", "json")
    shown = msgspec.json.decode(out, type=RulesShown)
    assert code == 0
    assert [table.name for table in shown.tables] == list(TABLES)
    assert next(iter(json.loads(out))) == "schema"


def test_disputed_rows_name_who_says_so(rules):
    _, out, _ = rules("show", "nesting")
    assert any(
        "second-ve" in line and "triple fault" in line and line.endswith("mail")
        for line in out.splitlines()
    )


def test_output_file(rules, tmp_path):
    target = tmp_path / "rules.json"
    code, out, _ = rules("show", "memory", "--format", "json", "-o", target)
    assert (code, out) == (0, "")
    assert msgspec.json.decode(target.read_bytes(), type=RulesShown).module_version == "1.5.01"


# explain


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        (["HLT"], ["enforced   #VE, exit reason 12", "tdx_td_dispatcher.c"]),
        (["mov", "cr0"], ["clears ne", "DIFFERS    #VE  [module-comment]", "agrees     #GP(0)"]),
        (["VMREAD"], ["enforced   #UD", "DIFFERS    #GP(0)  [linux-doc]"]),
        (["0x6e0"], ["IA32_TSC_DEADLINE (0x6e0)", "#VE if TSC DEADLINE, else #GP(0)"]),
        (["1760"], ["IA32_TSC_DEADLINE"]),
        (["ia32_tsc_deadline"], ["(0x6e0)"]),
        (["EFER"], ["only SCE may change"]),
        (["msr:0x4000"], ["outside the ranges of the bitmap"]),
        (["0x8b"], ["in the ranges of the bitmap and not in this table", "RDMSR #VE; WRMSR #VE"]),
        (["cpuid:0x1f"], ["leaf 0x1f.0, topology v2", "enforced   #VE"]),
        (["cpuid:5"], ["enforced   module", "DIFFERS    #VE  [intel-guide]"]),
        (["cpuid:4.9"], ["any leaf or sub-leaf not in this table"]),
        (["cpuid:0x77.1"], ["above the maximum", "leaf 0x23.1"]),
        (["cpuid:0x40000001"], ["hypervisor leaves", "enforced   #VE"]),
        (["tdcall:6"], ["TDG.MEM.PAGE.ACCEPT", "TDX_PAGE_SIZE_MISMATCH"]),
        (["TDG.VP.VMCALL"], ["bits 0, 1, 4 and 63:32", "DIFFERS    #GP(0)  [sdv]"]),
        (["tdcall:77"], ["unknown leaf", "TDX_OPERAND_INVALID | RAX"]),
        (["tdvmcall:0x10001"], ["MapGPA"]),
        (["MapGPA"], ["function 0x10001"]),
        (["memory:shared", "mmio"], ["ve info valid", "TD exit to the VMM"]),
        (["status:0xc000010000000001"], ["TDX_OPERAND_INVALID", "operand, RCX"]),
        (["status:TDVMCALL_STATUS_RETRY"], ["0x0000000000000001"]),
        (["second-ve"], ["DIFFERS    triple fault  [mail]", "GPA, to the VMM; so MMIO and WRMSR"]),
        (["port:0x71"], ["instructions: OUTS, always", "asks the host (not string)"]),
        (["in", "0x71"], ["function 0x1e"]),
        (["msr:0x1a0"], ["IA32_MISC_ENABLE (0x1a0)"]),
        (["RDMSR", "0x1a0"], ["asks the host, since v5.19, ae87f609cd52"]),
        (["cpuid", "0xb"], ["leaf 0xb, topology", "gives zeros (other leaf)", "c141fa2c2bba"]),
        (["cpuid", "4.2"], ["leaf 0x4.2"]),
        (["cpuid:0x40000000"], ["asks the host (hypervisor leaf)"]),
        (["nmi-held"], ["enforced   held"]),
        (["sdm-rflags-if"], ["enforced   held"]),
        (["WBINVD"], ["refuses (any other exit reason)", "described  #GP(0)  [sdm]"]),
        (["0x80000002"], ["brand string"]),
        (["SEPT_VE_DISABLE"], ["bit 28"]),
        (["TD_CTLS"], ["0x1110000300000017", "writes 0x1"]),
    ],
)
def test_explain(rules, what, expected):
    code, out, err = rules("explain", *what)
    assert (code, err) == (0, "")
    for text in expected:
        assert text in out


def test_explain_as_json(rules):
    code, out, _ = rules("explain", "second-ve", "--format", "json")
    explained = msgspec.json.decode(out, type=RulesExplained)
    assert code == 0
    assert explained.questions[0].is_disputed
    assert explained.questions[0].answers[0].row.followed
    assert sum(answer.row.followed for answer in explained.questions[0].answers) == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("IA32_TSC_DEADLIN", "did you mean IA32_TSC_DEADLINE"),
        ("0xb", "write msr:0xb, cpuid:0xb or tdcall:0xb"),
        ("0x1b", "write msr:0x1b, cpuid:0x1b or tdcall:0x1b"),
        ("port:0x10000", "is no port"),
        ("zzzzzzzz", "see 'trapline rules explain --help'"),
        ("cpuid:banana", "is no CPUID leaf"),
        ("cpuid:0x100000000", "is no CPUID leaf"),
        ("0x100000000", "is no MSR index"),
        ("tdvmcall:0x77777", "no rule about"),
        ("memory:", "no rule about"),
        ("status:12345", "no rule about"),
        ("9" * 100, "no rule about"),
        ("x" * 1000, "too long"),
        ("\x1b[2J", "no rule about"),
    ],
)
def test_explain_unknown_things(rules, what, message):
    code, out, err = rules("explain", what)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.isascii()
    assert "\x1b" not in err


# diff


def test_a_version_equals_itself_and_its_copy(rules, folder):
    assert rules("diff", "1.5.01", "1.5.01") == (0, "1.5.01 and 1.5.01: no differences\n", "")
    code, out, _ = rules("diff", "1.5.01", folder)
    assert code == 0
    assert "no differences" in " ".join(out.split())  # wrapped where the folder's name ends


def test_diff_names_what_changed(rules, folder):
    replace(
        folder,
        "msrs",
        "IA32_PLATFORM_DCA_CAP,0x1f8,0x1f8,gp_unless_ve,dca",
        "IA32_PLATFORM_DCA_CAP,0x1f8,0x1f8,gp,",
    )
    lines = (folder / "nesting.csv").read_text().splitlines(keepends=True)
    gone = next(line for line in lines if line.startswith("nmi-one,"))
    (folder / "nesting.csv").write_text("".join(line for line in lines if line != gone))
    with (folder / "memory.csv").open("a") as file:
        file.write("new-one,any,private,poisoned,always,td_exit,48,1.5.01,module,here,enforced,\n")
    code, out, _ = rules("diff", "1.5.01", folder)
    assert code == 1
    words = " ".join(out.split())
    assert "3 rules with another answer" in words
    assert "IA32_PLATFORM_DCA_CAP (0x1f8): RDMSR #VE if DCA, else #GP(0)" in words
    assert "-> RDMSR #GP(0); WRMSR #VE if DCA" in words
    assert "nmi, several pended: gone (was: merged)" in words
    assert "any, private, poisoned, always: new: TD exit to the VMM" in words
    code, out, _ = rules("diff", "1.5.01", folder, "--format", "json")
    compared = msgspec.json.decode(out, type=RulesCompared)
    assert code == 1
    assert sorted(change.change for change in compared.changes) == ["added", "changed", "removed"]


def test_diff_with_nonsense(rules, tmp_path):
    code, _, err = rules("diff", "1.5.01", tmp_path / "none")
    assert code == 14
    assert "not a folder of rule tables" in err
    code, _, err = rules("diff", tmp_path, "1.5.01")
    assert code == 14
    assert "the table is missing" in err


# lint


def test_lint_of_what_ships(rules):
    assert rules("lint") == (0, "the tables of trapline: no problems.\n", "")


def test_lint_of_a_folder(rules, folder):
    assert rules("lint", folder)[0] == 0
    replace(folder, "nesting", "nmi-one,nmi,several_pended,merged", "nmi-one,nmi,several_pended,eh")
    code, out, _ = rules("lint", folder)
    assert code == 1
    assert out.startswith("nesting.csv:")
    assert "'eh' is not one of" in out


def test_unknown_version_and_table(rules):
    code, _, err = rules("show", "--module-version", "9.9")
    assert code == 2
    assert "'9.9' is not one of '1.5.01', '1.5.06'" in err
    code, _, err = rules("show", "spells")
    assert code == 2
    assert "no table 'spells'" in err


# The published schemas.


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rules", ("show",)),
        ("rules-explained", ("explain", "second-ve")),
        ("rules-diff", ("diff", "1.5.01", "1.5.01")),
    ],
)
def test_documents_validate(rules, name, arguments):
    _, out, _ = rules(*arguments, "--format", "json")
    jsonschema.validate(json.loads(out), json.loads(render(name)))
