"""Kernels from Debian packages: resolving, caching, and all that can go wrong with apt."""

import fcntl
import multiprocessing
import subprocess
from pathlib import Path

import pytest

from trapline.base.errors import FetchError, OutputError
from trapline.kernel.find import apt, deb
from trapline.kernel.find.apt import Apt, parse_stanzas, run_program
from trapline.kernel.find.deb import cache_folder, fetch_kernel, fetch_package, resolve_kernel

# `apt-cache show` as recorded on Debian 12, shortened.
META = """\
Package: linux-image-6.12-cloud-amd64
Source: linux-signed-6.12-amd64 (6.12.117+1~deb12u1)
Version: 6.12.117-1~deb12u1
Installed-Size: 13
Architecture: amd64
Provides: linux-latest-modules-6.12.117+deb12-cloud-amd64, wireguard-modules (= 1.0.0)
Depends: linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)
Description: Linux for x86-64 cloud (meta-package)
 This package depends on the latest Linux kernel: and modules.
Size: 1512
SHA256: ab2bd6d92fedce96f7fb3f51a0dfefadf069a32023927150d7ddaeb3aed1464c

"""
IMAGE = """\
Package: linux-image-6.12.117+deb12-cloud-amd64
Source: linux-signed-6.12-amd64 (6.12.117+1~deb12u1)
Version: 6.12.117-1~deb12u1
Installed-Size: 126868
Depends: kmod, linux-base (>= 4.3~), initramfs-tools (>= 0.120+deb8u2) | linux-initramfs-tool
Recommends: apparmor
Size: 33720320

"""
DEBUG = """\
Package: linux-image-6.12.117+deb12-cloud-amd64-dbg
Version: 6.12.118-1~deb12u1
Installed-Size: 1800000
Size: 319000000

Package: linux-image-6.12.117+deb12-cloud-amd64-dbg
Version: 6.12.117-1~deb12u1
Installed-Size: 1722900
Size: 317999999

"""
BUSYBOX = """\
Package: busybox-static
Version: 1:1.35.0-4+deb12u1+b1
Installed-Size: 2
Depends: init
Size: 900

"""
# Ubuntu splits the modules off, and has dbgsym packages of its own naming.
UBUNTU = {
    "linux-image-generic": """\
Package: linux-image-generic
Version: 6.8.0.31.31
Depends: linux-image-6.8.0-31-generic, linux-firmware, intel-microcode, amd64-microcode

""",
    "linux-image-6.8.0-31-generic": """\
Package: linux-image-6.8.0-31-generic
Version: 6.8.0-31.31
Depends: kmod, linux-base (>= 4.5ubuntu1~16.04.1), linux-modules-6.8.0-31-generic

""",
    "linux-modules-6.8.0-31-generic": """\
Package: linux-modules-6.8.0-31-generic
Version: 6.8.0-31.31
Depends: wireless-regdb

""",
    "linux-image-6.8.0-31-generic-dbgsym": """\
Package: linux-image-6.8.0-31-generic-dbgsym
Version: 6.8.0-31.31

""",
}
ARCHIVE = {
    "linux-image-6.12-cloud-amd64": META,
    "linux-image-6.12.117+deb12-cloud-amd64": IMAGE,
    "linux-image-6.12.117+deb12-cloud-amd64-dbg": DEBUG,
    "busybox-static": BUSYBOX,
}
NAME = "linux-image-6.12-cloud-amd64"


class FakeApt:
    """Stands for apt-get, apt-cache and dpkg-deb, and remembers what it was asked."""

    def __init__(self, archive=None, *, fail=(), stderr=""):
        self.archive = dict(ARCHIVE if archive is None else archive)
        self.fail = set(fail)
        self.stderr = stderr
        self.asked = []

    def __call__(self, arguments, folder):
        arguments = list(arguments)
        if arguments[0] == "dpkg-deb":
            return self.answer("unpack", folder, arguments[2:])
        assert arguments[1] == "-c"
        action = next(a for a in arguments[3:] if not a.startswith("-"))
        operands = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
        return self.answer(action, folder, operands)

    def answer(self, action, folder, operands):
        self.asked.append((action, *operands))
        if action in self.fail:
            return subprocess.CompletedProcess([], 100, "", self.stderr)
        output = ""
        if action == "update":
            (folder / "lists/archive_main_Packages").touch()
        elif action == "show":
            output = self.archive.get(operands[0], "")
        elif action == "pkgnames":
            output = "\n".join(name for name in self.archive if name.startswith(operands[0]))
        elif action == "download":
            (folder / "some.deb").write_text(operands[0])
        elif action == "unpack":
            tree = Path(operands[1])
            (tree / "usr").mkdir(parents=True)
            (tree / "usr/what").write_text(Path(operands[0]).read_text())
        return subprocess.CompletedProcess([], 0, output, "")

    def count(self, action):
        return sum(entry[0] == action for entry in self.asked)


