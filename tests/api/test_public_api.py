"""`import trapline`: what it gives, what it loads, and what its functions refuse."""

import inspect
import subprocess
import sys

import click
import pytest

import guests
import tiny_kernel
import trapline
from trapline.api.progress import Progress
from trapline.base.errors import BadInputFileError, BadMachineError, NoDebugInfoError, UsageError
from trapline.cli.main import cli
from trapline.machine.loader import initramfs

# What takes long to load, and none needs who only asks for help.
HEAVY = ("unicorn", "numpy", "symbolic", "iced_x86", "rich", "msgspec", "elftools")


def loaded_by(code):
    """Run code in a new process; returns the names of the modules it has then."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "code",
    ["import trapline", "from trapline.cli.main import run; run(['--help'])"],
)
def test_nothing_heavy_is_loaded(code):
    assert not {name for name in loaded_by(code) if name.split(".")[0] in HEAVY}


def test_a_scan_does_load_it():
    """Or the test above could not fail."""
    assert {"numpy", "msgspec"} <= set(loaded_by("import trapline; trapline.scan"))


def test_what_is_public_is_there():
    for name in trapline.__all__:
        assert getattr(trapline, name) is not None
    assert set(trapline.__all__) <= set(dir(trapline))
    with pytest.raises(AttributeError, match="'nonsense'"):
        trapline.nonsense  # noqa: B018


@pytest.mark.parametrize("first", ["", "import trapline.{0}; ", "from trapline import {0}; "])
def test_a_function_is_not_hidden_by_the_room_of_its_name(first):
    names = ("scan", "boot", "explore", "verify", "contexts", "tradeoff")
    used = "".join(f"import trapline; {first.format(name)}trapline.{name}; " for name in names)
    rooms = ", ".join(f"trapline.{name}" for name in names)
    code = (
        f"{used}import {rooms}, trapline.scan.wholekernel, trapline.boot.plan; "
        f"assert all(map(callable, ({rooms})))"
    )
    assert {f"trapline.{name}" for name in names} <= set(loaded_by(code))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_kernel.build_vmlinux(tmp_path_factory.mktemp("kernel"))


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    path = tmp_path_factory.mktemp("initrd") / "initrd.img"
    path.write_bytes(initramfs.newc([]))
    return path


def test_a_script_needs_no_guard_against_its_own_workers(tiny, tmp_path):
    """Worker processes of multiprocessing run the main program again, unless kept from it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"print('once')\nimport trapline\nprint(len(trapline.scan({str(tiny)!r}).sites))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == f"once\n{len(trapline.scan(tiny).sites)}\n"


def test_a_kernel_says_what_it_is(tiny):
    kernel = trapline.open_kernel(str(tiny))
    assert kernel.name == str(tiny)
    assert kernel.vmlinux == tiny.resolve()
    assert kernel.files.vmlinux == tiny
    assert any("modules" in sentence for sentence in kernel.missing)


def test_a_path_a_name_and_an_open_kernel_are_the_same(tiny):
    results = [
        trapline.scan(kernel, workers=1) for kernel in (tiny, str(tiny), trapline.open_kernel(tiny))
    ]
    assert results[0].sites
    assert results[0] == results[1] == results[2]


def test_progress_is_told(tiny):
    told = []
    trapline.scan(tiny, workers=1, progress=told.append)
    assert told == [Progress("scanned", 1, 1)]
    assert str(told[0]) == "scanned: 1 of 1"
    more = Progress("explored", 1000, 2000, "up to 2 more windows to come")
    assert str(more) == "explored: 1,000 of 2,000 (up to 2 more windows to come)"


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("scan", "scan"), ("boot", "boot"), ("explore", "explore"), ("verify", "verify"),
        ("contexts", "contexts"), ("tradeoff", "tradeoff"), ("filter check", "check"),
        ("filter live", "check_machine"), ("filter export", "export_filter"),
    ],
)  # fmt: skip
def test_an_option_of_a_command_is_an_argument(command, function):
    """What the page says of names holds for each."""
    named = {"device": "devices", "scenario": "scenarios", "policy": "policies", "no_scan": "scan"}
    named["from"] = "roots"  # "from" is a word of Python's
    named["acpi_table"] = "acpi_tables"
    printing = {"format", "output", "verbose", "quiet", "list"}
    context = click.Context(cli, info_name="trapline")
    found = cli
    for word in command.split():
        found = found.get_command(context, word)
    options = {
        parameter.opts[-1].removeprefix("--").replace("-", "_")
        for parameter in found.params
        if isinstance(parameter, click.Option)
    }
    arguments = inspect.signature(getattr(trapline, function)).parameters
    assert {named.get(name, name) for name in options - printing} <= set(arguments)


def test_functions_print_nothing(tiny, initrd, capfd):
    trapline.scan(tiny, workers=1)
    trapline.boot(guests.build(()), initrd=initrd, memory=guests.MEMORY, scan=False)
    assert capfd.readouterr() == ("", "")


