"""A kernel that waits for ever says where, long before the limit."""

import msgspec
import pytest

from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.results.boot import BootResult

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("boot")]


def test_a_guest_that_waits_for_its_root_device_is_noticed(debian_kernel_name, tmp_path, capfd):
    output = tmp_path / "boot.json"
    line = "console=ttyS0 root=/dev/vda rootwait rdinit=/nothing"
    command = ["boot", debian_kernel_name, "--no-scan", "-q", "--cmdline", line]
    assert run([*command, "--format", "json", "-o", str(output)]) == ExitCode.GUEST_HANG
    capfd.readouterr()
    result = msgspec.json.decode(output.read_bytes(), type=BootResult)
    assert result.outcome.seconds < 100
    assert "Waiting for root device /dev/vda" in result.last_line
    first = result.tasks[0]
    assert (first.pid, first.state) == (1, "D")
    assert first.trace[0].startswith("msleep+")
    assert any(label.startswith("kernel_init+") for label in first.trace)
    assert "kthreadd" in {task.comm for task in result.tasks}
    assert [task.pid for task in result.tasks if task.is_running] == [0]