@pytest.fixture
def fake(monkeypatch):
    def use(*arguments, **options):
        runner = FakeApt(*arguments, **options)
        monkeypatch.setattr(apt, "run_program", runner)
        return runner

    return use


def shower(archive):
    return lambda name: parse_stanzas(archive.get(name, ""), name)


def names_and_versions(packages):
    return [(package.name, package.version) for package in packages]


def test_meta_package_leads_to_image_and_debug_package_of_its_version():
    assert names_and_versions(resolve_kernel(NAME, shower(ARCHIVE))) == [
        ("linux-image-6.12.117+deb12-cloud-amd64", "6.12.117-1~deb12u1"),
        ("linux-image-6.12.117+deb12-cloud-amd64-dbg", "6.12.117-1~deb12u1"),
    ]


def test_image_package_itself_and_one_without_debug_package():
    archive = {key: text for key, text in ARCHIVE.items() if not key.endswith("-dbg")}
    found = resolve_kernel("linux-image-6.12.117+deb12-cloud-amd64", shower(archive))
    assert [p.name for p in found] == ["linux-image-6.12.117+deb12-cloud-amd64"]
    assert found[0].size == 33720320
    assert found[0].installed == 126868 << 10


def test_ubuntu_has_its_modules_apart():
    assert [p.name for p in resolve_kernel("linux-image-generic", shower(UBUNTU))] == [
        "linux-image-6.8.0-31-generic",
        "linux-modules-6.8.0-31-generic",
        "linux-image-6.8.0-31-generic-dbgsym",
    ]


def test_dependencies_in_a_circle_end():
    archive = {
        f"linux-image-{a}": f"Package: linux-image-{a}\nVersion: 1\nDepends: linux-image-{b}\n"
        for a, b in (("x", "y"), ("y", "x"))
    }
    assert [p.name for p in resolve_kernel("linux-image-x", shower(archive))] == ["linux-image-y"]


def test_unknown_package_resolves_to_nothing():
    assert resolve_kernel("linux-image-none", shower(ARCHIVE)) == []


def test_stanzas_of_other_packages_and_broken_ones_are_left_out():
    text = META + "Package: other\nVersion: 1\n\nnonsense\n\nPackage: x\n"
    assert len(parse_stanzas(text, NAME)) == 1
    assert parse_stanzas("Package: x\nVersion: 1\nSize: -5\n", "x")[0].size == 0


def test_fetches_once_then_works_without_the_network(tmp_path, fake):
    runner = fake()
    said = []
    trees = fetch_kernel(NAME, announce=said.append, cache=tmp_path)
    assert [(tree / "usr/what").read_text() for tree in trees] == [
        "linux-image-6.12.117+deb12-cloud-amd64=6.12.117-1~deb12u1",
        "linux-image-6.12.117+deb12-cloud-amd64-dbg=6.12.117-1~deb12u1",
    ]
    assert trees[0] == tmp_path / (
        "packages/linux-image-6.12.117+deb12-cloud-amd64_6.12.117-1~deb12u1"
    )
    assert len(said) == 2
    assert "34 MB), linux-image-6.12.117+deb12-cloud-amd64-dbg" in said[1]
    assert "(318 MB); unpacked 1894 MB in" in said[1]
    assert sorted(p.name for p in (tmp_path / "packages").iterdir()) == sorted(
        tree.name for tree in trees
    )
    runner.asked.clear()
    said.clear()
    assert fetch_kernel(NAME, announce=said.append, cache=tmp_path) == trees
    assert {entry[0] for entry in runner.asked} == {"show"}
    assert said == []


def test_takes_the_first_alternative_that_apt_knows(tmp_path, fake):
    runner = fake()
    trees = fetch_kernel(f"linux-image-9-amd64 | {NAME}|busybox-static", cache=tmp_path)
    assert len(trees) == 2
    assert runner.count("update") == 1


def test_other_packages(tmp_path, fake):
    fake()
    tree = fetch_package("busybox-static", cache=tmp_path)
    assert tree.name == "busybox-static_1%3a1.35.0-4+deb12u1+b1"
    assert (tree / "usr/what").read_text() == "busybox-static=1:1.35.0-4+deb12u1+b1"


def test_unfinished_tree_is_replaced(tmp_path, fake):
    fake()
    tree = fetch_package("busybox-static", cache=tmp_path)
    (tree / ".trapline-complete").unlink()
    (tree / "left-over").touch()
    assert fetch_package("busybox-static", cache=tmp_path) == tree
    assert not (tree / "left-over").exists()


