"""--help, mistyped names, completion and the manual page: what a user meets first."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import click
import pytest

from trapline.base.errors import ExitCode
from trapline.cli.command import Command, Group
from trapline.cli.main import COMMANDS, cli, run
from trapline.explore import scenario


def walk(group, context):
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = click.Context(command, info_name=name, parent=context)
        yield inner
        if isinstance(command, click.Group):
            yield from walk(command, inner)


ROOT = click.Context(cli, info_name="trapline", **cli.context_settings)
CONTEXTS = [ROOT, *walk(cli, ROOT)]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda context: context.command_path)
class TestEachCommand:
    def test_help_has_an_example(self, context, capsys):
        path = context.command_path.split()[1:]
        assert run([*path, "--help"]) == 0
        out = capsys.readouterr().out
        examples = context.command.examples
        assert examples
        for example in examples:
            assert f"\n  {example}\n" in out

    def test_examples_are_command_lines_that_exist(self, context, tmp_path, monkeypatch):
        """Each parses, down to the values of its options."""
        monkeypatch.chdir(tmp_path)
        for example in context.command.examples:
            substituted = re.search(r'"\$\(trapline (.*)\)"', example)
            line = substituted[1] if substituted else example.removeprefix("trapline ")
            words = shlex.split(line.partition(" | ")[0].replace("$(uname -r)", "6.12.0"))
            inner, command = ROOT, cli
            while isinstance(command, Group):
                _, command, words = command.resolve_command(inner, words)
                inner = click.Context(command, parent=inner)
            if not {"--help", "--list"} & set(words):
                command.make_context("trapline", words)

    def test_only_options_are_listed_as_such(self, context):
        if isinstance(context.command, Command):
            for _, records in context.command.grouped(context):
                assert all(names.startswith("-") for names, _ in records)

    def test_groups_name_options_that_are_there(self, context):
        command = context.command
        if not isinstance(command, Command) or not command.groups:
            return
        named = [name for names in command.groups.values() for name in names]
        assert len(named) == len(set(named))
        options = {p.name for p in command.params if isinstance(p, click.Option)}
        assert set(named) == options


def test_an_example_that_is_wrong_would_be_seen():
    command = cli.get_command(ROOT, "scan")
    with pytest.raises(click.NoSuchOption):
        command.make_context("scan", ["vmlinux", "--jobs", "2"])


def test_commands_are_listed_in_the_order_in_which_one_meets_them(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    places = [out.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert not any("," in text for text in COMMANDS.values())  # which click's fish script cuts at
    assert list(COMMANDS)[:6] == ["scan", "boot", "run", "explore", "verify", "contexts"]


@pytest.mark.parametrize(
    ("option", "commands"),
    [
        ("--workers", ["scan", "explore", "verify", "filter check", "filter export"]),
        (
            "--module-version",
            [
                "boot",
                "run",
                "explore",
                "verify",
                "contexts",
                "tradeoff",
                "rules show",
                "rules explain",
            ],
        ),
    ],
)
def test_one_word_for_one_thing(option, commands):
    having = [
        context.command_path.removeprefix("trapline ")
        for context in CONTEXTS
        if any(option in parameter.opts for parameter in context.command.params)
    ]
    assert having == commands
    assert not any("--jobs" in p.opts for context in CONTEXTS for p in context.command.params)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scna", "vmlinux"], "trapline has no command 'scna'; did you mean scan or schema?"),
        (["Tradeof"], "did you mean tradeoff?"),
        (["zzz"], "trapline has no command 'zzz'; try scan, boot, "),
        (["filter", "chekc"], "trapline filter has no command 'chekc'; did you mean check?"),
        (["rules", "explian", "HLT"], "did you mean explain?"),
        (["scan", "vmlinux", "--workes", "2"], "--workers"),
        (["explore", "vmlinux", "--scenario", "sycall-gap"], "did you mean syscall-gap"),
        (["rules", "explain", "secnd-ve"], "did you mean second-ve"),
        (["x" * 100_000], "try scan"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(arguments, says, capsys):
    assert run(arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


# Completion.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell, capsys, tmp_path):
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_TRAPLINE_COMPLETE={shell}_complete" in script
    path = tmp_path / "script"
    assert run(["completion", shell, "-o", str(path)]) == 0
    assert path.read_text() == script


def in_shell(shell, script, tmp_path):
    """Run a script in a shell that finds the program under test as `trapline`; its words."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    program = tmp_path / "bin" / "trapline"
    main = "from trapline.cli.main import main; main()"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{main}' \"$@\"\n")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*shell, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert not done.stderr
    return done.stdout.split()


def completed(words, tmp_path):
    """Ask bash what it would offer for the last of the words, as its user does with Tab."""
    script = (
        'eval "$(trapline completion bash)"\n'
        "compopt() { :; }\n"  # works only while bash completes
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}\n"
        "_trapline_completion trapline\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    return in_shell(["bash"], script, tmp_path)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["trapline", "tr"], ["tradeoff"]),
        (["trapline", "filter", "e"], ["export"]),
        (["trapline", "scan", "--mod"], ["--modules"]),
        (["trapline", "boot", "x", "--device", "ioa"], ["ioapic"]),
        (["trapline", "boot", "x", "--policy", "mmio=f"], ["mmio=forbid"]),
        (["trapline", "explore", "x", "--event", "nm"], ["nmi"]),
    ],
)
def test_bash_completes(words, offered, tmp_path):
    assert completed(words, tmp_path) == offered


def test_bash_completes_scenarios_and_else_files(tmp_path):
    offered = completed(["trapline", "explore", "x", "--scenario", "sys"], tmp_path)
    assert offered == [name for name in scenario.shipped() if name.startswith("sys")]
    assert offered
    assert completed(["trapline", "explore", "x", "--scenario", "./my"], tmp_path) == []


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_completes(tmp_path):
    script = 'trapline completion fish | source; complete -C "trapline boot x --policy mmio="'
    assert in_shell(["fish"], script, tmp_path) == ["mmio=forbid", "mmio=paravirt", "mmio=trap"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes(tmp_path):
    script = (
        "compdef() { :; }\n"
        'eval "$(trapline completion zsh)"\n'
        "compadd() { print -l ${(P)${@[-1]}} }\n"  # works only while zsh completes
        "words=(trapline boot x --policy mmio=); CURRENT=5; _trapline_completion\n"
    )
    assert in_shell(["zsh", "-f"], script, tmp_path) == [
        "mmio=trap",
        "mmio=paravirt",
        "mmio=forbid",
    ]


# The manual page.


@pytest.fixture
def page(capsys):
    assert run(["man"]) == 0
    return capsys.readouterr().out


def test_the_page_has_all_commands_and_options(page):
    for context in CONTEXTS[1:]:
        assert f'.SH "{context.command_path.upper()}"\n' in page
        for parameter in context.command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[-1].replace("-", "\\-") in page


def test_the_page_uses_no_request_that_its_text_did_not_mean(page):
    requests = {line.split()[0] for line in page.splitlines() if line.startswith((".", "'"))}
    assert requests == {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".nf", ".fi"}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_groff_takes_the_page(page):
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tascii", "-P-cbou"],
        input=page, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert "trapline boot vmlinuz --policy mmio=forbid --on-forbidden panic" in done.stdout