def test_an_allow_list_is_a_file_or_loaded(tiny, tmp_path):
    path = tmp_path / "list.toml"
    path.write_text(
        'schema = "trapline/allow-list"\nversion = 1\ntitle = "ours"\n'
        '[[allow]]\nid = "1af4:1041"\nname = "net"\n'
    )
    by_file = trapline.scan(tiny, allow=path, workers=1)
    assert [entry.id for entry in by_file.allow] == ["1af4:1041"]
    assert trapline.scan(tiny, allow=trapline.allow_list(path), workers=1) == by_file
    assert len(trapline.scan(tiny, workers=1).allow) == 8


def test_a_boot_is_looked_up_in_the_scan_that_is_given(initrd):
    kernel = trapline.open_kernel(guests.build(("TRAP",)))
    given = {"initrd": initrd, "memory": guests.MEMORY}
    printed = bytearray()
    known = trapline.scan(kernel, workers=1)
    run = trapline.boot(kernel, **given, scan=known, console=printed.extend)
    assert {site.standing for site in run.sites if site.trap == "cpuid"} == {"found"}
    without = trapline.boot(kernel, **given, scan=False)
    assert {site.standing for site in without.sites} == {"unaccounted"}
    assert without.hashes == run.hashes


def test_a_campaign_is_one_worker_s_or_two_s(initrd, tmp_path):
    scenario = tmp_path / "getpid.toml"
    scenario.write_text(guests.SYSCALL)
    one, two = (
        trapline.explore(
            guests.build(("VE_ON_IST",)),
            scenarios=[str(scenario)],
            initrd=initrd,
            beyond_rules=True,
            workers=workers,
            module_version="1.5.01",
        )
        for workers in (1, 2)
    )
    assert one.injected == len(one.results) > 10
    assert one == two


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"policies": {"mmio": "nonsense"}}, UsageError, "CLASS=MODE"),
        ({"policies": {"weather": "trap"}}, UsageError, "CLASS=MODE"),
        ({"policies": {"mmio": "forbid"}, "scan": False}, UsageError, "need a scan"),
        ({"on_forbidden": "panic"}, UsageError, "forbid"),
        ({"allow_mode": "report"}, UsageError, "--allow"),
        ({"devices": ["nonsense"]}, UsageError, "no device is called"),
        ({"module_version": "9.9"}, UsageError, "9.9"),
        ({"memory": -1}, BadMachineError, "memory"),
        ({"memory": 1 << 50}, BadMachineError, "memory"),
        ({"unaccepted": 1 << 50}, BadMachineError, "unaccepted"),
        ({"unaccepted": -4096}, BadMachineError, "unaccepted"),
        ({"gdb": "nonsense"}, UsageError, "nonsense"),
        ({"timeout": float("nan")}, UsageError, "timeout"),
        ({"timeout": -1}, UsageError, "timeout"),
        ({"scan": "/nowhere.json"}, BadInputFileError, "/nowhere.json"),
    ],
)
def test_a_boot_that_makes_no_sense(options, error, says, initrd):
    with pytest.raises(error, match=says):
        trapline.boot(guests.build(()), initrd=initrd, **{"memory": guests.MEMORY} | options)


@pytest.mark.parametrize("workers", [0, -1])
def test_no_worker_is_too_few(workers, tiny, initrd):
    kernel = guests.build(())
    for call in (
        lambda: trapline.scan(tiny, workers=workers),
        lambda: trapline.verify(kernel, workers=workers, scan=False),
        lambda: trapline.explore(kernel, initrd=initrd, workers=workers),
    ):
        with pytest.raises(UsageError, match="one is the least"):
            call()


def test_one_name_is_not_a_sequence_of_letters(initrd):
    kernel = guests.build(())
    run = trapline.boot(
        kernel, initrd=initrd, memory=guests.MEMORY, scan=False, append="quiet", devices="hpet"
    )
    assert run.machine.command_line.endswith(" quiet")
    assert "HPET" in run.machine.devices
    with pytest.raises(UsageError, match="'sycall-gap'; did you mean syscall-gap"):
        trapline.explore(kernel, scenarios="sycall-gap")
    with pytest.raises(trapline.TraplineError, match="no module e1000"):
        trapline.boot(kernel, insmod="e1000")


def test_modules_belong_to_a_kernel_that_is_to_be_opened(tiny):
    with pytest.raises(UsageError, match="open_kernel"):
        trapline.scan(trapline.open_kernel(tiny), modules=tiny.parent)


def test_what_needs_symbols_says_so(tmp_path):
    boot_image = tmp_path / "empty"
    boot_image.mkdir()
    with pytest.raises(trapline.TraplineError) as caught:
        trapline.open_kernel(boot_image)
    assert caught.value.exit_code is trapline.ExitCode.KERNEL_NOT_FOUND


def test_a_check_without_debug_information_is_refused():
    with pytest.raises(NoDebugInfoError, match="which code is which"):
        trapline.check(guests.build(()), workers=1)