def test_unknown_package_suggests_near_names(tmp_path, fake):
    runner = fake()
    with pytest.raises(FetchError, match=f"no package linux-image-6.12-clod.*near.* {NAME}"):
        fetch_kernel("linux-image-6.12-clod-amd64", cache=tmp_path)
    # Lists that were just fetched are not fetched again; older ones are.
    assert runner.count("update") == 1
    with pytest.raises(FetchError, match="check the sources in /etc/apt"):
        fetch_kernel("zzzz", cache=tmp_path)
    assert runner.count("update") == 2


@pytest.mark.parametrize("spec", ["", "A B", "x|", "-o", "../x", "a=1"])
def test_names_that_are_none(tmp_path, fake, spec):
    fake()
    with pytest.raises(FetchError, match="is not a package name"):
        fetch_kernel(spec, cache=tmp_path)


def test_no_network(tmp_path, fake):
    fake(fail={"update"}, stderr="E: Could not resolve 'archive'\nE: more\n")
    with pytest.raises(FetchError, match=r"package lists \(Could not resolve 'archive'; more\)"):
        fetch_kernel(NAME, cache=tmp_path)


def test_one_source_that_fails_is_no_error(tmp_path, fake):
    runner = fake()
    fetch_package("busybox-static", cache=tmp_path)
    runner.fail.add("update")
    runner.stderr = "E: one source failed\n"
    with pytest.raises(FetchError, match=r"no package absent.*\(one source failed\)"):
        fetch_package("absent", cache=tmp_path)


def test_download_fails(tmp_path, fake):
    fake(fail={"download"}, stderr="W: x\nE: Failed to fetch some.deb\n")
    with pytest.raises(FetchError, match=r"could not download .* \(Failed to fetch some.deb\)"):
        fetch_kernel(NAME, cache=tmp_path)
    assert list((tmp_path / "packages").iterdir()) == []


def test_version_that_left_the_archive(tmp_path, fake):
    runner = fake(fail={"download"})
    original = runner.answer

    def answer(action, folder, operands):
        if action == "update" and runner.count("download"):
            runner.archive["busybox-static"] = BUSYBOX.replace("1.35", "1.36")
        return original(action, folder, operands)

    runner.answer = answer
    with pytest.raises(FetchError, match=r"no longer in the archive.*once more"):
        fetch_package("busybox-static", cache=tmp_path)
    runner.fail.clear()
    assert "1.36" in fetch_package("busybox-static", cache=tmp_path).name


@pytest.mark.parametrize("action", ["update", "download", "unpack"])
def test_full_disk_seen_by_a_program(tmp_path, fake, action):
    fake(fail={action}, stderr="E: write: No space left on device\n")
    with pytest.raises(OutputError, match="the disk is full"):
        fetch_kernel(NAME, cache=tmp_path)
    assert list(tmp_path.glob("packages/*")) == []


def test_package_that_does_not_unpack(tmp_path, fake):
    fake(fail={"unpack"}, stderr="dpkg-deb: error: corrupt\n")
    with pytest.raises(FetchError, match="could not be unpacked"):
        fetch_kernel(NAME, cache=tmp_path)


def test_too_little_room_is_seen_before_the_download(tmp_path, fake, monkeypatch):
    runner = fake()
    monkeypatch.setattr(deb.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(OutputError, match=r"2246 MB are needed and 1000 MB are free"):
        fetch_kernel(NAME, cache=tmp_path)
    assert runner.count("download") == 0


def test_a_full_disk_is_seen_before_anything_is_fetched(tmp_path, fake, monkeypatch):
    """apt would try again for minutes."""
    runner = fake()
    monkeypatch.setattr(_Usage, "free", 10**6)
    monkeypatch.setattr(deb.shutil, "disk_usage", lambda _: _Usage())
    with pytest.raises(OutputError, match="150 MB are needed and 1 MB are free"):
        fetch_kernel(NAME, cache=tmp_path)
    assert runner.count("update") == runner.count("download") == 0


class _Usage:
    free = 10**9


def test_cache_that_cannot_be_written(tmp_path, fake):
    fake()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        fetch_kernel(NAME, cache=tmp_path / "file" / "cache")
    with pytest.raises(OutputError, match='must not have a "'):
        fetch_kernel(NAME, cache=tmp_path / 'a"b')


def test_no_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="apt-get is not installed"):
        fetch_kernel(NAME, cache=tmp_path / "cache")


def test_cache_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "trapline"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/trapline"


