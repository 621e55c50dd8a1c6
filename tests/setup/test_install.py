"""tools/install and tools/setup: .venv holds the lock and nothing else, whatever the index offers.

They run as they are, on a project of empty packages that shows what a real lock has: a package that
asks for another with an extra, as pytest-cov does for coverage[toml].
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from wheels import wheel

TOOLS = Path(__file__).parents[2] / "tools"
# Debian 12's pip, or the last that looks past a lock and still runs on this Python.
OLD_PIP = "23.0.1" if sys.version_info < (3, 12) else "23.2.1"
# Its own build back end, which hands over a wheel that is there.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "project"
version = "1"
"""
BACKEND = """
import shutil
def build_editable(folder, config_settings=None, metadata_directory=None):
    return shutil.copy("project-1-py3-none-any.whl", folder).rpartition("/")[2]
"""


class Project:
    """A folder with the real tools, a lock, and an index of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.index = folder / "index"
        self.lock = folder / "requirements" / "run.txt"
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")} | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        shutil.copytree(TOOLS, folder / "tools")
        for each in (self.index, self.lock.parent, folder / "bin"):
            each.mkdir()
        (folder / "pyproject.toml").write_text(PYPROJECT)
        (folder / "backend.py").write_text(BACKEND)
        wheel(folder, "project", "1", requires=["asks"])
        self.asks = wheel(self.index, "asks", "1", requires=["asked[extra]>=1"])
        self.asked = wheel(self.index, "asked", "1", extras=["extra"])
        self.lock.write_text(self.asks + self.asked)

    def publish_newer_releases(self):
        wheel(self.index, "asks", "2", requires=["asked[extra]>=1"])
        wheel(self.index, "asked", "2", extras=["extra"])

    def command(self, name, script):
        """Put a command before all others of its name."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, *arguments):
        return subprocess.run(
            arguments,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def installed(self):
        """Name and version of all in .venv but its pip and what pips of Python 3.11 come with."""
        paths = [str(path) for path in self.folder.glob(".venv/lib/python3*/site-packages")]
        found = {each.name: each.version for each in distributions(path=paths)}
        return {k: v for k, v in found.items() if k not in {"pip", "setuptools", "wheel"}}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture(scope="session")
def old_pip(tmp_path_factory):
    """A folder to link from: unpacked, and compiled, once."""
    folder = tmp_path_factory.mktemp("pip")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.run([*pip, "download", "--no-deps", "-d", folder, f"pip=={OLD_PIP}"], check=True)
    zipfile.ZipFile(next(folder.iterdir())).extractall(folder / "pip")
    return folder / "pip"


def make_environment(project, old_pip):
    """What runs in place of `python3 -m venv --clear .venv`, with the old pip; takes no second."""
    project.command(
        "python3",
        f"""
        case "$*" in
        "-m venv --clear .venv")
          {sys.executable} -m venv --clear --without-pip .venv
          ln -s {old_pip}/* .venv/lib/python3*/site-packages/ ;;
        *) exec {sys.executable} "$@" ;;
        esac
        """,
    )
    project.command("qemu-system-x86_64", "")


@pytest.fixture(params=["old pip", "the pip of this Python"])
def python(request, project):
    """The Python of an environment of the project with that pip."""
    if request.param == "old pip":
        make_environment(project, request.getfixturevalue("old_pip"))
        project.run("python3", "-m", "venv", "--clear", ".venv").check_returncode()
    else:
        project.run(sys.executable, "-m", "venv", ".venv").check_returncode()
    return project.folder / ".venv/bin/python"


only_old = pytest.mark.parametrize("python", ["old pip"], indirect=True)
LOCKED = {"asks": "1", "asked": "1", "project": "1"}


def test_the_lock_is_installed_exactly_whatever_is_published_later(project, python):
    project.publish_newer_releases()
    done = project.run("tools/install", python, project.lock)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert project.installed() == LOCKED


@only_old
@pytest.mark.parametrize("newer", [False, True])
def test_resolving_would_fail_as_soon_as_something_is_published(project, python, newer):
    script = project.folder / "tools/install"
    resolving = script.read_text().replace(
        "install -qq --no-deps --require", "install -qq --require"
    )
    assert resolving != script.read_text()
    script.write_text(resolving)
    if newer:
        project.publish_newer_releases()
    done = project.run(script, python, project.lock)
    assert ("In --require-hashes mode" in done.stderr) == newer
    assert (done.returncode == 0) == (not newer)


@only_old
def test_a_lock_that_lacks_something_is_refused(project, python):
    project.lock.write_text(project.asks)
    done = project.run("tools/install", python, project.lock)
    assert done.returncode == 1
    assert "run.txt is not whole: asks 1 requires asked, which is not installed" in done.stderr


@only_old
def test_a_package_that_is_not_the_locked_one_is_refused(project, python):
    wheel(project.index, "asked", "1", extras=["extra"], requires=["asks"])
    done = project.run("tools/install", python, project.lock)
    assert done.returncode != 0
    assert "HASHES" in done.stderr
    assert project.installed() == {}


def test_setup_makes_the_environment_anew_from_another_lock_only(project, old_pip):
    make_environment(project, old_pip)
    left = project.folder / ".venv" / "left"

    first = project.run("tools/setup", "run")
    assert first.stderr == ""
    assert first.stdout.startswith("Downloading ")
    assert project.installed() == LOCKED

    left.touch()
    again = project.run("tools/setup", "run")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert left.exists()

    wheel(project.folder, "project", "1")  # needs nothing any more
    project.lock.write_text(project.asked)
    assert project.run("tools/setup", "run").returncode == 0
    assert not left.exists()
    assert project.installed() == {"asked": "1", "project": "1"}


def test_setup_makes_an_environment_anew_whose_python_is_gone(project, old_pip):
    make_environment(project, old_pip)
    left = project.folder / ".venv" / "bin" / "python"  # as after an upgrade of Debian
    left.parent.mkdir(parents=True)
    left.symlink_to("python3.9")
    shutil.copy(project.lock, project.folder / ".venv" / ".run")
    assert project.run("tools/setup", "run").returncode == 0
    assert project.installed() == LOCKED


@pytest.mark.parametrize("uid", [0, 1000])
def test_what_debian_lacks_is_installed_by_root_and_named_to_others(project, uid):
    project.command("id", f"echo {uid}")
    project.command("python3", "exit 127")
    project.command("qemu-system-x86_64", "")
    project.command("apt-get", 'echo "apt-get $*"; test "$1" = update')
    done = project.run("tools/setup", "run")
    install = "apt-get install --no-install-recommends"
    if uid == 0:
        said = ["Installing from Debian: python3-venv (at most 250 MB).", "apt-get update -qq"]
        assert done.stdout.splitlines() == said
        assert done.returncode == 1  # apt-get's own
    else:
        said = f"trapline needs Debian packages; as root, run: {install} python3-venv\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", said)
    assert not (project.folder / ".venv").exists()
