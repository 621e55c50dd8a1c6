"""The locks hold what pyproject.toml and every locked package ask for, and nothing else.

Nothing else looks: what is installed is not resolved. What a package asks for is read where it is
installed; the few that the lock has for other Pythons only are read when the suite runs on those.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# Debian 12's, those between, Debian 13's.
PYTHONS = ["3.11.2", "3.11.15", "3.12.13", "3.13.5"]


def linux(python):
    """The values of markers there."""
    return default_environment() | {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "implementation_version": python,
    }


def lines(lock):
    """Each locked package, as a requirement."""
    return [
        Requirement(line.partition("--hash")[0].rstrip(" \\"))
        for line in lock.splitlines()
        if re.match(r"[a-z0-9]", line)
    ]


def faults(lock, roots, python, asks):
    """What is asked for and not locked, and what is locked and not asked for.

    `asks` gives the requirements of a package, as strings.
    """
    environment = linux(python)
    locked = {
        canonicalize_name(line.name): line
        for line in lines(lock)
        if line.marker is None or line.marker.evaluate(environment)
    }
    found, reached = set(), set()
    todo = [(Requirement(root), "", "pyproject.toml") for root in roots]
    while todo:
        wanted, extra, by = todo.pop()
        if wanted.marker and not wanted.marker.evaluate(environment | {"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        if name not in locked:
            found.add(f"{by} asks for {wanted}, which is not locked")
            continue
        (pin,) = locked[name].specifier
        if not wanted.specifier.contains(pin.version, prereleases=True):
            found.add(f"{by} asks for {wanted}, and {pin.version} is locked")
        for each in {"", *wanted.extras}:
            if (name, each) not in reached:
                reached.add((name, each))
                todo += [(Requirement(text), each, name) for text in asks(name)]
    surplus = locked.keys() - {name for name, _ in reached}
    return sorted(found | {f"nothing asks for {name}" for name in surplus})


def installed_asks(name):
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


def group(groups, name):
    for each in groups[name]:
        if isinstance(each, dict):
            yield from group(groups, each["include-group"])
        else:
            yield each


def roots(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    # hatchling asks for editables when it builds what `pip install -e` installs.
    build = [*project["build-system"]["requires"], "editables"]
    if lock == "run":
        return project["project"]["dependencies"] + build
    extras = project["project"]["optional-dependencies"]["cluster"]
    dev = list(group(project["dependency-groups"], "dev"))
    return project["project"]["dependencies"] + build + extras + dev


def read(lock):
    return (ROOT / "requirements" / f"{lock}.txt").read_text()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", ["run", "dev"])
def test_the_lock_is_whole_and_no_more(lock, python):
    found = faults(read(lock), roots(lock), python, installed_asks)
    # Who asks for what is locked for other Pythons only may be for those only, too: not read here.
    elsewhere = {f"nothing asks for {line.name}" for line in lines(read(lock)) if not is_here(line)}
    assert set(found) <= elsewhere
    if python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}."):
        assert found == []


def is_here(line):
    return line.marker is None or line.marker.evaluate()


@pytest.mark.parametrize("lock", ["run", "dev"])
def test_everything_for_this_python_is_installed_as_locked(lock):
    """Else the test above has read nothing, or something else."""
    for line in lines(read(lock)):
        if is_here(line):
            (pin,) = line.specifier
            assert version(line.name) == pin.version, line.name


def test_what_runs_is_what_is_tested():
    assert set(map(str, lines(read("run")))) <= set(map(str, lines(read("dev"))))


ASKS = {
    "asks": ["asked[extra]>=2"],
    "asked": [
        "always",
        'by-extra; extra == "extra"',
        'by-another-extra; extra == "another"',
        'on-old-pythons; python_version < "3.12"',
        'on-windows; sys_platform == "win32"',
    ],
}
LOCK = """
always==1 \\
    --hash=sha256:00
asked==2.5 \\
    --hash=sha256:00
asks==1 \\
    --hash=sha256:00
by-extra==1 \\
    --hash=sha256:00
on-old-pythons==1 ; python_full_version < '3.12' \\
    --hash=sha256:00
"""


@pytest.mark.parametrize(
    ("was", "now", "python", "fault"),
    [
        ("always==1", "# gone", "3.13.5", "asked asks for always, which is not locked"),
        ("by-extra==1", "# gone", "3.13.5", "asked asks for by-extra"),
        ("on-old-pythons==1", "# gone", "3.11.2", "asked asks for on-old-pythons"),
        ("< '3.12'", "< '3.11'", "3.11.2", "asked asks for on-old-pythons"),
        ("asked==2.5", "asked==1.5", "3.13.5", "asked[extra]>=2, and 1.5 is locked"),
        ("always==1", "always==1\nmore==1", "3.13.5", "nothing asks for more"),
        ("< '3.12'", "< '3.14'", "3.13.5", "nothing asks for on-old-pythons"),
    ],
)
def test_a_fault_in_a_lock_is_found(was, now, python, fault):
    def asks(name):
        return ASKS.get(name, [])

    assert was in LOCK
    (found,) = faults(LOCK.replace(was, now), ["asks"], python, asks)
    assert fault in found
    assert faults(LOCK, ["asks"], python, asks) == []
