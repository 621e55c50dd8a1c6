"""Debian's kernel as a TD, from the command line to the result document."""

import gzip
import json

import msgspec
import pytest

from trapline.base.errors import ExitCode
from trapline.cli.main import run
from trapline.machine.loader import initramfs
from trapline.results.boot import BootResult

pytestmark = [pytest.mark.kernel, pytest.mark.xdist_group("boot")]


class Boot:
    """One run of `trapline boot`: exit code, document, console and trace."""

    def __init__(self, folder, capfd, kernel, *arguments):
        output, trace = folder / "result.json", folder / "trace.jsonl"
        command = ["boot", str(kernel), "--format", "json", "-o", str(output)]
        self.code = run([*command, "--trace", str(trace), *map(str, arguments)])
        captured = capfd.readouterr()
        self.console, self.errors = captured.out, captured.err
        self.result = msgspec.json.decode(output.read_bytes(), type=BootResult)
        with trace.open() as lines:
            self.header, *self.traps = map(json.loads, lines)

    @property
    def milestones(self):
        return {milestone.name: milestone.seconds for milestone in self.result.milestones}


@pytest.fixture(scope="module")
def boots(debian_kernel_name, tmp_path_factory):
    """Run the command, each set of arguments once; `capfd` is per test, so none is used here."""
    known = {}

    def boot(*arguments, kernel=debian_kernel_name, capfd=None, again=False):
        key = (*arguments, str(kernel), again)
        if key not in known:
            known[key] = Boot(tmp_path_factory.mktemp("boot"), capfd, kernel, *arguments)
        return known[key]

    return boot


@pytest.fixture
def stock(boots, capfd):
    """The stock boot image on the distribution's own command line."""
    return boots(capfd=capfd)


def test_the_stock_image_powers_itself_off(stock):
    assert stock.code == ExitCode.CLEAN
    assert stock.result.outcome.kind == "powered-off"
    assert stock.result.kernel.image == "bzImage"
    assert "Memory Encryption Features active: Intel TDX" in stock.console
    assert "init: self-test passed" in stock.console
    assert "console=tty0" in stock.result.machine.command_line


def test_it_reaches_its_milestones_in_order(stock):
    wanted = [
        "decompressor entered",
        "first trap of the kernel proper",
        "start_kernel",
        "TDX detected",
        "first initcall",
        "/init started",
        "first trap in ring 3",
        "self-test passed",
        "power off",
    ]
    times = [stock.milestones[name] for name in wanted]
    assert times == sorted(times)


def test_the_decompressor_calls_the_host_directly(stock):
    sites = [site for site in stock.result.sites if site.image == "decompressor"]
    assert {site.trap for site in sites} == {"tdcall"}
    assert all(site.standing == "outside" for site in sites)


def test_kaslr_is_on_and_accounted_for(stock):
    slide = int(stock.result.kernel.slide, 16)
    assert slide
    assert slide % (2 << 20) == 0
    serial = [site for site in stock.result.sites if site.function == "io_serial_out"]
    assert serial
    assert all(int(s.address, 16) - int(s.link_address, 16) == slide for s in serial)
    assert any(site.file == "arch/x86/include/asm/shared/io.h" for site in serial)


def test_ring_3_takes_cpuid_traps_that_the_kernel_handles(stock):
    (user,) = (site for site in stock.result.sites if site.image == "user")
    assert user.trap == "cpuid"
    assert user.count > 10


def test_the_scan_had_foreseen_the_traps(stock):
    sound = stock.result.soundness
    assert sound.scanned
    assert sound.traps > 10_000
    assert sound.traps_found / sound.traps >= 0.99
    assert {site.label for site in stock.result.unaccounted} == set()


def test_counts_add_up(stock):
    result = stock.result
    calls = sum(site.count for site in result.sites if site.trap == "tdcall")
    assert sum(result.tdcalls.values()) == calls
    traps = sum(site.count for site in result.sites if site.trap != "tdcall")
    assert sum(result.traps.values()) == traps
    assert result.tdcalls["TDG.VP.VMCALL"] == sum(result.tdvmcalls.values())
    assert result.tdcalls["TDG.VP.VEINFO.GET"] >= traps


