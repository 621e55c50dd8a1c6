"""Debian's kernel: what is found is found twice, and the command says it."""

import json

import pytest
from click.testing import CliRunner

from trapline.base.errors import ExitCode
from trapline.cli.verify import command
from trapline.guest.target import TargetSource
from trapline.results.verify import VerifiedKernel
from trapline.verify.launch import initrd
from trapline.verify.rounds import Options, verify

pytestmark = pytest.mark.kernel


@pytest.mark.xdist_group("verify-debian")
def test_two_runs_find_the_same(debian_kernel):
    source = TargetSource(kernel="debian", vmlinux=debian_kernel.vmlinux.resolve(), initrd=initrd())
    kernel = VerifiedKernel(name="debian", release=None, build_id=None)
    one, two = (verify(source, kernel, Options(count, limit=500)) for count in (1, 2))
    assert one == two
    for trap in ("mmio", "pio", "cpuid", "msr", "hlt"):
        assert sum(one.verdicts[trap].values()) > 0
    # Every form of a plain MOV between memory and a register of its own width is emulated
    # faithfully but for flags: were it not, no driver would work.
    worse = {
        finding.kind: finding.forms
        for finding in one.findings
        if finding.kind not in {"wrong-flags", "refused", "not-refused"}
        and finding.cause == "any operand"
    }
    assert all("MOV r/m32, r32" not in forms for forms in worse.values())
    refused = {form.form for form in one.refused}
    assert {"XCHG r/m32, r32", "STOSD", "OUTSB"} <= refused
    assert not {"MOV r/m32, r32", "MOV r32, r/m32"} & refused


@pytest.mark.xdist_group("verify-debian")
def test_the_command_counts_sites_of_the_scan(debian_kernel):
    arguments = [str(debian_kernel.vmlinux), "--limit", "200", "--format", "json"]
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert result.return_value == ExitCode.FINDINGS
    document = json.loads(result.stdout)
    assert document["schema"] == "trapline/verify"
    occurs = {finding["kind"]: finding["occurs"] for finding in document["findings"]}
    assert all(isinstance(count, int) for count in occurs.values())
    # String moves on MMIO: the kernel has them, and its handler refuses them.
    strings = [form for form in document["refused"] if form["form"].startswith("MOVS")]
    assert any(form["occurs"] > 0 for form in strings)
