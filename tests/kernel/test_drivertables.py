"""Driver structures of a small vmlinux that gcc builds, with symbols and BTF, then of Debian's."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged, only_bad_image

from trapline.kernel.drivers import devicetables
from trapline.kernel.drivers.kbuild import debug_descriptors, initcall_files
from trapline.kernel.elf.file import ElfFile

TYPES = """
typedef unsigned char __u8;
typedef unsigned int __u32;
typedef unsigned long kernel_ulong_t;
struct bus_type;
struct acpi_device_id { __u8 id[16]; kernel_ulong_t driver_data; __u32 cls, cls_msk; };
struct device_driver {
    const char *name; const struct bus_type *bus; const struct acpi_device_id *acpi_match_table;
};
struct pci_device_id {
    __u32 vendor, device, subvendor, subdevice, class, class_mask;
    kernel_ulong_t driver_data; __u32 override_only;
};
struct pci_driver {
    const char *name; const struct pci_device_id *id_table; int (*probe)(void);
    struct device_driver driver;
};
struct virtio_device_id { __u32 device, vendor; };
struct virtio_driver {
    struct device_driver driver; const struct virtio_device_id *id_table; int (*probe)(void);
    long spare[3];
};
struct platform_device_id { char name[24]; kernel_ulong_t driver_data; };
struct platform_driver {
    int (*probe)(void); struct device_driver driver; const struct platform_device_id *id_table;
    long spare[9];
};
struct acpi_device_ops { int (*add)(void); };
struct acpi_driver {
    char name[80]; const struct acpi_device_id *ids; struct acpi_device_ops ops;
};
struct _ddebug {
    const char *modname, *function, *filename, *format; unsigned int line; long key[2];
};
#define ANY 0xffffffffu
"""

FAKE_NET = """
static int probe(void) { return 0; }
static const struct pci_device_id ids[] = {
    { 0x1af4, 0x1041, ANY, ANY, 0, 0, 0, 0 },
    { ANY, ANY, ANY, ANY, 0x0c0330, 0xffffff, 0, 0 },
    { 0x8086, 0x100e, 0x1af4, 0x1100, 0x020000, 0xff0000, 0, 0 },
    { 0x10ec, 0x8139, ANY, ANY, 0, 0, 0, 1 },
    { 0 } };
static struct pci_driver fake_driver = { "fake-net", ids, probe };
static const void *const __initcall__kmod_fake_net__12_34_fake_init6 = probe;
static const struct virtio_device_id vids[] = { { 1, ANY }, { 0x1a, 0x1af4 }, { 0 } };
static struct virtio_driver fake_virtio = { { "fake_virtio" }, vids, probe };
static struct _ddebug dd __attribute__((section("__dyndbg"))) =
    { "fake_net", "probe", "drivers/net/fake/main.c", "%d" };
extern struct _ddebug __start___dyndbg[], __stop___dyndbg[];
int keep_net(void) { return __stop___dyndbg - __start___dyndbg + fake_driver.probe()
    + fake_virtio.probe() + (dd.line != 0) + (__initcall__kmod_fake_net__12_34_fake_init6 != 0); }
"""

FAKE_FIRMWARE = """
static int probe(void) { return 0; }
static const struct acpi_device_id acpi_ids[] = {
    { "PNP0501" }, { "", 0, 0x0c0330, 0xffff00 }, { "" } };
static struct acpi_driver fake_acpi = { "fake-acpi", acpi_ids, { probe } };
static struct platform_driver named = { probe, { "fake-uart", 0, acpi_ids } };
static const struct platform_device_id platform_ids[] = { { "one" }, { "two" }, { "" } };
static struct platform_driver listed = { probe, { "listed" }, platform_ids };
int keep_firmware(void) { return fake_acpi.ops.add() + named.probe() + listed.probe(); }
"""

# Objects of the right size that are no drivers.
NOT_DRIVERS = """
static int probe(void) { return 0; }
static const struct pci_device_id endless[1] = { { 1, 2, 3, 4, 5, 6, 7, 8 } };
struct pci_driver no_probe = { "no-probe", 0, 0 };
struct pci_driver no_name = { "\\001", 0, probe };
struct pci_driver wild_table = { "wild", (void *)0x1234, probe };
struct pci_driver probe_in_data = { "data", 0, (int (*)(void))&endless };
"""

CFLAGS = ("-O0", "-fno-pic", "-mcmodel=kernel", "-fno-stack-protector", "-fcf-protection=none")


def build(folder, files):
    """Compile each file and link them as a kernel; BTF is that of the first file."""
    objects = []
    for number, (name, source) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TYPES + source)
        flags = ["-gbtf"] if number == 0 else []
        objects.append(str(path.with_suffix(".o")))
        subprocess.run(["gcc", *CFLAGS, *flags, "-c", str(path), "-o", objects[-1]], check=True)
    image = folder / "vmlinux"
    subprocess.run(
        ["ld", "-o", str(image), "-Ttext=0xffffffff81000000", "-e", "0", *objects], check=True
    )
    return image


ALL_TYPES = """
struct pci_driver a; struct virtio_driver b; struct platform_driver c; struct acpi_driver d;
struct platform_device_id e; struct acpi_device_id f; struct pci_device_id g;
struct virtio_device_id h;
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("vmlinux"),
        {
            "types.c": ALL_TYPES,
            "drivers/net/fake/main.c": FAKE_NET,
            "drivers/acpi/fake_uart_acpi.c": FAKE_FIRMWARE,
            "other.c": NOT_DRIVERS,
        },
    )