def test_the_trace_holds_each_trap(stock):
    kinds = [trap["kind"] for trap in stock.traps]
    assert kinds.count("ve") == sum(stock.result.traps.values())
    assert len(kinds) == kinds.count("ve") + sum(stock.result.tdcalls.values())
    assert [trap["n"] for trap in stock.traps] == list(range(1, len(kinds) + 1))
    cycles = [trap["cycles"] for trap in stock.traps]
    assert cycles == sorted(cycles)
    assert stock.header["schema"] == "trapline/trace"
    assert stock.header["build_id"] == stock.result.kernel.build_id


def test_the_same_run_is_the_same(stock, boots, capfd):
    again = boots(again=True, capfd=capfd)
    assert again.result == stock.result
    assert again.traps == stock.traps
    assert again.console == stock.console


@pytest.fixture
def direct(boots, debian_kernel, capfd):
    """The vmlinux itself, with half of its memory unaccepted, modules and an HPET."""
    options = ("--unaccepted", "256M", "--insmod", "tdx-guest", "--device", "hpet")
    modules = ("--modules", debian_kernel.modules_dir)
    return boots(*options, *modules, kernel=debian_kernel.vmlinux, capfd=capfd)


def test_a_vmlinux_boots_without_its_decompressor(direct):
    # With memory to accept, Linux warns of a mapping that somebody left (docs/limitations.md).
    assert direct.code == ExitCode.GUEST_COMPLAINED
    (complaint,) = direct.result.complaints
    assert "check_early_ioremap_leak" in complaint.text
    assert direct.result.outcome.kind == "powered-off"
    assert direct.result.kernel.image == "vmlinux"
    assert int(direct.result.kernel.slide, 16) == 0
    assert not [site for site in direct.result.sites if site.image == "decompressor"]
    assert direct.result.unaccounted == ()


def test_unaccepted_memory_is_accepted(direct):
    accepted = direct.result.tdcalls["TDG.MEM.PAGE.ACCEPT"]
    # Pages are added with 4 KiB: each 2 MiB is asked for once, in vain, and then page by page.
    assert accepted == (256 << 20) // (2 << 20) + (256 << 20) // 4096
    assert "efi: Unaccepted=" in direct.console


def test_modules_load_with_what_they_depend_on(direct):
    loaded = [line for line in direct.console.splitlines() if "init: loaded" in line]
    assert [line.split()[-1] for line in loaded][-2:] == ["tsm.ko", "tdx_guest.ko"]


def test_the_report_driver_works_and_gets_no_quote(direct):
    assert direct.result.tdcalls["TDG.MR.REPORT"] == 1
    assert direct.result.tdvmcalls["GetQuote"] == 1
    assert "init: the host gave a quote of 0 bytes" in direct.console


def test_an_ioapic_and_an_hpet_bring_mmio_traps_that_the_scan_knows(direct):
    assert direct.result.traps["mmio"] > 1000
    places = {site.function for site in direct.result.sites if site.trap == "mmio"}
    assert {"native_io_apic_read", "hpet_alloc"} <= places


def test_a_console_prints_by_mmio(boots, capfd):
    boot = boots(
        *("--device", "mmio-uart", "--cmdline", "8250.nr_uarts=5 console=ttyS4,115200"),
        capfd=capfd,
    )
    assert boot.code == ExitCode.CLEAN
    assert "init: self-test passed" in boot.console
    places = {site.function for site in boot.result.sites if site.trap == "mmio"}
    assert places == {"mem_serial_in", "mem_serial_out"}
    assert boot.result.unaccounted == ()


def test_a_panic_has_its_code_and_a_splat(tmp_path, boots, capfd, debian_kernel):
    initrd = tmp_path / "empty.cpio.gz"
    initrd.write_bytes(gzip.compress(initramfs.newc([initramfs.folder("dev")])))
    options = ("--append", "panic=-1", "--append", "nokaslr", "--no-scan")
    boot = boots("--initrd", initrd, *options, capfd=capfd)
    assert boot.code == ExitCode.GUEST_PANIC
    # earlyprintk works from the decompressor on, which takes no #VE.
    assert boot.console.lstrip().startswith("KASLR disabled: 'nokaslr' on cmdline.")
    assert "decompressor's first message" in boot.milestones
    assert "Unable to mount root fs" in boot.result.outcome.detail
    splat = boot.result.splat
    assert splat is not None
    places = [place.label.partition("+")[0] for place in (splat.place, *splat.trace)]
    assert "panic" in places
    assert "kernel_init" in places
    assert splat.traps
    assert str(debian_kernel.release) in splat.banner
