"""Which modules are drivers, which of them an allow list lets in, and by which way."""

import pytest

from trapline.allowlist.entries import AllowEntry, AllowList, parse_id
from trapline.kernel.drivers import binding
from trapline.kernel.drivers.kbuild import UnitMap
from trapline.kernel.drivers.modinfo import ModuleInfo, module_name, parse_modinfo

VIRTIO_PCI = "pci:v00001AF4d*sv*sd*bc*sc*i*"
NVME_CLASS = "pci:v*d*sv*sd*bc01sc08i02*"


def module(name, *aliases, builtin=False, folder="drivers/x"):
    return ModuleInfo(name, builtin, f"kernel/{folder}/{name}.ko", aliases, ())


MODULES = (
    module("virtio_pci", VIRTIO_PCI, builtin=True),
    module("virtio_ring", builtin=True),
    module("virtio_net", "virtio:d00000001v*"),
    module("virtio_rng", "virtio:d00000004v*"),
    module("9pnet_virtio", "virtio:d00000009v*", folder="net/9p"),
    module("virtiofs", "virtio:d0000001Av*", folder="fs/fuse", builtin=True),
    module("nvme", "pci:v00008086d00000953sv*sd*bc*sc*i*", NVME_CLASS, builtin=True),
    module("e1000", "pci:v00008086d0000100Esv*sd*bc*sc*i*"),
    module("vfio_virtio", "vfio_pci:v00001AF4d00001041sv*sd*bc*sc*i*"),
    module("ext4", "fs-ext4", folder="fs/ext4", builtin=True),
    module("libfoo", folder="lib"),
)


def verdicts(*ids, modules=MODULES):
    entries = tuple(AllowEntry(i, i, None, parse_id(i)) for i in ids)
    return binding.admit(binding.collect(modules), AllowList("t", "t", entries))


def allowed(*ids):
    return {name for name, verdict in verdicts(*ids).items() if verdict.allowed}


def test_drivers_are_what_binds_to_devices_or_lies_below_drivers():
    names = {driver.name for driver in binding.collect(MODULES)}
    assert names == {m.name for m in MODULES} - {"ext4", "libfoo"}


def test_the_way_of_a_virtio_driver():
    found = verdicts("1af4:1041")
    assert found["virtio_net"].via == ("1af4:1041 -> virtio_pci -> virtio:1 -> virtio_net",)
    assert found["virtio_net"].loopholes == ()
    assert found["virtio_pci"].via == ("1af4:1041 -> virtio_pci",)
    assert allowed("1af4:1041") == {"virtio_pci", "virtio_net"}


def test_id_9_is_9p_and_not_virtio_fs():
    assert allowed("1af4:1049") == {"virtio_pci", "9pnet_virtio"}
    assert allowed("1af4:105a") == {"virtio_pci", "virtiofs"}


def test_a_transitional_id_lets_in_any_virtio_driver_by_subsystem_id():
    found = verdicts("1af4:1000")
    assert found["virtio_net"].allowed
    for name, kind in (("virtio_rng", 4), ("virtiofs", 26), ("9pnet_virtio", 9)):
        assert not found[name].allowed
        assert found[name].loopholes == (
            f"1af4:1000 with subsystem id {kind} -> virtio_pci -> virtio:{kind} -> {name}",
        )
    assert not verdicts("1af4:1041")["virtio_rng"].loopholes


def test_virtio_entries_close_that_loophole():
    found = verdicts("1af4:1000", "virtio:1")
    assert found["virtio_net"].allowed
    assert not found["virtio_rng"].loopholes


def test_a_driver_that_binds_by_class_takes_any_id():
    found = verdicts("1af4:1041")["nvme"]
    assert not found.allowed
    assert found.loopholes == ("1af4:1041 with class 010802 -> nvme",)
    assert not verdicts("1af4:1041")["e1000"].loopholes


def test_class_entries_let_in_by_class():
    assert "nvme" in allowed("class:0108")
    assert "nvme" in allowed("8086:*")
    assert allowed("8086:100e") == {"e1000"}


def test_an_override_alias_binds_on_request_only():
    assert "vfio_virtio" not in allowed("1af4:1041")


def test_no_transport_no_virtio_driver():
    without = tuple(m for m in MODULES if m.name != "virtio_pci")
    assert not any(v.allowed for v in verdicts("1af4:1041", modules=without).values())