@pytest.fixture(scope="module")
def tables(image):
    with ElfFile.open(image) as elf:
        return {t.variable: t for t in devicetables.read(elf, ["fake_uart", "unrelated"])}


def test_only_drivers_are_found(tables):
    assert set(tables) == {"fake_driver", "fake_virtio", "fake_acpi", "named", "listed"}


def test_pci_aliases_are_those_of_file2alias(tables):
    assert tables["fake_driver"].name == "fake-net"
    assert tables["fake_driver"].aliases == (
        "pci:v00001AF4d00001041sv*sd*bc*sc*i*",
        "pci:v*d*sv*sd*bc0Csc03i30*",
        "pci:v00008086d0000100Esv00001AF4sd00001100bc02sc*i*",
        "vfio_pci:v000010ECd00008139sv*sd*bc*sc*i*",
    )


def test_virtio_aliases(tables):
    assert tables["fake_virtio"].aliases == ("virtio:d00000001v*", "virtio:d0000001Av00001AF4*")


def test_acpi_and_platform_aliases(tables):
    acpi = ("acpi*:PNP0501:*", "acpi*:0c03??:*")
    assert tables["fake_acpi"].aliases == acpi
    assert tables["named"].aliases == (*acpi, "platform:fake-uart")
    assert tables["listed"].aliases == ("platform:one", "platform:two")


def test_the_module_is_that_of_the_initcall_or_of_the_file(tables):
    assert tables["fake_driver"].module == "fake_net"
    assert tables["fake_virtio"].module == "fake_net"
    assert tables["fake_acpi"].module == "fake_uart"


def test_aliases_are_merged_by_module(tables):
    merged = devicetables.aliases_by_module(tuple(tables.values()))
    assert set(merged) == {"fake_net", "fake_uart"}
    assert "virtio:d00000001v*" in merged["fake_net"]
    assert "platform:two" in merged["fake_uart"]


def test_nothing_without_types_or_symbols(image, tmp_path):
    for flags in (["--strip-all"], ["--remove-section=.BTF"]):
        stripped = tmp_path / "stripped"
        subprocess.run(["objcopy", *flags, str(image), str(stripped)], check=True)
        with ElfFile.open(stripped) as elf:
            assert devicetables.read(elf) == ()


def test_initcalls_name_the_module_of_their_file(image):
    with ElfFile.open(image) as elf:
        assert initcall_files(elf) == {("main.c", "fake_net")}


def test_debug_descriptors_name_the_module_of_their_file(image):
    with ElfFile.open(image) as elf:
        assert debug_descriptors(elf) == {"drivers/net/fake/main.c": "fake_net"}


@given(st.data())
def test_damaged_images_are_refused_or_read(image, data):
    with only_bad_image(), ElfFile.open(data.draw(damaged(image.read_bytes()))) as elf:
        devicetables.read(elf)
        debug_descriptors(elf)
        initcall_files(elf)


@pytest.mark.kernel
def test_drivers_of_a_real_kernel(debian_kernel):
    with ElfFile.open(debian_kernel.vmlinux) as elf:
        merged = devicetables.aliases_by_module(devicetables.read(elf))
        files = debug_descriptors(elf)
    assert merged["virtio_pci"] == ("pci:v00001AF4d*sv*sd*bc*sc*i*",)
    assert merged["virtio_console"] == ("virtio:d00000003v*",)
    assert "pci:v*d*sv*sd*bc01sc08i02*" in merged["nvme"]
    assert files["init/main.c"] == "main"
