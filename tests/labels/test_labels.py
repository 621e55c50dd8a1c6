"""Labels: what a file says, which findings it is said of, and how it gets to the next kernel."""

import datetime as dt
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import scan_documents
import trapline
from reports import rendered, text
from trapline.base.errors import BadInputFileError, ExitCode
from trapline.cli.main import run
from trapline.labels import labelfile
from trapline.labels.applied import Labels, labelled
from trapline.labels.carried import carry
from trapline.results.findings import exit_code, findings
from trapline.results.labels import LabelEntry

REFUSED = "00000000000000d4"
HEAD = 'schema = "trapline/labels"\nversion = 1\n'


def entry(label="safe", **fits):
    said = {"reason": "looked at", "owner": "ada", "date": dt.date(2026, 11, 28)}
    return LabelEntry(label=label, **said, **fits)


def said(document, *entries):
    return labelled(document, Labels(entries, "ours.toml"))


def errors(document):
    return {found.id for found in findings(document) if found.level == "error"}


@pytest.mark.parametrize(
    ("fits", "settles"),
    [
        ({"id": REFUSED}, True),
        ({"id": "00000000000000d5"}, False),
        ({"function": "acpi_idle_*"}, True),
        ({"function": "acpi_idle"}, False),
        ({"file": "drivers/acpi/*"}, True),
        ({"subsystem": "ACPI", "trap": "wbinvd"}, True),
        ({"subsystem": "ACPI", "trap": "msr"}, False),
        ({"driver": "acpi"}, False),
        ({"gate": "acpi_idle_play_dead"}, False),
    ],
)
def test_a_finding_has_the_label_that_fits_all_that_is_given(fits, settles):
    document = scan_documents.document()
    assert REFUSED in errors(document)
    assert (REFUSED not in errors(said(document, entry(**fits)))) == settles


@pytest.mark.parametrize("label", ["excluded", "wrapper", "trusted", "safe"])
def test_what_is_settled_is_a_note_and_the_exit_code_goes_by_it(label):
    document = scan_documents.document()
    both = said(document, entry(label, id=REFUSED), entry(label, driver="8250"))
    assert errors(both) == set()
    assert exit_code(both) == ExitCode.CLEAN
    assert {found.label.label for found in findings(both)} == {label}
    assert "They settle 2 findings" in text(both)
    assert "nothing found against it" in text(both)


@pytest.mark.parametrize("label", ["unclassified", "concern"])
def test_what_is_not_settled_stays_an_error(label):
    document = said(scan_documents.document(), entry(label, id=REFUSED))
    assert REFUSED in errors(document)
    assert exit_code(document) == ExitCode.FINDINGS


def test_what_was_carried_settles_nothing_until_it_is_confirmed():
    carried = entry(id=REFUSED, carried="from 0: the same function and accessor")
    document = scan_documents.document()
    assert REFUSED in errors(said(document, carried))
    assert REFUSED not in errors(said(document, replace(carried, carried=None)))


def test_the_most_particular_label_counts():
    document = scan_documents.document()
    broad, exact = entry("safe", subsystem="ACPI"), entry("concern", id=REFUSED)
    for entries in ((broad, exact), (exact, broad)):
        (label,) = (each for each in said(document, *entries).labels if each.id == REFUSED)
        assert label.label == "concern"


def test_labels_that_contradict_each_other_are_an_error():
    one, other = entry("safe", subsystem="ACPI"), entry("concern", trap="wbinvd")
    with pytest.raises(BadInputFileError, match=r"labels 1 \(safe\) and 2 \(concern\) both fit"):
        said(scan_documents.document(), one, other)
    said(scan_documents.document(), one, entry("safe", trap="wbinvd"))


def test_sarif_has_suppressions_with_their_justification():
    document = said(
        scan_documents.document(),
        entry("safe", id=REFUSED),
        entry("concern", trap="msr"),
        entry("trusted", trap="pio", carried="from 1: likeness"),
    )
    results = json.loads(rendered(document, "sarif"))["runs"][0]["results"]
    by_id = {r["partialFingerprints"]["trapline/v2"]: r for r in results}
    assert by_id[REFUSED]["suppressions"] == [
        {
            "kind": "external",
            "status": "accepted",
            "justification": "safe: looked at (ada, 2026-11-28)",
        }
    ]
    assert by_id[REFUSED]["level"] == "note"
    assert "suppressions" not in by_id["00000000000000e5"]
    assert by_id["00000000000000e5"]["properties"]["label"] == "concern"
    assert by_id["00000000000000c3"]["suppressions"][0]["status"] == "underReview"


_TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=80)


@given(reason=_TEXTS, owner=_TEXTS, function=_TEXTS)
def test_what_is_written_reads_back(reason, owner, function):
    one = replace(entry(function=function), reason=reason, owner=owner)
    data = (HEAD + labelfile.text(one)).encode()
    assert labelfile.parse(data, "test") == (one,)


ONE = '[[label]]\nlabel = "safe"\nreason = "r"\nowner = "o"\ndate = 2026-01-01\n'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("", "is no file of labels"),
        ('schema = "trapline/allow-list"\nversion = 1\n', "is no file of labels"),
        (HEAD.replace("1", "2"), "version"),
        (HEAD + ONE, "label 1 fits nothing"),
        (HEAD + ONE + 'id = "a"\nsurprise = 1\n', "surprise"),
        (HEAD + ONE + 'class = "mnio"\n', "mnio"),
        (HEAD + ONE.replace('"safe"', '"fine"') + 'id = "a"\n', "fine"),
        (HEAD + ONE.replace("2026-01-01", "2026-13-01") + 'id = "a"\n', "TOML"),
        (HEAD + (ONE + 'id = "a"\n') * 2, "label 2 repeats label 1"),
        (HEAD + ONE + 'id = "a"\n' + ONE.replace("safe", "concern") + 'id = "a"\n', "contradicts"),
    ],
)
def test_an_unsound_file_is_one_sentence(data, says, tmp_path, capsys):
    path = tmp_path / "ours.toml"
    path.write_text(data)
    with pytest.raises(BadInputFileError, match=says):
        labelfile.load(path)
    assert run(["label", "list", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert len(capsys.readouterr().err.splitlines()) == 1


# Carrying.


def moved(**changes):
    """The refused site under another id."""
    sites = scan_documents.document().sites
    mine = next(site for site in sites if site.id == REFUSED)
    other = replace(mine, id="f" * 16, **changes)
    return scan_documents.document(sites=(*(s for s in sites if s.id != REFUSED), other))


def noted(tmp_path, **fits):
    path, scan = tmp_path / "ours.toml", tmp_path / "old.json"
    scan.write_bytes(rendered(scan_documents.document(), "json"))
    trapline.add_label(path, entry(**fits), scan)
    return path


def test_an_id_that_is_still_there_is_kept(tmp_path):
    found = trapline.carry_labels(noted(tmp_path, id=REFUSED), scan_documents.document())
    assert (found.kept, found.near, found.lost) == (1, 0, ())
    assert found.entries[0].carried is None


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"line": 700}, "the same function and accessor"),
        ({"object": "drivers/acpi/new/processor_idle.o"}, "the same function in a file of that"),
        ({"object": "drivers/idle/idle.o"}, "a function of that name in another file"),
        ({"accessor": "wbinvd_fence"}, "another accessor in the same function"),
    ],
)
def test_what_is_nearest_is_carried_and_marked(changes, how, tmp_path):
    path = noted(tmp_path, id=REFUSED)
    found = trapline.carry_labels(path, moved(**changes))
    assert (found.kept, found.near, found.lost) == (0, 1, ())
    (one,) = found.entries
    assert one.id == "f" * 16
    assert how in one.carried
    assert REFUSED in one.carried


def test_what_is_of_another_function_is_not_carried(tmp_path):
    path = noted(tmp_path, id=REFUSED)
    found = trapline.carry_labels(path, moved(function="something_else", object="a/b.o"))
    assert (found.kept, found.near) == (0, 0)
    assert found.lost == (f"id {REFUSED}",)
    assert found.entries[0].id == REFUSED