def test_what_a_driver_reaches():
    found = verdicts("1af4:1041")
    assert found["virtio_net"].reaches == (
        "virtio_ring",
        "virtio_pci",
        binding.PCI_MSI,
        binding.PCI_CONFIGURATION,
    )
    assert verdicts("8086:100e")["e1000"].reaches == (binding.PCI_MSI, binding.PCI_CONFIGURATION)
    assert found["e1000"].reaches == ()


def test_libraries_that_a_module_depends_on_act_for_it():
    modules = (
        ModuleInfo("ahci", False, "kernel/drivers/ata/ahci.ko", (NVME_CLASS,), ("libahci",)),
        ModuleInfo("libahci", False, "kernel/drivers/ata/libahci.ko", (), ("libata", "ahci")),
        ModuleInfo("libata", False, "kernel/drivers/ata/libata.ko", (), ("crc32",)),
        ModuleInfo("crc32", False, "kernel/lib/crc32.ko", (), ()),
    )
    found = verdicts("class:01", modules=modules)["ahci"]
    assert found.reaches[:2] == ("libahci", "libata")
    assert "crc32" not in found.reaches
    assert "ahci" not in found.reaches


def test_tables_add_aliases_to_built_in_drivers():
    bare = (module("virtio_pci", builtin=True), module("virtio_net", "virtio:d00000001v*"))
    tables = {"virtio_pci": (VIRTIO_PCI,), "efifb": ("platform:efi-framebuffer",)}
    found = {d.name: d for d in binding.collect(bare, tables)}
    assert found["virtio_pci"].aliases == (VIRTIO_PCI,)
    assert found["efifb"].builtin
    assert found["efifb"].bus == "platform"


@pytest.mark.parametrize(
    ("alias", "bus"),
    [
        (VIRTIO_PCI, "pci"),
        ("vfio_pci:v*", "pci"),
        ("virtio:d00000001v*", "virtio"),
        ("acpi*:PNP0501:*", "acpi"),
        ("of:N*T*Cns16550a", "platform"),
        ("platform:rtc_cmos", "platform"),
        ("fs-ext4", None),
        ("crypto-sha256", None),
        ("devname:fuse", None),
        ("pci", None),
        ("", None),
    ],
)
def test_the_bus_of_an_alias(alias, bus):
    assert binding.bus_of(alias) == bus


def test_modinfo_is_read_leniently():
    data = b"license=GPL\0alias=pci:v*\0\0no equals\0depends=a-b,c\0alias=x=y\0name=\xff"
    assert list(parse_modinfo(data))[1:4] == [
        ("alias", "pci:v*"),
        ("depends", "a-b,c"),
        ("alias", "x=y"),
    ]
    assert module_name("kernel/drivers/net/xen-netfront.ko.xz") == "xen_netfront"


UNITS = UnitMap(
    [
        "kernel/drivers/virtio/virtio_pci.ko",
        "kernel/drivers/virtio/virtio_pci_modern_dev.ko",
        "kernel/drivers/virtio/virtio.ko",
        "kernel/drivers/nvme/host/nvme.ko",
        "kernel/drivers/nvme/host/nvme-core.ko",
        "kernel/drivers/video/fbdev/xen-fbfront.ko",
    ],
    {"drivers/nvme/host/fabrics.c": "nvme_core", "drivers/nvme/host/zns.c": "not_built_in"},
    {("pci.c", "nvme"), ("pci.c", "pci_core"), ("efifb.c", "efifb")},
)


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("drivers/virtio/virtio.c", "virtio"),
        ("drivers/virtio/virtio_pci_common.c", "virtio_pci"),
        ("drivers/virtio/virtio_pci_modern.o", "virtio_pci"),
        ("drivers/virtio/virtio_pci_modern_dev.c", "virtio_pci_modern_dev"),
        ("drivers/nvme/host/pci.c", "nvme"),
        ("drivers/nvme/host/pci.o", "nvme"),
        ("drivers/nvme/host/fabrics.o", "nvme_core"),
        ("drivers/nvme/host/zns.c", None),
        ("drivers/pci/pci.c", None),
        ("drivers/video/fbdev/efifb.c", None),
        ("drivers/video/fbdev/xen-fbfront.c", "xen_fbfront"),
        ("mm/memory.c", None),
        ("", None),
    ],
)
def test_units_belong_to_modules(unit, expected):
    assert UNITS.module_of(unit) == expected
