"""Fixtures for tests on a real Debian kernel, and settings of hypothesis."""

import fcntl
import os
import signal
import sys

import msgspec
import pytest
from hypothesis import HealthCheck, settings

from binutils import Assembler
from trapline.allowlist.listfile import load
from trapline.base.errors import FetchError
from trapline.kernel.find.locate import locate
from trapline.results.scan import ScanResult
from trapline.scan.wholekernel import scan

# A shell that starts the tests in the background has Ctrl-C ignored; some of them press it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no bug: no example has a deadline.
settings.register_profile(
    "trapline", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("trapline")

# Meta-packages: releases leave the archive in time, these stay. The second is what Debian 13
# calls its own 6.12 kernel.
DEBIAN_KERNEL = "deb:linux-image-6.12-cloud-amd64|linux-image-cloud-amd64"


def pytest_addoption(parser):
    parser.addoption(
        "--engine",
        action="append",
        metavar="MODULE:FACTORY",
        help="a CPU engine to run tests/cpu/conformance on; may be repeated",
    )


@pytest.fixture(scope="session")
def assembler(tmp_path_factory):
    """GNU as and objdump."""
    return Assembler(tmp_path_factory.mktemp("as"))


@pytest.fixture(scope="session")
def debian_kernel(request):
    """Files of a TDX-enabled kernel with debug information; one download per machine."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def announce(line):
        with capture.global_and_fixture_disabled():
            sys.stderr.write(f"\ntrapline tests: {line}\n")

    try:
        return locate(DEBIAN_KERNEL, announce=announce)
    except FetchError as error:
        pytest.skip(f"no Debian kernel: {error}")


@pytest.fixture(scope="session")
def debian_kernel_name(debian_kernel):
    """What that kernel is called on a command line."""
    assert debian_kernel.vmlinuz is not None
    return DEBIAN_KERNEL


@pytest.fixture(scope="session")
def debian_scan(debian_kernel, tmp_path_factory):
    """The scan of that kernel with the built-in list; one for all processes of a test run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    document = folder / "debian-scan.json"
    with (folder / "debian-scan.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not document.exists():
            result = scan(debian_kernel, load())
            partial = document.with_suffix(".part")
            partial.write_bytes(msgspec.json.encode(result))
            partial.rename(document)
    return msgspec.json.decode(document.read_bytes(), type=ScanResult)