def test_likes_are_carried_in_the_order_of_the_source():
    base = scan_documents.site(owner="probe", function="probe", driver="d")

    def likes(prefix, *spots):
        return tuple(
            replace(base, id=f"{prefix}{number}", spot=spot) for number, spot in enumerate(spots)
        )

    old = scan_documents.document(sites=likes("old", "3:2", "9:2", "20:2"))
    new = scan_documents.document(sites=likes("new", "30:2", "4:2", "13:2", "10:2"))
    entries = [entry(id=f"old{number}") for number in range(3)]
    found = carry(entries, new, old)
    # The one at 13 is new: pairing it would move the others' lines further.
    assert [one.id for one in found.entries] == ["new1", "new3", "new2"] or [
        one.id for one in found.entries
    ] == ["new1", "new3", "new0"]
    assert len({one.id for one in found.entries}) == 3


# The command.


def test_add_keeps_comments_and_list_tells_what_is_idle(tmp_path, capsys):
    path = noted(tmp_path, id=REFUSED)
    path.write_text(path.read_text().replace("version = 1", "version = 1  # ours"))
    common = ["--reason", 'a "quoted" reason', "--owner", "ada", "--date", "2026-11-28"]
    arguments = ["label", "add", str(path), "--driver", "pata_*", "--label", "excluded", *common]
    assert run(arguments) == ExitCode.CLEAN
    assert "# ours" in path.read_text()
    tables = tomllib.loads(path.read_text())["label"]
    assert [table["label"] for table in tables] == ["safe", "excluded"]
    assert tables[0]["place"]["owner"] == "acpi_idle_play_dead"
    assert run(["label", "list", str(path)]) == ExitCode.CLEAN
    scan = tmp_path / "old.json"
    capsys.readouterr()
    assert run(["label", "list", str(path), str(scan)]) == ExitCode.FINDINGS
    out = capsys.readouterr().out
    assert "Fit nothing any more" in out
    assert out.index("pata_*") < out.index(REFUSED)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], ExitCode.USAGE),
        (["--id", REFUSED], ExitCode.USAGE),
        (["--class", "mnio"], ExitCode.USAGE),
    ],
)
def test_add_that_says_too_little_is_wrong_usage(arguments, code, tmp_path, capsys):
    said = ["--label", "safe", "--reason", "r", "--owner", "o"]
    assert run(["label", "add", str(tmp_path / "ours.toml"), *arguments, *said]) == code
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "ours.toml").exists()


def test_add_of_an_id_that_is_not_there_writes_nothing(tmp_path, capsys):
    path = noted(tmp_path, id=REFUSED)
    before = path.read_bytes()
    said = ["--label", "safe", "--reason", "r", "--owner", "o"]
    command = ["label", "add", str(path), str(tmp_path / "old.json"), "--id", "0" * 16, *said]
    assert run(command) == ExitCode.BAD_INPUT_FILE
    assert "has nothing that fits" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_carry_writes_whole_files_and_says_what_is_lost(tmp_path, capsys):
    path = noted(tmp_path, id=REFUSED)
    new = tmp_path / "new.json"
    new.write_bytes(rendered(moved(line=1), "json"))
    target = tmp_path / "new.toml"
    assert run(["label", "carry", str(path), str(new), "-o", str(target)]) == ExitCode.CLEAN
    assert "0 kept, 1 carried" in capsys.readouterr().out
    assert labelfile.load(target)[0].carried
    new.write_bytes(rendered(scan_documents.document(sites=()), "json"))
    assert run(["label", "carry", str(path), str(new), "-o", str(target)]) == ExitCode.FINDINGS
    assert labelfile.load(target)[0].id == REFUSED


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a JSON result"),
        (b"{}", "has no schema"),
        (b'{"schema": "trapline/scan", "version": 1}', "is version 1 of trapline/scan"),
        (b'{"schema": "sarif", "version": 2}', "says 'sarif'"),
        (b'{"schema": "trapline/scan", "version": 2}', "is not a result of trapline/scan"),
        (b"[" * 100_000, "is not a JSON result"),
    ],
)
def test_a_document_that_is_none_is_one_sentence(data, says, tmp_path, capsys):
    path, other = noted(tmp_path, id=REFUSED), tmp_path / "other.json"
    other.write_bytes(data)
    assert run(["label", "list", str(path), str(other)]) == ExitCode.BAD_INPUT_FILE
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
