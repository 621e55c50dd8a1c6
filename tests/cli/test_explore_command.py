"""The command line of explore, on a guest of a hundred instructions."""

import fcntl
import json
import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from guests import SYSCALL, build
from trapline.api.progress import Progress
from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.cli.progress import ProgressReport
from trapline.explore import scenario
from trapline.machine.loader import initramfs


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    """Arguments that name a guest, its scenario and an initrd."""
    folder = tmp_path_factory.mktemp("a guest's")  # to be quoted for a shell
    (folder / "gap.toml").write_text(SYSCALL.replace('"nmi"', '"ve:wrmsr"'))
    (folder / "init.cpio").write_bytes(initramfs.newc([]))
    return [
        "explore", str(build(("VE_ON_IST",))), "--initrd", str(folder / "init.cpio"),
        "--scenario", str(folder / "gap.toml"), "--workers", "1",
    ]  # fmt: skip


def faulty(arguments):
    return [str(build(())) if "vmlinux" in a else a for a in arguments]


def test_list_names_scenarios_and_events(capsys):
    assert run(["explore", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*scenario.shipped(), *scenario.EVENTS):
        assert f"  {name} " in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--resume"], "name it with --store"),
        (["--at", "3"], "say what with --event"),
        (["--event", "nonsense"], "known are nmi"),
        (["--event", "nmi,nmi,nmi"], "or two with a comma"),
        (["--event", "nmi", "--at", "x"], "one number"),
        (["--event", "nmi,nmi", "--at", "3"], "two numbers, K,N"),
        (["--event", "nmi", "--at", "9" * 30], "one number"),
        (["--event", "nmi", "--at", "\u0663"], "one number"),
        (["--scenario", "nonsense"], "no scenario is called 'nonsense'"),
        (["--scenario", "int80", "--scenario", "int80"], "two scenarios are called 'int80'"),
    ],
)
def test_what_makes_no_sense(arguments, says, capsys):
    assert run(["explore", "vmlinux", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_kernel_without_symbols_is_refused(tmp_path, capsys):
    stripped = tmp_path / "vmlinuz"
    stripped.write_bytes(b"nothing")
    assert run(["explore", str(stripped)]) == 11
    assert capsys.readouterr().err.count("\n") == 1


def test_by_the_rules_there_is_nothing_to_try(guest, capsys):
    assert run(guest) == 0
    out = capsys.readouterr().out
    assert out.startswith("0 events were injected by trapline.\n")
    assert "private-mapped" in out


def test_a_campaign_in_all_formats(guest, tmp_path, capsys):
    store = ["--store", str(tmp_path / "a.db")]
    guest = faulty(guest)
    assert run([*guest, "--beyond-rules", *store, "--format", "json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "trapline/explore"
    assert result["injected"] == len(result["results"]) == result["windows"][0]["instructions"]
    assert result["beyond_rules"]
    resumed = [*guest, "--beyond-rules", *store, "--resume"]
    for name, first in (
        ("text", f"{result['injected']} events were injected by trapline."),
        ("ktap", "KTAP version 1"),
    ):
        assert run([*resumed, "--format", name]) == 1
        assert capsys.readouterr().out.splitlines()[0] == first
    assert run([*resumed, "--format", "jsonl"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[0])["injected"] == result["injected"]
    assert run([*guest, "--beyond-rules", *store]) == 14
    assert "--resume" in capsys.readouterr().err


def test_a_finding_is_reproduced_by_its_own_command(guest, capsys):
    arguments = [*faulty(guest), "--event", "ve:wrmsr", "--format", "json"]
    assert run([*arguments, "--beyond-rules"]) == 1
    whole = json.loads(capsys.readouterr().out)["results"]
    worst = next(one for one in whole if one["verdict"] == "privilege")
    words = shlex.split(worst["reproduce"])
    assert words[:2] == ["trapline", "explore"]
    rest = [*words[1:], "--workers", "1", "--format", "json"]
    assert run(rest) == 1
    assert json.loads(capsys.readouterr().out)["results"] == [worst]


def test_a_baseline_decides_the_exit_code(guest, tmp_path, capsys):
    before = tmp_path / "before.json"
    beyond = [*guest, "--beyond-rules"]
    assert run([*beyond, "-o", str(before), "--format", "json"]) == 0
    assert run([*beyond, "--baseline", str(before)]) == 0
    assert "Worse than the baseline: 0 boundaries." in capsys.readouterr().out
    assert run([*faulty(beyond), "--baseline", str(before)]) == 1
    out = capsys.readouterr().out
    assert "Worse than the baseline: 5 boundaries." in out
    assert "now privilege" in out


def test_progress_goes_on_with_each_window(guest, capsys):
    """The total grows when a window opens; elsewhere than on a terminal it is told, too."""
    other = Path(guest[5]).with_name("later.toml")
    other.write_text(SYSCALL.replace("nth = 4", "nth = 6"))
    assert run([*guest, "--scenario", str(other), "--beyond-rules"]) == 0
    err = capsys.readouterr().err
    assert "explored: 17 of 17 (up to 1 more window to come)" in err
    assert "explored: 34 of 34\n" in err


def test_no_time_left_is_told_while_windows_are_to_come(monkeypatch, capsys):
    """What is left of the open windows is not what is left of the campaign."""
    clock = iter((0.0, 10.0, 20.0))
    time = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("trapline.cli.progress.time", time)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with ProgressReport() as report:
        report.advance(Progress("explored", 900, 1000, "up to 2 more windows to come"))
        report.advance(Progress("explored", 1800, 2000))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "trapline: explored: 900 of 1,000 (90/s, up to 2 more windows to come)"
    assert second == "trapline: explored: 1,800 of 2,000 (90/s, 2 s left)"


def special(tmp_path, kind):
    if kind == "device":
        return Path("/dev/zero")
    if kind == "folder":
        return tmp_path
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_baseline_that_is_no_file(kind, guest, tmp_path, capsys):
    path = special(tmp_path, kind)
    assert run([*guest, "--baseline", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert capsys.readouterr().err.endswith(f"{path}: is not a regular file.\n")


def test_a_baseline_that_is_too_large(guest, tmp_path, capsys):
    path = tmp_path / "huge.json"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # sparse
    assert run([*guest, "--baseline", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert "is larger than 512 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b'{"schema": "trapline/explore", "generator": "\xff"}',
        b'{"schema": "trapline/explore", "\\u001b]0;owned\\u0007\\n": 1}',
        b'{"schema": "trapline/explore", "injected": ' + b"9" * 5000 + b"}",
    ],
    ids=["not UTF-8", "an escape sequence", "a number of 5,000 digits"],
)
def test_a_hostile_baseline_is_one_printable_sentence(data, guest, tmp_path, capsys):
    path = tmp_path / "baseline.json"
    path.write_bytes(data)
    assert run([*guest, "--baseline", str(path)]) == ExitCode.BAD_INPUT_FILE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert str(path) in line


def test_a_scenario_that_is_a_fifo_or_no_toml(guest, tmp_path, capsys):
    path = tmp_path / "one.toml"
    os.mkfifo(path)
    assert run([*guest[:2], "--scenario", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert "is not a regular file" in capsys.readouterr().err
    path.unlink()
    path.write_bytes(b"nth = " + b"9" * 5000)
    assert run([*guest[:2], "--scenario", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert "is not valid TOML" in capsys.readouterr().err


def test_a_second_campaign_on_one_store_is_refused_at_once(guest, tmp_path, capsys):
    """Before it boots anything."""
    path = tmp_path / "a.db"
    assert run([*guest, "--store", str(path), "--limit", "1"]) in {0, 1}
    capsys.readouterr()
    with path.open("rb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)  # as the first campaign does
        assert run([*guest, "--store", str(path), "--resume"]) == ExitCode.OUTPUT_FAILED
    assert "another command is writing to it" in capsys.readouterr().err


def test_a_store_that_is_no_file(guest, tmp_path, capsys):
    path = special(tmp_path, "fifo")
    assert run([*guest, "--store", str(path)]) == ExitCode.BAD_INPUT_FILE
    assert "is not a regular file" in capsys.readouterr().err


def test_a_limit(guest, capsys):
    assert run([*guest, "--beyond-rules", "--limit", "3", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["injected"] == 3
