"""What a plan makes of the options, and what of it a trace's first line holds."""

import pytest

from trapline.allowlist import listfile
from trapline.allowlist.entries import AllowList
from trapline.base.errors import KernelNotFoundError
from trapline.boot.plan import (
    DISTRIBUTION_COMMAND_LINE,
    BootOptions,
    BootPlan,
    command_line,
    make_plan,
    parse_devices,
    with_dependencies,
    without_boot_image,
)
from trapline.boot.policy import Guard
from trapline.boot.run import trace_header
from trapline.kernel.find.kernelfiles import KernelFiles
from trapline.machine.loader import initramfs, kernelimage
from trapline.machine.loader.kernelimage import KernelImage

IMAGE = KernelImage("bzImage", "vmlinuz", (), 0, 0, 0, b"", 0, 0)


@pytest.mark.parametrize(
    ("replaced", "append", "line"),
    [
        (None, (), DISTRIBUTION_COMMAND_LINE),
        (None, ("nokaslr",), f"{DISTRIBUTION_COMMAND_LINE} nokaslr"),
        ("quiet", ("a", "b"), "quiet a b"),
        ("", (), ""),
        ("", ("panic=1",), "panic=1"),
    ],
)
def test_the_command_line(replaced, append, line):
    assert command_line(BootOptions(command_line=replaced, append=append)) == line


def test_a_vmlinux_that_is_named_is_booted_itself(tmp_path):
    vmlinux, vmlinuz = tmp_path / "vmlinux", tmp_path / "vmlinuz"
    vmlinux.touch()
    vmlinuz.touch()
    files = KernelFiles("6.12", vmlinux, vmlinuz)
    assert without_boot_image(files, str(vmlinux)) == KernelFiles("6.12", vmlinux, None)
    for spec in (str(vmlinuz), str(tmp_path), "6.12", "deb:linux-image"):
        assert without_boot_image(files, spec) == files


@pytest.mark.parametrize(
    ("config", "device", "said"),
    [
        ({"CONFIG_X": "y"}, "ioapic", 1),
        ({"CONFIG_KVM_GUEST": "y"}, "ioapic", 0),
        ({"CONFIG_HYPERV": "y"}, "ioapic", 0),
        ({"CONFIG_X": "y"}, "mmio-uart", 1),
        ({}, "ioapic", 0),  # nobody knows
    ],
)
def test_a_kernel_that_knows_no_host_is_told_of_before_it_starts(
    config, device, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(kernelimage, "open_image", lambda _: IMAGE)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(initramfs.newc([initramfs.program("init", b"#!")]))
    files = KernelFiles("6.12", tmp_path / "vmlinux", None, config=config)
    board, devices = parse_devices([device])
    told = []
    make_plan(files, BootOptions(initrd=initrd, board=board, devices=devices), told.append)
    assert sum("CONFIG_KVM_GUEST" in each for each in told) == said


def test_what_is_built_in_need_not_be_loaded(tmp_path):
    (tmp_path / "modules.builtin").write_text("kernel/drivers/block/virtio_blk.ko\n")
    files = KernelFiles("6.12", tmp_path / "vmlinux", None, modules_dir=tmp_path)
    assert with_dependencies(files, ["virtio-blk"]) == ()
    with pytest.raises(KernelNotFoundError, match="no module virtio_net"):
        with_dependencies(files, ["virtio_blk", "virtio_net"])


NOTHING = AllowList("a list", "built-in", ())


def test_two_lists_of_one_title_differ():
    some = AllowList(NOTHING.title, NOTHING.source, listfile.load(None).entries)
    assert header(guard=Guard(allow=some)) != header(guard=Guard(allow=NOTHING))


def test_what_becomes_of_what_is_forbidden_is_in_the_first_line_too():
    forbid = {"mmio": "forbid"}
    assert header(guard=Guard(forbid)) != header(guard=Guard(forbid, panic=True))
    reported = Guard(allow=NOTHING, hide=False)
    assert header(guard=Guard(allow=NOTHING)) != header(guard=reported)


def header(initrd=b"one", **options):
    chosen = BootOptions(**options)
    return trace_header(
        BootPlan(KernelFiles(None, None, None), IMAGE, initrd, "self-test", "quiet", (), chosen)
    )


@pytest.mark.parametrize(
    "other",
    [
        {"initrd": b"two"},
        {"memory": 1 << 30},
        {"unaccepted": 1 << 20},
        {"insmod": ("tdx-guest",)},
        {"seed": 2},
        {"virtual_seconds": 7},
        {"console_limit": 7},
        *({"board": parse_devices([name])[0]} for name in ("ioapic", "hpet", "mmio-uart")),
        {"devices": parse_devices(["e1000"])[1]},
        {"guard": Guard(classes={"mmio": "forbid"})},
        {"guard": Guard(allow=NOTHING)},
    ],
)
def test_what_changes_a_run_changes_the_first_line_of_its_trace(other):
    assert header() == header()
    assert header(**other) != header()