def test_configuration_keeps_apt_off_the_system(tmp_path):
    Apt(tmp_path)
    dump = run_program(["apt-config", "-c", str(tmp_path / "apt.conf"), "dump"], tmp_path).stdout
    values = dict(line.rstrip(";").split(" ", 1) for line in dump.splitlines())
    for key in ("Dir::State::lists", "Dir::State::status", "Dir::Cache", "Dir::Cache::archives"):
        assert values[key].strip('"').startswith(str(tmp_path))
    hooks = [key for key in values if key.startswith("APT::Update::") and "Invoke" in key]
    assert all(values[key] == '""' for key in hooks)
    assert values["APT::Architecture"] == '"amd64"'


def _fetch_in_child(cache, log):
    class Slow(FakeApt):
        def answer(self, action, folder, operands):
            if action in {"update", "download"}:
                with log.open("a") as file:
                    file.write(f"{action}\n")
            return super().answer(action, folder, operands)

    apt.run_program = Slow()
    fetch_kernel(NAME, cache=cache)


def test_processes_do_not_race(tmp_path):
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    children = [
        context.Process(target=_fetch_in_child, args=(tmp_path / "cache", log)) for _ in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 3
    assert sorted(log.read_text().split()) == ["download", "download", "update"]


class _WouldWaitError(Exception):
    pass


def _no_waiting(line):
    raise _WouldWaitError(line)


def test_what_is_in_the_cache_does_not_wait_for_a_fetch(tmp_path, fake):
    runner = fake()
    trees = fetch_kernel(NAME, cache=tmp_path)
    runner.asked.clear()
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert fetch_kernel(NAME, announce=_no_waiting, cache=tmp_path) == trees
        # apt may be in the middle of an update.
        assert runner.asked == []
        with pytest.raises(_WouldWaitError, match="Waiting for another process"):
            fetch_package("busybox-static", announce=_no_waiting, cache=tmp_path)
        # The same name stands for one package alone there.
        with pytest.raises(_WouldWaitError):
            fetch_package(NAME, announce=_no_waiting, cache=tmp_path)


def test_an_incomplete_cache_waits_for_the_fetch(tmp_path, fake):
    fake()
    trees = fetch_kernel(NAME, cache=tmp_path)
    (trees[1] / ".trapline-complete").unlink()
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(_WouldWaitError):
            fetch_kernel(NAME, announce=_no_waiting, cache=tmp_path)


@pytest.mark.kernel
def test_real_apt(debian_kernel):
    del debian_kernel  # says whether apt works here, and has fetched the lists
    said = []
    tree = fetch_package("busybox-static", announce=said.append)
    assert (tree / "bin/busybox").is_file() or (tree / "usr/bin/busybox").is_file()
    said.clear()
    assert fetch_package("busybox-static", announce=said.append) == tree
    assert said == []
    with pytest.raises(FetchError, match="apt knows no package linux-image-no-such-flavour"):
        fetch_package("linux-image-no-such-flavour")


def test_another_suite_has_sources_and_a_cache_of_its_own(fake, tmp_path):
    runner = fake()
    fetch_kernel(NAME, cache=tmp_path)
    fetch_kernel(f"{NAME}@trixie-backports", cache=tmp_path)
    assert runner.count("update") == 2
    folder = tmp_path / "apt-trixie-backports"
    assert " trixie-backports main" in (folder / "sources.list").read_text()
    assert f'SourceList "{folder}/sources.list"' in (folder / "apt.conf").read_text()
    assert "SourceList" not in (tmp_path / "apt/apt.conf").read_text()
    assert len(list((tmp_path / "resolved").iterdir())) == 2


@pytest.mark.parametrize(
    ("sources", "suite", "expected"),
    [
        ("", "sid", "http://deb.debian.org/debian"),
        ("deb http://a.example/debian bookworm main", "sid", "http://a.example/debian"),
        ("# deb http://b.example/debian x main", "sid", "http://deb.debian.org/debian"),
        ("URIs: https://a.example/x/debian/\n", "sid", "https://a.example/x/debian"),
        (
            "deb http://a.example/debian bookworm main",
            "bookworm-security",
            "http://a.example/debian-security",
        ),
        ("deb http://a.example/ubuntu noble main", "sid", "http://deb.debian.org/debian"),
    ],
)
def test_another_suite_comes_from_the_mirror_that_the_system_has(
    sources, suite, expected, tmp_path
):
    (tmp_path / "sources.list").write_text(sources)
    assert apt.mirror(tmp_path, suite) == expected


@pytest.mark.parametrize("suite", ["", "Sid", "a b", "../x", "s\nid", "x" * 100])
def test_what_is_no_suite_is_refused(suite, tmp_path):
    with pytest.raises(FetchError, match="is no suite"):
        fetch_kernel(f"{NAME}@{suite}", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
